"""``grace-ds trace`` tells the samples that a run trained on, and none that it did not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from grace_ds.cli.main import main
from grace_ds.cli.trace import Shown, trace
from grace_ds.data.schedule import save_schedule
from grace_ds.errors import DataError, GraceError
from grace_ds.monitor.metrics import Recorder
from grace_ds.monitor.trained import TrainedRecord, read_trained
from grace_ds.records import Role, Schedule

BATCH = 4


def schedule(version: int, start: int, ids: list[int], **meta: object) -> Schedule:
    roles = np.full(len(ids), Role.CORE, np.uint8)
    roles[-2:] = Role.EXPLORE, Role.AUDIT
    facts = {"batch": BATCH, "window": 100, "coreset": len(ids), "decided_at_step": start // BATCH, "objective": "sample", **meta}
    return Schedule(version, start, np.array(ids, np.int64), roles, np.full(len(ids), 0.5, np.float32), 1, facts, "a run")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of 5 steps: 2 in uniform order, then of a coreset; with a report of two of its samples, and a map."""
    folder = tmp_path / "run"
    save_schedule(schedule(0, 0, list(range(8)), objective="uniform"), folder / "schedules")
    chosen = schedule(1, 8, list(range(50, 66)), drawn_by="grace", guard={"reason": "effective share 0.32"})
    save_schedule(chosen, folder / "schedules")
    weighed = {
        "id": 50,
        "group": "chosen",
        "chance": 0.4,
        "factors": {"quality": 0.9, "copies": 0.5},
        "signals": {"quality": 0.9, "density": 1.0, "loss": None, "influence": None},
        "role": "core",
        "text": "def first():\n    return \x1b[31m1",
    }
    report = {"version": 1, "step": 2, "level": "grace", "used": True, "histograms": {}, "samples": [weighed]}
    (folder / "reports").mkdir()
    (folder / "reports" / "report-000001.json").write_text(json.dumps(report))
    chart = {"version": 1, "step": 2, "window": 100, "used": True, "level": "grace", "explained": [0.5, 0.2], "ids": [51]}
    chart |= {"x": [0.0], "y": [0.0], "chance": [-1.0], "influence": [0.7], "chosen": [True], "shown": [{"tokens": [7, 8]}]}
    (folder / "reports" / "map.json").write_text(json.dumps(chart))
    record = TrainedRecord(str(folder))
    record.write(5, 5 * BATCH)
    record.close()
    return folder


def samples(where: Path, step: int, shown: Shown | None = None) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(trace(str(where), step, shown, as_json=True))["samples"]
    return found


