"""The live view over jobs that know nothing of it, on a real pseudo-terminal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from grace_ds.monitor import progress
from grace_ds.monitor.progress import LossReader
from tests.terminal import on_terminal

FACTS: dict[str, Any] = {
    "step": 1200,
    "steps": 4000,
    "loss": 3.25,
    "step_seconds": 0.125,
    "version": 2,
    "chosen": True,
    "coreset": 4000,
    "window": 20000,
    "age": 200,
    "next": 300,
    "failures": 0,
    "refresh_share": 0.012,
    "collect_share": 0.003,
    "level": "content",
    "reason": "the whole recipe",
    "frozen": False,
    "shadow": False,
}
OURS = "import sys; from grace_ds.cli.launch import supervise; from grace_ds.cli.live import Screen\n"
OURS += "with Screen() as s: status = supervise([sys.executable, '-c', sys.argv[1]], s.environment, s.streams)\n"
OURS += "sys.exit(status)"
TELL = "import os, sys, time\nfrom grace_ds.monitor import progress as p\n"
TELL += f"p._sender(os.environ[p.VARIABLE])[0]({FACTS!r})\n"


def view(job: str, **options: Any) -> Any:
    return on_terminal([sys.executable, "-c", OURS, job], {}, timeout=60, **options)


def test_the_view_says_what_was_told_and_the_jobs_lines_stay_above_it() -> None:
    pictures: list[str] = []
    job = TELL + "for i in range(60): print('line', i, flush=True); time.sleep(0.02)\nsys.exit(3)"
    seen = view(job, act=lambda child, lines: pictures.append("\n".join(lines)))
    assert seen.status == 3 and seen.whole
    # In order, each once, nothing in between: the view leaves no trace among them.
    assert [line for line in seen.lines if line][:60] == [f"line {i}" for i in range(60)]
    end = "\n".join(seen.lines)
    assert end.count(" GRACE ") == 1 and "ended" in end
    for said in ("step 1,200/4,000", "loss 3.25", "schedule 2: 4,000 of 20,000 samples, 200 steps old", "in 300 steps"):
        assert said in end and any(said in picture for picture in pictures)
    assert "overhead 1.5% (refreshes 1.2%, collect 0.3%)" in end and "guard content: the whole recipe" in end


def test_colours_bars_and_torn_bytes_pass_through() -> None:
    job = (
        "import sys, time, os\nassert sys.stdout.isatty() and os.get_terminal_size().columns == 100\n"
        "print('\\x1b[31mred\\x1b[0m plain')\n"
        "for i in range(5): print(f'\\rbar {i}', end='', flush=True); time.sleep(0.4)\n"
        "print()\nprint('other line end', end='\\r\\n')\nsys.stdout.flush()\n"
        "sys.stdout.buffer.write(b'\\xff\\xfe torn\\n' + 'ünï'.encode() + b'\\n'); sys.stderr.write('unended')"
    )
    bars: set[str] = set()
    seen = view(job, act=lambda child, lines: bars.update(line.strip() for line in lines if line.startswith("bar ")))
    assert seen.status == 0 and seen.whole
    assert "red plain" in seen.lines and b"\x1b[31mred" in seen.raw
    assert len(bars) >= 3 and seen.lines.count("bar 4") == 1 and "bar 3" not in seen.lines
    assert "other line end" in seen.lines
    assert "ünï" in seen.lines and "unended" in seen.lines and any(line.endswith(" torn") for line in seen.lines)
    assert "ended before GRACE was attached" in "\n".join(seen.lines)


def test_ctrl_c_and_a_flood_of_output_leave_the_terminal_whole() -> None:
    """What the job says while it goes must be taken off its hands, or it would never be able to go."""
    job = TELL + (
        "print('ready', flush=True)\ntry: time.sleep(60)\n"
        "except KeyboardInterrupt:\n  for i in range(3000): print('x' * 90)\n  print('gone', flush=True)\n  sys.exit(5)"
    )
    asked: list[int] = []

    def interrupt(child: subprocess.Popen[bytes], lines: list[str]) -> None:
        if "ready" in map(str.strip, lines) and not asked:
            asked.append(1)
            child.send_signal(signal.SIGINT)

    seen = view(job, act=interrupt)
    assert asked and seen.status == 130 and seen.whole
    assert seen.lines.count("x" * 90) == 3000 and "gone" in seen.lines


def test_narrow_lines_are_cut_and_silence_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    from grace_ds.cli.live import Screen

    screen = Screen()
    screen.facts = {**FACTS, "reason": "word " * 200, "next": 0}
    screen._last_message -= 30
    with screen.console.capture() as taken:
        screen.console.print(screen._view())
    shown = taken.get().splitlines()
    assert len(shown) == 5 and all(len(line) <= screen.console.width for line in shown)
    assert "last word 30 s ago" in shown[1] and "refreshing now" in shown[2]


def test_a_plain_line_says_the_same() -> None:
    said = progress.line({**FACTS, "loss": None, "next": None, "frozen": True, "shadow": True, "chosen": False, "failures": 2})
    for part in ("step 1,200/4,000", "the whole pool, uniform order", "no further refresh, 2 given up", "frozen", "shadow mode"):
        assert part in said
    assert "loss" not in said and "\n" not in said
    json.dumps(FACTS)


def test_a_loss_is_read_only_when_it_is_told() -> None:
    class Counted(torch.Tensor):
        reads = 0

        def __float__(self) -> float:
            Counted.reads += 1
            return super().__float__()

    reader, loss = LossReader(), torch.tensor(2.5, requires_grad=True).as_subclass(Counted)
    assert reader.read() is None
    reader.offer(torch.ones(3))  # per-sample losses of a job are not one
    assert reader.read() is None
    for _ in range(50):
        reader.offer(loss)
    assert Counted.reads == 0
    assert reader.read() == 2.5 and Counted.reads == 1


def test_nobody_listening_costs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    where = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(where)
        say, every = progress._sender(where)
        assert every < 1
        for _ in range(3000):  # nobody takes them: the buffer is full long before the end
            say(FACTS)
        assert json.loads(server.recv(65536)) == FACTS
    say(FACTS)  # refused
    os.unlink(where)
    say(FACTS)  # gone
    say, every = progress._sender(where)  # on another host than the one that draws
    say(FACTS)
    assert every >= 60 and capsys.readouterr().out.startswith("grace: step 1,200/4,000")
