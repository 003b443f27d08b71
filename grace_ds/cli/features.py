"""Compute the content features of a corpus before a job reads them: ``grace-ds features``."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from grace_ds.config.load import find_block, load_config, read_ds_config
from grace_ds.config.schema import GraceConfig
from grace_ds.data.corpus import Corpus
from grace_ds.data.pool import Pool
from grace_ds.data.sampler import Geometry
from grace_ds.errors import ConfigError, ExecutorError, GraceError
from grace_ds.features.offline import OfflineJob, precompute, window_sampling
from grace_ds.features.precomputed import Manifest, first_window
from grace_ds.integrations.setup import prepare
from grace_ds.integrations.trusted_set import UserInputs
from grace_ds.recipes import recipe

CONNECT = 60.0  # seconds in which the scheduler and a first worker must be there
_CLOSED: dict[str, Any] = {"distributed.scheduler.http.routes": [], "distributed.worker.http.routes": []}


@dataclass(frozen=True)
class Where:
    """The cluster.

    Attributes:
        scheduler: its address; None: start workers on this machine.
        tls: CA, certificate and key of the client, PEM files; empty: without TLS.
        workers: to start on this machine; 0: one for each core.
    """

    scheduler: str | None = None
    tls: Sequence[str] = field(default_factory=tuple)
    workers: int = 0


def features(
    corpus: Corpus, out: Path, config: Path | None, dotlist: Sequence[str], batch: int, chunk: int, where: Where, as_json: bool
) -> str:
    """Compute all features, and return what was done, in words or as JSON.

    Args:
        corpus: to read.
        out: folder for the features.
        config: DeepSpeed config of the job; None: the defaults.
        dotlist: assignments that override its grace block.
        batch: samples of an optimizer step of the job; 0: as the config says.
        chunk: samples of a task.
        where: the tasks run.
        as_json: return JSON.

    Raises:
        GraceError: something cannot be read, written or reached.
    """
    settings, batch = _job(config, dotlist, batch)
    dataset = corpus.open()
    if not len(dataset):
        raise ConfigError(f"{corpus.path} holds no samples: name a corpus that does")
    whole = not (settings.window or batch)
    if whole:
        settings.window = len(dataset)
    parts = prepare(dataset, settings, Geometry(1, 0, batch or 1, 1), UserInputs())
    if parts.reader is None or not isinstance(parts.pool, Pool):
        raise ConfigError(f"recipe = {settings.recipe!r} reads no content: there is nothing to compute; name another recipe")
    blocks, dim = first_window(parts.pool, settings.start_step), settings.features.dim if settings.builds_graph else 0
    manifest = Manifest.of(parts.reader, dim, settings.seed, parts.quality_model, blocks)
    inside = None
    if parts.pool.size < parts.pool.n:
        inside = np.zeros(parts.pool.n, np.bool_)
        for ids in blocks():
            inside[ids] = True
    reader = parts.reader
    job = OfflineJob(
        corpus, reader.key, reader.max_tokens, reader.separator, str(out.absolute()), manifest, window_sampling(reader, blocks)
    )
    began = time.perf_counter()
    try:
        with _client(where) as client:
            tokens = precompute(client, job, parts.quality_model, inside, chunk, _progress())
    except OSError as error:
        raise GraceError(f"{out} cannot be written ({error.strerror}); name another folder with --out") from error
    seconds = time.perf_counter() - began
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    done = {"samples": len(dataset), "window": parts.pool.size, "tokens_read": tokens, "seconds": seconds, "bytes": size}
    if as_json:
        return json.dumps({"out": str(out), **done}, indent=1) + "\n"
    note = ""
    if whole:
        note = (
            "No --batch, and no window in the config: the whole corpus counts as the window. A job with a smaller one refuses "
            "these features.\n"
        )
    return (
        f"{len(dataset)} samples, {tokens} tokens read in {seconds:.1f} s; {size / 2**20:.1f} MiB in {out}\n"
        f"first window: {parts.pool.size} samples\n{note}"
        f"for the job: features.precomputed: {out}\n"
    )


def _job(path: Path | None, dotlist: Sequence[str], batch: int) -> tuple[GraceConfig, int]:
    """Return the job's settings, as far as features depend on them, and its batch (0: not known)."""
    block, ds_config = {}, {}
    if path is not None:
        ds_config = read_ds_config(path)
        if (found := find_block(ds_config)) is None:
            raise ConfigError(
                f"{path} holds no grace block: GRACE would be off; name the job's own config, or leave --config out"
            )
        block = found[1]
    config = load_config(block, dotlist=dotlist)
    config = dataclasses.replace(config, recipe=recipe(config.recipe).name)
    config.features.precomputed = None
    given = ds_config.get("train_batch_size", 0)
    return config, batch or (given if isinstance(given, int) and given > 0 else 0)


@contextlib.contextmanager
def _client(where: Where) -> Iterator[Any]:
    """Connect to the user's cluster, or start workers on this machine and end them on exit."""
    for module, name in (("distributed", "dask[distributed]"), ("cryptography", "cryptography")):
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"{name} is not installed: pip install grace_ds[dask]")
    import dask
    from distributed import Client, LocalCluster
    from distributed.security import Security

    logging.getLogger("distributed").setLevel(logging.ERROR)
    with contextlib.ExitStack() as stack:
        if where.scheduler is None:
            # Other users of this machine must not reach it: credentials of its own, and no pages but on the loopback.
            stack.enter_context(dask.config.set(_CLOSED))
            security = Security.temporary()
            target: Any = stack.enter_context(
                LocalCluster(
                    n_workers=where.workers or len(os.sched_getaffinity(0)),
                    threads_per_worker=1,  # rows are read under the GIL
                    host="127.0.0.1",
                    protocol="tls://",
                    security=security,
                    dashboard_address="127.0.0.1:0",
                    memory_limit=0,
                )
            )
        else:
            target, security = where.scheduler, None
            if where.tls:
                ca, certificate, key = where.tls
                security = Security(tls_ca_file=ca, tls_client_cert=certificate, tls_client_key=key, require_encryption=True)
        try:
            client = stack.enter_context(Client(target, security=security, timeout=CONNECT, set_as_default=False))
            client.wait_for_workers(1, timeout=CONNECT)
        except (OSError, TimeoutError, ValueError, TypeError) as error:
            place = where.scheduler or "this machine"
            raise ExecutorError(
                f"no Dask cluster with a worker at {place} within {CONNECT:g} s ({error or type(error).__name__}): check "
                "--scheduler, --tls, and that workers run"
            ) from error
        yield client


def _progress() -> Callable[[str, int, int], None]:
    """Return what shows how far the tasks are: one line on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        return lambda stage, done, all_of: None

    def show(stage: str, done: int, all_of: int) -> None:
        print(f"\r{stage}: {done} of {all_of}\x1b[K", end="\n" if done == all_of else "", file=sys.stderr, flush=True)

    return show
