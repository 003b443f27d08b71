"""Folders of arrays with a manifest: built once for a key, taken again while key and digest agree."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grace_ds.records import Array
from grace_ds.utils.files import write_atomic

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Built:
    """What a folder holds: arrays by file name, the tokenizer's JSON text, facts for the manifest."""

    arrays: dict[str, Array]
    tokenizer: str
    facts: dict[str, Any]


@dataclass(frozen=True)
class Stored:
    """A folder and its manifest; ``reused``: whether it was there already."""

    folder: Path
    manifest: dict[str, Any]
    reused: bool

    def array(self, name: str) -> Array:
        """One of its arrays."""
        loaded: Array = np.load(self.folder / f"{name}.npy")
        return loaded

    def tokenizer(self) -> Any:
        """The tokenizer of its texts."""
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.folder / TOKENIZER))


def opened(folder: Path) -> Stored:
    """A folder that was built before.

    Raises:
        FileNotFoundError: there is none.
    """
    return Stored(folder, json.loads((folder / "manifest.json").read_text("utf-8")), reused=True)


def stored(folder: Path, key: dict[str, Any], build: Callable[[], Built]) -> Stored:
    """The folder of ``key``: what an earlier call left there, or what ``build`` gives."""
    try:
        found = opened(folder)
    except (OSError, ValueError):
        found = None
    plain = json.loads(json.dumps(key))  # tuples come back as lists
    if found is not None and found.manifest.get("key") == plain and found.manifest.get("digest") == digest_of(folder):
        return found
    built = build()
    for stale in folder.glob("*.npy"):
        stale.unlink()
    for name, array in built.arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array)
        write_atomic(folder / f"{name}.npy", buffer.getvalue())
    write_atomic(folder / TOKENIZER, built.tokenizer.encode())
    # The manifest goes last: a build that was cut off leaves none, or one whose digest does not match.
    manifest = {"key": plain, "digest": digest_of(folder), **built.facts}
    write_atomic(folder / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
    return Stored(folder, manifest, reused=False)


def digest_of(folder: Path) -> str:
    """32 hex digits over the names and bytes of all arrays and of the tokenizer."""
    h = hashlib.blake2b(digest_size=16)
    for path in sorted([*folder.glob("*.npy"), *folder.glob(TOKENIZER)]):
        h.update(path.name.encode() + path.read_bytes())
    return h.hexdigest()
