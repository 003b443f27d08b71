"""What the ranks of the checkpoint fuzz do: save twice, then try to load the second checkpoint a thousand times, damaged."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.multirank.harness import World
from tests.multirank.launch import COLLECTING

EARLIER, LATER = 4, 6
MODEL = "mp_rank_00_model_states.pt"
ODD_VALUES: list[Any] = [None, True, -1, 2**70, 1.5, "1", "", [], {}, ["x"], {"x": 1}]


@dataclass(frozen=True)
class Case:
    """One damage and what came of it on this rank.

    Attributes:
        what: the damage, in words.
        error: kind and message; empty where it loaded.
        ours: whether the error is one of ours.
        same: whether GRACE's state is as before after a refusal, or as of the undamaged checkpoint after a load.
    """

    what: str
    error: str
    ours: bool
    same: bool


def make_engine(folder: Path) -> tuple[Any, Any]:
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    import grace_ds
    from tests.multirank.toy import Corpus, Model, write_trusted

    __compatible_ops__["deepspeed_shm_comm"] = False
    os.environ["LOCAL_RANK"] = str(torch.distributed.get_rank())  # which DeepSpeed asks for
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    trusted = folder / "trusted.jsonl"
    if torch.distributed.get_rank() == 0:
        write_trusted(trusted, Corpus(64, salt=3).tokens)
    torch.distributed.barrier()
    config = {
        "train_batch_size": 8,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "steps_per_print": 10**9,
        "grace_ds": {**COLLECTING, "trusted": str(trusted), "collect": {"dim": 32}},
    }
    torch.manual_seed(0)
    model = Model()
    engine, _, _, _ = grace_ds.initialize(model=model, model_parameters=model.parameters(), training_data=Corpus(), config=config)
    return engine, engine.grace_ds.deepspeed_loader(num_local_io_workers=0)


def fingerprint(c: Any) -> str:
    """Digest of everything of GRACE's that a checkpoint brings back, on this rank."""
    from grace_ds.integrations.checkpoint import scalars

    h = hashlib.blake2b(json.dumps(scalars(c), sort_keys=True).encode())
    for schedule in c.book.schedules:
        h.update(f"{schedule.digest()} {json.dumps(dict(schedule.meta), sort_keys=True)}".encode())
    arrays = [getattr(t.rows, f.name) for t in (c.table, c.seen) for f in fields(t.rows)] + [c.visits.ids, c.visits.counts]
    arrays += [array for _, array in sorted(c.basis.to_arrays().items())] if c.basis is not None else []
    for array in arrays:
        h.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    h.update(f"{c.sampler.frontier} {c.sampler.issued}".encode())
    return h.hexdigest()


