"""``grace-ds plan --calibrate`` under a launcher: one answer, from all ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.multirank.harness import run_command
from tests.multirank.launch import environment, free_port


def test_ranks_calibrate_together_and_one_of_them_speaks(tmp_path: Path) -> None:
    sizes = ["--samples", "2e4", "--ranks", "2", "--tokens", "64", "--batch", "32", "--interval", "40", "--calibrate", "--json"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    said = run_command([*launcher, "-m", "grace_ds.cli.main", "plan", *sizes], timeout=100, env=environment(tmp_path))
    told = json.loads(said[said.index("{\n") : said.rindex("}") + 1])
    rates = told["sizes"]["rates"]
    assert rates["measured_ranks"] == 2 and rates["origin"]["gbits"] == "measured" and rates["gbits"] > 0
