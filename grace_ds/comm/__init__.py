"""Transports between the ranks: the protocol, and adapters for one process, MPI and torch.distributed.

Read ``base.py`` for what the stages may ask, ``_framing.py`` for how it is kept in step, ``choose.py`` for which
adapter a job gets.  Importing this package imports neither MPI nor torch.
"""

from grace_ds.comm.base import Comm, ReduceOp

__all__ = ["Comm", "ReduceOp"]
