"""Runs the forms, started by the deepspeed launcher."""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.multirank.forms import FORMS


@dataclass
class FormResult:
    """What a form came to on this rank."""

    found: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    log: str = ""


def main() -> None:
    """Runs every form in its order: ``python -m tests.multirank.forms OUT FOLDER [NAME ...]``; writes OUT/RANK.json."""
    import logging

    import deepspeed
    import torch.distributed as dist

    from grace_ds.errors import GraceError

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("grace_ds").addHandler(handler)
    logging.getLogger("grace_ds").setLevel(logging.INFO)
    gc.freeze()  # what has been imported is not looked through after every form
    told: dict[str, Any] = {}
    wanted = sys.argv[3:]
    for one in FORMS:
        if wanted and one.name not in wanted:
            continue
        lines.clear()
        outcome = FormResult()
        try:
            outcome.found = one.run()
        except GraceError as error:
            outcome.error = f"{type(error).__name__}: {error}"
        except Exception as error:
            outcome.error = f"not ours: {type(error).__name__}: {error}"
        outcome.log = "\n".join(lines)
        gc.collect()  # what a form leaves behind must not end in a data worker that the next one forks
        told[one.name] = dataclasses.asdict(outcome)
        Path(sys.argv[1], f"{dist.get_rank()}.json").write_text(json.dumps(told))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.argv = [a for a in sys.argv if not a.startswith("--local_rank")]
    main()
