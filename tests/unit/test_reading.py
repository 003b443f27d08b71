"""Files that others have written: no link out of a run's folder, no allocation by a claim, no wait, no foreign error."""

from __future__ import annotations

import io
import os
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from grace_ds.config.load import load_config, read_ds_config, write_resolved
from grace_ds.data.schedule import load_book, load_schedule, put_aside, save_schedule
from grace_ds.errors import CheckpointError, ConfigError
from grace_ds.integrations.checkpoint import FOLDER, _folder
from grace_ds.integrations.checkpoint_state import MANIFEST
from grace_ds.monitor.metrics import keep_explanation
from grace_ds.monitor.trained import TrainedRecord, read_trained
from grace_ds.records import Schedule
from grace_ds.report.load import load_run
from grace_ds.utils import reading
from grace_ds.utils.files import folder_below, open_below, write_atomic
from grace_ds.utils.reading import opened, read_bytes, read_json, read_npy, read_npz, read_yaml


def schedule(version: int = 0) -> Schedule:
    ids = np.arange(8)
    return Schedule(version, 8 * version, ids, np.zeros(8, np.uint8), np.ones(8, np.float32), 1, {"batch": 4}, "run")


# -- links -------------------------------------------------------------------------------------------------------------


def test_no_link_below_a_root_is_followed_to_read_or_to_write(tmp_path: Path) -> None:
    root, outside = tmp_path / "run", tmp_path / "outside"
    (root / "in").mkdir(parents=True)
    outside.mkdir()
    (outside / "file").write_bytes(b"old")
    (root / "link").symlink_to(outside)
    (root / "in" / "file").symlink_to(outside / "file")
    (root / "in" / "twin").symlink_to(root / "in" / "other")  # also where it stays inside: nothing tells the two apart in time
    for path in (root / "link" / "file", root / "in" / "file", root / "in" / "twin"):
        with pytest.raises(OSError, match="symbolic link"):
            read_bytes(path, root=root)
        with pytest.raises(OSError, match="symbolic link"):
            os.close(open_below(root, path, os.O_WRONLY | os.O_CREAT))
    with pytest.raises(OSError, match="symbolic link"):
        write_atomic(root / "link" / "file", b"new", root=root)
    with pytest.raises(OSError, match="leads out"), folder_below(root, root / ".." / "outside"):
        pass
    write_atomic(root / "in" / "file", b"new", root=root)  # puts a file in the link's place
    assert (outside / "file").read_bytes() == b"old" and read_bytes(root / "in" / "file", root=root) == b"new"
    assert not (root / "in" / "other").exists() and sorted(p.name for p in outside.iterdir()) == ["file"]


