"""Files: schedules, checkpoints, trusted sets, id files, Megatron's indices and feature caches.

Where a file has a checksum (schedules, checkpoints, feature caches), accepted means equal to the original.  In the built cases
the checksums are made anew, as anyone who may write there can: then what is accepted must be usable.  A Megatron index holds
most facts twice, and accepted means the same tokens for every item; the tokens themselves have no checksum, so of the ``.bin``
only its length is changed.  Text and .npy have none: accepted means that each value is the one that an independent reader finds.
"""

from __future__ import annotations

import ast
import json
import logging
import random
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from grace_ds_quickstart.tokenizer import train_tokenizer
from hypothesis import strategies as st
from safetensors.numpy import save

from benchmarks.fuzz.mutate import NUMBERS, mutated
from benchmarks.fuzz.target import REFUSED, SAME, SILENT, TAKEN, Target
from grace_ds.data import MMapTokens
from grace_ds.data.pool import Pool, read_ids, read_sources
from grace_ds.data.schedule import ScheduleBook, parse_schedule, save_schedule
from grace_ds.data.tokenizer import load_tokenizer
from grace_ds.data.trusted import load_trusted
from grace_ds.features import cache
from grace_ds.gradients.basis import TrustedBasis
from grace_ds.integrations.checkpoint_state import BASIS, MANIFEST, SCALARS, SCHEMA, VISITS, read_saved
from grace_ds.records import Array, Losses, SampleRecords, Schedule
from grace_ds.refresh.table import Table
from grace_ds.utils.files import digest

N, BATCH, DIM = 64, 8, 4


def schedule_of(version: int = 2, seed: int = 0) -> Schedule:
    """A schedule of 40 slots over N samples."""
    rng = np.random.default_rng(seed)
    ids, roles = rng.integers(0, N, 40), rng.integers(0, 3, 40).astype(np.uint8)
    meta: dict[str, Any] = {
        "batch": BATCH,
        "decided_at_step": 5 * version,
        "next_refresh_step": 5 * version + 5,
        "coreset": 12,
        "window": N,
    }
    meta |= {"objective": "sample", "drawn_by": "grace", "guard": {"level": "grace", "reason": "–"}}
    return Schedule(version, 40 * version, ids, roles, rng.random(40, np.float32) + 0.5, 7, meta, "run")


def equal(a: Any, b: Any) -> bool:
    """Whether two values are the same, arrays bit for bit."""
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    if hasattr(a, "__dict__") and type(a) is type(b):
        return equal(vars(a), vars(b))
    return type(a) is type(b) and bool(a == b)


# -- schedules ---------------------------------------------------------------------------------------------------------


@st.composite
def odd_schedule(draw: st.DrawFn) -> Schedule:
    """A schedule that is whole by its digests, and holds anything."""
    number = st.sampled_from(NUMBERS[:-1]) | st.integers(-(2**62), 2**62)
    slots = draw(st.integers(0, 5))
    ids = np.array(draw(st.lists(number, min_size=slots, max_size=slots)), np.int64)
    roles = np.array(draw(st.lists(st.integers(0, 5), min_size=slots, max_size=slots)), np.uint8)
    weights = np.array(draw(st.lists(st.floats(width=32), min_size=slots, max_size=slots)), np.float32)
    meta = draw(
        st.dictionaries(st.sampled_from(["batch", "window", "x"]), number | st.floats() | st.text(max_size=3), max_size=3)
    )
    return Schedule(draw(number), draw(number), ids, roles, weights, draw(number), meta, draw(st.text(max_size=3)))


def schedules(folder: Path) -> Target:
    original, place = schedule_of(), folder / "schedules"
    whole = save_schedule(original, place).read_bytes()

    def judge(value: Any) -> str:
        if isinstance(value, bytes):
            return SAME if equal(parse_schedule(value, "schedule-000002.safetensors"), original) else SILENT
        written = save_schedule(value, place)
        try:
            read = parse_schedule(written.read_bytes(), written)
        finally:
            written.unlink()
        if not equal(vars(read), vars(value)):
            return SILENT
        Pool(1 << 62, 1, 1.0, 1, 1, 0).check([read])
        slots = ScheduleBook([read]).slots(read.start, 3 * len(read))  # three laps
        return TAKEN if len(slots.ids) == 3 * len(read) else SILENT

    return Target("schedules", 0.14, lambda rng: mutated(whole, rng), judge, odd_schedule())


