"""Text that is on the machine already, by kind: where it is looked for, how it is read, what to install where it is missing.

Nothing is downloaded.  What a pool holds of it depends on the machine; the pool's digest tells whether two machines agree.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import struct
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from email import message_from_string
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
from grace_ds_quickstart.corpus import is_generated

from grace_ds.errors import DataError

PIECE = 6000  # characters taken from a file at most, so that no file prevails
_SITE, _LIBRARY = Path(sysconfig.get_paths()["purelib"]), Path(sysconfig.get_paths()["stdlib"])


@dataclass(frozen=True)
class Source:
    """Where a kind's files are, and the cure if there are none.

    Attributes:
        roots: folders with the patterns of their files.
        install: what to install.
        pieces: take every piece of a file, not one: the files are few and long.
        declared: take those files alone that say that a program wrote them; the others are clean text.
    """

    roots: tuple[tuple[Path, str], ...]
    install: str
    pieces: bool = False
    declared: bool = False


SOURCES = {
    "c": Source(
        (
            (Path(sysconfig.get_paths()["include"]), "**/*.h"),
            (_SITE / "torch" / "include", "**/*.h"),
            (Path("/usr/include"), "**/*.h"),
        ),
        "C headers: apt-get install libc6-dev",
    ),
    "man": Source(((Path("/usr/share/man"), "man[1-8]/*.gz"),), "man pages: apt-get install manpages manpages-dev"),
    "javascript": Source(
        (
            (_SITE, "**/*.js"),
            (Path("/usr/share/javascript"), "**/*.js"),
            (Path("/usr/share/nodejs"), "**/*.js"),
            (Path("/usr/lib/node_modules"), "**/*.js"),
        ),
        "JavaScript: apt-get install libjs-jquery libjs-underscore",
    ),
    "perl": Source(
        ((Path("/usr/share/perl"), "**/*.p[lm]"), (Path("/usr/lib"), "*/perl-base/**/*.pm")),
        "Perl: apt-get install perl-modules",
    ),
    "language": Source(
        ((Path("/usr/share/locale"), "*/LC_MESSAGES/*.mo"),),
        "translated messages: apt-get install gettext, with locales not excluded by dpkg's path-exclude",
    ),
    # Written by a program: of installed packages, and the standard library's own tables, which its clean text does not hold.
    "codecs": Source(((_LIBRARY / "encodings", "*.py"),), "codecs: a whole Python", True, declared=True),
    "topics": Source(((_LIBRARY / "pydoc_data", "*.py"),), "help texts: a whole Python", True, declared=True),
    "stubs": Source(
        ((_SITE / "torch" / "_C", "**/*.pyi"), (_SITE / "faiss", "*.pyi")), "generated stubs: pip install torch faiss-cpu", True
    ),
    "swig": Source(((_SITE / "faiss", "swigfaiss.py"),), "SWIG wrappers: pip install faiss-cpu", True),
    "parsers": Source(
        ((_SITE / "omegaconf" / "grammar" / "gen", "*.py"), (_SITE / "sympy" / "parsing", "**/_antlr/*.py")),
        "generated parsers: pip install omegaconf sympy",
        True,
    ),
    "stemmers": Source(((_SITE / "snowballstemmer", "*_stemmer.py"),), "generated stemmers: pip install snowballstemmer", True),
    "protobuf": Source(
        ((_SITE / "google", "**/*_pb2.py"), (_SITE / "tensorboard", "**/*_pb2.py")),
        "generated messages: pip install protobuf tensorboard",
        True,
    ),
}
MACHINE_WRITTEN = ("codecs", "topics", "stubs", "swig", "parsers", "stemmers", "protobuf")

# Of the standard library, without side effects when imported.
_DOCUMENTED = """
argparse ast asyncio.events asyncio.streams base64 bdb calendar cmd codecs collections configparser contextlib csv ctypes
dataclasses datetime decimal difflib dis email.message enum fileinput fractions ftplib functools gettext glob hashlib heapq
html.parser http.client http.cookiejar imaplib inspect io ipaddress json locale logging logging.handlers mailbox
multiprocessing.pool numbers optparse pathlib pdb pickle pickletools plistlib poplib pprint queue random sched selectors
shelve shlex smtplib socket socketserver sqlite3 ssl statistics string subprocess tarfile tempfile textwrap threading
tokenize trace traceback types typing unittest.case unittest.mock urllib.request uuid wave weakref xml.dom.minidom
xml.etree.ElementTree xmlrpc.client zipfile
"""
_PAGES = """
import importlib, json, pydoc, sys
found = []
for name in sys.argv[1:]:
    try:
        found.append(pydoc.html.document(importlib.import_module(name)))
    except ImportError:
        pass
