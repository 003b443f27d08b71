"""Runs as values and as processes: what a run's result depends on, which results are there already, and running the others."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from grace_ds_quickstart.launch import environment

from benchmarks.interrupts import deferred_interrupts
from benchmarks.selection.arms.ceiling import CEILINGS
from benchmarks.selection.arms.libraries import PEERS, installed
from benchmarks.selection.arms.system import RECIPES
from grace_ds.utils.processes import end_group

ROOT = Path(__file__).resolve().parents[2]
REFRESHES = 5  # of a run, the first schedule included
MAX_REPEATS = 4  # of a chosen sample, beyond which the budget is raised for all arms alike
_ALONE = ("uniform", "static_random", "oracle", "infobatch", "trusted_upsample", *PEERS)  # use nothing of the system
TAIL = 30  # lines shown of a run that failed
_LOOP = ("job", "visits", "scoring", "sizes", "arms/base")  # what every run executes
_FAMILIES: dict[str, tuple[str, ...]] = {
    "arms/system": (*RECIPES, *CEILINGS),
    "arms/ceiling": CEILINGS,
    "arms/scored": ("loss_topk", "gradnorm_topk", "rho"),
    "arms/graph": ("facility", "d2", "density"),
    "arms/filters": ("dedup_filter", "dsir"),
    "arms/lexical": ("bm25", "dsir_library", "token_frequency", "offline", "bergson"),
    "arms/offline": ("offline",),
    "arms/attribution": ("bergson",),
    "arms/instep": ("dattri",),
}


@dataclass(frozen=True)
class RunSpec:
    """Everything that a run's result depends on.

    Attributes:
        pool, pool_folder, pool_digest: the training pool; the folder is where it lies, the digest what it holds.
        seed: of the weights.
        order_seed: of the order of the samples and of the arm's choices.
        budget: share of the pool that a subset holds.
        code: digest of the sources that the arm runs, as :func:`code_digest` has it.
        versions: of the libraries that compute, the arm's own included.
    """

    pool: str
    pool_folder: str
    pool_digest: str
    arm: str
    seed: int
    order_seed: int
    steps: int
    batch: int = 32
    lr: float = 5e-3
    model: str = "small"
    budget: float = 0.2
    eval_every: int = 50
    code: str = ""
    versions: str = ""

    @property
    def interval(self) -> int:
        """Steps between two refreshes."""
        return max(1, self.steps // REFRESHES)

    def budget_of(self, rows: int) -> float:
        """The budget on a pool of ``rows``: raised where the run would repeat a chosen sample too often."""
        return min(1.0, max(self.budget, self.steps * self.batch / (MAX_REPEATS * rows)))

    @property
    def name(self) -> str:
        """Of its files."""
        model = "" if self.model == "small" else f"-{self.model}"
        return f"{self.pool}{model}/{self.arm}-n{self.steps}-s{self.seed}-o{self.order_seed}"

    def stamped(self) -> RunSpec:
        """With the digest of its sources and the versions filled in."""
        names = ("torch", "numpy", "deepspeed")
        own = [installed(self.arm)] if installed(self.arm) else []
        versions = " ".join([f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in names), *own])
        return replace(self, code=code_digest(self.arm), versions=versions)

    def stamp(self) -> dict[str, Any]:
        """What must be equal for a result to be taken again: everything but where the pool lies."""
        return {key: value for key, value in asdict(self).items() if key != "pool_folder"}


def read_spec(path: Path) -> RunSpec:
    """A spec from its JSON file."""
    return RunSpec(**json.loads(path.read_text("utf-8")))


@functools.cache
def code_digest(arm: str) -> str:
    """16 hex digits over the sources that can change the arm's result; comments, docstrings and layout do not count."""
    here, package = ROOT / "benchmarks" / "selection", ROOT / "grace_ds"
    paths = [here / f"{name}.py" for name in _sources(arm)]
    paths += [ROOT / "examples" / "grace_ds_quickstart" / name for name in ("model.py", "train.py")] + [
        package / "gradients/losses.py"
    ]
    if arm in _FAMILIES["arms/system"]:
        paths += [p for p in package.rglob("*.py") if "cli" not in p.relative_to(package).parts]
    elif arm not in _ALONE:
        paths += [p for part in ("features", "graph") for p in (package / part).rglob("*.py")]
        paths += [package / "selection" / f"{name}.py" for name in ("facility_location", "objectives", "gumbel")]
    h = hashlib.blake2b(digest_size=8)
    for path in sorted(set(paths)):
        h.update(str(path.relative_to(ROOT)).encode() + _meaning(path.read_text("utf-8")))
    return h.hexdigest()


def _sources(arm: str) -> list[str]:
    families = [name for name, arms in _FAMILIES.items() if arm in arms]
    return [*_LOOP, *(families or ["arms/simple"])]