# -- checkpoints: rows, losses, visits, basis, manifest ----------------------------------------------------------------


def checkpoint(folder: Path) -> Target:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    ids = np.sort(rng.choice(N, 20, replace=False)).astype(np.int64)
    empty = SampleRecords.empty(DIM)
    rows = {
        f.name: rng.integers(0, 5, (20, *getattr(empty, f.name).shape[1:])).astype(getattr(empty, f.name).dtype)
        for f in fields(empty)
    }
    losses = Losses(ids, np.arange(20), rng.random(20, np.float32))
    files = Table(SampleRecords(**{**rows, "ids": ids})).save(folder, 0, 1) | Table(losses).save(folder, 0, 1)
    left, middle, right = (rng.random(shape).astype(np.float32) for shape in ((6, 2), (2,), (5, 2)))
    basis = TrustedBasis(1, {"layer": (left, middle, right)})
    shared: dict[str, dict[str, Array]] = {VISITS: {"ids": ids, "counts": np.ones(20, np.int32)}, BASIS: dict(basis.to_arrays())}
    for name, arrays in shared.items():
        (folder / name).write_bytes(save(arrays))
        files[name] = digest((folder / name).read_bytes())
    path = save_schedule(schedule_of(), folder)
    files[path.name] = digest(path.read_bytes())
    numbers = dict(zip(SCALARS, (N, BATCH, 10, 80, 80, 15, 0, 2, 3), strict=True))
    more = {"reference": {"1": 0.5}, "basis": 1, "gradient": None, "collect": {"running_mean": 0.1, "sketcher": {}}}
    (folder / MANIFEST).write_text(json.dumps({"schema": SCHEMA, "files": files, **numbers, **more}))
    names = [MANIFEST, *files]
    kept = {name: (folder / name).read_bytes() for name in names}
    state = {"schema": SCHEMA, "manifest": digest(kept[MANIFEST]), "step": 10, "tag": "a"}
    original = read_saved(folder, state, 0, 1, DIM)

    def changed(source: random.Random, sealed: bool = False) -> tuple[str, bytes, bool]:
        name = source.choice(names)
        return name, mutated(kept[name], source), sealed

    def judge(value: tuple[str, bytes, bool]) -> str:
        name, data, sealed = value
        (folder / name).write_bytes(data)
        given = dict(state)
        try:
            if sealed and name != MANIFEST:
                (folder / MANIFEST).write_bytes(kept[MANIFEST].replace(files[name].encode(), digest(data).encode()))
            if sealed:
                given["manifest"] = digest((folder / MANIFEST).read_bytes())
            read = read_saved(folder, given, 0, 1, DIM)
        finally:
            for written in (name, MANIFEST):
                (folder / written).write_bytes(kept[written])
        return SAME if equal(read, original) else TAKEN if sealed else SILENT

    built = st.randoms(use_true_random=False).map(lambda source: changed(source, True))
    return Target("checkpoints", 0.12, changed, judge, built, 0.4)


# -- trusted sets and id files -----------------------------------------------------------------------------------------


def _numpys(data: bytes) -> Array:
    """The array of a .npy file, read by hand: the header is a Python literal, and the data follow it."""
    size = 2 if data[6] == 1 else 4
    start = 8 + size + int.from_bytes(data[8 : 8 + size], "little")
    header = ast.literal_eval(data[8 + size : start].decode("latin1"))
    array: Array = np.frombuffer(data[start:], np.dtype(header["descr"]))
    shaped: Array = array.reshape(header["shape"], order="F" if header["fortran_order"] else "C")
    return shaped


def _npy(array: Array, folder: Path) -> bytes:
    np.save(folder / "made.npy", array)
    return (folder / "made.npy").read_bytes()


LIKE = {"input_ids": torch.arange(6), "attention_mask": torch.ones(6, dtype=torch.int64), "labels": torch.arange(6)}


