"""Count what a rank sends: the one place that knows what a message and a byte of a transport are.

A message is a piece of data for one other rank; empty pieces, and those that stay on the rank, are none.  Bytes are those of
the pieces, headers of :mod:`grace_ds.comm.framing` included; what a network adds is not.  Exchanges are counted as they are.
For sums and broadcasts, which the library below splits up, the algorithm of gloo counts: a ring (Patarasuk & Yuan 2009,
doi:10.1016/j.jpdc.2008.09.002), and a binomial tree.  MPI chooses its own, by size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Traffic:
    """What one rank has sent to others.

    Attributes:
        calls: of the transport's primitives, each of which waits for all ranks.
        messages: pieces for another rank that were not empty.
        bytes: in them.
    """

    calls: int = 0
    messages: int = 0
    bytes: int = 0

    def since(self, before: Traffic) -> Traffic:
        """Return what was sent after ``before``."""
        return Traffic(self.calls - before.calls, self.messages - before.messages, self.bytes - before.bytes)

    def copy(self) -> Traffic:
        """Return the present state, which later calls do not change."""
        return Traffic(self.calls, self.messages, self.bytes)

    def add(self, more: Traffic) -> None:
        """Add ``more`` to this."""
        self.calls, self.messages, self.bytes = self.calls + more.calls, self.messages + more.messages, self.bytes + more.bytes

    def equal_pieces(self, size: int, piece: int) -> None:
        """Count one exchange of ``piece`` bytes, not 0, to each of ``size`` ranks, this one included."""
        self._count(size - 1, (size - 1) * piece)

    def pieces(self, rank: int, counts: Sequence[int]) -> None:
        """Count one exchange of ``counts[p]`` bytes to rank p, by rank ``rank``."""
        self._count(len(counts) - counts.count(0) - (counts[rank] > 0), sum(counts) - counts[rank])

    def ring(self, rank: int, size: int, items: int, itemsize: int) -> None:
        """Count one sum of ``items`` numbers over ``size`` ranks, by rank ``rank``.

        The numbers are cut into a chunk for each rank.  In the first round of the ring a rank passes all chunks on but the one
        after its own, which it completes; in the second all but the one after that.
        """
        kept = [_chunk(rank + 1, size, items), _chunk(rank + 2, size, items)] if size > 1 else [items, items]
        filled = min(size, items)
        self._count(2 * filled - sum(chunk > 0 for chunk in kept) if size > 1 else 0, (2 * items - sum(kept)) * itemsize)

    def tree(self, rank: int, size: int, root: int, payload: int) -> None:
        """Count one broadcast of ``payload`` bytes by ``root`` to ``size`` ranks, at rank ``rank``.

        Counted from the root, rank v passes the whole on to each rank v + 2^i with 2^i > v.
        """
        place = (rank - root) % size
        children = sum(place < 1 << i < size - place for i in range(size.bit_length()))
        self._count(children if payload else 0, children * payload)

    def _count(self, messages: int, payload: int) -> None:
        self.calls, self.messages, self.bytes = self.calls + 1, self.messages + messages, self.bytes + payload


def _chunk(at: int, size: int, items: int) -> int:
    """Return the numbers in chunk ``at`` modulo ``size`` of a sum of ``items`` numbers."""
    at %= size
    return items * (at + 1) // size - items * at // size
