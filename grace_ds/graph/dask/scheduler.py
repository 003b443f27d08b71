"""Run a Dask scheduler in its own process; started by :mod:`grace_ds.graph.dask.cluster`, never by hand.

It shares no event loop and no GIL with a worker (sharing them has deadlocked).  It reads its credentials from its standard
input, which no other process can read, and prints its address as one line.  It ends when its standard input does: when the
job is gone, for any reason.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from typing import Any


async def _serve(settings: dict[str, Any]) -> None:
    from distributed import Scheduler
    from distributed.security import Security

    security = Security(require_encryption=True, **settings["security"])
    logging.getLogger("distributed").setLevel(logging.WARNING)
    host, nowhere = settings["host"], "127.0.0.1:0"
    async with Scheduler(
        host=host, port=0, protocol="tls", security=security, dashboard=False, dashboard_address=nowhere
    ) as scheduler:
        print(scheduler.address, flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        await scheduler.close()


def main() -> int:
    """Read the settings, and serve until standard input ends."""
    import dask

    settings = json.loads(sys.stdin.readline())
    with dask.config.set(settings["dask"]):
        asyncio.run(_serve(settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
