"""Compute the features of a whole corpus before any job runs, as tasks over ranges of its samples on a Dask cluster.

The first tasks write scores and 6-grams, and count the terms of the samples of the first window; the second ones write vectors
with weights from these counts.  A task opens the corpus itself and writes into a folder that all machines see, so that nothing
of the corpus' size travels or is held anywhere.  What the folder holds already is not computed again.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from grace_ds.data.corpus import Corpus
from grace_ds.data.tokens import TokenBlock, TokenReader
from grace_ds.errors import DataError, ExecutorError
from grace_ds.features.columns import (
    Scores,
    read_grams,
    read_scores,
    read_vectors,
    write_grams,
    write_scores,
    write_vectors,
)
from grace_ds.features.corpus_cache import CorpusCache, WindowFacts
from grace_ds.features.duplicates import ngram_bins
from grace_ds.features.ngrams import LOOKED_AT, Sampling, agree_sampling, some
from grace_ds.features.precomputed import Manifest
from grace_ds.features.quality import QualityModel
from grace_ds.features.sweeps import KNOWN
from grace_ds.features.tfidf import TERMS, Terms, TfIdf
from grace_ds.records import IntArray

FAN_IN = 16  # counts that one task adds up
LOST = 60.0  # seconds without a worker after which a cluster is given up
RETRIES = 2  # of a task whose worker is gone

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class OfflineJob:
    """What the tasks read, and where they write.

    Attributes:
        corpus: the corpus.
        key, max_tokens, separator: as for :class:`TokenReader`.
        folder: for the features; on a file system that all workers see.
        manifest: what the features are made for.
        sampling: of the 6-grams.
    """

    corpus: Corpus
    key: str
    max_tokens: int
    separator: int
    folder: str
    manifest: Manifest
    sampling: Sampling

    @property
    def cache(self) -> CorpusCache:
        """The features that the folder holds, as it is now."""
        return CorpusCache(self.manifest.corpus, Path(self.folder))

    def reader(self) -> TokenReader:
        """Return the reader of the corpus, which is opened once by each thread of a worker."""
        return TokenReader(_opened(self.corpus, os.getpid(), threading.get_ident()), self.key, self.max_tokens, self.separator)


@functools.lru_cache(maxsize=64)
def _opened(corpus: Corpus, process: int, thread: int) -> Any:
    return corpus.open()


def window_sampling(reader: TokenReader, blocks: Callable[[], Any]) -> Sampling:
    """Return the sampling of a window's 6-grams, as :func:`agree_sampling` does for all ranks, without holding its ids."""
    samples = sum(len(ids) for ids in blocks())
    looked_at = np.concatenate([ids[some(ids, LOOKED_AT, samples)] for ids in blocks()])
    return agree_sampling(reader, looked_at, lambda array: array, samples)


def precompute(
    client: Any,
    job: OfflineJob,
    model: QualityModel | None,
    inside: Bools | None,
    chunk: int,
    show: Callable[[str, int, int], None] = lambda stage, done, all_of: None,
) -> int:
    """Compute all features of the corpus, and write what they were made for last.

    Args:
        client: of distributed, connected to the cluster.
        job: what to compute.
        model: the trusted model; None: no scores.
        inside: (n,) bool, samples of the first window; None: all.
        chunk: samples of a task.
        show: called with the stage, and how many of its tasks are done.

    Returns:
        The tokens that were read.

    Raises:
        DataError: a worker reads another corpus, or does not see the folder.
        ExecutorError: the cluster has lost all of its workers, or a task has failed.
    """
    _check_workers(client, job)
    samples, facts = job.manifest.samples, job.cache.window(job.manifest.window)
    known = facts is not None and facts.tells(True, job.manifest.dim > 0)
    ranges = [(start, min(start + chunk, samples)) for start in range(0, samples, chunk)]
    scattered = client.scatter(model, broadcast=True, hash=False)
    submit = functools.partial(client.submit, pure=False, retries=RETRIES)

    def of_window(start: int, stop: int) -> Bools | bool:
        return (not known and job.manifest.dim > 0) if inside is None else (inside[start:stop] if not known else False)

    # Only sums are held: the workers forget the counts of a range, 2 MiB, as soon as they are added.
    level = [
        submit(
            _added,
            *(submit(_first, job, scattered, start, stop, of_window(start, stop)) for start, stop in ranges[at : at + FAN_IN]),
        )
        for at in range(0, len(ranges), FAN_IN)
    ]
    _wait(client, level, "scores and 6-grams", show)
    while len(level) > 1:
        level = [submit(_added, *level[at : at + FAN_IN]) for at in range(0, len(level), FAN_IN)]
        _wait(client, level, "counts", show)
    totals, tokens = level[0].result()
    if facts is None or not known:
        facts = WindowFacts(job.sampling, totals if job.manifest.dim else np.empty(0, np.int64))
        job.cache.keep_window(job.manifest.window, facts)
    if job.manifest.dim:
        weights = client.scatter(facts.totals, broadcast=True, hash=False)
        second = [submit(_second, job, weights, start, stop) for start, stop in ranges]
        _wait(client, second, "vectors", show)
        tokens += sum(future.result() for future in second)
    job.manifest.write(Path(job.folder))
    return int(tokens)


