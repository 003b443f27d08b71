"""Every command says what it does, and a mistake in one line: what, the value and the cure; ``--debug`` says where."""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import grace_ds
from grace_ds.cli import main as cli
from grace_ds.cli.commandline import BUG, PIPE, Parser, amount, count, in_one_line, positive, spell_out
from grace_ds.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CLI = [sys.executable, "-m", "grace_ds.cli.main"]
QUICKSTART = [sys.executable, "-m", "grace_ds_quickstart"]
BENCHMARKS = [sys.executable, "-m", "benchmarks"]


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, env=env)


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.strip().splitlines()
    assert done.returncode != 0, done.stdout
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return lines[0]


MISTAKES = {
    "no such command": ([*CLI, "plna"], "did you mean plan?"),
    "no such option of all": ([*CLI, "--debgu", "config"], "did you mean --debug?"),
    "trace: typo": ([*CLI, "trace", "runs", "--stpe", "3"], "did you mean --step?"),
    "trace: bad value": ([*CLI, "trace", "runs", "--step", "soon"], "'soon' is not a whole number"),
    "trace: missing file": ([*CLI, "trace", "/nowhere", "--step", "3"], "/nowhere"),
    "trace: no folder": ([*CLI, "trace", "/nowhere", "--step", "3"], "there is no folder /nowhere"),
    "trace: nothing given": ([*CLI, "trace"], "--step"),
    "doctor: typo": ([*CLI, "doctor", "--share", "/tmp", "--rnaks", "2"], "did you mean --ranks?"),
    "plan: no ranks": ([*CLI, "plan", "--samples", "1e6", "--ranks", "0"], "must be 1 or more"),
    "plan: too many repeats": ([*CLI, "plan", "--samples", "1e5", "--ranks", "8", "--steps", "2e4"], "above max_repeats 4.0"),
    "doctor: bad value": ([*CLI, "doctor", "--parameters", "many"], "'many' is not a number above 0"),
    "config: typo": ([*CLI, "config", "--markdwon"], "did you mean --markdown?"),
    "config: a word too many": ([*CLI, "config", "budget"], "one word too many"),
    "plan: typo": ([*CLI, "plan", "--samples", "1e6", "--rank", "2", "--intervall", "3"], "did you mean --interval?"),
    "plan: bad value": ([*CLI, "plan", "--samples", "1.5", "--ranks", "2"], "'1.5' is not a whole number"),
    "plan: impossible value": ([*CLI, "plan", "--samples", "1e6", "--ranks", "2", "--budget", "7"], "in (0, 1]"),
    "plan: unknown key": ([*CLI, "plan", "--samples", "1e6", "--ranks", "2", "--set", "budgte=1"], "did you mean 'budget'?"),
    "report: typo": ([*CLI, "report", "runs", "--terminl"], "did you mean --terminal?"),
    "report: missing folder": ([*CLI, "report", "/nowhere"], "/nowhere does not exist"),
    "report: a file": ([*CLI, "report", str(Path(__file__))], "is a file, not the folder of a run"),
    "report: another folder": ([*CLI, "report", str(ROOT / "docs")], "give the folder that run_dir names"),
    "run: typo of ours": ([*CLI, "run", "--prempt-dir", "x", "train.py"], "did you mean --preempt-dir?"),
    "run: no script": ([*CLI, "run"], "no script given"),
    "run: missing file": ([*CLI, "run", "nowhere.py"], "nowhere.py"),
    "run: no folder": ([*CLI, "run", "--preempt-dir"], "needs the folder"),
    "grace_ds.run: missing file": ([sys.executable, "-m", "grace_ds.run", "nowhere.py"], "nowhere.py"),
    "quickstart: typo": ([*QUICKSTART, "--stpes", "3"], "did you mean --steps?"),
    "quickstart: bad choice": ([*QUICKSTART, "--pool", "crwal"], "did you mean crawl?"),
    "quickstart: bad value": ([*QUICKSTART, "--ranks", "0"], "must be 1 or more"),
    "quickstart: no such folder": ([*QUICKSTART, "--out", "/proc/nowhere"], "/proc/nowhere"),
    "benchmarks: no such benchmark": ([*BENCHMARKS, "colect"], "did you mean collect?"),
    "benchmarks: typo": ([*BENCHMARKS, "collect", "--piars", "3"], "did you mean --pairs?"),
    "benchmarks: bad value": ([*BENCHMARKS, "soak", "--minutes", "few"], "few"),
    "benchmarks: no such folder": ([*BENCHMARKS, "soak", "--json", "/proc/nowhere/file"], "/proc/nowhere"),
    "launch/mpirun.sh: nothing given": (["bash", "launch/mpirun.sh"], "usage: "),
    "launch/mpirun.sh: bad value": (["bash", "launch/mpirun.sh", "two", "--", "train.py"], "usage: "),
    "launch/deepspeed.sh: no script": (["bash", "launch/deepspeed.sh", "--"], "usage: "),
    "launch/megatron.sh: missing file": (["bash", "launch/megatron.sh", "nowhere.yaml"], "usage: "),
    "launch/slurm/train.sbatch: not under Slurm": (["bash", "launch/slurm/train.sbatch", "train.py"], "sbatch"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_line(mistake: str) -> None:
    command, piece = MISTAKES[mistake]
    assert piece in one_line(run(command, SLURM_JOB_ID=""))


@pytest.mark.parametrize(
    "command",
    [
        [*CLI, "trace", "/nowhere", "--step", "3", "--debug"],
        [*CLI, "--debug", "report", "/nowhere"],
        [*CLI, "plan", "--samples", "1e6", "--ranks", "2", "--budget", "7", "--debug"],
        [*CLI, "run", "--debug", "--prempt-dir", "x", "train.py"],
        [*QUICKSTART, "--debug", "--out", "/proc/nowhere"],
        [*BENCHMARKS, "soak", "--json", "/proc/nowhere/file", "--debug"],
    ],
    ids=lambda c: " ".join(c[2:4]),
)
def test_debug_shows_where_an_error_comes_from(command: list[str]) -> None:
    done = run(command)
    assert done.returncode != 0
    assert "Traceback (most recent call last)" in done.stderr


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{' '.join(CLI)} config | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = run(["bash", "-c", command])
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] in ("0", str(PIPE))


# -- scripts of the user's ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("debug", ["", "1"])
def test_an_error_of_ours_in_a_script_is_one_line_unless_debug(tmp_path: Path, debug: str) -> None:
    script = tmp_path / "train.py"
    script.write_text("from grace_ds.errors import ConfigError\nraise ConfigError('budget is 7: give less')\n")
    done = run([sys.executable, "-m", "grace_ds.run", str(script)], GRACE_DS_DEBUG=debug, DS_ACCELERATOR="cpu")
    assert done.returncode == 1
    assert ("Traceback" in done.stderr) == bool(debug)
    assert done.stderr.strip().splitlines()[-1].endswith("budget is 7: give less")


def test_a_scripts_own_error_keeps_its_traceback_and_its_exit_status(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    for text, status in (("1 / 0", 1), ("raise SystemExit(75)", 75)):
        script.write_text(text)
        done = run([sys.executable, "-m", "grace_ds.run", str(script)], DS_ACCELERATOR="cpu")
        assert done.returncode == status
        assert ("ZeroDivisionError" in done.stderr) == (status == 1)


# -- the pieces --------------------------------------------------------------------------------------------------------


def boom(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ConfigError("a\nb"), 1, "p: a b\n"),
        (PermissionError(13, "Permission denied", "/x/y"), 1, "p: /x/y: Permission denied\n"),
        (KeyboardInterrupt(), 130, "p: interrupted\n"),
        (ZeroDivisionError("division by zero"), BUG, "p: ZeroDivisionError: division by zero; this was not foreseen"),
        (ModuleNotFoundError("No module named 'rich'", name="rich"), 1, "p: rich is not installed"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_what_is_raised_becomes_one_line(
    error: BaseException, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert in_one_line("p", lambda: boom(error), debug=False) == status
    assert capsys.readouterr().err.startswith(said)


def test_what_is_not_ours_can_be_let_through(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError):
        in_one_line("p", lambda: boom(ZeroDivisionError()), debug=False, ours_only=True)
    assert in_one_line("p", lambda: None, debug=False) == 0


def test_numbers_of_a_command_line() -> None:
    assert (count("1e8"), count("0"), positive("3"), amount("1.3e9")) == (100_000_000, 0, 3, 1.3e9)
    assert (count("100M"), count("1.1k"), amount("7B"), amount("0.5t")) == (100_000_000, 1_100, 7e9, 5e11)
    wrong = ("-1", "1.5", "x", "inf", "nan", "", "M", "1.23456k", "1e999")
    for kind, words in ((count, wrong), (positive, ("0",)), (amount, ("0", "-2", "nan", "inf", "x", "B", "7Q"))):
        for word in words:
            with pytest.raises(argparse.ArgumentTypeError):
                kind(word)


def test_options_of_run_go_to_the_front_and_the_scripts_own_stay_where_they_are() -> None:
    words = ["--num_gpus", "2", "--debug", "--preempt-dir=here", "train.py", "--debug", "--preempt-dir", "there"]
    assert cli._own_options_first(words) == ["--preempt-dir", "here", "--num_gpus", "2", *words[4:]]


# -- a terminal without Unicode ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0"}], ids=str)
def test_a_terminal_without_unicode_is_no_error(environment: dict[str, str]) -> None:
    done = run([*CLI, "trace", "/nöwhere×", "--step", "3"], **environment)
    assert done.returncode == 1 and "there is no folder /n" in one_line(done)
    assert "Unicode" not in done.stderr


@pytest.mark.parametrize(
    "command",
    [["--help"], ["run", "--help"], ["config"], ["plan", "--samples", "1e6", "--ranks", "8", "--gflops", "50"]],
    ids=" ".join,
)
def test_a_terminal_without_unicode_gets_every_word(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    for encoding in ("utf-8", "ascii"):
        screen = io.TextIOWrapper(io.BytesIO(), encoding)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", screen)
            try:
                assert cli.main(command) == 0
            except SystemExit as left:
                assert left.code == 0
        screen.seek(0)
        told.append(screen.read())
    there, plain = told
    assert plain.isascii() and len(plain.splitlines()) == len(there.splitlines())
    assert plain.count("?") == there.count("?")  # no character without a look-alike


def test_what_ascii_lacks_is_spelt_out() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    spell_out(stream)
    stream.write("2 × 3 → 10⁹ é ┏━┓ “5 %” – … ≤ 你")
    stream.seek(0)
    assert stream.read() == '2 x 3 -> 109 e +-+ "5 %" - ... <= ?'
    kept = io.TextIOWrapper(io.BytesIO(), "ascii", "ignore")  # asked for by PYTHONIOENCODING=ascii:ignore
    spell_out(kept)
    assert kept.errors == "ignore"


# -- help --------------------------------------------------------------------------------------------------------------


def parsers() -> Iterator[argparse.ArgumentParser]:
    top = cli.parser()
    yield top
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


def test_the_command_alone_shows_its_help_and_tells_its_version() -> None:
    alone, asked, version = run(CLI), run([*CLI, "--help"]), run([*CLI, "--version"])
    assert alone.returncode == asked.returncode == version.returncode == 0
    assert alone.stdout == asked.stdout and alone.stderr == ""
    assert version.stdout == f"grace_ds {grace_ds.__version__}\n"


def test_help_of_run_lists_the_options_that_run_takes() -> None:
    said = run([*CLI, "run", "--help"]).stdout
    assert all(f"\n  {option}" in said for option in cli._OWN_OPTIONS)


def test_help_fits_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    for parser in parsers():
        words = parser.format_help().split("\nexamples:\n")[0]  # a command is not cut
        assert max(map(len, words.splitlines())) <= 60, parser.prog


def test_the_public_names_are_those_that_dir_shows() -> None:
    assert dir(grace_ds) == sorted(grace_ds.__all__)
    assert all(getattr(grace_ds, name) for name in dir(grace_ds))


@pytest.mark.parametrize("parser", parsers(), ids=lambda p: p.prog)
def test_help_says_what_a_command_does_how_and_what_each_option_means(parser: argparse.ArgumentParser) -> None:
    assert isinstance(parser, Parser)
    assert parser.description and len(parser.description) > 40
    assert parser.epilog is not None and parser.prog.split()[0] in parser.epilog
    for action in parser._actions:
        assert action.help or isinstance(action, argparse._SubParsersAction), f"{parser.prog} {action.dest} has no help"
    assert "  grace-ds" in parser.format_help()


@pytest.mark.parametrize(
    "command", [QUICKSTART, [*BENCHMARKS], *([*BENCHMARKS, n] for n in ("collect", "selection", "soak"))], ids=str
)
def test_help_of_the_others_has_an_example_and_a_word_on_every_option(command: list[str]) -> None:
    done = run([*command, "--help"], COLUMNS="120")
    assert done.returncode == 0, done.stderr
    assert "examples:\n  python -m " in done.stdout
    options = done.stdout.split("options:\n")[1].split("examples:")[0].splitlines()
    for at, line in enumerate(options):
        if line.startswith("  --"):
            told = "  " in line.strip() or (at + 1 < len(options) and options[at + 1].startswith("      "))
            assert told, f"no help: {line}"


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "launch").glob("*.sh") if p.name != "common.sh"))
def test_help_of_a_launch_script_starts_nothing(script: str, tmp_path: Path) -> None:
    done = run(["bash", f"launch/{script}", "--help"], GRACE_VENV=str(tmp_path / "venv"))
    assert done.returncode == 0
    assert len(done.stdout) > 60 and not done.stdout.startswith("#")
    assert not (tmp_path / "venv").exists()
