"""Corpora as megatron-core and DeepSpeed write them: read back token for token, and refused where the index is damaged."""

from __future__ import annotations

import collections
import pickle
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from grace_ds.data import MMapTokens
from grace_ds.data import megatron_index as index_module
from grace_ds.data.tokens import TokenReader
from grace_ds.errors import ConfigError, DataError

TOP = {"int16": 2**15, "uint16": 2**16, "int32": 150_000, "int64": 150_000, "uint64": 150_000}  # above the largest id
# The header's fields: from which byte to which.
HEADER = {"magic": (0, 9), "version": (9, 17), "code": (17, 18), "sequences": (18, 26), "entries": (26, 34)}


def documents(tokens: int, dtype: str, seed: int = 0, longest: int = 2000) -> list[list[np.ndarray]]:
    """Documents of 1 to 3 sequences, of ``tokens`` tokens or some more; the type's extremes are among them."""
    rng = np.random.default_rng(seed)
    out, total = [], 0
    while total < tokens:
        out.append([rng.integers(0, TOP[dtype], rng.integers(1, longest)) for _ in range(rng.choice([1, 1, 1, 2, 3]))])
        total += sum(map(len, out[-1]))
    out[0][0][0], out[-1][-1][-1] = TOP[dtype] - 1, 0
    return out


def by_megatron(prefix, docs, dtype):
    why = "megatron-core is not installed (the extra megatron)"
    module = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason=why)
    builder = module.IndexedDatasetBuilder(f"{prefix}.bin", dtype=getattr(np, dtype))
    for doc in docs:
        builder.add_document(np.concatenate(doc), [len(part) for part in doc])
    builder.finalize(f"{prefix}.idx")


def by_deepspeed(prefix, docs, dtype):
    from deepspeed.runtime.data_pipeline.data_sampling.indexed_dataset import MMapIndexedDatasetBuilder

    builder = MMapIndexedDatasetBuilder(f"{prefix}.bin", dtype=getattr(np, dtype))
    for doc in docs:
        for part in doc:
            builder.add_item_numpy(part)
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


def by_hand(prefix, lengths=(3, 1), code=4, dtype="int32", *, pointers=None, docs=None, tokens=None, tail=b"", **header):
    """A pair of files of the given parts; by default a good one of two documents."""
    size = np.dtype(dtype).itemsize
    pointers = [sum(lengths[:i]) * size for i in range(len(lengths))] if pointers is None else pointers
    docs = range(len(lengths) + 1) if docs is None else docs
    head = {"magic": b"MMIDIDX\x00\x00", "version": 1, "sequences": len(lengths), "entries": len(docs)} | header
    raw = head["magic"] + struct.pack("<QBQQ", head["version"], code, head["sequences"], head["entries"])
    raw += np.array(lengths, "<i4").tobytes() + np.array(pointers, "<i8").tobytes() + np.array(docs, "<i8").tobytes() + tail
    prefix.with_suffix(".idx").write_bytes(raw)
    prefix.with_suffix(".bin").write_bytes(np.array(range(sum(lengths)) if tokens is None else tokens, dtype).tobytes())


def differs(corpus: MMapTokens, pieces: MMapTokens, sequences: list[np.ndarray]) -> bool:
    """Whether any item of either view, or their number, is not what ``sequences`` say."""
    flat = np.concatenate(sequences)
    wanted = [flat[a : a + pieces.length + 1] for a in range(0, len(flat) - pieces.length, pieces.length)]
    return not (
        len(corpus) == len(sequences)
        and len(pieces) == len(wanted)
        and all(np.array_equal(corpus.tokens(i), row) for i, row in enumerate(sequences))
        and all(np.array_equal(pieces.tokens(i), row) for i, row in enumerate(wanted))
    )


CORPORA = [
    (by_megatron, "int32"),
    (by_megatron, "uint16"),
    (by_deepspeed, "int32"),
    (by_deepspeed, "uint16"),
]


