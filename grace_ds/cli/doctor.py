"""Find what would stop a job on this machine before the job starts: ``grace-ds doctor``."""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import shutil
import socket
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from grace_ds import __version__
from grace_ds.comm.choose import UNKNOWN, launcher_world
from grace_ds.config.load import find_block, load_config, read_ds_config
from grace_ds.config.schema import GraceConfig
from grace_ds.errors import ConfigError
from grace_ds.graph.repair import SPARE

OK, NOTE, WARNING, FAILURE = "ok", "note", "warning", "failure"
_RAPIDS = {  # modules that the GPU path imports, and the distributions that contain them
    "cupy": ("cupy-cuda12x", "cupy-cuda13x"),
    "cuvs": ("cuvs-cu12", "cuvs-cu13"),
    "rmm": ("rmm-cu12", "rmm-cu13"),
    "raft_dask": ("raft-dask-cu12", "raft-dask-cu13"),
}
# Distributions that a job may use beside those that grace_ds requires; their versions are printed where they are installed.
_ALSO = ("faiss-cpu", "transformers", "accelerate", "datasets", "peft", "trl", "lightning-fabric", "megatron-core", "tokenizers")
_IDS = ("selection.include", "selection.exclude", "selection.sources")
_FILE_KEYS = ("trusted", "tokenizer", "replay", "features.precomputed", *_IDS)
_SKEW_SECONDS = 2.0  # tolerated difference between the clocks of this machine and of shared storage
_SHM_BYTES = 64 << 20  # with less, gloo and data workers fail with misleading errors
_TIGHT = 0.8  # share of the free memory beyond which little is left for activations
_ROW_BYTES = 36  # bytes of a table's row in addition to its sketch
_VISIT_BYTES = 12  # bytes per sample seen
_FILES = 1024  # open files that a rank with data workers needs


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        what: name of the check.
        status: ok | note | warning | failure; the last one alone makes the exit status 1.
        message: the result in words, with the value.
        cure: what to do; empty if nothing needs to be done.
    """

    what: str
    status: str
    message: str
    cure: str = ""


@dataclass(frozen=True)
class Job:
    """Facts of a job that determine its memory.

    Attributes:
        config: path of its DeepSpeed config.
        parameters: number of the model's parameters; 0: not known, with ``samples``.
        samples: number of the dataset's samples; 0: not known, with ``parameters``.
        ranks: data-parallel ranks of the job.
        here: ranks on this machine.
    """

    config: Path
    parameters: float
    samples: float
    ranks: int
    here: int


def examine(environ: Mapping[str, str], shared: Path | None, job: Job | None = None) -> list[Finding]:
    """Return all findings on this machine, in the order of the report.

    Args:
        environ: of the job to be.
        shared: a folder on the storage of the checkpoints; None: do not check it.
        job: job whose memory is compared with the free memory; None: report only the free memory.
    """
    checks: list[Callable[[], list[Finding]]] = [
        packages,
        lambda: launcher(environ),
        lambda: gpu(environ),
        lambda: extensions(environ),
        lambda: port(environ),
        limits,
        lambda: configured(job),
        lambda: memory(job),
    ]
    if shared is not None:
        checks.append(lambda: storage(shared))
    return [finding for check in checks for finding in check()]


def packages() -> list[Finding]:
    """Check Python, and the packages that grace_ds requires, each against its version range."""
    found = [
        Finding("grace_ds", OK, f"{__version__} ({Path(__file__).parents[1]})"),
        Finding("python", OK, f"{sys.version.split()[0]} ({sys.executable})"),
    ]
    for text in importlib.metadata.requires("grace_ds") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        installed = _version(requirement.name)
        if installed is None:
            found.append(
                Finding(requirement.name, FAILURE, "not installed", f"pip install '{requirement.name}{requirement.specifier}'")
            )
        elif not requirement.specifier.contains(installed, prereleases=True):
            cure = f"pip install '{requirement.name}{requirement.specifier}'"
            found.append(Finding(requirement.name, FAILURE, f"{installed}, and grace_ds needs {requirement.specifier}", cure))
        else:
            found.append(Finding(requirement.name, OK, installed))
    return found + [Finding(name, OK, installed) for name in _ALSO if (installed := _version(name)) is not None]


def launcher(environ: Mapping[str, str]) -> list[Finding]:
    """Check what has started this process, and whether MPI is available for it."""
    mpi, world = _version("mpi4py"), launcher_world(environ)
    mpi_state = f"mpi4py {mpi}" if mpi else "mpi4py is not installed: rows and schedules travel by torch.distributed"
    found = [Finding("mpi", OK if mpi else NOTE, mpi_state, "" if mpi else "pip install grace_ds[mpi], if MPI is wanted")]
    if world is None:
        found.append(Finding("launcher", NOTE, "none that tells an MPI world: this looks like a plain shell"))
        return found
    rank, size = world
    world_state = f"rank {rank} of {'an unknown number' if size == UNKNOWN else size}"
    torch_size = environ.get("WORLD_SIZE", "")
    if torch_size.isdigit() and size not in (UNKNOWN, int(torch_size)):
        cure = "unset RANK, WORLD_SIZE and MASTER_PORT of another launcher"
        found.append(Finding("launcher", FAILURE, f"MPI's world has {size} ranks, WORLD_SIZE is {torch_size}", cure))
    else:
        found.append(
            Finding("launcher", OK if mpi else WARNING, world_state, "" if mpi else "pip install grace_ds[mpi] to use it")
        )
    return found


def gpu(environ: Mapping[str, str]) -> list[Finding]:
    """Check the GPUs and the device of an engine, and report what would compute on it.

    That is the graph back end that ``auto`` takes, and the array library of propagation.
    """
    import torch

    from grace_ds.graph.backends import automatic
    from grace_ds.utils.arrays import gpu_extra, library_for

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        found = [Finding("gpu", OK, f"{count} × {torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}")]
    else:
        found = [Finding("gpu", NOTE, f"none that torch {torch.__version__} can use: everything runs on the CPU")]
    configured = environ.get("DS_ACCELERATOR", "")
    device = configured or ("cuda" if count else "cpu")
    found.append(Finding("device", OK, f"{device} (DS_ACCELERATOR)" if configured else device))
    cure = f"pip install grace_ds[{gpu_extra()}]" if count and device == "cuda" else ""
    backend, why = automatic(device)
    found.append(_chosen("graph.backend auto", backend, why, "cuvs", cure))
    library, why = library_for(device)
    found.append(_chosen("propagation rows", library, why, "cupy", cure))
    for module, names in _RAPIDS.items():
        installed = next((f"{name} {_version(name)}" for name in names if _version(name)), None)
        if installed or cure:
            found.append(Finding(module, OK if installed else NOTE, installed or "not installed", "" if installed else cure))
    return found


def _chosen(what: str, name: str, why: str, best: str, cure: str) -> Finding:
    """Return the choice as a finding; a note with the cure if there is a GPU and the choice is not ``best``."""
    short = bool(cure) and name != best
    shown_cure = cure if short and "not installed" in why else ""  # any other reason already says what is wrong
    return Finding(what, NOTE if short else OK, f"{name} ({why})", shown_cure)


def extensions(environ: Mapping[str, str]) -> list[Finding]:
    """Check for the lock of a compilation that was killed: later ranks would wait for it forever without a message."""
    default = Path.home() / ".cache" / "torch_extensions"
    folder = Path(environ.get("TORCH_EXTENSIONS_DIR", "") or default)
    locks = sorted(folder.glob("**/lock")) if folder.is_dir() else []
    if locks:
        old = max(time.time() - lock.stat().st_mtime for lock in locks)
        cure = f"if nothing is compiling now: rm {' '.join(map(str, locks))}"
        return [Finding("torch extensions", FAILURE, f"{len(locks)} lock(s) in {folder}, up to {old / 60:.0f} minutes old", cure)]
    return [Finding("torch extensions", OK, f"no lock in {folder}")]


def port(environ: Mapping[str, str]) -> list[Finding]:
    """Check that rank 0 could listen on MASTER_PORT, if this machine is MASTER_ADDR."""
    number = environ.get("MASTER_PORT", "29500")
    if not number.isdigit() or not 0 < int(number) < 65536:
        return [Finding("port", FAILURE, f"MASTER_PORT is {number!r}", "give a number from 1 to 65535")]
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(number)))
        except OSError as error:
            cure = "set MASTER_PORT (--master_port) to a free one, or end the job that holds it"
            return [Finding("port", WARNING, f"{number} cannot be listened on here ({error.strerror})", cure)]
    return [Finding("port", OK, f"{number} is free here")]


def limits() -> list[Finding]:
    """Check shared memory and open files."""
    shm = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else None
    if shm is None or shm.free < _SHM_BYTES:
        state = "there is no /dev/shm" if shm is None else f"{shm.free >> 20} MiB free of {shm.total >> 20}"
        found = [Finding("shared memory", WARNING, state, "mount a larger /dev/shm (docker: --shm-size=1g)")]
    else:
        found = [Finding("shared memory", OK, f"{shm.free >> 20} MiB free")]
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    cure = "" if files >= _FILES else "raise it: ulimit -n 65536"
    found.append(Finding("open files", OK if files >= _FILES else WARNING, f"at most {files}", cure))
    return found


def configured(job: Job | None) -> list[Finding]:
    """Check that the job's DeepSpeed config can be read, that its grace block is right, and that the files it names exist."""
    if job is None:
        return []
    try:
        grace = _block(job)
    except ConfigError as error:
        return [Finding("config", FAILURE, str(error), "mend it: the job would not start either")]
    if grace is None:
        cure = "add one, or name a file with one: grace-ds run --grace FILE"
        return [Finding("config", NOTE, f"{job.config} holds no grace block: GRACE would be off", cure)]
    state = f"{job.config}: GRACE is {'on, recipe ' + grace.recipe if grace.enabled else 'off (enabled: false)'}"
    found = [Finding("config", OK, state)]
    for key in _FILE_KEYS:
        section, _, name = key.rpartition(".")
        named = getattr(getattr(grace, section) if section else grace, name)
        if named is not None and not Path(named).exists():
            state = f"there is no {named} (from {Path.cwd()})"
            found.append(
                Finding(key, FAILURE, state, f"give {key} an existing file, as an absolute path for a job started elsewhere")
            )
    return found