def trusted(folder: Path) -> list[Target]:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 99, (5, 6))
    rows = "".join(json.dumps({"input_ids": row.tolist(), "attention_mask": [1] * 6}) + "\n" for row in tokens)
    texts = "".join(json.dumps({"text": f"document {i} is good, isn't it?"}) + "\n" for i in range(5))
    plain = "\n\n".join(f"document {i} is good" for i in range(5))
    originals = {"rows.jsonl": rows, "texts.jsonl": texts, "plain.txt": plain}
    kept: dict[str, bytes] = {name: text.encode() for name, text in originals.items()} | {"rows.npy": _npy(tokens, folder)}

    def spelled(text: str) -> list[int]:
        return list(text.encode())

    def meant(name: str, data: bytes) -> list[list[int]]:
        """The token ids of all rows, by other readers than the package's."""
        if name == "rows.npy":
            found: list[list[int]] = _numpys(data).tolist()
            return found
        lines = [line for line in data.decode().split("\n") if line.strip()]
        if name == "rows.jsonl" and not ('"text"' in lines[0] and '"input_ids"' not in lines[0]):
            return [json.loads(line)["input_ids"] for line in lines]
        pieces = data.decode().split("\n\n") if name == "plain.txt" else [json.loads(line)["text"] for line in lines]
        flat = [token for piece in pieces if piece.strip() for token in spelled(piece)]
        return [flat[i : i + 6] for i in range(0, len(flat) - 5, 6)]

    originally = {name: meant(name, data) for name, data in kept.items()}

    def changed(source: random.Random) -> tuple[str, bytes]:
        name = source.choice(list(kept))
        return name, mutated(kept[name], source)

    def judge(value: tuple[str, bytes]) -> str:
        name, data = value
        (folder / name).write_bytes(data)
        found = load_trusted(folder / name, LIKE, spelled)
        says = meant(name, data)
        longest = max(map(len, says))
        for i, row in enumerate(says):
            ids = found[i]["input_ids"].tolist()
            if (
                ids[: len(row)] != row
                or len(ids) != longest
                or (len(row) < longest and found[i]["attention_mask"][len(row) :].any())
            ):
                return SILENT
        if len(found) != len(says):
            return SILENT
        return SAME if says == originally[name] else TAKEN

    value = st.recursive(
        st.none() | st.booleans() | st.integers() | st.integers(0, 9) | st.floats() | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=8,
    )
    ids = st.lists(st.integers(0, 9) | st.sampled_from([2**31, 2**63, -1, 1.0, True, None, "1"]), max_size=6)
    row = st.fixed_dictionaries(
        {"input_ids": ids}, optional={"attention_mask": value, "labels": value, "text": value, "extra": value}
    )
    built = st.lists(row, min_size=1, max_size=3).map(lambda rows: ("rows.jsonl", "\n".join(map(json.dumps, rows)).encode()))
    return [Target("trusted sets", 0.11, changed, judge, built, 0.3)]


def id_files(folder: Path) -> Target:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    ids = np.sort(rng.choice(N, 12, replace=False))
    labels = rng.integers(0, 3, N).astype(np.int32)
    kept = {
        "ids.txt": b"# those that must be in\n" + "\n".join(f"{i}  # sample" for i in ids).encode(),
        "ids.npy": _npy(ids, folder),
        "sources.npy": _npy(labels, folder),
    }

    def changed(source: random.Random) -> tuple[str, bytes]:
        name = source.choice(list(kept))
        return name, mutated(kept[name], source)

    def judge(value: tuple[str, bytes]) -> str:
        found: Array
        says: Array
        before: Array
        name, data = value
        (folder / name).unlink(missing_ok=True)  # a map of the last case may still be open
        (folder / name).write_bytes(data)
        if name == "sources.npy":
            found, says, before = np.asarray(read_sources(folder / name, N)), _numpys(data), labels
        else:
            found, before = read_ids(folder / name, N), ids
            entries = [line.split("#")[0].strip() for line in data.decode().splitlines()] if name == "ids.txt" else []
            says = np.unique(np.array([int(e) for e in entries if e]) if name == "ids.txt" else _numpys(data))
        if found.tolist() != says.tolist():
            return SILENT
        return SAME if says.tolist() == before.tolist() else TAKEN

    return Target("id and source files", 0.07, changed, judge)