class Damage:
    """Damages the later checkpoint in place, on one rank; :meth:`mend` puts everything back."""

    def __init__(self, saved: Path, seed: int) -> None:
        self.at, self.earlier = saved / f"global_step{LATER}", saved / f"global_step{EARLIER}"
        self.ours = self.at / "grace_ds"
        self.rng = np.random.default_rng(seed)
        self.whole = {path: path.read_bytes() for path in [*self.ours.iterdir(), self.at / MODEL]}
        self.files = sorted(path for path in self.whole if path.parent == self.ours)
        self.kinds: list[Callable[[], str]] = [
            *[self.flip] * 6,
            *[self.cut] * 3,
            self.pad,
            self.blank,
            self.swap,
            self.swap_rows,
            self.stale,
            self.lose,
            self.forged_schema,
            self.forged_manifest,
            self.forged_manifest,
            self.forged_collect,
            self.forged_table,
            self.forged_swap,
            self.client_state,
            self.client_state,
        ]

    def do(self, number: int) -> str:
        return self.kinds[number % len(self.kinds)]()

    def mend(self) -> None:
        for path, data in self.whole.items():
            if not path.exists() or path.read_bytes() != data:
                path.write_bytes(data)

    def pick(self, choices: Any) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    # -- what storage does to files ------------------------------------------------------------------------------------

    def flip(self) -> str:
        path = self.pick(self.files)
        data = bytearray(self.whole[path])
        # The headers are small beside the arrays: aim at them half of the time.
        reach = min(len(data), 400) if self.rng.random() < 0.5 else len(data)
        for at in self.rng.integers(0, reach, self.pick([1, 1, 1, 5])):
            data[at] ^= 1 << int(self.rng.integers(8))
        path.write_bytes(bytes(data))
        return f"bits of {path.name} flipped"

    def cut(self) -> str:
        path = self.pick(self.files)
        path.write_bytes(self.whole[path][: int(self.rng.integers(len(self.whole[path])))])
        return f"{path.name} cut"

    def pad(self) -> str:
        path = self.pick(self.files)
        path.write_bytes(self.whole[path] + bytes(int(self.rng.integers(1, 4096))))
        return f"{path.name} padded"

    def blank(self) -> str:
        path = self.pick(self.files)
        data = bytearray(self.whole[path])
        at = int(self.rng.integers(len(data)))
        data[at : at + 512] = b"\xff" * len(data[at : at + 512])
        path.write_bytes(bytes(data))
        return f"a sector of {path.name} overwritten"

    def swap(self) -> str:
        a, b = self.rng.choice(len(self.files), 2, replace=False)
        one, other = self.files[a], self.files[b]
        one.write_bytes(self.whole[other])
        other.write_bytes(self.whole[one])
        return f"{one.name} and {other.name} swapped"

    def swap_rows(self) -> str:
        one, other = (path for path in self.files if path.name.startswith("rows-"))
        one.write_bytes(self.whole[other])
        other.write_bytes(self.whole[one])
        return "buckets swapped"

    def stale(self) -> str:
        before = {path: self.earlier / "grace_ds" / path.name for path in self.files}
        path = self.pick([path for path, old in before.items() if old.exists() and old.read_bytes() != self.whole[path]])
        shutil.copy(before[path], path)
        return f"{path.name} of an earlier checkpoint"

    def lose(self) -> str:
        path = self.pick(self.files)
        path.unlink()
        return f"{path.name} missing"

    # -- what another version might have written: every digest fits ----------------------------------------------------

    def forged_schema(self) -> str:
        value = self.pick([0, 1, 99, -1, None, "2", 1.5, True, []])
        where = self.pick(["manifest", "state", "both"])
        inside = None if where == "manifest" else [value]
        self.forge(lambda m: m.update(schema=value) if where != "state" else None, schema=inside)
        return f"schema {value!r} in {where}"

    def forged_manifest(self) -> str:
        key = self.pick(sorted(json.loads(self.whole[self.ours / "manifest.json"])))
        value = self.pick(ODD_VALUES)

        def edit(manifest: dict[str, Any]) -> None:
            right = isinstance(value, type(manifest[key])) or (key in ("basis", "gradient", "collect") and value is None)
            if right or self.rng.random() < 0.5:
                del manifest[key]
            else:
                manifest[key] = value

        self.forge(edit)
        return f"{key} of the manifest dropped or {value!r}"

    def forged_collect(self) -> str:
        key = self.pick(["seed", "dim", "rank", "scale", "sigma", "sums", "frozen", "running_mean"])
        value = self.pick([v for v in ODD_VALUES if v is not None and not isinstance(v, bool)])

        def edit(manifest: dict[str, Any]) -> None:
            collect = manifest["collect"]
            holder = next(h for h in (collect, collect["sketcher"], collect["sketcher"]["scale"]) if key in h)
            right = isinstance(value, type(holder.pop(key))) or key == "frozen"
            if not right and self.rng.random() < 0.5:
                holder[key] = value

        self.forge(edit)
        return f"{key} of the collection dropped or {value!r}"

    def forged_table(self) -> str:
        from safetensors.numpy import load, save

        path = self.pick([path for path in self.files if path.name.startswith("rows-")])
        columns = load(self.whole[path])
        name = self.pick(sorted(columns))
        if name == "schema":
            columns[name] = np.array([self.pick([0, 1, 99])], np.int64)
        elif self.rng.random() < 0.3:
            del columns[name]
        else:
            columns[name] = self.pick([columns[name][:-1], columns[name].astype(np.float64), columns[name][None]])
        self.rewrite(path, save({key: np.ascontiguousarray(value) for key, value in columns.items()}))
        return f"{name} of {path.name} of another form"

    def forged_swap(self) -> str:
        one, other = (path for path in self.files if path.name.startswith("rows-"))
        self.forge(lambda m: m["files"].update({one.name: m["files"][other.name], other.name: m["files"][one.name]}))
        self.swap_rows()
        return "buckets swapped, digests too"

    def rewrite(self, path: Path, data: bytes) -> None:
        from grace_ds.utils.files import digest

        path.write_bytes(data)
        self.forge(lambda m: m["files"].update({path.name: digest(data)}))

    def forge(self, edit: Callable[[dict[str, Any]], None], schema: list[Any] | None = None) -> None:
        """Writes an edited manifest, with its digest where it belongs."""
        from grace_ds.utils.files import digest

        manifest = json.loads(self.whole[self.ours / "manifest.json"])
        edit(manifest)
        data = json.dumps(manifest).encode()
        (self.ours / "manifest.json").write_bytes(data)
        self.edit_state(lambda s: s.update(manifest=digest(data), **({} if schema is None else {"schema": schema[0]})))

    def client_state(self) -> str:
        key = self.pick(["schema", "manifest", "step", ""])
        value = self.pick(ODD_VALUES)

        def edit(state: dict[str, Any]) -> None:
            if key and self.rng.random() < 0.3:
                del state[key]
            elif key:
                state[key] = value

        if key:
            self.edit_state(edit)
        else:
            self.edit_state(lambda s: None, replace=[value])
        return f"{key or 'the whole'} of the client state dropped or {value!r}"

    def edit_state(self, edit: Callable[[dict[str, Any]], None], replace: list[Any] | None = None) -> None:
        state = torch.load(self.at / MODEL, weights_only=False)
        edit(state["grace_ds"])
        if replace is not None:
            state["grace_ds"] = replace[0]
        torch.save(state, self.at / MODEL)


