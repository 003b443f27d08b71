"""Runs an unchanged training script with GRACE: ``deepspeed --module grace_ds.run [--progress] train.py …``.

With ``--progress`` rank 0 prints a line a minute on how the run stands; ``grace-ds run --progress`` draws it.

Inside the script ``deepspeed.initialize`` is :func:`grace_ds.initialize`; whether GRACE is on is still decided by the
script's own DeepSpeed config.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from grace_ds.cli.commandline import in_one_line, wants_debug

_USAGE = "usage: deepspeed --module grace_ds.run [--progress] train.py [arguments]"


def run_script(script: str, arguments: list[str]) -> None:
    """Runs ``script`` as ``__main__`` with ``deepspeed.initialize`` replaced.

    Raises:
        SystemExit: the script does not exist, or exits itself.
    """
    if not Path(script).is_file():
        raise SystemExit(f"grace_ds.run: no script {script!r}; {_USAGE}")
    import deepspeed

    from grace_ds.integrations import deepspeed as integration

    integration.replace_initialize(deepspeed)
    sys.argv = [script, *arguments]
    # As ``python train.py`` would have it: the script's own folder first.
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")


def main() -> None:
    """Entry of ``python -m grace_ds.run``.  The launcher puts ``--local_rank=N`` before or after the script's arguments."""
    arguments = sys.argv[1:]
    at = next((i for i, a in enumerate(arguments) if not a.startswith("-")), None)
    if at is None:
        raise SystemExit(_USAGE)
    first = [a for a in arguments[:at] if a != "--progress"]
    if len(first) < at:
        from grace_ds.monitor.progress import LINES, VARIABLE

        os.environ.setdefault(VARIABLE, LINES)
    run_script(arguments[at], first + arguments[at + 1 :])


if __name__ == "__main__":
    # Errors of ours are one line; the script's own are the script's to show.
    sys.exit(in_one_line("grace_ds", main, wants_debug([]), ours_only=True))