def test_the_root_itself_may_be_a_link_and_folders_are_made(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    write_atomic(tmp_path / "run" / "a" / "b" / "file", b"x", root=tmp_path / "run")
    assert (tmp_path / "disk" / "a" / "b" / "file").read_bytes() == b"x"
    assert read_bytes(tmp_path / "run" / "a" / "b" / "file", root=tmp_path / "run") == b"x"
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        read_bytes(tmp_path / "run" / "a" / "b" / "file", root=tmp_path / "run")
        with pytest.raises(FileNotFoundError):
            read_bytes(tmp_path / "run" / "none" / "file", root=tmp_path / "run")
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_a_run_writes_goes_through_no_link_that_lies_in_its_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    victim, run = tmp_path / "victim", tmp_path / "run"
    victim.write_text("precious\n" * 20)
    run.mkdir()
    for name in ("trained.json", "grace_resolved.yaml", "refreshes.jsonl"):
        (run / name).symlink_to(victim)
    record = TrainedRecord(str(run))
    record.write(3, 12)
    record.close()
    assert "how far the run came cannot be kept" in caplog.text and read_trained(run) is None
    write_resolved(load_config({}), run)
    assert not (run / "grace_resolved.yaml").is_symlink()
    (tmp_path / "elsewhere").mkdir()
    (run / "reports").symlink_to(tmp_path / "elsewhere")
    keep_explanation({"version": 0, "samples": [], "used": False}, run / "reports", None, {})
    assert "no explanation of refresh 0 is kept" in caplog.text and not list((tmp_path / "elsewhere").iterdir())
    assert victim.read_text() == "precious\n" * 20


def test_schedules_behind_a_link_are_neither_read_nor_written_nor_renamed(tmp_path: Path) -> None:
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "run"
    path = save_schedule(schedule(), elsewhere)
    run.mkdir()
    (run / "schedules").symlink_to(elsewhere)
    for act in (
        lambda: load_schedule(run / "schedules" / path.name, run),
        lambda: load_book(run / "schedules", run),
    ):
        with pytest.raises(CheckpointError, match="symbolic link"):
            act()
    for write in (
        lambda: save_schedule(schedule(1), run / "schedules", run),
        lambda: put_aside(run / "schedules", schedule(), run),
    ):
        with pytest.raises(OSError, match="symbolic link"):
            write()
    assert [p.name for p in elsewhere.iterdir()] == [path.name]
    (run / "schedules").unlink()
    (run / "schedules").mkdir()
    (run / "schedules" / path.name).symlink_to(path)
    with pytest.raises(CheckpointError, match="symbolic link"):
        load_book(run / "schedules")


def test_a_tag_in_a_checkpoint_leads_to_no_other_folder_than_one_beside(tmp_path: Path) -> None:
    for name in ("saved/universal", "saved/step4", "private"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("saved/step4", "private", "saved"):
        (tmp_path / name / FOLDER).mkdir()
        (tmp_path / name / FOLDER / MANIFEST).write_text("{}")
    here = tmp_path / "saved" / "universal"
    assert _folder(here, {"tag": "step4"}) == tmp_path / "saved" / "step4" / FOLDER
    for tag in ("../private", str(tmp_path / "private"), "..", "", ".", "step4/../../private", 4):
        assert _folder(here, {"tag": tag}) == here / FOLDER, tag


# -- sizes and kinds ---------------------------------------------------------------------------------------------------


def test_only_regular_files_of_a_size_are_read_and_none_is_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match="no regular file"):
            read_bytes(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_ds_config(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"12345")
    assert read_bytes(tmp_path / "file", 5) == b"12345"
    with pytest.raises(OSError, match="5 bytes, and at most 4 are read"):
        read_bytes(tmp_path / "file", 4)
    with open(tmp_path / "large", "wb") as file:
        file.truncate(reading.SETTINGS + 1)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_ds_config(tmp_path / "large")
    with opened(tmp_path / "file", 5) as found:
        assert found.read() == b"12345"


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, b"\xff", "{"], ids=["lists", "objects", "digits", "no text", "torn"]
)
def test_json_is_read_or_a_value_error(tmp_path: Path, text: str | bytes) -> None:
    (tmp_path / "a.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)), "aliases"),
        ("a: &a [*a]", "aliases"),
        ("a: " + "[" * 60_000, "deep"),
        ("a: [1", "expected"),
    ],
    ids=["many", "itself", "deep", "torn"],
)
def test_a_small_yaml_file_that_stands_for_a_large_one_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=says):
        read_yaml(tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match=says):
        load_config({"file": str(tmp_path / "a.yaml")})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "grace_resolved.yaml").write_text(text)
    (tmp_path / "run" / "refreshes.jsonl").write_text("")
    assert any("grace_resolved.yaml cannot be read" in note for note in load_run(tmp_path / "run").notes)


def test_aliases_that_stand_for_little_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("ablate: &none []\nplugins: *none\nrefresh: {interval_steps: 7}\n")
    assert load_config({"file": str(tmp_path / "a.yaml")}).refresh.interval_steps == 7


# -- arrays ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=">i4").reshape(2, 3),
        np.asfortranarray(np.random.default_rng(0).random((3, 4))),
        np.array(["one", "three"]),
        np.zeros((0, 4), np.int8),
        np.array(True),
    ],
    ids=["big-endian", "Fortran", "texts", "empty", "scalar"],
)
def test_an_array_is_read_as_numpy_has_saved_it(tmp_path: Path, array: np.ndarray, mapped: bool) -> None:
    np.save(tmp_path / "a.npy", array)
    found = read_npy(tmp_path / "a.npy", mapped)
    assert found.dtype == array.dtype and found.shape == array.shape and (found == array).all()
    np.savez(tmp_path / "a.npz", x=array, y=np.arange(3))
    both = read_npz(tmp_path / "a.npz")
    assert list(both) == ["x", "y"] and (both["x"] == array).all() and both["x"].flags.writeable