sys.stdout.write(json.dumps(found))
"""


class MissingKind(DataError):
    """A kind of text is not on this machine."""


def files_of(kind: str) -> list[Path]:
    """All files of a kind, root by root, sorted.

    Raises:
        MissingKind: there are none; says what to install.
    """
    source = SOURCES[kind]
    found = [path for root, pattern in source.roots for path in sorted(root.glob(pattern)) if path.is_file()]
    if kind == "language":
        found = [path for path in found if not path.parts[-3].startswith("en")]
    if source.declared:
        found = [path for path in found if is_generated(read_text(path))]
    if not found:
        roots = ", ".join(str(root / pattern) for root, pattern in source.roots)
        raise MissingKind(f"no text of kind {kind!r} (looked for {roots}); {source.install}")
    return found


def draw(kind: str, rng: np.random.Generator, characters: int) -> list[str]:
    """Pieces of files of a kind in random order, at least ``characters`` of them where there are so many."""
    files = files_of(kind)
    pieces: list[str] = []
    total = 0
    if SOURCES[kind].pieces:
        cut = [text[at : at + PIECE] for text in map(read_text, files) for at in range(0, len(text), PIECE)]
        found = (cut[at] for at in rng.permutation(len(cut)))
    else:
        found = (_piece(read_text(files[at]), rng) for at in rng.permutation(len(files)))
    for piece in found:
        if piece.strip():
            pieces.append(piece)
            total += len(piece)
        if total >= characters:
            break
    return pieces


def _piece(text: str, rng: np.random.Generator) -> str:
    start = int(rng.integers(0, max(1, len(text) - PIECE)))
    return text[start : start + PIECE]


def read_text(path: Path) -> str:
    """The text of a file; man pages without the most of their roff, catalogs as their translations."""
    data = path.read_bytes()
    if path.suffix == ".mo":
        return "\n".join(translations(data))
    if path.suffix == ".gz":
        return without_roff(gzip.decompress(data).decode("utf-8", "replace"))
    return data.decode("utf-8", "replace")


def without_roff(text: str) -> str:
    """A man page without comments, request names and font changes."""
    text = re.sub(r'^[.\']\\".*\n', "", text, flags=re.MULTILINE)
    text = re.sub(r"^[.'][A-Za-z]{1,3} ?", "", text, flags=re.MULTILINE)
    return re.sub(r"\\f[BIRP]|\\&", "", text).replace("\\-", "-")


def translations(data: bytes) -> list[str]:
    """The translated messages of a gettext catalog (.mo), its header left out; none where the file is something else."""
    order = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}.get(data[:4])
    if order is None:
        return []
    count, _, table = struct.unpack_from(f"{order}3I", data, 8)
    found: list[str] = []
    for i in range(1, count):  # entry 0 translates the empty message: the header
        length, offset = struct.unpack_from(f"{order}2I", data, table + 8 * i)
        found.append(data[offset : offset + length].decode("utf-8", "replace").replace("\0", "\n"))
    return found


def html_pages() -> list[str]:
    """The standard library's documentation as HTML, made by pydoc; without addresses, which differ from run to run."""
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    command = [sys.executable, "-W", "ignore", "-c", _PAGES, *_DOCUMENTED.split()]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    if ended.returncode:
        raise DataError(f"pydoc gave no pages (status {ended.returncode}): {ended.stderr.strip()[-500:]}")
    pages: list[str] = json.loads(ended.stdout)
    return [re.sub(r"(0x|handle )[0-9a-fA-F]{6,}", r"\g<1>0", page) for page in pages]


def descriptions() -> list[str]:
    """The long descriptions of the installed distributions, by name: English prose about software."""
    found: dict[str, str] = {}
    for distribution in distributions():
        text = str(message_from_string(distribution.read_text("METADATA") or "").get_payload())
        if text.strip():
            found[str(distribution.metadata["Name"]).lower()] = text
    return [found[name] for name in sorted(found)]
