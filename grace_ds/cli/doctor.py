"""``grace-ds doctor``: what would stop a job on this machine, found before the job does."""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from packaging.requirements import Requirement

from grace_ds.cli.memory import Job, needs
from grace_ds.comm.choose import UNKNOWN, launcher_world
from grace_ds.errors import ConfigError

OK, NOTE, WARNING, FAILURE = "ok", "note", "warning", "failure"
_RAPIDS = {  # what the GPU path imports, and the distributions that have it
    "cupy": ("cupy-cuda12x", "cupy-cuda13x"),
    "cuvs": ("cuvs-cu12", "cuvs-cu13"),
    "rmm": ("rmm-cu12", "rmm-cu13"),
    "raft_dask": ("raft-dask-cu12", "raft-dask-cu13"),
}
_SKEW_SECONDS = 2.0  # that the clocks of this machine and of shared storage may differ
_SHM_BYTES = 64 << 20  # below it gloo and data workers fail in ways that do not name it
_TIGHT = 0.8  # of the free memory, beyond which little is left for activations
_FILES = 1024  # open files that a rank with data workers should be allowed


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: its name.
        status: ok | note | warning | failure; the last one alone makes the exit status 1.
        said: what was found, with the value.
        cure: what to do; empty where nothing is to be done.
    """

    what: str
    status: str
    said: str
    cure: str = ""


def examine(environ: Mapping[str, str], shared: Path | None, job: Job | None = None) -> list[Finding]:
    """All findings on this machine, in the order in which they are told.

    Args:
        environ: of the job to be.
        shared: a folder on the storage that the checkpoints will lie on; None: not looked at.
        job: whose memory is compared with what is free; None: free memory is told alone.
    """
    looks: list[Callable[[], list[Finding]]] = [
        packages,
        lambda: launcher(environ),
        lambda: gpu(environ),
        lambda: extensions(environ),
        lambda: port(environ),
        limits,
        lambda: memory(job),
    ]
    if shared is not None:
        looks.append(lambda: storage(shared))
    return [finding for look in looks for finding in look()]


def packages() -> list[Finding]:
    """Python and what grace_ds asks for, each against the range that it asks for."""
    found = [Finding("python", OK, f"{sys.version.split()[0]} ({sys.executable})")]
    for text in importlib.metadata.requires("grace_ds") or []:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        have = _version(wanted.name)
        if have is None:
            found.append(Finding(wanted.name, FAILURE, "not installed", f"pip install '{wanted.name}{wanted.specifier}'"))
        elif not wanted.specifier.contains(have, prereleases=True):
            cure = f"pip install '{wanted.name}{wanted.specifier}'"
            found.append(Finding(wanted.name, FAILURE, f"{have}, and grace_ds needs {wanted.specifier}", cure))
        else:
            found.append(Finding(wanted.name, OK, have))
    return found


def launcher(environ: Mapping[str, str]) -> list[Finding]:
    """Who has started this process, and whether MPI is there for it."""
    mpi, world = _version("mpi4py"), launcher_world(environ)
    said = f"mpi4py {mpi}" if mpi else "mpi4py is not installed: rows and schedules travel by torch.distributed"
    found = [Finding("mpi", OK if mpi else NOTE, said, "" if mpi else "pip install grace_ds[mpi], if MPI is wanted")]
    if world is None:
        found.append(Finding("launcher", NOTE, "none that tells an MPI world: this looks like a plain shell"))
        return found
    rank, size = world
    told = f"rank {rank} of {'an unknown number' if size == UNKNOWN else size}"
    torch_size = environ.get("WORLD_SIZE", "")
    if torch_size.isdigit() and size not in (UNKNOWN, int(torch_size)):
        cure = "unset RANK, WORLD_SIZE and MASTER_PORT of another launcher"
        found.append(Finding("launcher", FAILURE, f"MPI's world has {size} ranks, WORLD_SIZE is {torch_size}", cure))
    else:
        found.append(Finding("launcher", OK if mpi else WARNING, told, "" if mpi else "pip install grace_ds[mpi] to use it"))
    return found


def gpu(environ: Mapping[str, str]) -> list[Finding]:
    """GPUs, the device of an engine, and what would compute on it: the backend that ``auto`` takes, the rows of propagation."""
    import torch

    from grace_ds.graph.backends import automatic
    from grace_ds.utils.arrays import gpu_extra, library_for

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        found = [Finding("gpu", OK, f"{count} × {torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}")]
    else:
        found = [Finding("gpu", NOTE, f"none that torch {torch.__version__} can use: everything runs on the CPU")]
    asked = environ.get("DS_ACCELERATOR", "")
    device = asked or ("cuda" if count else "cpu")
    found.append(Finding("device", OK, f"{device} (DS_ACCELERATOR)" if asked else device))
    cure = f"pip install grace_ds[{gpu_extra()}]" if count and device == "cuda" else ""
    backend, why = automatic(device)
    found.append(_chosen("graph.backend auto", backend, why, "cuvs", cure))
    library, why = library_for(device)
    found.append(_chosen("propagation rows", library, why, "cupy", cure))
    for module, names in _RAPIDS.items():
        have = next((f"{name} {_version(name)}" for name in names if _version(name)), None)
        if have or cure:
            found.append(Finding(module, OK if have else NOTE, have or "not installed", "" if have else cure))
    return found


def _chosen(what: str, name: str, why: str, best: str, cure: str) -> Finding:
    """What would be used; a note with the cure where a GPU is there and something else than ``best`` would be."""
    short = bool(cure) and name != best
    told = cure if short and "not installed" in why else ""  # the reason says itself what else is wrong
    return Finding(what, NOTE if short else OK, f"{name} ({why})", told)


def extensions(environ: Mapping[str, str]) -> list[Finding]:
    """Locks of a compilation that was killed: later ranks would wait on them for ever, and say nothing."""
    default = Path.home() / ".cache" / "torch_extensions"
    folder = Path(environ.get("TORCH_EXTENSIONS_DIR", "") or default)
    locks = sorted(folder.glob("**/lock")) if folder.is_dir() else []
    if locks:
        old = max(time.time() - lock.stat().st_mtime for lock in locks)
        cure = f"if nothing is compiling now: rm {' '.join(map(str, locks))}"
        return [Finding("torch extensions", FAILURE, f"{len(locks)} lock(s) in {folder}, up to {old / 60:.0f} minutes old", cure)]
    return [Finding("torch extensions", OK, f"no lock in {folder}")]


def port(environ: Mapping[str, str]) -> list[Finding]:
    """Whether rank 0 could listen on MASTER_PORT, where this machine is MASTER_ADDR."""
    number = environ.get("MASTER_PORT", "29500")
    if not number.isdigit() or not 0 < int(number) < 65536:
        return [Finding("port", FAILURE, f"MASTER_PORT is {number!r}", "give a number from 1 to 65535")]
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("", int(number)))
        except OSError as error:
            cure = "set MASTER_PORT (--master_port) to a free one, or end the job that holds it"
            return [Finding("port", WARNING, f"{number} cannot be listened on here ({error.strerror})", cure)]
    return [Finding("port", OK, f"{number} is free here")]


def limits() -> list[Finding]:
    """Shared memory and open files."""
    shm = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else None
    if shm is None or shm.free < _SHM_BYTES:
        said = "there is no /dev/shm" if shm is None else f"{shm.free >> 20} MiB free of {shm.total >> 20}"
        found = [Finding("shared memory", WARNING, said, "mount a larger /dev/shm (docker: --shm-size=1g)")]
    else:
        found = [Finding("shared memory", OK, f"{shm.free >> 20} MiB free")]
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    cure = "" if files >= _FILES else "raise it: ulimit -n 65536"
    found.append(Finding("open files", OK if files >= _FILES else WARNING, f"at most {files}", cure))
    return found


def memory(job: Job | None) -> list[Finding]:
    """Free memory, and whether it holds at least the states of the job's ranks on this machine."""
    free = available()
    if job is None:
        return [Finding("memory", OK, f"{free / 2**30:.1f} GiB available")]
    try:
        model, ours = needs(job)
    except ConfigError as error:
        return [Finding("memory", FAILURE, str(error), "mend it: the job would not start either")]
    room = {"memory": (free, ours), **gpu_room(model)} if gpu_room(model) else {"memory": (free, model + ours)}
    return [_enough(what, has, needed) for what, (has, needed) in room.items()]


