"""An ordinary DeepSpeed job, which knows nothing of GRACE: a small byte-level GPT on the Python library's own sources.

deepspeed examples/train/train.py --deepspeed_config examples/train/ds.json
"""

import argparse
import os
from pathlib import Path

import deepspeed
import torch
from torch import nn
from torch.utils.data import Dataset

# On a CPU DeepSpeed compiles collectives of its own for a minute; this toy does without them.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Sources(Dataset):
    """Rows of 64 bytes of source text."""

    def __init__(self, rows=4000, length=64):
        text = b"".join(file.read_bytes() for file in sorted(Path(os.__file__).parent.glob("*.py")))
        self.rows = torch.frombuffer(bytearray(text[: rows * length]), dtype=torch.uint8).view(rows, length)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        # The text is for the report's readers alone: neither the model nor GRACE looks at it.
        return {"input_ids": row.long(), "text": bytes(row.tolist()).decode("utf-8", "replace")}


class GPT(nn.Module):
    """Two blocks; the call returns the mean loss in nats a byte."""

    def __init__(self, width=64):
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True) for _ in range(2)
        )
        self.head = nn.Linear(width, 256)

    def forward(self, input_ids):
        """(n, length) int64 → the loss."""
        x, mask = self.embed(input_ids), nn.Transformer.generate_square_subsequent_mask(input_ids.shape[1])
        for block in self.blocks:
            x = block(x, src_mask=mask.to(x), is_causal=True)
        return nn.functional.cross_entropy(self.head(x)[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten())


def main():
    """Trains for ``--steps`` optimizer steps, goes on from ``--save`` where it holds a checkpoint, and saves there."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save", help="folder of the checkpoints")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    args = deepspeed.add_config_arguments(parser).parse_args()
    torch.manual_seed(0)
    model = GPT()
    engine, _, loader, _ = deepspeed.initialize(args, model=model, model_parameters=model.parameters(), training_data=Sources())
    if args.save and (Path(args.save) / "latest").exists():
        engine.load_checkpoint(args.save)
    while engine.global_steps < args.steps:
        for batch in loader:
            loss = engine(batch["input_ids"].to(engine.device))
            engine.backward(loss)
            engine.step()
            if engine.global_steps % 10 == 0 and engine.global_rank == 0:
                print(f"step {engine.global_steps}: loss {loss.item():.3f}", flush=True)
            if engine.global_steps >= args.steps:
                break
    if args.save:
        engine.save_checkpoint(args.save)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
