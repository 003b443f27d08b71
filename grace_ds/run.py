"""Run an unchanged training script with GRACE: ``deepspeed --module grace_ds.run [--progress] train.py …``.

With ``--progress`` rank 0 prints the state of the run once a minute; ``grace-ds run --progress`` draws it instead.

Inside the script ``deepspeed.initialize`` is :func:`grace_ds.initialize`; the script's own DeepSpeed config still decides
whether GRACE is on.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from grace_ds.cli.commandline import in_one_line, wants_debug

_USAGE = "usage: deepspeed --module grace_ds.run [--progress] train.py [arguments]"


def run_script(script: str, arguments: list[str]) -> None:
    """Run ``script`` as ``__main__`` with ``deepspeed.initialize`` replaced.

    Raises:
        SystemExit: the script does not exist, or exits itself.
    """
    if not Path(script).is_file():
        raise SystemExit(f"grace_ds.run: no script {script!r}; {_USAGE}")
    import deepspeed

    from grace_ds.integrations import deepspeed as integration

    integration.replace_initialize(deepspeed)
    sys.argv = [script, *arguments]
    # The script's own folder comes first, as with ``python train.py``.
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")


def main() -> None:
    """Run the script named on the command line; the entry point of ``python -m grace_ds.run``.

    The launcher puts ``--local_rank=N`` before or after the script's arguments.

    Raises:
        SystemExit: no script is named, or as :func:`run_script`.
    """
    arguments = sys.argv[1:]
    script_at = next((i for i, argument in enumerate(arguments) if not argument.startswith("-")), None)
    if script_at is None:
        raise SystemExit(_USAGE)
    options = [argument for argument in arguments[:script_at] if argument != "--progress"]
    if len(options) < script_at:
        from grace_ds.monitor.progress import LINES, VARIABLE

        os.environ.setdefault(VARIABLE, LINES)
    run_script(arguments[script_at], options + arguments[script_at + 1 :])


if __name__ == "__main__":
    # Errors of grace_ds are printed as one line; the script's own errors keep their traceback.
    sys.exit(in_one_line("grace_ds", main, wants_debug([]), ours_only=True))
