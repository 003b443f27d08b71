"""How far a better filter could take the system: its content prior, told what it would have to find out."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.selection.arms.base import View
from benchmarks.selection.arms.system import SystemArm
from grace_ds.quickstart.pollute import Kind

CEILINGS = ("prior_unique",)


class PriorUnique(SystemArm):
    """The recipe ``prior`` with every copy and all junk known and left out: what a filter of any kind could add to it.

    ``prior`` ranks what is left as it always does.  What this arm gains over ``prior`` bounds what finding more of the junk
    can bring, by gradients or otherwise; it does not bound what another ranking of the unique rows could.
    """

    name = "prior"

    def begin(self, engine: Any) -> None:
        """Attaches the system with the rows to leave out in a file, as its config takes them."""
        with tempfile.TemporaryDirectory(prefix="ceiling-") as folder:
            self.block["selection"] = {"exclude": str(excluded(self.view, Path(folder)))}
            super().begin(engine)


def excluded(view: View, folder: Path) -> Path:
    """A file in ``folder`` of the ids that are not unique rows."""
    path = folder / "exclude.npy"
    np.save(path, np.flatnonzero(view.kinds != Kind.UNIQUE))
    return path