@pytest.mark.parametrize(("build", "dtype"), [*CORPORA, (by_deepspeed, "int64"), (by_deepspeed, "uint64")])
def test_a_million_tokens_come_back(tmp_path, build, dtype):
    docs = documents(1_000_000, dtype)
    build(tmp_path / "c", docs, dtype)
    sequences = [part for doc in docs for part in doc]
    corpus, pieces = MMapTokens(tmp_path / "c"), MMapTokens(tmp_path / "c.idx", length=1024)
    assert (corpus.layout.dtype, corpus.layout.sequences, corpus.layout.entries) == (dtype, len(sequences), len(docs) + 1)
    assert corpus.layout.total == sum(map(len, sequences)) >= 1_000_000
    assert not differs(corpus, pieces, sequences)


def spans(sequences: int, entries: int) -> dict[str, tuple[int, int]]:
    a, b = 34 + 4 * sequences, 34 + 12 * sequences
    return HEADER | {"lengths": (34, a), "pointers": (a, b), "documents": (b, b + 8 * entries)}


def damage(raw: bytes, kind: str, span: tuple[int, int], rng: np.random.Generator) -> bytes:
    """``raw`` with one flipped byte, 1 to 16 bytes put in or taken out in ``span``, or the end lost from there."""
    at = int(rng.integers(*span))
    n = int(rng.integers(1, 17))
    if kind == "flip":
        return raw[:at] + bytes([raw[at] ^ int(rng.integers(1, 256))]) + raw[at + 1 :]
    if kind == "insert":
        return raw[:at] + rng.bytes(n) + raw[at:]
    return raw[:at] + (raw[at + n :] if kind == "delete" else b"")


@pytest.mark.parametrize(("build", "dtype"), [*CORPORA, (by_deepspeed, "int16")])
def test_a_damaged_index_is_refused_or_harmless(tmp_path, build, dtype):
    """500 damages a corpus.  Each must end in a DataError, on opening or on reading an item, or in all of: the number of
    sequences, every sequence, the number of fixed-length items and every one of these are the original's.  Any other
    exception fails.  Harmless are: a type code whose tokens are the same numbers, and an inner entry of the document
    index that is still in order, which no item depends on.
    """
    docs = documents(600, dtype, seed=1, longest=30)
    build(tmp_path / "c", docs, dtype)
    sequences = [part for doc in docs for part in doc]
    index = tmp_path / "c.idx"
    raw = index.read_bytes()
    fields = spans(len(sequences), len(docs) + 1)
    assert fields["documents"][1] == len(raw)
    rng = np.random.default_rng(7)
    silent, counts = [], collections.Counter()
    for i in range(500):
        field, kind = list(fields)[i % 8], ("flip", "flip", "insert", "truncate", "delete")[i // 8 % 5]
        mutant = damage(raw, kind, fields[field], rng)
        assert mutant != raw
        index.write_bytes(mutant)
        try:
            wrong = differs(MMapTokens(tmp_path / "c"), MMapTokens(tmp_path / "c", length=16), sequences)
        except DataError:
            counts["refused", field] += 1
            continue
        counts["harmless", field] += 1
        if wrong:
            silent.append((i, field, kind))
    assert silent == []
    assert {field for what, field in counts if what == "harmless"} <= {"code", "documents"}
    assert {field for what, field in counts if what == "refused"} == set(fields)


@pytest.mark.parametrize(("build", "dtype"), CORPORA)
def test_every_type_code_is_refused_or_harmless(tmp_path, build, dtype):
    docs = documents(600, dtype, seed=1, longest=30)
    build(tmp_path / "c", docs, dtype)
    sequences = [part for doc in docs for part in doc]
    index = tmp_path / "c.idx"
    raw = bytearray(index.read_bytes())
    harmless = set()
    for code in range(256):
        raw[17] = code
        index.write_bytes(raw)
        try:
            wrong = differs(MMapTokens(tmp_path / "c"), MMapTokens(tmp_path / "c", length=16), sequences)
        except DataError:
            continue
        assert not wrong, code
        harmless.add(code)
    assert harmless == ({4} if dtype == "int32" else {6, 8})  # either library's uint16; int16 (3) shows as a negative id


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"magic": b"TNTIDX\x00\x00\x00"}, r"begins with b'TNTIDX.*--dataset-impl mmap"),
        ({"version": 2}, "version 2, and only 1"),
        ({"code": 9}, "code 9 is none of"),
        ({"sequences": 0, "lengths": [], "docs": [0]}, "0 sequences"),
        ({"sequences": 3}, "has 82 bytes, and 3 sequences with 3 document index entries need 94"),
        ({"entries": 2**63}, "9223372036854775808 document index entries need"),
        ({"tail": b"\x00"}, "has 83 bytes"),
        ({"tail": b"\x00\x00"}, "2 bytes of modes: a multimodal"),
        ({"lengths": [5, -1]}, "sequence 1 has length -1"),
        ({"lengths": [0, 0]}, "all 2 sequences are empty"),
        ({"tokens": range(3)}, r"has 12 bytes, and the 4 tokens of its index need 16 \(int32\)"),
        ({"code": 6, "dtype": "int32"}, r"need 32 \(float64\) or 8 \(uint16\)"),
        ({"pointers": [0, 8]}, "sequence 1 begins at byte 8, and those before it end at 12"),
        ({"pointers": [4, 12]}, "sequence 0 begins at byte 4"),
        ({"docs": [1, 1, 2]}, "runs from 1 to 2, not from 0 to its 2"),
        ({"docs": [0, 1, 3]}, "runs from 0 to 3"),
        ({"docs": [0, 1]}, "end_document"),
        ({"docs": [0, 3, 2]}, "falls from 3 to 2 at entry 2"),
        ({"code": 7}, "float32 if megatron-core wrote it and uint32 if DeepSpeed did.*pass dtype='uint32'"),
        ({"code": 6, "dtype": "float64"}, "holds float64: token ids are integers"),
    ],
)
def test_refusals_tell_the_reason(tmp_path, parts, says):
    by_hand(tmp_path / "c")
    assert len(MMapTokens(tmp_path / "c")) == 2
    by_hand(tmp_path / "c", **parts)
    with pytest.raises(DataError, match=says):
        MMapTokens(tmp_path / "c")


