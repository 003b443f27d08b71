"""Imported by every Python process that ``grace-ds run COMMAND`` starts, before anything else: prepares it for GRACE.

An environment may have a ``sitecustomize`` of its own, which this one hides: it runs first, and stays the module of that name.
An error in either is shown by Python, as it shows every error at its start, and the process goes on.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from pathlib import Path

_HERE = Path(__file__).parent


def _run_hidden() -> None:
    """Run the ``sitecustomize`` that this one hides, if there is one."""
    spec = PathFinder.find_spec(__name__, sys.path)
    if spec is not None and spec.loader is not None:
        module = module_from_spec(spec)
        sys.modules[__name__] = module
        spec.loader.exec_module(module)


def _prepare() -> None:
    """Prepare this process, unless its interpreter has no GRACE, as one may that the job starts for something else."""
    if find_spec("grace_ds") is not None:
        from grace_ds.run import prepare_child

        prepare_child()


sys.path[:] = [entry for entry in sys.path if Path(entry) != _HERE]
try:
    _run_hidden()
finally:
    _prepare()