def _enough(what: str, free: int, needed: int) -> Finding:
    said = f"{free / 2**30:.1f} GiB available, {needed / 2**30:.1f} GiB for the states of the ranks here, activations come on top"
    if needed > free:
        return Finding(what, FAILURE, said, "more ranks, a higher ZeRO stage, or fewer ranks on this machine")
    tight = needed > _TIGHT * free
    return Finding(what, WARNING if tight else OK, said, "leave more room for activations and data workers" if tight else "")


def available() -> int:
    """Bytes that can be had without swapping, caches included."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def gpu_room(model: int) -> dict[str, tuple[int, int]]:
    """Free and needed bytes of all GPUs together, where the model's states lie on them; empty without a GPU."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {"gpu memory": (sum(torch.cuda.mem_get_info(i)[0] for i in range(count)), model)} if count else {}


def storage(folder: Path) -> list[Finding]:
    """Whether checkpoints can be written there whole, and by the same clock."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".grace_ds-doctor-", delete=False) as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
        probe, now = Path(file.name), time.time()
        skew = probe.stat().st_mtime - now
        moved = probe.with_name(probe.name + ".moved")
        probe.replace(moved)
        moved.unlink()
    except OSError as error:
        return [Finding("storage", FAILURE, f"{folder}: {error.strerror}", "free space, or give a folder that can be written")]
    free = shutil.disk_usage(folder).free
    found = [Finding("storage", OK, f"{folder}: written, renamed, {free / 2**30:.1f} GiB free")]
    if abs(skew) > _SKEW_SECONDS:
        said = f"{folder} is {skew:+.0f} s off this machine's"
        found.append(Finding("clock", WARNING, said, "let both follow one time server: file times would mislead"))
    return found


def doctor(environ: Mapping[str, str], shared: Path | None, as_json: bool, job: Job | None = None) -> tuple[str, int]:
    """The report, and the exit status: 1 where something would stop a job."""
    found = examine(environ, shared, job)
    failed = any(f.status == FAILURE for f in found)
    if as_json:
        return json.dumps({"ok": not failed, "findings": [asdict(f) for f in found]}, indent=1) + "\n", int(failed)
    width = max(len(f.what) for f in found)
    lines = [f"{f.status:8} {f.what:{width}}  {f.said}" + (f"\n{'':{width + 11}}→ {f.cure}" if f.cure else "") for f in found]
    return "\n".join([*lines, "something here would stop a job" if failed else "nothing here would stop a job", ""]), int(failed)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