def _block(job: Job) -> GraceConfig | None:
    """Return the checked grace block of the job's config; None without one.

    Raises:
        ConfigError: the config cannot be read, or the block is wrong.
    """
    found = find_block(read_ds_config(job.config))
    return load_config(found[1], found[0]) if found is not None else None


def memory(job: Job | None) -> list[Finding]:
    """Check that the free memory holds at least the states of the job's ranks on this machine."""
    free = available()
    available_state = f"{free / 2**30:.1f} GiB available"
    if job is None:
        return [Finding("memory", OK, available_state)]
    if not job.parameters or not job.samples:
        return [Finding("memory", NOTE, available_state, "to compare the job's memory with it, give --parameters and --samples")]
    try:
        model, grace = needs(job)
    except ConfigError:  # told under "config"
        return [Finding("memory", NOTE, available_state, "mend the config, to compare the job's memory with it")]
    room = {"memory": (free, grace), **gpu_room(model)} if gpu_room(model) else {"memory": (free, model + grace)}
    return [_enough(what, has, needed) for what, (has, needed) in room.items()]


def needs(job: Job) -> tuple[int, int]:
    """Return the bytes on this machine of the model's states, and of GRACE's; activations and data workers are not included.

    The model's: weights, gradients, and Adam's states, with float32 weights if the job computes in 16 bits.  Each is divided
    among the ranks from its ZeRO stage on (arXiv 1910.02054, section 3.1).

    Raises:
        ConfigError: the config cannot be read, or the block is wrong.
    """
    grace = _block(job) or GraceConfig(enabled=False)
    model = _model(read_ds_config(job.config), job)
    return round(job.here * model), round(job.here * _grace(grace, job)) if grace.enabled else 0


