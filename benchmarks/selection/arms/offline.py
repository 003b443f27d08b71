"""What a lab does before training: near-duplicates out by MinHash (datasketch), then a quality filter (fastText)."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.selection.arms.base import View
from benchmarks.selection.arms.lexical import StaticArm, highest
from grace_ds.records import FloatArray, IntArray

GRAM, JACCARD, PERMUTATIONS = 5, 0.5, 128
TRIALS = 20


class OfflineFilter(StaticArm):
    """MinHash near-duplicate removal, then what a classifier of trusted against pool text rates highest; once, then kept.

    Rows are sets of character 5-grams; one whose signature of 128 permutations agrees with that of an earlier kept row by half or
    more is dropped (after Lee et al., arXiv 2107.06499). fastText learns to tell the trusted rows from rows of the pool (the
    filter of DCLM, arXiv 2406.11794: bigrams of words), and the rows of highest probability are kept.

    Chosen on ``crawl`` and ``generated-50``: characters and a half, since the usual word 5-grams at 0.7 find 4 % of these copies;
    one row of the pool to a trusted one, of 1, 4, 10 and 30, by the share of unique rows kept; and 0.35 of the pool kept, by the
    rows for choosing of ``crawl``, where 0.2, 0.35 and 0.5 end 0.184, 0.247 and 0.184 below uniform (one seed).
    """

    KEPT, AGAINST = 0.35, 1

    def __init__(self, view: View) -> None:
        super().__init__(view)
        import datasketch
        import fasttext

        self._sketch, self._fasttext = datasketch, fasttext
        self.left = 0

    def subset(self) -> IntArray:
        """The best of what is left without copies."""
        left = np.flatnonzero(~self.copies())
        self.left = len(left)
        return left[highest(self.quality()[left], max(1, round(self.KEPT * self.view.n)))]

    def copies(self) -> npt.NDArray[np.bool_]:
        """(n,) bool: rows like an earlier row that is kept."""
        found = np.zeros(self.view.n, np.bool_)
        index = self._sketch.MinHashLSH(threshold=JACCARD, num_perm=PERMUTATIONS)
        shingles = [grams(text) for text in self.texts]
        signatures = self._sketch.MinHash.bulk(shingles, num_perm=PERMUTATIONS, seed=self.plan.seed + 1)
        for row, signature in enumerate(signatures):
            # The buckets propose; the estimate from all permutations decides.
            if any(signature.jaccard(signatures[other]) >= JACCARD for other in index.query(signature)):
                found[row] = True
            else:
                index.insert(row, signature)
        return found

    def quality(self) -> FloatArray:
        """(n,) float32: the probability that a row is trusted text."""
        pool, trusted = ([" ".join(text.split()) for text in texts] for texts in (self.texts, self.trusted_texts))
        drawn = self.rng.choice(len(pool), min(len(pool), self.AGAINST * len(trusted)), replace=False)
        lines = [f"__label__trusted {text}" for text in trusted] + [f"__label__pool {pool[i]}" for i in drawn]
        with tempfile.TemporaryDirectory(prefix="offline-") as folder:
            path = Path(folder) / "labelled.txt"
            path.write_text("\n".join(lines[i] for i in self.rng.permutation(len(lines))) + "\n", "utf-8")
            model = self._trained(path)
        labels, probabilities = model.predict(pool, k=2)
        return np.array(
            [p[names.index("__label__trusted")] for names, p in zip(map(list, labels), probabilities, strict=True)], np.float32
        )

    def _trained(self, path: Path) -> Any:
        """The classifier of the labelled lines of a file."""
        for trial in range(TRIALS):
            try:
                return self._fasttext.train_supervised(
                    str(path), wordNgrams=2, epoch=25, lr=0.1, dim=16, bucket=200_000, thread=1, seed=self.plan.seed, verbose=0
                )
            except RuntimeError as error:
                # fastText 0.9.2 stops with "Encountered NaN" now and then, on the same file with the same seed too.
                if "NaN" not in str(error) or trial + 1 == TRIALS:
                    raise
        raise AssertionError("unreachable")

    def end(self) -> dict[str, Any]:
        """How many rows were no copies."""
        return {"left": self.left}


def grams(text: str) -> list[bytes]:
    """The 5-grams of a text's characters, any space being one; the whole text where it is shorter."""
    plain = " ".join(text.split())
    return [plain[at : at + GRAM].encode("utf-8", "replace") for at in range(max(1, len(plain) - GRAM + 1))]
