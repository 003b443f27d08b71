"""Reading a checkpoint's manifest: whoever can write it must not choose what is opened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grace_ds.errors import CheckpointError, DamagedState
from grace_ds.integrations.checkpoint_state import MANIFEST, SCHEMA, read_saved
from grace_ds.utils.files import digest


@pytest.mark.parametrize(
    "name",
    [
        "schedule-../../secret",
        "schedule-000001/../../secret.safetensors",
        "window-/../../secret.safetensors",
        "rows-b0000-b0001.safetensors/..",
        "other.safetensors",
    ],
)
def test_a_name_that_leads_elsewhere_is_refused_before_anything_is_opened(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "grace"
    folder.mkdir()
    secret = tmp_path / "secret"
    secret.write_bytes(b"x")
    manifest = json.dumps({"schema": SCHEMA, "files": {name: digest(b"x")}}).encode()
    (folder / MANIFEST).write_bytes(manifest)
    with pytest.raises(CheckpointError, match="unknown file"):
        read_saved(folder, {"schema": SCHEMA, "manifest": digest(manifest)}, 0, 1, 8)


def test_a_manifest_that_is_not_the_one_that_was_named_is_not_read(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(b"{}")
    with pytest.raises(DamagedState, match="does not match its digest"):
        read_saved(tmp_path, {"schema": SCHEMA, "manifest": digest(b"{ }")}, 0, 1, 8)


@pytest.mark.parametrize(("schema", "cure"), [(SCHEMA + 1, "newer grace_ds"), (SCHEMA - 1, "with the grace_ds that wrote it")])
@pytest.mark.parametrize("outside", [True, False])
def test_another_schema_is_refused_wherever_it_stands(tmp_path: Path, schema: int, cure: str, outside: bool) -> None:
    manifest = json.dumps({"schema": schema, "files": {}}).encode()
    (tmp_path / MANIFEST).write_bytes(manifest)
    with pytest.raises(CheckpointError, match=cure):
        read_saved(tmp_path, {"schema": schema if outside else SCHEMA, "manifest": digest(manifest)}, 0, 1, 8)
