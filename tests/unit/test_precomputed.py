"""A folder of features that was made for something else is refused, and the message says what differs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grace_ds.data.pool import Pool
from grace_ds.data.tokens import TokenReader
from grace_ds.errors import ConfigError, DataError
from grace_ds.features.precomputed import FILE, MOST_BYTES, Manifest, check_precomputed, first_window
from tests.unit.test_features_content import N, corpus, quality_model


def manifest(
    rows: Any = None, dim: int = 32, seed: int = 3, trusted: Any = "model", window: int = 50, start: int = 0
) -> Manifest:
    reader = TokenReader(rows if rows is not None else corpus())
    pool = Pool(N, window, 0.2, 5, 8, seed)
    return Manifest.of(reader, dim, seed, quality_model() if trusted == "model" else trusted, first_window(pool, start))


def test_what_was_made_for_a_job_serves_it(tmp_path: Path) -> None:
    manifest().write(tmp_path)
    check_precomputed(tmp_path, manifest())
    check_precomputed(tmp_path, manifest(dim=0))  # without a graph
    check_precomputed(tmp_path, manifest(trusted=None))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": corpus(seed=1)}, "corpus"),
        ({"dim": 64}, "features.dim: 32 there, 64 here"),
        ({"seed": 4}, "seed: 3 there, 4 here"),
        ({"window": 60}, "first window .*: 50 samples .* there, 60 samples"),
        ({"start": 10}, "first window"),
    ],
)
def test_what_was_made_for_something_else_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    manifest().write(tmp_path)
    with pytest.raises(ConfigError, match=rf"features\.precomputed.*{said}.*run grace-ds features"):
        check_precomputed(tmp_path, manifest(**change))


def test_another_trusted_set_or_edition_is_refused(tmp_path: Path) -> None:
    manifest(trusted=None).write(tmp_path)
    with pytest.raises(ConfigError, match="trusted set .*: none there"):
        check_precomputed(tmp_path, manifest())
    dataclasses.replace(manifest(), recipe=1).write(tmp_path)
    with pytest.raises(ConfigError, match="edition of the features: 1 there"):
        check_precomputed(tmp_path, manifest())
    dataclasses.replace(manifest(dim=0)).write(tmp_path)
    with pytest.raises(ConfigError, match="dim: 0 there, 32 here"):
        check_precomputed(tmp_path, manifest())


def test_a_fingerprint_does_not_depend_on_the_form_of_the_items() -> None:
    as_arrays = [np.array(row, np.int64) for row in corpus()]
    as_dicts = [{"input_ids": row, "labels": row} for row in corpus()]
    first, *rest = (manifest(rows) for rows in (corpus(), as_arrays, as_dicts))
    assert rest == [first, first]
    assert TokenReader(corpus(), max_tokens=9).token_fingerprint() != TokenReader(corpus()).token_fingerprint()
    assert TokenReader(corpus(), separator=7).token_fingerprint() != TokenReader(corpus()).token_fingerprint()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "nonsense", "[" * 100_000, '{"recipe": 6}', "x" * (MOST_BYTES + 1), "\udcff"],
)
def test_a_damaged_manifest_is_told_with_its_cure(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=r"features\.json is damaged .*: run grace-ds features again"):
        check_precomputed(tmp_path, manifest())


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Manifest)])
def test_a_manifest_of_other_types_is_refused(tmp_path: Path, name: str) -> None:
    found = dataclasses.asdict(manifest())
    for value in (None, 1.5, True, [True], {"a": 1}):
        (tmp_path / FILE).write_text(json.dumps({**found, name: value}))
        with pytest.raises((DataError, ConfigError)):
            check_precomputed(tmp_path, manifest())


def test_no_folder_is_told_with_its_cure(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file.*grace-ds features has written"):
        check_precomputed(tmp_path / "absent", manifest())
