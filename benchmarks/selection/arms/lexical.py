"""Arms that rate each row by its text once: BM25 and DSIR by their libraries, and the priors of tokens."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.selection.arms.base import SubsetArm, View
from grace_ds.records import Array, FloatArray, IntArray


def highest(scores: Array, k: int) -> IntArray:
    """(k,) int64: the positions of the k highest scores, the first ones of equal scores."""
    return np.argsort(-scores, kind="stable")[:k].astype(np.int64)


class StaticArm(SubsetArm):
    """Chooses once, from text, before the first step.

    The texts are read before anything is counted: who trains on text has it.
    """

    def __init__(self, view: View) -> None:
        super().__init__(view)
        self.texts, self.trusted_texts = view.decode(view.rows), view.decode(view.trusted)

    def choose(self, version: int) -> IntArray | None:
        """The subset, at the start only."""
        return None if version else self.subset()

    def subset(self) -> IntArray:
        """Ids of the subset."""
        raise NotImplementedError


class Bm25(StaticArm):
    """BM25 likeness to the trusted set, by ``bm25s``: the pool is the index, each trusted row a query.

    A row's score is the mean over the queries; the highest are kept. The library's own settings (Lucene's variant, k1 = 1.5,
    b = 0.75, words of two characters or more), but without English stop words, which are words of Python too.
    """

    def __init__(self, view: View) -> None:
        super().__init__(view)
        import bm25s

        self._library = bm25s

    def subset(self) -> IntArray:
        """The rows most like the trusted ones."""
        return highest(self.scores(), self.view.k)

    def scores(self) -> FloatArray:
        """(n,) float32."""
        words, queries = (
            self._library.tokenize(texts, stopwords=[], return_ids=False, show_progress=False)
            for texts in (self.texts, self.trusted_texts)
        )
        index = self._library.BM25()
        index.index(words, show_progress=False)
        total = np.zeros(self.view.n, np.float64)
        for query in queries:
            if query:  # a row of punctuation alone asks for nothing
                total += index.get_scores(query)
        return (total / max(1, len(queries))).astype(np.float32)


class DsirLibrary(StaticArm):
    """DSIR (arXiv 2302.03169) by its authors' library ``data-selection``: hashed uni- and bigrams of words, Gumbel top-k.

    Its defaults, but for the least length of a row (100 words): the rows here are shorter than that. One process: what children
    would take is counted by nobody.
    """

    def __init__(self, view: View) -> None:
        super().__init__(view)
        from data_selection import HashedNgramDSIR

        self._library = HashedNgramDSIR

    def subset(self) -> IntArray:
        """The resampled fifth."""
        with tempfile.TemporaryDirectory(prefix="dsir-") as name:
            folder = Path(name)
            raw, target = (
                _written(folder / f"{name}.jsonl", texts) for name, texts in (("raw", self.texts), ("target", self.trusted_texts))
            )
            dsir = self._library([raw], [target], str(folder / "cache"), num_proc=1, min_example_length=0)
            dsir.fit_importance_estimator()
            dsir.compute_importance_weights()
            state = np.random.get_state()  # the library draws from numpy's global generator
            np.random.seed(self.plan.seed)
            try:
                dsir.resample(str(folder / "out"), self.view.k, cache_dir=str(folder / "resampled"))
            finally:
                np.random.set_state(state)
            lines = (folder / "out" / "0.jsonl").read_text("utf-8").splitlines()
        return np.array([json.loads(line)["id"] for line in lines], np.int64)


def _written(path: Path, texts: list[str]) -> str:
    """The file of these texts, one JSON object a line, as the library reads them."""
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)), "utf-8")
    return str(path)


class TokenFrequency(SubsetArm):
    """The filter by priors of tokens (arXiv 2509.18577): what is ordinary in the pool is kept, what is far from it goes.

    A token's prior is its count in the pool times the number of rows that hold it, normalised. A row has the mean of its tokens'
    log priors and the standard deviation of their priors; the half of the pool that lies nearest to the median by both ranks is
    kept, as the paper keeps half. No library, no trusted set; training goes on over that half.
    """

    KEPT = 0.5

    def choose(self, version: int) -> IntArray | None:
        """The middle half, at the start only."""
        if version:
            return None
        mean, spread = prior_statistics(self.view.rows, self.view.vocab)
        return highest(-np.maximum(off_median(mean), off_median(spread)), max(1, round(self.KEPT * self.view.n)))


def prior_statistics(rows: Array, vocab: int) -> tuple[Array, Array]:
    """The mean of each row's log priors and the standard deviation of its priors, (n,) float64 each."""
    counts = np.bincount(rows.reshape(-1), minlength=vocab).astype(np.float64)
    ordered = np.sort(rows, axis=1)
    first = np.ones(rows.shape, np.bool_)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    weight = counts * np.bincount(ordered[first], minlength=vocab)
    prior = (weight / weight.sum())[rows]
    return np.log(prior).mean(axis=1), prior.std(axis=1, ddof=1)


def off_median(values: Array) -> Array:
    """(n,) float64: how far each value's rank is from the middle one, in shares of the ranks."""
    rank = np.empty(len(values), np.float64)
    rank[np.argsort(values, kind="stable")] = np.arange(len(values))
    return np.asarray(np.abs(rank / max(1, len(values) - 1) - 0.5))
