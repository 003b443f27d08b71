"""The corpus: the running interpreter's standard library, split by package into train, trusted and validation.

``prepare`` writes one folder of .npy files with a manifest; a second call with the same arguments reuses it.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import re
import sysconfig
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grace_ds.errors import DataError
from grace_ds.records import Array
from grace_ds.utils.files import write_atomic
from grace_ds_quickstart.generated import generated_code
from grace_ds_quickstart.pollute import Encode, JunkSource, Kind, Pool, mix
from grace_ds_quickstart.tokenizer import encode_stream, train_tokenizer

POOLS = ("crawl", "natural")
TOKENIZER = "tokenizer.json"
SPLITS = ("train", "trusted", "validation")
FORMAT = 4  # raise when the same arguments would give other data
STREAM = 1  # of the random numbers: raised with FORMAT only if the natural pool is to change too
# In a file's first lines; the last are tables of characters, of which a few do not say where they are from.
_GENERATED = re.compile(r"do not edit|auto-?generated|generated (by|from)|character mapping codec", re.IGNORECASE)
_SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib-dynload"}


@dataclass(frozen=True)
class CorpusSpec:
    """What to build; two equal specs on one interpreter give the same bytes.

    Attributes:
        duplicates: share of near-duplicates in the crawl pool.
        junk: share of junk in the crawl pool.
        generated: share of machine-written code in the crawl pool; the rest is unique.
    """

    pool: str = "crawl"
    pool_size: int = 20_000
    duplicates: float = 0.20
    junk: float = 0.15
    generated: float = 0.25
    trusted_size: int = 384
    validation_size: int = 512
    length: int = 65  # 64 inputs and the target of the last one
    vocab: int = 2048
    seed: int = 0  # of the pool's composition, not of the training order: all seeds of a benchmark share one pool


@dataclass(frozen=True)
class Corpus:
    """Where the built data lie, and what is in them.

    Attributes:
        folder: holds train.npy, trusted.npy, validation.npy ((n, length) int32) and kinds.npy ((n,) uint8).
        manifest: spec, digest, counts of rows and kinds, packages of each split.
        reused: whether the files were there already.
    """

    folder: Path
    manifest: dict[str, Any]
    reused: bool


def split_of(package: str) -> str:
    """The split of a top-level package or module, by the hash of its name: the same on every machine."""
    point = int.from_bytes(hashlib.blake2b(package.encode(), digest_size=8).digest(), "big") / 2**64
    return "validation" if point < 0.12 else "trusted" if point < 0.22 else "train"


def read_packages(root: Path) -> dict[str, list[str]]:
    """The text of every .py file below ``root``, by top-level package or module, without tests and third parties.

    Files that a program wrote are left out: what pools hold as machine-written must not be what is trusted or tested on.

    Returns:
        package name to the texts of its files, both in sorted order.
    """
    packages: dict[str, list[str]] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        # _sysconfigdata and config-* hold the paths of the machine that built Python.
        if _SKIP.intersection(parts) or parts[0].startswith(("_sysconfigdata", "config-")):
            continue
        text = path.read_text("utf-8", errors="replace")
        if text.strip() and not is_generated(text):
            packages.setdefault(path.relative_to(root).parts[0].removesuffix(".py"), []).append(text)
    return packages


def is_generated(text: str) -> bool:
    """Whether a file says in its first three lines that a program wrote it, or that it is a table of characters."""
    return any(_GENERATED.search(line) for line in text.splitlines()[:3])


def chunk(stream: Array, length: int) -> Array:
    """Consecutive rows of ``length`` tokens, (len(stream) // length, length); the rest is dropped."""
    count = len(stream) // length
    return stream[: count * length].reshape(count, length)


def spread(rows: Array, count: int, name: str) -> Array:
    """``count`` rows at even distances, so that every package of a split is represented."""
    if len(rows) < count:
        raise DataError(f"the {name} split has {len(rows)} sequences, {count} are needed: is the standard library cut?")
    return rows[np.linspace(0, len(rows) - 1, count).astype(np.int64)]


def prepare(spec: CorpusSpec, folder: Path, root: Path | None = None) -> Corpus:
    """Build the data below ``folder``, or take what an earlier call with the same spec and interpreter left there.

    Raises:
        DataError: an unknown pool, or too little text.
    """
    if spec.pool not in POOLS:
        raise DataError(f"pool {spec.pool!r} is not known: choose from {list(POOLS)}")
    root = root or Path(sysconfig.get_paths()["stdlib"])
    key = {"format": FORMAT, "python": platform.python_version(), "root": str(root), **asdict(spec)}
    manifest = _read_manifest(folder)
    if manifest and manifest["key"] == key and manifest["digest"] == _digest(folder) and (folder / TOKENIZER).is_file():
        return Corpus(folder, manifest, reused=True)
    arrays, facts, tokenizer = build(spec, root)
    write_atomic(folder / TOKENIZER, tokenizer.encode())
    # The manifest goes last: a build that was cut off leaves none, or one whose digest does not match.
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array)
        write_atomic(folder / f"{name}.npy", buffer.getbuffer())
    manifest = {"key": key, "digest": _digest(folder), **facts}
    write_atomic(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    return Corpus(folder, manifest, reused=False)


def build(spec: CorpusSpec, root: Path) -> tuple[dict[str, Array], dict[str, Any], str]:
    """The arrays by file name, the facts for the manifest, the tokeniser as JSON."""
    packages = read_packages(root)
    names = {split: [name for name in packages if split_of(name) == split] for split in SPLITS}
    texts = {split: [text for name in names[split] for text in packages[name]] for split in SPLITS}
    if not texts["train"]:
        raise DataError(f"no Python source files below {root}: the quickstart trains on the interpreter's own library")
    tokenizer = train_tokenizer(texts["train"], spec.vocab)

    def encode(documents: Sequence[str]) -> Array:
        return encode_stream(tokenizer, documents)

    rows = {split: chunk(encode(texts[split]), spec.length) for split in SPLITS}
    pool = make_pool(spec, rows["train"], encode, tokenizer.get_vocab_size())
    arrays = {
        "train": pool.rows,
        "kinds": pool.kinds,
        "trusted": spread(rows["trusted"], spec.trusted_size, "trusted"),
        "validation": spread(rows["validation"], spec.validation_size, "validation"),
    }
    facts = {
        "vocab": tokenizer.get_vocab_size(),
        "rows": {split: len(arrays[split]) for split in SPLITS},
        "kinds": pool.counts(),
        "packages": names,
    }
    return arrays, facts, tokenizer.to_str()


def make_pool(spec: CorpusSpec, clean: Array, encode: Encode, vocab: int) -> Pool:
    """The training pool of the spec; ``natural`` has at most as many rows as there are clean ones."""
    rng = np.random.default_rng([spec.seed, STREAM])
    source = JunkSource(clean, encode, vocab)
    if spec.pool == "crawl":
        return mix(
            source,
            rng,
            spec.pool_size,
            duplicates=spec.duplicates,
            junk=spec.junk,
            generated=spec.generated,
            generate=generated_code,
        )
    order = rng.permutation(len(clean))[: spec.pool_size].astype(np.int64)
    return Pool(rows=clean[order], kinds=np.full(len(order), Kind.UNIQUE, np.uint8), sources=order)


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and {"key", "digest"} <= manifest.keys() else None


def _digest(folder: Path) -> str:
    """Over the bytes of all arrays; an empty string where one is missing."""
    digest = hashlib.blake2b(digest_size=16)
    for name in (*SPLITS, "kinds"):
        try:
            digest.update((folder / f"{name}.npy").read_bytes())
        except OSError:
            return ""
    return digest.hexdigest()
