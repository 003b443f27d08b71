"""Read the files of a run's ``run_dir``.  Missing or damaged files become notes for the page, never an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from grace_ds.config.interpolated import check_interpolations
from grace_ds.data.schedule import load_schedule
from grace_ds.data.tokenizer import is_failure
from grace_ds.errors import CheckpointError, ConfigError, DataError, GraceError
from grace_ds.records import Array, Schedule
from grace_ds.utils.reading import TOKENIZER, parse_json, read_bytes, read_json, read_npy, read_text, read_yaml

Curve = list[tuple[float, float]]  # (optimizer step, loss in nats per token)
_LINES = 1 << 28  # bytes of refreshes.jsonl: some thousands of a refresh
_KINDS = ("unique", "duplicate", "junk", "generated")  # of the quickstart's kinds.npy
_LOSSES = 'a JSON object such as {"uniform": [[100, 5.1], [200, 4.9]], "grace": [[100, 5.0]]}'


@dataclass(frozen=True)
class Options:
    """Options of the command line besides the run_dir.

    Attributes:
        tokenizer: a ``tokenizer.json`` that decodes the samples; None: the quickstart's, if there is one.
        sources: (N,) .npy, a label for every sample of the dataset; None: the run's own ``selection.sources``, or the
            quickstart's kinds, if there are any.
        losses: JSON file of curves by arm; None: the quickstart's, if there are any.
    """

    tokenizer: Path | None = None
    sources: Path | None = None
    losses: Path | None = None


@dataclass(frozen=True)
class Run:
    """The readable data of a run.

    Attributes:
        folder: the run_dir.
        config: the resolved config; empty if it is missing.
        refreshes: lines of ``refreshes.jsonl``, by version.
        schedules: by version.
        explanations: ``reports/report-*.json``, by version.
        chart: ``reports/map.json``, checked; None without one.
        results: the quickstart's ``result.json`` by arm.
        curves: loss by arm.
        sources: (N,) label of every sample, and the labels' names; None without labels.
        decode: token ids → text; None without a tokenizer.
        notes: descriptions of missing, damaged or omitted data.
    """

    folder: Path
    config: dict[str, Any]
    refreshes: dict[int, dict[str, Any]]
    schedules: dict[int, Schedule]
    explanations: dict[int, dict[str, Any]]
    chart: dict[str, Any] | None
    results: dict[str, dict[str, Any]]
    curves: dict[str, Curve]
    sources: tuple[Array, list[str]] | None
    decode: Callable[[list[int]], str] | None
    notes: list[str] = field(default_factory=list)


def load_run(where: str | Path, options: Options | None = None) -> Run:
    """Read everything that can be read of the run.

    Args:
        where: a run_dir, or the ``--out`` folder of a quickstart.

    Raises:
        CheckpointError: there is no run here, or its files do not have the form that a run gives them.
        DataError: a file given by name cannot be used.
    """
    options, folder = options or Options(), find(Path(where))
    notes: list[str] = []
    with shown_from(folder):
        results, config = _results(folder), _config(folder, notes)
        return Run(
            folder,
            config,
            _refreshes(folder, notes),
            _schedules(folder, notes),
            explanations(folder, notes),
            read_map(folder, notes),
            results,
            _curves(options, results, notes),
            _sources(options, folder, config, notes),
            decoder(options, folder, notes),
            notes,
        )


@contextmanager
def shown_from(folder: Path) -> Iterator[None]:
    """Turn what records of the wrong form raise into an error that says so: they can be anybody's, and hold anything.

    Raises:
        CheckpointError: naming the folder.
    """
    try:
        yield
    except GraceError:
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder} holds records that cannot be shown ({type(error).__name__}: {error}); restore what was altered there, or "
            "move it away"
        ) from error


def find(where: Path) -> Path:
    """Return the run_dir at ``where`` or, for a quickstart, below it."""
    if not where.is_dir():
        kind = "is a file, not the folder" if where.exists() else "does not exist: there is no folder"
        raise CheckpointError(f"{where} {kind} of a run; give the folder that run_dir names in the job's grace block")
    for folder in (where, where / "grace", where / "grace" / "grace"):
        if (folder / "refreshes.jsonl").is_file() or (folder / "grace_resolved.yaml").is_file():
            return folder
    raise CheckpointError(
        f"{where} holds neither refreshes.jsonl nor grace_resolved.yaml; give the folder that run_dir names in the job's "
        "grace block (or a quickstart's --out folder)"
    )


def _config(folder: Path, notes: list[str]) -> dict[str, Any]:
    try:
        found = yaml.safe_load(read_yaml(folder / "grace_resolved.yaml", root=folder))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        notes.append(f"grace_resolved.yaml cannot be read ({type(error).__name__}): the settings are not shown.")
        return {}
    return found if isinstance(found, dict) else {}


def _refreshes(folder: Path, notes: list[str]) -> dict[int, dict[str, Any]]:
    """Read the refreshes by version; of a version that a resumed run made again, the last record counts."""
    found: dict[int, dict[str, Any]] = {}
    try:
        lines = read_bytes(folder / "refreshes.jsonl", _LINES, folder).decode("utf-8", "replace").splitlines()
    except FileNotFoundError:
        notes.append("refreshes.jsonl is missing: the run ended before its first refresh was recorded.")
        return found
    except OSError as error:
        notes.append(f"refreshes.jsonl cannot be read: {error.strerror}.")
        return found
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json(line)
            found[int(record["version"])] = record
        except (ValueError, KeyError, TypeError, OverflowError):
            notes.append(f"line {number} of refreshes.jsonl is torn and left out, as after a kill.")
    return dict(sorted(found.items()))


def _schedules(folder: Path, notes: list[str]) -> dict[int, Schedule]:
    found = {}
    for path in sorted((folder / "schedules").glob("schedule-*.safetensors")):
        try:
            schedule = load_schedule(path, folder)
            found[schedule.version] = schedule
        except CheckpointError as error:
            notes.append(f"{path.name} is left out: {error}")
    if not found:
        notes.append("No schedule can be read: churn, age, repeats and sources are not shown.")
    return found


def explanations(folder: Path, notes: list[str]) -> dict[int, dict[str, Any]]:
    """Read ``reports/report-*.json`` of a run_dir by version; what cannot be read is told in ``notes``."""
    found = {}
    for path in sorted((folder / "reports").glob("report-*.json")):
        try:
            explanation = read_json(path, root=folder)
            if not explanation.keys() >= {"step", "histograms", "samples"}:
                raise ValueError("entries are missing")
            if not all(type(sample["id"]) is int for sample in explanation["samples"]):
                raise ValueError("a sample without an id")
            found[int(explanation["version"])] = explanation
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            notes.append(f"{path.name} cannot be read ({type(error).__name__}) and is left out.")
    if not found:
        notes.append(
            "The run kept no reports/: it was made by an older version, or no refresh weighed a sample yet. "
            "Histograms and samples are not shown."
        )
    return found


def read_map(folder: Path, notes: list[str]) -> dict[str, Any] | None:
    """Read ``reports/map.json`` of a run_dir and check it; None without one, or if ``notes`` tells why it cannot be read."""
    path = folder / "reports" / "map.json"
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = read_json(path, root=folder)
        count = len(found["ids"])
        numbers = np.array([found["ids"], found["x"], found["y"]], np.float64)
        coloured = [key for key in ("chance", "influence", "loss", "crowding") if key in found or key in ("chance", "influence")]
        whole = all(len(found[key]) == count for key in (*coloured, "chosen", "shown"))
        known = [v for key in coloured for v in found[key] if v is not None]
        if not count or not whole or not np.isfinite(numbers).all() or not np.isfinite(np.array(known, np.float64)).all():
            raise ValueError("entries are missing")
        first, second = map(float, found["explained"])
        facts = {key: int(found[key]) for key in ("version", "step", "window")}
        return {
            **found,
            **facts,
            "ids": [int(i) for i in found["ids"]],
            "explained": (first, second),
            "used": bool(found["used"]),
        }
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        notes.append(f"map.json cannot be read ({type(error).__name__}): the map is not shown.")
        return None


def _results(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the results of a quickstart's arms, if the run_dir belongs to one (OUT/grace/grace)."""
    found = {}
    for arm in ("uniform", "grace"):
        try:
            result = read_json(folder.parent.parent / arm / "result.json")
            if isinstance(result, dict) and "curve" in result:
                found[arm] = result
        except (OSError, ValueError):
            continue
    return found


