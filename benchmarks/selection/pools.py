"""The training pools: clean rows, near-duplicates and junk in stated shares, each a pure function of its spec.

Pools to develop on (``crawl``, ``natural``, ``dose-*``, ``dev``, ``generated-25``, ``generated-50``, ``generated-crawl``,
``answers``) and pools held out (``unseen-junk``, ``off-domain``, ``second``, ``generated-heldout-*``, ``machine-written``): look
at nothing but counts of the latter, or the next recipe is tuned to them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from grace_ds_quickstart.pollute import JUNK, JunkKind, JunkSource, Pool, mix
from grace_ds_quickstart.tokenizer import encode_stream

from benchmarks.selection import answers
from benchmarks.selection.corpora import ANSWERS, GSM8K, HELD, STDLIB, CorpusSpec, prepare_corpus
from benchmarks.selection.junk import CRAWL_JUNK, DEV_JUNK, OFF_DOMAIN, UNSEEN_JUNK, Decode, apart_from, blended, junk_kind
from benchmarks.selection.store import TOKENIZER, Built, Stored, stored
from benchmarks.selection.texts import MACHINE_WRITTEN, MissingKind
from grace_ds.errors import DataError
from grace_ds.records import Array

FORMAT = 1  # raise when the same spec would give another pool
ADDED = ("weights", "length")  # to PoolSpec later: no part of the key at their defaults, so that older folders are still found


@dataclass(frozen=True)
class PoolSpec:
    """What to build.

    Attributes:
        corpus: the clean text, ``stdlib``, ``gsm8k`` or ``answers``.
        length: tokens of a row; 0 for the corpus' own.
        duplicates, junk: shares of the pool; the rest is unique.
        kinds: of junk, in equal parts if there are no weights.
        weights: of the kinds, in their order.
        size: rows; fewer where there is too little clean text, and the manifest says so.
        seed: of the composition; all seeds of a benchmark share one pool.
    """

    name: str
    duplicates: float = 0.3
    junk: float = 0.2
    kinds: tuple[str, ...] = CRAWL_JUNK
    corpus: str = STDLIB
    size: int = 20_000
    seed: int = 0
    weights: tuple[float, ...] = ()
    length: int = 0


def _generated(prefix: str) -> tuple[PoolSpec, ...]:
    """The pools of one set of templates, whose kind and group are called ``prefix``."""
    crawl = (prefix, *CRAWL_JUNK)
    parts = (25.0, *[10 / len(CRAWL_JUNK)] * len(CRAWL_JUNK))  # per cent of the pool
    return (
        PoolSpec(f"{prefix}-25", duplicates=0.0, junk=0.25, kinds=(prefix,)),
        PoolSpec(f"{prefix}-50", duplicates=0.0, junk=0.5, kinds=(prefix,)),
        PoolSpec(f"{prefix}-crawl", duplicates=0.15, junk=0.35, kinds=crawl, weights=parts),
    )


DOSES = (0, 5, 10, 25, 50)  # per cent of junk
SPECS = {
    spec.name: spec
    for spec in (
        PoolSpec("crawl"),
        PoolSpec("natural", duplicates=0.0, junk=0.0, kinds=()),
        *(PoolSpec(f"dose-{dose}", duplicates=0.0, junk=dose / 100) for dose in DOSES),
        PoolSpec("dev", kinds=DEV_JUNK),
        PoolSpec("unseen-junk", kinds=UNSEEN_JUNK),
        PoolSpec("off-domain", kinds=OFF_DOMAIN),
        PoolSpec("second", kinds=("shakespeare",), corpus=GSM8K),
        *_generated("generated"),
        *_generated("generated-heldout"),
        PoolSpec("machine-written", duplicates=0.0, junk=0.25, kinds=MACHINE_WRITTEN),
        PoolSpec("answers", duplicates=0.0, junk=0.5, kinds=("permuted",), corpus=ANSWERS, length=answers.LENGTH),
    )
}
GROUPS = {
    "crawl": ("crawl",),
    "natural": ("natural",),
    "dose": tuple(f"dose-{dose}" for dose in DOSES),
    "heldout": ("unseen-junk", "off-domain", "second"),
    "dev": ("dev",),
    "generated": ("generated-25", "generated-50", "generated-crawl"),
    "generated-heldout": ("generated-heldout-25", "generated-heldout-50", "generated-heldout-crawl", "machine-written"),
    "answers": ("answers",),
}
GROUPS["peers"] = GROUPS["generated-heldout"] + GROUPS["crawl"] + GROUPS["answers"]
HELDOUT = GROUPS["heldout"] + GROUPS["generated-heldout"]


def prepare_pool(
    spec: PoolSpec, folder: Path, *, corpus: CorpusSpec | None = None, root: Path | None = None, allow_missing: bool = False
) -> Stored:
    """The pool's folder below ``folder``: train, kinds, trusted, dev and test .npy, the tokenizer and the manifest.

    Args:
        corpus: sizes of the corpus; default: the benchmark's.
        root: of the corpus that the spec names; None for the running interpreter's library.
        allow_missing: leave out junk kinds whose text is not on this machine; the manifest names them.

    Raises:
        MissingKind: such a kind, unless ``allow_missing``.
        DataError: there is too little text.
    """
    clean_spec = replace(corpus or CorpusSpec(), name=spec.corpus)
    if spec.length:
        clean_spec = replace(clean_spec, length=spec.length)
    base = prepare_corpus(clean_spec, folder / f"corpus-{_short(asdict(clean_spec) | {'root': str(root)})}", root)
    settings = {name: value for name, value in asdict(spec).items() if value or name not in ADDED}
    key = {"format": FORMAT, **settings, "corpus_digest": base.manifest["digest"], "allow_missing": allow_missing}
    return stored(folder / f"{spec.name}-{_short(key)}", key, lambda: build(spec, base, root, allow_missing))


def build(spec: PoolSpec, base: Stored, root: Path | None, allow_missing: bool) -> Built:
    """The pool's arrays and manifest."""
    tokenizer = base.tokenizer()
    clean = base.array("clean")

    def encode(documents: Sequence[str]) -> Array:
        return encode_stream(tokenizer, documents)

    def decode(rows: Array) -> list[str]:
        return decode_rows(tokenizer, rows)

    held = np.concatenate([base.array(split) for split in HELD])
    kinds, missing = _available(spec, decode, root, allow_missing, held)
    size = min(spec.size, int(len(clean) / (1 - spec.duplicates - spec.junk) + 1e-9))
    source = JunkSource(clean, encode, tokenizer.get_vocab_size())
    rng = np.random.default_rng([spec.seed, FORMAT])
    offer: Mapping[str, JunkKind] = kinds
    if spec.weights:
        weight = dict(zip(spec.kinds, spec.weights, strict=True))
        offer = {spec.name: blended(list(kinds.values()), [weight[name] for name in kinds])}
    with offered(offer):
        pool: Pool = mix(source, rng, size, duplicates=spec.duplicates, junk=spec.junk, kinds=list(offer))
    arrays = {"train": pool.rows, "kinds": pool.kinds, **{split: base.array(split) for split in HELD}}
    facts: dict[str, Any] = {
        "pool": spec.name,
        "vocab": source.vocab,
        "rows": {name: len(array) for name, array in arrays.items()},
        "rows_asked_for": spec.size,
        "kinds": pool.counts(),
        "junk_kinds": list(kinds),
        "junk_kinds_missing": missing,
        "corpus": {key: value for key, value in base.manifest.items() if key not in ("packages", "key")},
    }
    return Built(arrays, (base.folder / TOKENIZER).read_text("utf-8"), facts)