def test_steps_of_the_run_are_told_and_no_other(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [s["id"] for s in samples(run_dir, 4)] == [58, 59, 60, 61]
    for step in (5, 6, 10**9):
        assert main(["trace", str(run_dir), "--step", str(step)]) == 1
        said = capsys.readouterr()
        assert f"step {step} was never trained on" in said.err and "below" in said.err and said.out == ""


def test_without_a_record_the_schedules_are_the_end_and_it_is_said(run_dir: Path) -> None:
    (run_dir / "trained.json").unlink()
    assert "has not recorded how far it trained" in trace(str(run_dir), 5)
    with pytest.raises(GraceError, match="beyond the last schedule.*below 6"):
        trace(str(run_dir), 6)


def test_a_checkpoint_tells_by_its_manifest(run_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint" / "grace_ds"
    save_schedule(schedule(1, 8, list(range(50, 66))), folder)
    (folder / "manifest.json").write_text(json.dumps({"step": 3, "cursor": 12}))
    for where in (folder, folder.parent):
        assert [s["id"] for s in samples(where, 2)] == [50, 51, 52, 53]
        assert "goes on from it" not in trace(str(where), 2)
        ahead = "The checkpoint is of step 3: a run that goes on from it trains on these samples, unless it refreshes before."
        assert [s["id"] for s in samples(where, 3)] == [54, 55, 56, 57] and ahead in trace(str(where), 3, width=200)
        with pytest.raises(GraceError, match="beyond the last schedule"):
            trace(str(where), 6)
        with pytest.raises(GraceError, match="before the first schedule"):
            trace(str(where), 1)


def test_reason_and_text_are_those_that_the_run_has_kept(run_dir: Path) -> None:
    first, second, third, _ = samples(run_dir, 2)
    assert "quality 0.90" in str(first["reason"]) and "1 near-duplicates" in str(first["reason"])
    assert str(first["text"]).startswith("def first()")
    assert second["reason"] == "chosen: chance 0.1 of the likeliest sample's, influence +0.7 deviations from the trusted"
    assert second["text"] == "token ids 7 8"
    assert (third["reason"], third["text"]) == ("chosen", None)
    assert {s["reason"] for s in samples(run_dir, 0)} == {"nothing was chosen: uniform order"}
    text = trace(str(run_dir), 2, width=60)
    assert "\x1b" not in text  # a sample's text does not steer the terminal
    assert max(map(len, text.splitlines())) <= 60
    assert "Of 2 of 4 samples the run has kept no text; --data FILE" in text
    assert "schedule 1, made at step 2" in text and "effective share 0.32" in text


@pytest.mark.parametrize("form", ["text.jsonl", "tokens.jsonl", "tokens.npy"])
def test_the_dataset_tells_the_text_of_every_sample(run_dir: Path, tmp_path: Path, form: str) -> None:
    data, few = tmp_path / form, tmp_path / f"few-{form}"
    for file, count in ((data, 100), (few, 52)):
        if form == "tokens.npy":
            np.save(file, np.arange(count)[:, None] + np.array([0, 1000]))
        else:
            rows = [{"text": f"sample {i}"} if form == "text.jsonl" else {"input_ids": [i, i + 1000]} for i in range(count)]
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = [s["text"] for s in samples(run_dir, 2, Shown(data))]
    assert told == [f"sample {i}" if form == "text.jsonl" else f"token ids {i} {i + 1000}" for i in range(50, 54)]
    with pytest.raises(DataError, match="few.*cannot be used|few.*has no sample 52"):
        trace(str(run_dir), 2, Shown(few))
    with pytest.raises(DataError, match=r"gone\.jsonl cannot be used \(No such file"):
        trace(str(run_dir), 2, Shown(tmp_path / "gone.jsonl"))


def test_a_quickstarts_folder_is_taken_with_its_data(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "quickstart"
    (out / "grace").mkdir(parents=True)
    run_dir.rename(out / "grace" / "grace")
    (out / "data").mkdir()
    np.save(out / "data" / "train.npy", np.arange(300).reshape(100, 3))
    for where in (out, out / "grace", out / "grace" / "grace", out / "grace" / "grace" / "schedules"):
        assert samples(where, 3)[0]["text"] == "token ids 162 163 164"


def test_a_shadow_run_and_a_growing_batch_are_told_for_what_they_are(run_dir: Path) -> None:
    (run_dir / "grace_resolved.yaml").write_text("mode: shadow\n")
    assert "the job trained in its own order" in trace(str(run_dir), 2)
    save_schedule(schedule(2, 24, list(range(8)), batch=2 * BATCH), run_dir / "schedules")
    with pytest.raises(GraceError, match="batch has changed"):
        trace(str(run_dir), 2)


def test_the_record_holds_the_last_step_of_a_run_that_was_killed(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\nfrom grace_ds.monitor.metrics import Recorder\n"
        "recorder = Recorder(sys.argv[1], None)\n"
        "[recorder.trained(step, 8 * step) for step in [*range(1, 120_000, 997), 7]]\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "new")], env=dict(os.environ), check=False)
    assert done.returncode == -signal.SIGKILL
    found = read_trained(tmp_path / "new")
    assert found is not None and (found.step, found.position) == (7, 56)  # a run resumed at an earlier step goes back


def test_a_record_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    recorder = Recorder(str(tmp_path / "file"), None)
    for step in range(3):
        recorder.trained(step, step)
    recorder.close()
    recorder.close()
    assert sum("how far the run came cannot be kept" in r.message for r in caplog.records) == 1
    assert read_trained(tmp_path / "file") is None


@pytest.mark.parametrize("batch", [None, 0, -4, 4.0, True, "4", 10**12])
def test_a_schedule_that_says_no_step_a_command_could_list_is_refused(run_dir: Path, batch: object) -> None:
    save_schedule(schedule(2, 24, list(range(8)), batch=batch), run_dir / "schedules")
    with pytest.raises(GraceError, match=r"schedule 2 .* says that a step has"):
        trace(str(run_dir), 1)


def test_no_control_character_of_a_file_reaches_the_terminal(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_schedule(
        schedule(2, 24, list(range(8)), drawn_by="\x1b]0;title\x07", guard={"reason": "\x1b[2J"}), run_dir / "schedules"
    )
    TrainedRecord(str(run_dir)).write(9, 36)
    assert main(["trace", str(run_dir), "--step", "6"]) == 0
    odd = Schedule(3, 32, np.arange(8), np.zeros(8, np.uint8), np.ones(8, np.float32), 1, {"batch": BATCH}, "\x1b[31mrun")
    save_schedule(odd, run_dir / "schedules")
    assert main(["trace", str(run_dir), "--step", "6"]) == 1
    said = capsys.readouterr()
    assert "mixes the schedules of two runs" in said.err and "31mrun" in said.err and "2J" in said.out
    assert "\x1b" not in said.out + said.err and "\x07" not in said.out


def test_records_of_the_wrong_form_are_told_in_one_line(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run_dir / "reports" / "report-000001.json"
    whole = json.loads(report.read_text())
    report.write_text(json.dumps({**whole, "samples": [{**whole["samples"][0], "factors": 7}]}))
    assert main(["trace", str(run_dir), "--step", "2"]) == 1
    assert "holds records that cannot be shown (TypeError" in capsys.readouterr().err
