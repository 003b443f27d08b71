"""Reading a checkpoint's manifest: whoever can write it must not choose what is opened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grace_ds.errors import CheckpointError
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