def decode_rows(tokenizer: Any, rows: Array) -> list[str]:
    """The text of each row; bytes cut in the middle of a character become replacement characters."""
    texts: list[str] = tokenizer.decode_batch(rows.tolist(), skip_special_tokens=True)
    return texts


def _available(
    spec: PoolSpec, decode: Decode, root: Path | None, allow_missing: bool, held: Array
) -> tuple[dict[str, JunkKind], list[str]]:
    """The spec's kinds that this machine has text for, and the names of the others; ``held``: rows that are judged on."""
    found: dict[str, JunkKind] = {}
    missing: list[str] = []
    for name in spec.kinds:
        try:
            kind = junk_kind(name, decode, root)
            found[name] = apart_from(kind, name, held) if name in MACHINE_WRITTEN else kind
        except MissingKind as error:
            if not allow_missing:
                raise MissingKind(f"pool {spec.name}: {error}; or leave such kinds out with --allow-missing-kinds") from None
            missing.append(name)
    if spec.kinds and not found:
        raise DataError(f"pool {spec.name}: none of its junk kinds {list(spec.kinds)} is on this machine")
    return found, missing


@contextmanager
def offered(kinds: Mapping[str, JunkKind]) -> Iterator[None]:
    """Within it ``mix`` knows these kinds beside its own."""
    own = dict(JUNK)
    JUNK.update(kinds)
    try:
        yield
    finally:
        JUNK.clear()
        JUNK.update(own)


def _short(key: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=4).hexdigest()