def _model(config: Mapping[str, Any], job: Job) -> float:
    stage = int((config.get("zero_optimization") or {}).get("stage", 0))
    half = any((config.get(kind) or {}).get("enabled") for kind in ("bf16", "fp16"))
    width, states = (2, 12) if half else (4, 8)
    parts = ((width, 3), (width, 2), (states, 1))  # bytes per parameter, and the stage that divides them among the ranks
    return sum(job.parameters * size / (job.ranks if stage >= divided else 1) for size, divided in parts)


def _grace(grace: GraceConfig, job: Job) -> float:
    window = min(grace.window or job.samples, job.samples)
    row = 2 * grace.collect.dim + _ROW_BYTES if grace.collects else 0
    if grace.builds_graph:  # the vectors, and the lists of the kept graph
        row += 4 * grace.features.dim + 8 * (grace.graph.k + SPARE + 1)
    return _VISIT_BYTES * job.samples + window / job.ranks * row


def _enough(what: str, free: int, needed: int) -> Finding:
    state = (
        f"{free / 2**30:.1f} GiB available, {needed / 2**30:.1f} GiB for the states of the ranks here, activations come on top"
    )
    if needed > free:
        return Finding(what, FAILURE, state, "more ranks, a higher ZeRO stage, or fewer ranks on this machine")
    tight = needed > _TIGHT * free
    return Finding(what, WARNING if tight else OK, state, "leave more room for activations and data workers" if tight else "")


