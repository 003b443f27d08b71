"""Converts DeepSpeed checkpoints to universal ones, as its own tool does: ``universal.py FOLDER ...``, each a TAG's folder."""

from __future__ import annotations

import argparse
import sys

from deepspeed.checkpoint import ds_to_universal

SUFFIX = "_universal"


def main() -> None:
    for folder in sys.argv[1:]:
        options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
        where = {"input_folder": folder, "output_folder": folder + SUFFIX}
        ds_to_universal.main(argparse.Namespace(**where, **options, inject_missing_state=True))


if __name__ == "__main__":
    main()