def _check_workers(client: Any, job: OfflineJob) -> None:
    """Check that every worker sees the folder and the same corpus."""
    name = f"seen-by-all-{os.urandom(8).hex()}"
    place = Path(job.folder) / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.touch()
    try:
        said = client.run(_seen, job, name)
    finally:
        place.unlink(missing_ok=True)
    for worker, (sees, found, error) in said.items():
        if not sees:
            raise DataError(f"worker {worker} does not see {job.folder}: give --out a folder on storage that all workers share")
        if found != job.manifest.corpus:
            what = f"cannot read {job.corpus.path} ({error})" if error else f"reads other tokens from {job.corpus.path}"
            raise DataError(f"worker {worker} {what}: give a corpus that is the same on all machines, and GRACE's version there")


def _seen(job: OfflineJob, name: str) -> tuple[bool, str, str]:
    """Return whether this worker sees a file of the folder, and the fingerprint of the corpus here or why there is none."""
    found = error = ""
    try:
        found = job.reader().token_fingerprint()
    except Exception as caught:  # told by the client, with the worker's address
        error = f"{type(caught).__name__}: {caught}"
    return (Path(job.folder) / name).exists(), found, error


def _wait(client: Any, futures: list[Any], stage: str, show: Callable[[str, int, int], None]) -> None:
    """Wait until all futures are done."""
    last_seen = time.monotonic()
    while True:
        done = 0
        for future in futures:
            if future.status in ("error", "cancelled", "lost"):
                for other in futures:
                    other.cancel()
                cause = future.exception() if future.status == "error" else f"it is {future.status}"
                if isinstance(cause, DataError):
                    raise cause
                raise ExecutorError(
                    f"a task of {stage} has failed ({cause!r}); repair that, and run the command again: it goes on"
                )
            done += future.status == "finished"
        show(stage, done, len(futures))
        if done == len(futures):
            return
        if client.scheduler_info().get("workers"):
            last_seen = time.monotonic()
        elif time.monotonic() - last_seen > LOST:
            raise ExecutorError(f"no worker has been there for {LOST:g} s; start workers, and run the command again: it goes on")
        time.sleep(0.1)


def _first(job: OfflineJob, model: QualityModel | None, start: int, stop: int, inside: Bools | bool) -> tuple[IntArray, int]:
    """Write scores and 6-grams of a range that are missing; return the counts of the terms ``inside``, and the tokens read."""
    ids, cache, reader = np.arange(start, stop, dtype=np.int64), job.cache, job.reader()
    counted = np.broadcast_to(inside, len(ids))
    scores, grams = cache.scores(model.digest()) if model is not None else None, cache.grams(job.sampling)
    lacks_scores, lacks_grams = np.full(len(ids), model is not None), np.ones(len(ids), np.bool_)
    for at in range(0, len(ids), KNOWN):
        part = slice(at, at + KNOWN)
        lacks_scores[part] &= ~read_scores(scores, ids[part], True)[0]
        lacks_grams[part] = ~read_grams(grams, ids[part], job.sampling)[0]
    terms, tokens = TfIdf(8, 0), 0
    for part_ids, rows in reader.rows(ids[lacks_scores | lacks_grams | counted]):
        block, places = TokenBlock.of(part_ids, rows), part_ids - start
        tokens += len(block.flat)
        if model is not None and len(wanted := _of(block, lacks_scores[places])):
            quality, statistics = model.examine(wanted.flat, wanted.offsets)
            write_scores(scores, wanted.ids, Scores(quality.astype(np.float32), statistics))
        if len(wanted := _of(block, lacks_grams[places])):
            write_grams(grams, wanted.ids, ngram_bins(wanted, job.sampling))
        if len(wanted := _of(block, counted[places])):
            terms.add(wanted)
    for files in (scores, grams):
        if files is not None:
            files.flush()
            _written(job, files.target)
    if not counted.any():
        return np.empty(0, np.int64), tokens
    terms.reduce(lambda counts: counts)
    return terms.totals, tokens


def _second(job: OfflineJob, totals: IntArray, start: int, stop: int) -> int:
    """Write the vectors of a range that are missing; return the tokens read."""
    ids, reader, tokens = np.arange(start, stop, dtype=np.int64), job.reader(), 0
    files = job.cache.vectors(job.manifest.dim, job.manifest.seed, totals)
    lacks = np.ones(len(ids), np.bool_)
    for at in range(0, len(ids), KNOWN):
        lacks[at : at + KNOWN] = ~read_vectors(files, ids[at : at + KNOWN], job.manifest.dim)[0]
    if lacks.any():
        terms = TfIdf.of(job.manifest.dim, job.manifest.seed, totals)
        for block in reader.blocks(ids[lacks]):
            tokens += len(block.flat)
            write_vectors(files, block.ids, terms.vectors(len(block), Terms.of(block)))
        files.flush()
        _written(job, files.target)
    return tokens


def _of(block: TokenBlock, selected: Bools) -> TokenBlock:
    return block if selected.all() else block.take(selected)


def _written(job: OfflineJob, target: Path | None) -> None:
    if target is None:  # a cache in a job only warns
        raise DataError(f"{job.folder} cannot be written: free space there, or name another folder with --out; it goes on then")


def _added(*parts: tuple[IntArray, int]) -> tuple[IntArray, int]:
    total = np.zeros(TERMS + 1, np.int64)
    for counts, _ in parts:
        if len(counts):
            total += counts
    return total, sum(tokens for _, tokens in parts)