def attempt(engine: Any, saved: str, what: str, whole: str) -> Case:
    """Loads the damaged checkpoint over the earlier one."""
    from grace_ds.errors import CheckpointError

    c = engine.grace_ds.controller
    before = fingerprint(c)
    try:
        engine.load_checkpoint(saved, tag=f"global_step{LATER}")
    except Exception as error:
        return Case(what, f"{type(error).__name__}: {error}", isinstance(error, CheckpointError), fingerprint(c) == before)
    return Case(what, "", True, fingerprint(c) == whole)


def work(world: World, folder: str, cases: int, seed: int) -> tuple[list[Case], str, str]:
    """The cases on this rank, and the fingerprint of the later checkpoint before and after all of them."""
    saved = f"{folder}/saved"
    engine, loader = make_engine(Path(folder))
    for batch in loader:
        engine.backward(engine(batch))
        engine.step()
        if engine.global_steps in (EARLIER, LATER):
            engine.save_checkpoint(saved)
        if engine.global_steps == LATER:
            break
    engine.load_checkpoint(saved, tag=f"global_step{LATER}")
    whole = fingerprint(engine.grace_ds.controller)
    engine.load_checkpoint(saved, tag=f"global_step{EARLIER}")
    assert fingerprint(engine.grace_ds.controller) != whole
    damage = Damage(Path(saved), seed) if world.rank == 0 else None
    done: list[Case] = []
    for number in range(cases):
        what = [damage.do(number) if damage is not None else ""]
        torch.distributed.broadcast_object_list(what)
        done.append(attempt(engine, saved, what[0], whole))
        if not done[-1].error:
            engine.load_checkpoint(saved, tag=f"global_step{EARLIER}")
        torch.distributed.barrier()
        if damage is not None:
            damage.mend()
    engine.load_checkpoint(saved, tag=f"global_step{LATER}")
    return done, whole, fingerprint(engine.grace_ds.controller)