def _meaning(source: str) -> bytes:
    """The syntax tree of a source without its docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            body[0].value = ast.Constant(value=None)
    return ast.dump(tree).encode()


def finished(spec: RunSpec, folder: Path) -> dict[str, Any] | None:
    """The result of a run with the same stamp; None where there is none."""
    try:
        result: dict[str, Any] = json.loads((folder / f"{spec.name}.json").read_text("utf-8"))
        return result if RunSpec(**result["settings"]).stamp() == spec.stamp() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def take_from(records: Sequence[Path], specs: Sequence[RunSpec], folder: Path) -> int:
    """Puts results that stand in earlier records into ``folder``, for those of ``specs`` that have none there.

    Args:
        records: JSON files of this benchmark; a result is taken where everything in its stamp is equal.

    Returns:
        How many were taken.

    Raises:
        SystemExit: a record cannot be read.
    """
    known: dict[str, dict[str, Any]] = {}
    for path in records:
        try:
            rows = json.loads(path.read_text("utf-8"))["rows"]["runs"]
            known |= {json.dumps({k: row[k] for k in specs[0].stamp()}, sort_keys=True): row for row in rows}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"--known {path}: no record of runs can be read from it ({type(error).__name__}: {error})") from None
    taken = 0
    for spec in dict.fromkeys(specs):
        row = known.get(json.dumps(spec.stamp(), sort_keys=True))
        if row is not None and "test" in row and finished(spec, folder) is None:
            result = {"settings": asdict(spec), **{k: v for k, v in row.items() if k not in asdict(spec)}}
            path = folder / f"{spec.name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=1) + "\n")
            taken += 1
    return taken


@dataclass
class _Running:
    spec: RunSpec
    child: subprocess.Popen[bytes]
    log: Path
    deadline: float


def run_all(
    specs: Sequence[RunSpec],
    folder: Path,
    *,
    jobs: int,
    limit_seconds: float,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """The results of ``specs``, in their order; runs those that are not there yet, a process each.

    Args:
        folder: of the results.
        jobs: processes at once, each on one thread.
        limit_seconds: of one run.
        say: takes a line for each run that ended.

    Raises:
        SystemExit: some run failed; the others were run to their end first, so that nothing is lost.
    """
    todo = list(dict.fromkeys(spec for spec in specs if finished(spec, folder) is None))
    say(f"{len(set(specs)) - len(todo)} runs are there already, {len(todo)} to do")
    failures: list[str] = []
    running: list[_Running] = []
    done = 0
    try:
        while todo or running:
            while todo and len(running) < jobs:
                with deferred_interrupts():
                    running.append(_start(todo.pop(0), folder, limit_seconds))
            time.sleep(0.1)
            for run in [r for r in running if r.child.poll() is not None or time.monotonic() > r.deadline]:
                running.remove(run)
                done += 1
                failure = _ended(run, folder, limit_seconds)
                if failure is not None:
                    failures.append(failure)
                line = failure.splitlines()[0] if failure is not None else _line(run.spec, folder)
                say(f"  {done}/{done + len(running) + len(todo)} {line}")
    finally:
        for run in running:
            end_group(run.child.pid, signal.SIGTERM, 5.0)
            run.child.wait()
    if failures:
        raise SystemExit("\n\n".join([f"{len(failures)} run(s) failed", *failures]))
    results = [finished(spec, folder) for spec in specs]
    assert all(result is not None for result in results)
    return [result for result in results if result is not None]


def _start(spec: RunSpec, folder: Path, limit_seconds: float) -> _Running:
    log = folder / f"{spec.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    asked = log.with_suffix(".spec.json")
    asked.write_text(json.dumps(asdict(spec), indent=1))
    env = environment(folder / "extensions")
    env["OMP_NUM_THREADS"] = "1"
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "benchmarks.selection.job", str(asked), str(log.with_suffix(".json"))]
    with log.open("wb") as out:
        child = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    return _Running(spec, child, log, time.monotonic() + limit_seconds)


def _ended(run: _Running, folder: Path, limit_seconds: float) -> str | None:
    """Leaves nothing of the run behind; what went wrong, or None."""
    code = run.child.poll()
    end_group(run.child.pid, signal.SIGTERM, 5.0)
    run.child.wait()
    if code == 0 and finished(run.spec, folder) is not None:
        return None
    why = f"not done after {limit_seconds:.0f} s (--limit), stopped" if code is None else f"exit status {code}"
    tail = run.log.read_text("utf-8", "replace").splitlines()[-TAIL:]
    return "\n".join([f"run {run.spec.name}: {why}; whole log: {run.log}", *tail])


def _line(spec: RunSpec, folder: Path) -> str:
    result = finished(spec, folder)
    assert result is not None
    return f"{spec.name}: dev {result['dev']:.4f}, {result['cpu_total']:.0f} CPU s ({result['cpu_selection']:.1f} choosing)"
