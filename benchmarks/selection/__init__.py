"""Selection against its rivals: arms × pools × seeds at equal optimizer steps, with every arm's own cost counted in.

A pool is text of this machine with junk and near-duplicates in stated shares; an arm says which samples a step trains on. Each
run is a process of its own (``python -m benchmarks.selection.job``); one that was finished before with the same settings,
sources and libraries is taken from --out. Losses are those of the dev rows; --final takes the test rows, which nothing was
chosen by.
"""

from benchmarks.selection.matrix import add_arguments, run

__all__ = ["add_arguments", "run"]
