"""What stops jobs is found on the machine, each time by a thing that is really there."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import grace_ds
from grace_ds.cli import doctor as module
from grace_ds.cli.doctor import Finding, Job, examine, needs

COMMAND = [sys.executable, "-m", "grace_ds.cli.main", "doctor"]


def finding(found: list[Finding], what: str) -> Finding:
    return next(f for f in found if f.what == what)


def healthy(tmp_path: Path, port: int) -> dict[str, str]:
    return {"TORCH_EXTENSIONS_DIR": str(tmp_path), "MASTER_PORT": str(port), "HOME": str(tmp_path)}


@pytest.fixture
def free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        port: int = s.getsockname()[1]
        return port


def test_a_healthy_machine_is_told_so_in_both_forms(tmp_path: Path, free_port: int) -> None:
    env = {**os.environ, **healthy(tmp_path, free_port)}
    for key in [k for k in env if k.startswith(("OMPI_", "PMI", "SLURM_"))]:
        del env[key]
    for form in ([], ["--json"]):
        done = subprocess.run(
            [*COMMAND, "--shared", str(tmp_path / "new"), *form], env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        if form:
            told = json.loads(done.stdout)
            assert told["ok"] and {"torch", "deepspeed", "storage", "port"} <= {f["what"] for f in told["findings"]}
        else:
            assert done.stdout.endswith("nothing here would stop a job\n")
            told = done.stdout.splitlines()
            assert any(line.split()[:3] == ["ok", "grace_ds", grace_ds.__version__] for line in told)
            assert any(line.split()[:3] == ["ok", "deepspeed", metadata.version("deepspeed")] for line in told)
            assert any("new does not exist yet" in line for line in told)
    assert list(tmp_path.iterdir()) == []


def test_storage_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("")
    assert [f.status for f in module.storage(tmp_path)] == [module.OK]
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_config_is_read_and_the_files_that_it_names_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "ds.json"
    job = Job(config, 0, 0, 1, 1)
    missing = finding(module.configured(job), "config")
    assert missing.status == module.FAILURE and str(config) in missing.message
    config.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    off = finding(module.configured(job), "config")
    assert off.status == module.NOTE and "no grace block" in off.message and "--grace" in off.cure
    (tmp_path / "there.npy").write_text("")
    files = {"trusted": "gone.jsonl", "selection": {"sources": "there.npy", "include": str(tmp_path / "none.txt")}}
    config.write_text(json.dumps({"grace_ds": files}))
    found = module.configured(job)
    assert {f.what: f.status for f in found if f.status != module.OK} == dict.fromkeys(
        ("trusted", "selection.include"), module.FAILURE
    )
    assert "gone.jsonl" in finding(found, "trusted").message and finding(found, "config").status == module.OK
    config.write_text(json.dumps({"grace_ds": {"budgte": 1}}))
    assert "did you mean 'budget'" in finding(module.configured(job), "config").message
    assert finding(module.memory(job), "memory").status == module.NOTE  # neither parameters nor samples are given


def test_lines_fit_a_narrow_terminal(tmp_path: Path, free_port: int) -> None:
    text, _ = module.doctor(healthy(tmp_path, free_port), None, False, columns=60)
    words = [line for line in text.splitlines() if len(line) > 60]
    assert all(len(line.split()) <= 3 for line in words)  # a path alone may be longer


def test_a_stale_lock_is_a_failure_with_the_file_to_remove(tmp_path: Path, free_port: int) -> None:
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    env = {**os.environ, **healthy(tmp_path, free_port)}
    done = subprocess.run(COMMAND, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert str(lock) in done.stdout and done.stdout.endswith("something here would stop a job\n")


def test_a_taken_port_and_one_that_is_none(tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("", 0))
        s.listen()
        taken = finding(examine(healthy(tmp_path, s.getsockname()[1]), None), "port")
    assert taken.status == "warning" and "free one" in taken.cure
    assert finding(examine({**healthy(tmp_path, 1), "MASTER_PORT": "x"}, None), "port").status == "failure"


def test_two_launchers_that_disagree(tmp_path: Path, free_port: int) -> None:
    world = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}
    env = {**healthy(tmp_path, free_port), **world}
    assert finding(examine(env, None), "launcher").message == "rank 1 of 4"
    assert finding(examine({**env, "WORLD_SIZE": "4"}, None), "launcher").status == "ok"
    wrong = finding(examine({**env, "WORLD_SIZE": "2"}, None), "launcher")
    assert wrong.status == "failure" and "4 ranks, WORLD_SIZE is 2" in wrong.message and "unset" in wrong.cure


def test_storage_that_cannot_be_written(tmp_path: Path, free_port: int) -> None:
    (tmp_path / "file").write_text("")
    found = finding(examine(healthy(tmp_path, free_port), tmp_path / "file" / "below"), "storage")
    assert found.status == "failure" and str(tmp_path / "file") in found.message


def test_a_version_out_of_range_names_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    real = module._version
    monkeypatch.setattr(module, "_version", lambda name: {"deepspeed": "0.5.0", "hjson": None}.get(name, real(name)))
    old, gone = (finding(module.packages(), name) for name in ("deepspeed", "hjson"))
    assert old.status == gone.status == "failure"
    assert "0.5.0" in old.message and "pip install 'deepspeed" in old.cure and gone.message == "not installed"


def test_memory_is_compared_with_what_the_ranks_of_a_job_hold(tmp_path: Path) -> None:
    config = tmp_path / "ds.json"
    found = {}
    for stage in (0, 1, 2, 3):
        config.write_text(json.dumps({"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}))
        found[stage] = needs(Job(config, parameters=7.5e9, samples=1e6, ranks=64, here=1))
    # The figures of the ZeRO paper's first illustration: 7.5 billion parameters on 64 ranks.
    assert [round(model / 1e9, 1) for model, _ in found.values()] == [120.0, 31.4, 16.6, 1.9]
    assert {ours for _, ours in found.values()} == {0}
    sizes = {"collect": {"dim": 256}, "features": {"dim": 128}, "graph": {"k": 15}, "window": 6400}
    config.write_text(json.dumps({"grace_ds": {"recipe": "grace", **sizes}}))
    eight = needs(Job(config, parameters=1e6, samples=1e6, ranks=64, here=8))
    row, vector, lists = 512 + 36, 4 * 128, 8 * (15 + 8 + 1)  # the table's, and the kept graph's
    assert eight == (8 * 16_000_000, 8 * (12_000_000 + 100 * (row + vector + lists)))
    too_large = finding(module.memory(Job(config, 1e15, 1e6, 2, 2)), "memory")
    assert too_large.status == module.FAILURE and "ZeRO stage" in too_large.cure
    assert finding(module.memory(Job(config, 1e3, 1e3, 2, 2)), "memory").status == module.OK
    done = subprocess.run(
        [*COMMAND, "--config", str(config), "--parameters", "1e15", "--samples", "10"], capture_output=True, text=True
    )
    assert done.returncode == 1 and "GiB for the states of the ranks here" in " ".join(done.stdout.split())


def on_a_card(monkeypatch: pytest.MonkeyPatch, **values: object) -> None:
    """torch tells of one card with CUDA 13; what would be chosen on it, as given."""
    import torch

    from grace_ds.graph import gpu
    from grace_ds.utils import arrays

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "NVIDIA Pretended")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(gpu, "obstacle", lambda device: values["obstacle"] if device == "cuda" else f"the device is {device}")
    monkeypatch.setattr(arrays, "_cupy_problem", lambda: values["cupy"])


def test_what_would_compute_on_a_cpu() -> None:
    found = module.gpu({"DS_ACCELERATOR": "cpu"})
    assert finding(found, "device").message == "cpu (DS_ACCELERATOR)"
    backend, rows = finding(found, "graph.backend auto"), finding(found, "propagation rows")
    assert backend.status == rows.status == module.OK and not backend.cure and not rows.cure
    assert backend.message.startswith(("faiss (exact below", "torch (faiss is not installed"))
    assert rows.message == "numpy (the device is cpu)"


def test_what_would_compute_on_a_gpu_with_rapids(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_card(monkeypatch, obstacle="", cupy="")
    have = {"cupy-cuda13x": "14.2.0", "cuvs-cu13": "26.10.0", "rmm-cu13": "26.10.0", "raft-dask-cu13": "26.10.0"}
    monkeypatch.setattr(module, "_version", have.get)
    found = module.gpu({})
    assert finding(found, "gpu").message == "1 × NVIDIA Pretended, CUDA 13.0"
    assert finding(found, "device").message == "cuda"
    assert finding(found, "graph.backend auto").message == "cuvs (the device is cuda)"
    assert finding(found, "propagation rows").message == "cupy (the device is cuda)"
    assert {f.what: f.message for f in found if f.what in module._RAPIDS} == {
        "cupy": "cupy-cuda13x 14.2.0",
        "cuvs": "cuvs-cu13 26.10.0",
        "rmm": "rmm-cu13 26.10.0",
        "raft_dask": "raft-dask-cu13 26.10.0",
    }
    assert {f.status for f in found} == {module.OK}


def test_what_is_missing_on_a_gpu_comes_with_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "pip install grace_ds[gpu-cu13]"
    on_a_card(monkeypatch, obstacle=f"cuvs is not installed ({line})", cupy="cupy does not work here: no compiler")
    monkeypatch.setattr(module, "_version", {"cupy-cuda13x": "14.2.0"}.get)
    found = module.gpu({})
    backend, rows, cuvs = (finding(found, what) for what in ("graph.backend auto", "propagation rows", "cuvs"))
    assert backend.status == rows.status == cuvs.status == module.NOTE
    assert f"not cuvs: cuvs is not installed ({line})" in backend.message and backend.cure == cuvs.cure == line
    assert rows.message == "torch (cupy does not work here: no compiler)" and not rows.cure
    assert finding(found, "cupy").message == "cupy-cuda13x 14.2.0"
    kept_off = module.gpu({"DS_ACCELERATOR": "cpu"})
    assert finding(kept_off, "propagation rows").message == "numpy (the device is cpu)"
    assert not any(f.cure for f in kept_off)