def test_deepspeed_corpus_whose_documents_were_never_ended(tmp_path):
    from deepspeed.runtime.data_pipeline.data_sampling.indexed_dataset import MMapIndexedDatasetBuilder

    builder = MMapIndexedDatasetBuilder(str(tmp_path / "c.bin"), dtype=np.int32)
    for row in ([3, 1, 4], [1, 5]):
        builder.add_item_numpy(np.array(row))
    builder.finalize(str(tmp_path / "c.idx"))
    corpus = MMapTokens(tmp_path / "c")
    assert [corpus.tokens(i).tolist() for i in range(len(corpus))] == [[3, 1, 4], [1, 5]]


def test_missing_and_short_files(tmp_path):
    by_hand(tmp_path / "c")
    (tmp_path / "c.idx").write_bytes((tmp_path / "c.idx").read_bytes()[:20])
    with pytest.raises(DataError, match="20 bytes, fewer than its header's 34"):
        MMapTokens(tmp_path / "c")
    (tmp_path / "c.bin").unlink()
    with pytest.raises(DataError, match=r"c\.bin is not a file.*--data-path"):
        MMapTokens(tmp_path / "c")


def test_errors_beyond_the_first_block_of_the_index(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "BLOCK", 2)
    lengths = [3, 1, 4, 1, 5, 0, 2]
    by_hand(tmp_path / "c", lengths)
    assert [len(MMapTokens(tmp_path / "c").tokens(i)) for i in range(7)] == lengths
    by_hand(tmp_path / "c", [3, 1, 4, 1, -5, 0, 2])
    with pytest.raises(DataError, match="sequence 4 has length -5"):
        MMapTokens(tmp_path / "c")
    by_hand(tmp_path / "c", lengths, pointers=[0, 12, 16, 32, 36, 56, 60])
    with pytest.raises(DataError, match="sequence 6 begins at byte 60, and those before it end at 56"):
        MMapTokens(tmp_path / "c")
    for docs, says in ([0, 1, 2, 4, 3, 7], "from 4 to 3 at entry 4"), ([0, 1, 3, 2, 4, 7], "from 3 to 2 at entry 3"):
        by_hand(tmp_path / "c", lengths, docs=docs)
        with pytest.raises(DataError, match=says):
            MMapTokens(tmp_path / "c")