def _curves(options: Options, results: dict[str, dict[str, Any]], notes: list[str]) -> dict[str, Curve]:
    if options.losses is not None:
        try:
            given = read_json(options.losses)
            return {str(arm): [(float(step), float(loss)) for step, loss in curve] for arm, curve in given.items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise DataError(f"--losses {options.losses} cannot be used ({error}); give {_LOSSES}") from error
    curves = {arm: [(float(p["step"]), float(p["val_loss"])) for p in result["curve"]] for arm, result in results.items()}
    if not curves:
        notes.append(f"No loss is known: run_dir holds none. Give --losses FILE, {_LOSSES}.")
    elif len(curves) == 1:
        notes.append(f"Only the arm {next(iter(curves))} has a loss: whether selection helped cannot be said from this run.")
    return curves


def _sources(options: Options, folder: Path, config: dict[str, Any], notes: list[str]) -> tuple[Array, list[str]] | None:
    own = _value(config, "selection.sources")
    if options.sources is not None:
        return _labels(options.sources)
    if own is not None:
        try:
            return _labels(Path(own))
        except DataError:
            given = config["selection"]["sources"]
            notes.append(f"selection.sources, {given}, cannot be read from here: sources are not shown. Give --sources FILE.")
            return None
    try:
        kinds = read_npy(folder.parent.parent / "data" / "kinds.npy")
    except (OSError, ValueError):
        return None
    known = kinds.ndim == 1 and kinds.dtype == np.uint8 and kinds.max(initial=0) < len(_KINDS)
    return (kinds, list(_KINDS)) if known else None


def _value(config: dict[str, Any], key: str) -> Any:
    """Return the value of a key that may refer to another key.

    If it cannot be resolved here, return it as written.  No resolver is called: the file may be another person's, and the
    environment is the reader's.
    """
    section, name = key.split(".")
    within = config.get(section)
    given = within.get(name) if isinstance(within, dict) else None
    try:
        check_interpolations(config, (), "grace_resolved.yaml")
        return OmegaConf.select(OmegaConf.create(config), key) if isinstance(given, str) else given
    except (OmegaConfBaseException, ConfigError, ValueError, TypeError, RecursionError):
        return given


def _labels(path: Path) -> tuple[Array, list[str]]:
    try:
        labels = read_npy(path)
    except (OSError, ValueError) as error:
        raise DataError(f"--sources {path} cannot be read ({error}); give a .npy of one label a sample") from error
    if labels.ndim != 1:
        raise DataError(f"--sources {path} has shape {labels.shape}; give one label for each sample, (N,)")
    names, codes = np.unique(labels, return_inverse=True)
    return codes, [str(name) for name in names]


def decoder(options: Options, folder: Path, notes: list[str]) -> Callable[[list[int]], str] | None:
    """Return token ids → text, by the tokenizer given or the quickstart's; None without one.

    Raises:
        DataError: the one given cannot be used.
    """
    path = options.tokenizer or folder.parent.parent / "data" / "tokenizer.json"
    if options.tokenizer is None and not path.is_file():
        return None
    try:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(read_text(path, TOKENIZER))
    except BaseException as error:  # the library raises plain Exception, or panics
        if not is_failure(error):
            raise
        if options.tokenizer is not None:
            missing = isinstance(error, ImportError)
            cure = "pip install tokenizers" if missing else "give a tokenizer.json of Hugging Face's tokenizers"
            raise DataError(f"--tokenizer {path} cannot be used ({error}); {cure}") from error
        notes.append(f"{path.name} cannot be used ({type(error).__name__}): samples are shown as token ids.")
        return None

    def decode(tokens: list[int]) -> str:
        try:
            return str(tokenizer.decode(tokens, skip_special_tokens=False))
        except BaseException as error:
            if not is_failure(error):
                raise
            raise ValueError(f"the tokenizer fails ({type(error).__name__}: {error})") from error

    return decode
