"""Transports between the ranks: the protocol, and adapters for one process, MPI and torch.distributed.

Read ``base.py`` for the calls that a stage may make, ``framing.py`` for how the ranks are kept in step, and ``choose.py``
for which adapter a job gets.  Importing this package imports neither MPI nor torch.
"""

from grace_ds.comm.base import Comm, ReduceOp

__all__ = ["Comm", "ReduceOp"]
