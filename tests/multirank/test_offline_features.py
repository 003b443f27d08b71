"""Features that a real Dask cluster computes: they are those of a job, and a job that reads them chooses the same samples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from tests.multirank.harness import ROOT, World, run_ranks
from tests.multirank.toy import SAMPLES, Corpus, Model, write_trusted

pytest.importorskip("distributed", reason="dask[distributed] is not installed: pip install grace_ds[dask]")
pytestmark = [pytest.mark.slow, pytest.mark.multirank]

BATCH, STEPS = 8, 13
GRACE = {
    "enabled": True,
    "recipe": "grace",
    "budget": 0.5,
    "window": 96,  # half of the corpus: it rolls
    "start_step": 0,
    "trusted": "trusted.jsonl",
    "guard": {"enabled": False},
    "refresh": {"interval_steps": 3, "cadence": "fixed"},
}


def ds_config(folder: Path, **features: Any) -> dict[str, Any]:
    grace = {**GRACE, "trusted": str(folder / "trusted.jsonl"), "features": features}
    return {
        "train_batch_size": BATCH,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "data_efficiency": {"enabled": True, "data_sampling": {"enabled": True, "grace": grace}},
    }


def corpus() -> Corpus:
    """What a job makes in its own code, for the workers to import."""
    return Corpus()


class CountedCorpus(Corpus):
    """Counts how often each item is read, by anyone."""

    reads: ClassVar[Counter[int]] = Counter()

    def __getitem__(self, i: int) -> Any:
        self.reads[i] += 1
        return super().__getitem__(i)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("offline")
    write_trusted(path / "trusted.jsonl", Corpus(160, salt=3).tokens[::2])
    (path / "ds.json").write_text(json.dumps(ds_config(path)))
    np.save(path / "corpus.npy", Corpus().tokens)
    return path


def command(folder: Path, *words: object, status: int = 0) -> Any:
    """Runs ``grace-ds features`` and returns what its JSON says, or its error."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}"}
    line = [sys.executable, "-m", "grace_ds.cli.main", "features", *map(str, words)]
    ended = subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, timeout=110, check=False)
    assert ended.returncode == status, ended.stderr
    return json.loads(ended.stdout) if status == 0 else ended.stderr


@pytest.fixture(scope="module")
def made(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The features of the corpus, by two workers on this machine that import the job's own dataset."""
    out = folder / "made"
    words = ["tests.multirank.test_offline_features:corpus", "--config", "ds.json", "--workers", 2, "--chunk", 50, "--json"]
    return out, command(folder, *words, "--out", out)


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Any]:
    """A cluster that the user runs: two workers behind a scheduler that wants certificates."""
    from distributed import LocalCluster
    from distributed.security import Security

    security = Security.temporary()
    for name in ("tls_ca_file", "tls_client_cert", "tls_client_key"):
        (folder / f"{name}.pem").write_text(getattr(security, name))
    os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'examples'}"
    options = {
        "n_workers": 2,
        "threads_per_worker": 1,
        "dashboard_address": "127.0.0.1:0",
        "memory_limit": 0,
        "host": "127.0.0.1",
    }
    with LocalCluster(**options, protocol="tls", security=security) as running:
        yield running


def written(out: Path) -> dict[str, bytes]:
    """The rows of each kind and key, whatever files they lie in, and everything else."""
    from grace_ds.features.row_files import RowFiles

    found = {}
    for path in sorted(out.iterdir()):
        if path.is_dir():
            has, rows = RowFiles([path], path.name.rpartition("-")[2], None).read(np.arange(SAMPLES + 1))
            assert has[:SAMPLES].all() and not has[SAMPLES]
            found[path.name] = rows.lengths.tobytes() + rows.words.tobytes()
        elif path.suffix == ".json":
            found[path.name] = path.read_bytes()
    return found


def test_a_users_own_cluster_writes_the_same_from_a_file(folder: Path, made: Any, cluster: Any) -> None:
    out, first = made
    tls = [folder / f"{name}.pem" for name in ("tls_ca_file", "tls_client_cert", "tls_client_key")]
    words = ["corpus.npy", "--config", "ds.json", "--scheduler", cluster.scheduler_address, "--tls", *tls, "--json"]
    second = command(folder, *words, "--chunk", 33, "--out", folder / "again")
    assert written(folder / "again") == written(out)
    tokens = Corpus().tokens.size
    assert first["tokens_read"] == second["tokens_read"] == 2 * tokens  # once a sweep
    # What is there already is not computed again; what is missing is.
    assert command(folder, *words, "--chunk", 192, "--out", folder / "again")["tokens_read"] == 0
    (lost,) = (folder / "again").glob("vectors-*/*033-*66.rows")
    lost.unlink()
    assert command(folder, *words, "--chunk", 50, "--out", folder / "again")["tokens_read"] == 33 * Corpus().tokens.shape[1]
    assert written(folder / "again") == written(out)