def test_arrays_that_are_not_what_their_header_says_are_refused(tmp_path: Path) -> None:
    def npy(array: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=True)
        return buffer.getvalue()

    path, good = tmp_path / "a.npy", npy(np.arange(9))
    for data, says in (
        (good[:-1], "71 follow it"),
        (good + b"x", "73 follow it"),
        (npy(np.array([{}], object)), "numbers and texts"),
        (npy(np.zeros(3, [("a", "i4")])), "numbers and texts"),
        (good.replace(b"(9,)", b"(-9,"), "header"),
        (b"PK\x03\x04" + bytes(60), "header"),
        (b"", "header"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=says):
            read_npy(path)
    archive = tmp_path / "a.npz"
    np.savez_compressed(archive, x=np.zeros(100_000))
    with pytest.raises(ValueError, match="compressed"):
        read_npz(archive)
    with zipfile.ZipFile(archive, "w") as file, pytest.warns(UserWarning):
        file.writestr("x.npy", good)
        file.writestr("x.npy", good)
    with pytest.raises(ValueError, match="twice"):
        read_npz(archive)


# -- interpolations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "${oc.env:HOME}",
        "a/${ oc.env : HOME }/b",
        "${oc.decode:'${oc.env:HOME}'}",
        "${oc.${mode}:HOME}",
        "${oc.create:x}",
        "${oc.env:${mode}}",
        "\\${oc.env:HOME}",
    ],
)
def test_the_environment_is_read_only_where_it_is_asked_for(text: str, tmp_path: Path) -> None:
    for block in ({"run_dir": text}, {"collect": {"layers": ["a", text]}}, {"run_dir": text, "resolvers": ["another"]}):
        with pytest.raises(ConfigError, match="calls the resolver .* not asked for: add it to .*resolvers"):
            load_config(block)
    (tmp_path / "block.yaml").write_text(f'run_dir: "{text}"\n'.replace("\\", "\\\\"))
    with pytest.raises(ConfigError, match="calls the resolver"):
        load_config({"file": str(tmp_path / "block.yaml")})
    with pytest.raises(ConfigError, match=r"calls the resolver|cannot be read"):
        load_config({}, dotlist=[f"run_dir='{text}'"])


def test_what_is_asked_for_and_keys_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", "/data")
    config = load_config({"run_dir": "${oc.env:WHERE}/a", "replay": "${run_dir}/b", "resolvers": ["oc.env"]})
    assert config.run_dir == "/data/a" and config.replay == "/data/a/b"
    assert load_config({"run_dir": "${oc.env:WHERE}/a"}, dotlist=["resolvers=[oc.env]"]).run_dir == "/data/a"
    assert load_config({"trusted": "a", "run_dir": "${trusted}/b"}).run_dir == "a/b"


def test_interpolations_cannot_grow_without_end() -> None:
    keys = ("trusted", "run_dir", "replay", "tokenizer", "mode", "comm")
    bomb = {a: f"${{{b}}}" * 100 for a, b in pairwise(keys)}
    with pytest.raises(ConfigError, match="holds 500 interpolations; it must be at most 20"):
        load_config(bomb)
    with pytest.raises(ConfigError, match="has 5000 characters; it must be at most 4096"):
        load_config({"run_dir": "a" * 5000})


def test_a_run_dir_of_another_person_reads_nothing_of_the_readers_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "labels.npy", np.arange(4))
    monkeypatch.setenv("LABELS", str(tmp_path / "labels.npy"))
    (tmp_path / "refreshes.jsonl").write_text("")
    config = tmp_path / "grace_resolved.yaml"
    config.write_text("resolvers: [oc.env]\nselection: {sources: '${oc.env:LABELS}'}\n")
    run = load_run(tmp_path)
    assert run.sources is None and any("${oc.env:LABELS}, cannot be read from here" in note for note in run.notes)
    config.write_text(f"replay: {tmp_path}\nselection: {{sources: '${{replay}}/labels.npy'}}\n")
    assert load_run(tmp_path).sources is not None