def test_an_ambiguous_type_can_be_told(tmp_path):
    by_hand(tmp_path / "c", code=7, dtype="uint32", tokens=[2**32 - 1, 0, 1, 2])
    assert MMapTokens(tmp_path / "c", dtype="uint32").tokens(0).tolist() == [2**32 - 1, 0, 1]
    with pytest.raises(DataError, match="'int32', and .* says float32 or uint32"):
        MMapTokens(tmp_path / "c", dtype="int32")
    with pytest.raises(DataError, match="holds float32"):
        MMapTokens(tmp_path / "c", dtype="float32")


def test_a_negative_token_is_refused_where_it_is_read(tmp_path):
    by_hand(tmp_path / "c", tokens=[1, 2, 3, -100])
    corpus = MMapTokens(tmp_path / "c")
    assert corpus.tokens(0).tolist() == [1, 2, 3]
    with pytest.raises(DataError, match="token -100 in item 1, read as int32"):
        corpus[1]


def test_pieces_of_the_stream(tmp_path):
    by_hand(tmp_path / "c", [4, 5])
    pieces = MMapTokens(tmp_path / "c", length=4)
    assert [pieces.tokens(i).tolist() for i in range(len(pieces))] == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
    pieces = MMapTokens(tmp_path / "c", length=4, overlap=0)
    assert [item["input_ids"].tolist() for item in pieces] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(MMapTokens(tmp_path / "c", length=3)) == 2  # the third would lack its label
    assert len(MMapTokens(tmp_path / "c", length=3, overlap=0)) == 3
    with pytest.raises(DataError, match="9 tokens, fewer than one item of 9 \\+ 1"):
        MMapTokens(tmp_path / "c", length=9)
    for bad in {"length": 0}, {"length": 4, "overlap": -1}, {"length": 4, "overlap": 5}:
        with pytest.raises(ConfigError, match=" is (0|-1|5)"):
            MMapTokens(tmp_path / "c", **bad)


def test_items_and_indices(tmp_path):
    by_hand(tmp_path / "c", [3, 0, 1], 5, "int64")  # of the items' own type: no conversion that would make the copy
    corpus = MMapTokens(tmp_path / "c.bin")
    assert corpus[0]["input_ids"].dtype == torch.int64
    assert [row.tolist() for row in map(corpus.tokens, (0, 1, -1, np.int64(2)))] == [[0, 1, 2], [], [3], [3]]
    assert len(list(corpus)) == 3
    for i in 3, -4:
        with pytest.raises(IndexError, match=f"item {i} of 3"):
            corpus[i]
    row = corpus.tokens(0)
    row[0] = 7  # a copy
    assert corpus.tokens(0).tolist() == [0, 1, 2]
    block = TokenReader(corpus).all()
    assert (block.flat.tolist(), block.offsets.tolist()) == ([0, 1, 2, 3], [0, 3, 3, 4])


def test_a_prefix_with_a_dot(tmp_path):
    by_hand(tmp_path / "c")
    for suffix in ".idx", ".bin":
        (tmp_path / f"c{suffix}").rename(tmp_path / f"c.v1{suffix}")
    assert len(MMapTokens(str(tmp_path / "c.v1"))) == len(MMapTokens(tmp_path / "c.v1.bin")) == 2


def test_the_corpus_is_neither_copied_nor_pickled(tmp_path):
    docs = documents(1_000_000, "int32")
    by_deepspeed(tmp_path / "c", docs, "int32")
    tracemalloc.start()
    try:
        pieces = MMapTokens(tmp_path / "c", length=1024)
        pieces[len(pieces) - 1]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 400_000  # the .bin has 4 MB
    state = pickle.dumps(pieces)
    assert len(state) < 1000
    again = pickle.loads(state)
    assert len(again) == len(pieces)
    assert torch.equal(again[5]["input_ids"], pieces[5]["input_ids"])
    with open(tmp_path / "c.bin", "ab") as file:
        file.write(b"\x00")
    with pytest.raises(DataError, match="leave a corpus in use alone"):
        pickle.loads(state)


def test_a_spawned_worker_reads_the_same(tmp_path):
    by_hand(tmp_path / "c", [40, 25])
    pieces = MMapTokens(tmp_path / "c", length=8)
    loader = DataLoader(pieces, batch_size=4, num_workers=1, multiprocessing_context="spawn")
    read = torch.cat([batch["input_ids"] for batch in loader])
    assert read.tolist() == [list(range(a, a + 9)) for a in range(0, 64, 8)]
