"""Two thousand DeepSpeed configs, each valid until one thing in it was changed: an error of ours, or just what was written."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import hjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz.configs import BLOCK, WHOLE, as_written, one_changed, resolve
from grace_ds.config.load import find_block
from grace_ds.errors import ConfigError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_the_config_that_nothing_was_changed_in_is_taken_at_its_word(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(WHOLE))
    resolved = resolve(tmp_path / "ds.json")
    assert resolved is not None and as_written(BLOCK, resolved)


@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(one_changed())
def test_a_mutated_config_is_refused_by_our_error_or_taken_at_its_word(config: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ds.json"
        path.write_text(json.dumps(config))
        try:
            resolved = resolve(path)
        except ConfigError as error:
            assert len(str(error)) > 20
            return
        found = find_block(hjson.loads(path.read_text()))
        assert (found is None) == (resolved is None)
        if found is not None:
            assert resolved is not None and as_written(found[1], resolved)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_file_with_bytes_changed_is_read_or_refused_by_our_error(data: st.DataObject) -> None:
    text = bytearray(json.dumps(WHOLE, indent=1).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(text)), st.integers(0, len(text))))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ds.json"
        path.write_bytes(bytes(text[:cut]))
        try:
            resolve(path)
        except ConfigError as error:
            assert len(str(error)) > 20
