"""A Dask scheduler in a process of its own; started by :mod:`grace_ds.graph.dask.cluster`, never by hand.

It shares no loop and no GIL with a worker (with them it has deadlocked), is told its credentials over its standard input,
which nobody else can read, prints its address as one line, and ends when its standard input does: when the job is gone,
however it went.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from typing import Any


async def _serve(told: dict[str, Any]) -> None:
    from distributed import Scheduler
    from distributed.security import Security

    security = Security(require_encryption=True, **told["security"])
    logging.getLogger("distributed").setLevel(logging.WARNING)
    host, nowhere = told["host"], "127.0.0.1:0"
    async with Scheduler(
        host=host, port=0, protocol="tls", security=security, dashboard=False, dashboard_address=nowhere
    ) as scheduler:
        print(scheduler.address, flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        await scheduler.close()


def main() -> int:
    """Reads the settings, serves until standard input ends."""
    import dask

    told = json.loads(sys.stdin.readline())
    with dask.config.set(told["dask"]):
        asyncio.run(_serve(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