def available() -> int:
    """Return the bytes available without swapping, caches included."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def gpu_room(model: int) -> dict[str, tuple[int, int]]:
    """Return free and needed bytes of all GPUs together, which hold the model's states; empty without a GPU."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {"gpu memory": (sum(torch.cuda.mem_get_info(i)[0] for i in range(count)), model)} if count else {}


def storage(folder: Path) -> list[Finding]:
    """Check that checkpoints can be written completely in a folder, and that its clock agrees; leave nothing behind.

    Of a folder that does not exist yet, the nearest one above it is checked, in which a job would create it.
    """
    wanted, folder = folder, next(path for path in (folder, *folder.absolute().parents) if path.exists())
    missing = f"{wanted} does not exist yet; a job would create it below {folder}, " if folder != wanted else f"{folder}: "
    probe = moved = None
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".grace_ds-doctor-", delete=False) as file:
            probe = Path(file.name)
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
        now = time.time()
        skew = probe.stat().st_mtime - now
        moved = probe.with_name(probe.name + ".moved")
        probe.replace(moved)
    except OSError as error:
        return [Finding("storage", FAILURE, f"{missing}{error.strerror}", "free space, or give a folder that can be written")]
    finally:
        for path in filter(None, (probe, moved)):
            path.unlink(missing_ok=True)
    free = shutil.disk_usage(folder).free
    state = f"{missing}written, renamed, {free / 2**30:.1f} GiB free"
    found = [Finding("storage", NOTE if folder != wanted else OK, state, f"check the name: {wanted}" if folder != wanted else "")]
    if abs(skew) > _SKEW_SECONDS:
        state = f"{folder} is {skew:+.0f} s off this machine's"
        found.append(Finding("clock", WARNING, state, "let both follow one time server: file times would mislead"))
    return found


def doctor(
    environ: Mapping[str, str], shared: Path | None, as_json: bool, job: Job | None = None, columns: int = 110
) -> tuple[str, int]:
    """Return the report, in lines of at most ``columns``, and the exit status: 1 if something would stop a job."""
    found = examine(environ, shared, job)
    failed = any(f.status == FAILURE for f in found)
    if as_json:
        return json.dumps({"ok": not failed, "findings": [asdict(f) for f in found]}, indent=1) + "\n", int(failed)
    width = max(len(f.what) for f in found)
    indent = width + 11 if columns >= 70 else 4  # a narrow terminal has no room for a hanging column

    def shown(start: str, words: str, before: int) -> str:
        return textwrap.fill(
            words,
            max(columns, 40),
            initial_indent=start,
            subsequent_indent=" " * before,
            break_on_hyphens=False,
            break_long_words=False,
        )

    lines = []
    for f in found:
        lines.append(shown(f"{f.status:8} {f.what:{width}}  ", f.message, indent))
        lines += [shown(f"{'':{indent}}→ ", f.cure, indent + 2)] if f.cure else []
    return "\n".join([*lines, "something here would stop a job" if failed else "nothing here would stop a job", ""]), int(failed)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
