"""How far a better filter could take the system: its content filter, told what it would have to find out."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from grace_ds_quickstart.pollute import Kind

from benchmarks.selection.arms.base import View
from benchmarks.selection.arms.system import SystemArm

CEILINGS = ("content_unique",)


class ContentUnique(SystemArm):
    """The recipe ``content`` with every copy and all junk known and left out: what a filter of any kind could add to it.

    ``content`` ranks what is left as it always does.  What this arm gains over ``content`` bounds what finding more of the junk
    can bring, by gradients or otherwise; it does not bound what another ranking of the unique rows could.
    """

    name = "content"

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