def test_a_cluster_that_reads_other_data_or_is_not_there_is_told(folder: Path, cluster: Any) -> None:
    tls = [folder / f"{name}.pem" for name in ("tls_ca_file", "tls_client_cert", "tls_client_key")]
    (folder / "here.py").write_text("def rows():\n    return [[1, 2, 3]] * 9\n")
    words = ["--set", "pseudo_trusted=false", "--scheduler", cluster.scheduler_address, "--tls", *tls, "--out", "none"]
    said = command_here(folder, "here:rows", *words)
    assert "worker tls://" in said and "cannot read here:rows" in said and "PYTHONPATH" in said
    assert not (folder / "none" / "features.json").exists()


def command_here(folder: Path, *words: object) -> str:
    """Runs a command that fails, where the client finds modules that the workers do not."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{folder}:{ROOT}:{ROOT / 'examples'}"}
    line = [sys.executable, "-m", "grace_ds.cli.main", "features", *map(str, words)]
    ended = subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, timeout=110, check=False)
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1, ended.stderr
    return ended.stderr


def train(world: World, folder: str, variants: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ids of each step and the items that were read, for each of the features' settings."""
    import deepspeed
    import torch
    from deepspeed.ops import __compatible_ops__

    import grace_ds

    __compatible_ops__["deepspeed_shm_comm"] = False
    os.environ["LOCAL_RANK"] = str(world.rank)
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    told = []
    for features in variants:
        torch.manual_seed(0)
        CountedCorpus.reads.clear()
        model, config = Model(), ds_config(Path(folder), **features)
        config["train_micro_batch_size_per_gpu"] = BATCH // world.size
        engine, _, loader, _ = grace_ds.initialize(
            model=model, model_parameters=model.parameters(), training_data=CountedCorpus(), config=config
        )
        steps: list[list[int]] = []
        while len(steps) < STEPS:
            for batch in loader:
                engine.backward(engine(batch))
                engine.step()
                steps.append(batch["sid"].flatten().tolist())
                if len(steps) == STEPS:
                    break
        engine.destroy()
        told.append({"steps": steps, "reads": sum(CountedCorpus.reads.values())})
    return told


@pytest.mark.timeout(240)
@pytest.mark.parametrize("size", [1, 2])
def test_a_job_that_reads_them_chooses_the_same_and_reads_less(folder: Path, made: Any, size: int) -> None:
    precomputed, cache = {"precomputed": str(made[0])}, {"cache_dir": str(folder / f"cache{size}")}
    variants = [{}, precomputed, cache, cache, {**precomputed, **cache}, {**cache, "threads": 3}]
    for rank in run_ranks(train, size, str(folder), variants, timeout=200):
        plain, *others = rank
        assert len({tuple(step) for step in plain["steps"]}) > STEPS // 2
        for other in others:
            assert other["steps"] == plain["steps"]
        assert others[0]["reads"] < plain["reads"]
        assert others[2]["reads"] == others[0]["reads"] == others[3]["reads"] == others[4]["reads"]
        assert others[0]["reads"] < others[1]["reads"] <= plain["reads"]


def test_features_of_another_job_end_a_job_before_it_trains(folder: Path, made: Any) -> None:
    from grace_ds.config.load import find_block, load_config
    from grace_ds.data.sampler import Geometry
    from grace_ds.errors import ConfigError
    from grace_ds.integrations.setup import prepare
    from grace_ds.integrations.trusted_set import UserInputs

    found = find_block(ds_config(folder, precomputed=str(made[0])))
    assert found is not None
    assert prepare(Corpus(), load_config(found[1]), Geometry(1, 0, BATCH, 1), UserInputs()).reader is not None
    with pytest.raises(ConfigError, match="corpus"):
        prepare(Corpus(salt=1), load_config(found[1]), Geometry(1, 0, BATCH, 1), UserInputs())
    with pytest.raises(ConfigError, match="first window"):
        prepare(Corpus(), load_config(found[1], dotlist=["window=97"]), Geometry(1, 0, BATCH, 1), UserInputs())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["absent", "--out", "x"], "there is no corpus absent: give the prefix of a Megatron"),
        (["corpus.npy", "--out", "x", "--config", "absent.json"], "cannot be read"),
        (["corpus.npy", "--out", "x", "--set", "recipe=uniform"], "there is nothing to compute"),
        (["corpus.npy", "--out", "x", "--set", "sede=1"], "did you mean 'seed'"),
        (["corpus.npy", "--out", "/proc/x", "--workers", "1", "--set", "pseudo_trusted=false"], "name another folder with --out"),
    ],
)
def test_a_mistake_is_told_in_one_line(folder: Path, words: list[str], said: str) -> None:
    error = command(folder, *words, status=1)
    assert said in error and error.count("\n") == 1
