"""Files that are whole or absent, for whom the umask says."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from grace_ds.utils.files import write_atomic


@pytest.mark.parametrize(
    ("mask", "private", "mode"), [(0o022, False, 0o644), (0o077, False, 0o600), (0o002, False, 0o664), (0, True, 0o600)]
)
def test_who_may_read_a_file_the_umask_says(tmp_path: Path, mask: int, private: bool, mode: int) -> None:
    target = tmp_path / "file.json"
    target.write_text("old")
    target.chmod(0o666)
    before = os.umask(mask)
    try:
        write_atomic(target, b"new", private)
    finally:
        os.umask(before)
    assert stat.S_IMODE(target.stat().st_mode) == mode
    assert target.read_bytes() == b"new" and list(tmp_path.iterdir()) == [target]


def test_what_cannot_be_written_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "folder" / "in the way").mkdir(parents=True)
    with pytest.raises(OSError):
        write_atomic(tmp_path / "folder", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
