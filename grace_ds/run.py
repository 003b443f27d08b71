"""Run an unchanged training script with GRACE: ``deepspeed --module grace_ds.run [--progress] [--grace FILE] train.py …``.

With ``--progress`` rank 0 prints the state of the run once a minute; ``grace-ds run --progress`` draws it instead.  ``--grace``
names a file with the grace block, for scripts whose DeepSpeed config is a dict in code.

Inside the script ``deepspeed.initialize`` is :func:`grace_ds.initialize`, and a ``transformers.Trainer`` is attached to by
itself.  The script's own DeepSpeed config, or ``--grace``, decides whether GRACE is on.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from types import TracebackType

from grace_ds.cli.commandline import in_one_line, print_grace_error, wants_debug
from grace_ds.config.block_file import GIVEN
from grace_ds.integrations.unchanged import prepare_process

_USAGE = "usage: deepspeed --module grace_ds.run [--progress] [--grace FILE] train.py [arguments]"


def run_script(script: str, arguments: list[str]) -> None:
    """Run ``script`` as ``__main__``, in a process that is prepared for it.

    Raises:
        SystemExit: the script does not exist, or exits itself.
    """
    if not Path(script).is_file():
        raise SystemExit(f"grace_ds.run: no script {script!r}; {_USAGE}")
    prepare_process()
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
    launchers: list[str] = []
    while arguments[:1] and arguments[0].startswith("-"):
        option = arguments.pop(0)
        if option == "--progress":
            from grace_ds.monitor.progress import LINES, VARIABLE

            os.environ.setdefault(VARIABLE, LINES)
        elif option == "--grace" and arguments:
            os.environ[GIVEN] = arguments.pop(0)
        else:
            launchers.append(option)
    if not arguments:
        raise SystemExit(_USAGE)
    run_script(arguments[0], launchers + arguments[1:])


def prepare_child() -> None:
    """Prepare a process that ``grace-ds run COMMAND`` has started, directly or not; its errors of GRACE are one line."""
    prepare_process()
    before = sys.excepthook

    def shown(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if wants_debug([]) or not print_grace_error("grace_ds", error):
            before(kind, error, traceback)

    sys.excepthook = shown


if __name__ == "__main__":
    # Errors of grace_ds are printed as one line; the script's own errors keep their traceback.
    sys.exit(in_one_line("grace_ds", main, wants_debug([]), ours_only=True))