def tokenizers(folder: Path) -> Target:
    """A tokenizer.json of 300 tokens: what it makes of a text cannot be decided, only that nothing else is raised."""
    folder.mkdir(parents=True)
    text = "def f(x): return x + 1\nclass A: pass\n"
    whole, path = train_tokenizer([text] * 20, 300).to_str().encode(), folder / "tokenizer.json"
    (folder / "text.txt").write_text(text)

    def judge(data: bytes) -> str:
        path.write_bytes(data)
        load_trusted(folder / "text.txt", list(range(6)), load_tokenizer(path))
        return SAME if data == whole else TAKEN

    return Target("tokenizers", 0.03, lambda rng: mutated(whole, rng), judge)


# -- Megatron's indices ------------------------------------------------------------------------------------------------


def megatron(folder: Path) -> Target:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 30, 12).astype("<i4")
    tokens = rng.integers(0, 60_000, lengths.sum()).astype("<u2")
    pointers = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype("<i8") * 2
    documents = np.array([0, 3, 4, 8, 12], "<i8")
    header = b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + b"\x08" + (12).to_bytes(8, "little") + (5).to_bytes(8, "little")
    index, data = header + lengths.tobytes() + pointers.tobytes() + documents.tobytes(), tokens.tobytes()

    def write(index_now: bytes, data_now: bytes) -> None:
        for suffix, content in ((".idx", index_now), (".bin", data_now)):
            (folder / f"corpus{suffix}").unlink(missing_ok=True)  # a map of the last case may still be open
            (folder / f"corpus{suffix}").write_bytes(content)

    def read() -> list[list[int]]:
        dataset = MMapTokens(folder / "corpus")
        return [dataset.tokens(i).tolist() for i in range(len(dataset))]

    write(index, data)
    original = read()

    def changed(source: random.Random) -> tuple[bytes, bytes]:
        if source.random() < 0.1:
            return index, source.choice(
                (data[: source.randrange(len(data))], data + source.randbytes(source.randint(1, 9)), data * 2)
            )
        return mutated(index, source), data

    def judge(value: tuple[bytes, bytes]) -> str:
        write(*value)
        return SAME if read() == original else SILENT

    @st.composite
    def odd(draw: st.DrawFn) -> tuple[bytes, bytes]:
        """An index whose header and lengths are anything."""
        count = draw(st.sampled_from([1, 2, 3, 10**12, 2**63, 2**64 - 1]))
        entries = draw(st.sampled_from([1, 2, count % 2**64, 0, 10**12]))
        long = draw(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=3))
        body = np.array(long, "<i4").tobytes() + draw(st.binary(max_size=48))
        code = draw(st.integers(0, 9)).to_bytes(1, "little")
        return b"MMIDIDX\x00\x00" + b"".join(
            [
                (draw(st.integers(0, 2))).to_bytes(8, "little"),
                code,
                count.to_bytes(8, "little"),
                entries.to_bytes(8, "little"),
                body,
            ]
        ), data

    return Target("Megatron indices", 0.12, changed, judge, odd(), 0.2)


# -- feature caches ----------------------------------------------------------------------------------------------------


class _Heard(logging.Handler):
    """Counts warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1


def caches(folder: Path) -> Target:
    rng = np.random.default_rng(0)
    arrays: dict[str, Array] = {
        "quality": rng.random(30, np.float32),
        "vectors": rng.random((30, 4), np.float32),
        "counts": np.arange(9),
    }
    cache.store(folder, "ab", arrays)
    path = cache.path_of(folder, "ab")
    whole, heard = path.read_bytes(), _Heard()
    cache.log.addHandler(heard)

    def judge(data: bytes) -> str:
        path.write_bytes(data)
        before = heard.count
        found = cache.load(folder, "ab")
        if found is None:  # a cache only saves time: it is refused by a warning, and computed anew
            return REFUSED if heard.count == before + 1 else SILENT
        return SAME if equal(found, arrays) else SILENT

    return Target("feature caches", 0.07, lambda rng_of_case: mutated(whole, rng_of_case), judge)


def targets(folder: Path) -> list[Target]:
    """All targets of this module; their files go below ``folder``, which is emptied."""
    shutil.rmtree(folder, ignore_errors=True)
    return [
        schedules(folder / "schedules"),
        checkpoint(folder / "checkpoint"),
        *trusted(folder / "trusted"),
        id_files(folder / "ids"),
        tokenizers(folder / "tokenizer"),
        megatron(folder / "megatron"),
        caches(folder / "cache"),
    ]
