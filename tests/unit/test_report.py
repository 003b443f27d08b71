"""``grace-ds report``, from run_dirs that real refreshes and the real recorder leave."""

from __future__ import annotations

import base64
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grace_ds.cli.main import main
from grace_ds.comm.local import LocalComm
from grace_ds.config.load import load_config, write_resolved
from grace_ds.data.sampler import Geometry
from grace_ds.data.schedule import VisitCounts
from grace_ds.integrations.setup import prepare, refresh_context
from grace_ds.integrations.trusted_set import UserInputs
from grace_ds.monitor import metrics as metrics_module
from grace_ds.monitor.metrics import Recorder, keep_explanation, preview_of
from grace_ds.records import Losses, Role, SampleRecords
from grace_ds.refresh.line import refresh
from grace_ds.refresh.projection import POINTS, PCAProjection, principal
from grace_ds.refresh.signals import RefreshInputs
from grace_ds.refresh.state import RefreshState
from grace_ds.refresh.table import Table
from grace_ds.report.facts import facts
from grace_ds.report.load import load_run
from grace_ds.report.page import page
from grace_ds.report.samples import rows, shown
from grace_ds.report.terminal import terminal

N, INTERVAL, BATCH = 400, 4, 8
MARKUP = "<script>alert(1)</script><img src=x onerror=alert(2)> $x^$ [red]"


class Texts:
    """Every other sample is junk; each has its text, which is markup."""

    def __init__(self, n: int = N, seed: int = 0, junk: bool = True, text: str | None = MARKUP) -> None:
        rng = np.random.default_rng(seed)
        start = rng.integers(0, 50, n)
        self.tokens = (start[:, None] + np.arange(24) * 3 + rng.integers(0, 2, (n, 24))) % 97
        if junk:
            self.tokens[::2] = rng.integers(0, 97, (len(self.tokens[::2]), 24))
        self.text = text

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, Any]:
        item: dict[str, Any] = {"input_ids": self.tokens[i]}
        return item if self.text is None else {**item, "text": f"sample {i}: {self.text}"}


def record(folder: Path, refreshes: int = 3, data: Any = None, preview: Any = None, **block: Any) -> Path:
    """The run_dir of a job of so many refreshes on one rank, the first of them the warm-up."""
    data = data if data is not None else Texts()
    config = load_config(
        {
            "enabled": True,
            "budget": 0.2,
            "refresh": {"interval_steps": INTERVAL, "cadence": "fixed"},
            "run_dir": str(folder),
            **block,
        }
    )
    geometry = Geometry(1, 0, BATCH, 1)
    trusted = Texts(96, seed=1, junk=False)
    context = refresh_context(LocalComm(), config, geometry, prepare(data, config, geometry, UserInputs(trusted_data=trusted)))
    write_resolved(config, folder)
    recorder = Recorder(str(folder), None, preview or preview_of(data, "auto"))
    table, seen, step, kept = Table(SampleRecords.empty(config.collect.dim)), Table(Losses.empty()), 0, RefreshState()
    for version in range(refreshes):
        nothing, uniform = SampleRecords.empty(config.collect.dim), version == 0
        x = RefreshInputs(
            nothing, Losses.empty(), table, seen, VisitCounts(), step, version, step * BATCH, INTERVAL, uniform=uniform, kept=kept
        )
        outcome = refresh(context, x)
        spent = 0.5 * version
        told = {"train_seconds": 10.0 * version, "refresh_seconds": spent, "collect_seconds": 0.0, "failures": 0.0}
        recorder.made(outcome, told)
        recorder.settle()
        table, step, kept = outcome.table, step + INTERVAL, outcome.kept
    return folder


class Seen(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_run_is_told_on_one_page_that_needs_no_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = record(tmp_path / "run")
    assert main(["report", str(folder)]) == 0
    assert "report.html" in capsys.readouterr().out
    text = (folder / "report.html").read_text("utf-8")
    seen = Seen(text)
    assert {tag for tag, _ in seen.tags}.isdisjoint({"link", "iframe", "object", "base"})
    assert all(str(a.get("src", "data:")).startswith("data:") for _, a in seen.tags)
    # No address is named outside of the figures, which name the SVG namespace.
    assert "http" not in re.sub(r"data:[^\"]*", "", text).replace("http-equiv", "")
    for heading in ("Loss", "What it cost", "Coreset", "Signals", "The guard", "Sources", "Map", "Samples"):
        assert heading in seen.text
    assert "5.0%" in seen.text  # 1 s of refreshes in 20 s of training
    assert len(text) < 1_000_000


def test_what_samples_hold_is_text_and_never_markup(tmp_path: Path) -> None:
    seen = Seen(page(load_run(record(tmp_path))))
    assert MARKUP in seen.text  # as text
    assert [tag for tag, _ in seen.tags].count("script") == 1  # ours
    assert not any(name.startswith("on") for _, attributes in seen.tags for name in attributes)
    policy = next(a["content"] for tag, a in seen.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and "default-src 'none'" in policy and "script-src 'sha256-" in policy


def test_a_runs_own_sources_are_shown_and_have_kept_their_shares(tmp_path: Path) -> None:
    labels = np.arange(N) % 2  # source 0 is junk: the filter alone would leave next to nothing of it
    np.save(tmp_path / "labels.npy", labels)
    folder = record(tmp_path / "run", selection={"sources": str(tmp_path / "labels.npy")}, guard={"enabled": False})
    run = load_run(folder)
    assert run.sources is not None and run.sources[1] == ["0", "1"]
    told = [s.meta["sources"] for s in run.schedules.values() if "sources" in s.meta]
    assert told and all(t["window"] == [N // 2, N // 2] and t["coreset"] == [N // 10, N // 10] for t in told)
    chosen = [np.unique(s.ids[s.roles == Role.CORE]) for s in run.schedules.values() if "sources" in s.meta]
    assert all(labels[ids].mean() < 0.6 for ids in chosen)
    (tmp_path / "labels.npy").unlink()
    moved = load_run(folder)
    assert moved.sources is None and any("labels.npy, cannot be read from here" in note for note in moved.notes)


def test_names_of_sources_and_settings_are_text_too(tmp_path: Path) -> None:
    folder = record(tmp_path / "<b>run")
    np.save(tmp_path / "sources.npy", np.array([f"<b>{i % 2}$" for i in range(N)]))
    (tmp_path / "losses.json").write_text(json.dumps({"<b>$": [[1, 5.0]], "uniform": [[1, 4.0], [2, 3.0]]}))
    out = tmp_path / "out.html"
    arguments = ["--sources", str(tmp_path / "sources.npy"), "--losses", str(tmp_path / "losses.json")]
    assert main(["report", str(folder), "--html", str(out), *arguments]) == 0
    seen = Seen(out.read_text("utf-8"))
    # The likes of <b> are the page's own chief numbers only, none of which holds a name.
    assert "<b>0$" in seen.text and "<b>run" in seen.text
    assert [tag for tag, _ in seen.tags].count("b") == [a.get("class") for _, a in seen.tags].count("card")


def test_most_and_least_kept_are_what_the_filter_says(tmp_path: Path) -> None:
    run = load_run(record(tmp_path, recipe="content"))
    explanation = shown(run)
    assert explanation is not None and explanation["used"]
    most = [s for s in explanation["samples"] if s["group"] == "most"]
    least = [s for s in explanation["samples"] if s["group"] == "least"]
    assert min(s["chance"] for s in most) > max(s["chance"] for s in least)
    assert np.mean([s["id"] % 2 for s in most]) > 0.8  # odd ids are clean
    assert np.mean([s["id"] % 2 for s in least]) < 0.2
    core = set(run.schedules[explanation["version"]].ids[run.schedules[explanation["version"]].roles == Role.CORE].tolist())
    assert all((s["id"] in core) == (s["role"] == "core") for s in explanation["samples"])
    assert all(row.text.startswith(f"sample {row.id}: ") for row in rows(run, explanation))


@pytest.mark.parametrize("recipe", ["grace", "content", "density"])
def test_the_factors_explain_the_chance(tmp_path: Path, recipe: str) -> None:
    explanation = shown(load_run(record(tmp_path, recipe=recipe)))
    assert explanation is not None and explanation["level"] == recipe
    best = max(explanation["samples"], key=lambda s: s["chance"])
    named = {"grace": {"quality", "copies", "crowding"}, "content": {"quality", "copies"}, "density": {"copies"}}[recipe]
    for s in explanation["samples"]:  # up to one constant
        assert s["factors"].keys() == named
        product, reference = (np.prod(list(v["factors"].values())) for v in (s, best))
        assert product / reference == pytest.approx(s["chance"] / best["chance"], rel=1e-3)
        assert s["signals"]["crowding"] is None or recipe == "grace"


def test_histograms_count_every_sample_once(tmp_path: Path) -> None:
    run = load_run(record(tmp_path))
    assert set(run.explanations) == {1, 2}  # the warm-up weighs nothing
    for explanation in run.explanations.values():
        assert {"quality", "density", "chance", "crowding"} <= explanation["histograms"].keys()
        for h in explanation["histograms"].values():
            assert sum(h["window"]) + h["unknown"] == N
            assert sum(h["core"]) <= explanation["core"]
        assert sum(explanation["histograms"]["chance"]["core"]) == explanation["core"]


def test_ages_and_churn_are_counted_from_the_schedules(tmp_path: Path) -> None:
    run = load_run(record(tmp_path, refreshes=4))
    first, second, third, fourth = facts(run).generations
    assert first.uniform and first.age is None and second.churn is None
    cores = [set(s.ids[s.roles == Role.CORE].tolist()) for s in run.schedules.values()]
    assert third.churn == pytest.approx(len(cores[2] - cores[1]) / len(cores[2]))
    assert fourth.age is not None
    assert (fourth.age == 3).sum() == len(cores[3] & cores[2] & cores[1])
    assert (fourth.age == 1).sum() == len(cores[3] - cores[2])


def test_parts_that_are_missing_are_said(tmp_path: Path) -> None:
    folder = record(tmp_path)
    (folder / "refreshes.jsonl").write_text((folder / "refreshes.jsonl").read_text()[:-40])  # killed while writing
    (folder / "schedules" / "schedule-000001.safetensors").write_bytes(b"torn")
    (folder / "reports" / "report-000002.json").write_text("{")
    (folder / "grace_resolved.yaml").unlink()
    text = Seen(page(load_run(folder))).text
    for said in ("line 3 of refreshes.jsonl is torn", "schedule-000001", "report-000002.json cannot be read", "No loss is known"):
        assert said in text
    for name in ("schedules", "reports"):
        for path in (folder / name).iterdir():
            path.unlink()
    assert "no refresh of this run has weighed" in page(load_run(folder))
    assert "No histogram was kept" in Seen(page(load_run(folder))).text
    (folder / "refreshes.jsonl").write_text("")
    assert "No refresh is recorded" in Seen(page(load_run(folder))).text


@pytest.mark.parametrize(
    "block", [{"recipe": "uniform"}, {"guard": {"enabled": False}}, {"recipe": "density"}, {"guard": {"clean_share": 0.01}}]
)
def test_other_recipes_and_a_guard_that_is_off_make_a_page(tmp_path: Path, block: dict[str, Any]) -> None:
    run = load_run(record(tmp_path, **block))
    assert "What it cost" in page(run) and "refreshes" in terminal(run, 100)


def test_only_one_refresh_makes_a_page(tmp_path: Path) -> None:
    run = load_run(record(tmp_path, refreshes=1))
    assert "No decision is recorded" in page(run) and run.notes


def test_a_job_in_shadow_mode_is_not_said_to_have_trained_on_its_schedules(tmp_path: Path) -> None:
    assert "on none of these schedules" in page(load_run(record(tmp_path / "a", mode="shadow")))
    assert "on none of these schedules" not in page(load_run(record(tmp_path / "b")))


def test_what_is_no_run_is_one_line_with_the_cure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "run_dir" in said
    folder = record(tmp_path / "run")
    for option, cure in (("--tokenizer", "tokenizer.json"), ("--sources", "one label a sample"), ("--losses", "JSON object")):
        assert main(["report", str(folder), option, str(tmp_path / "none")]) == 1
        assert cure in capsys.readouterr().err
    assert main(["report", str(folder), "--html", str(tmp_path / "none" / "x.html")]) == 1
    assert "--html" in capsys.readouterr().err


def test_the_terminal_obeys_no_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = record(tmp_path, data=Texts(text="\x1b[31mred [bold]x[/bold]"))
    assert main(["report", str(folder), "--terminal"]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and "refreshes" in said
    assert not (folder / "report.html").exists()


def test_a_dataset_that_raises_costs_its_account_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def broken(sample: int) -> dict[str, Any]:
        raise RuntimeError(f"sample {sample} is gone")

    run = load_run(record(tmp_path, preview=broken))
    assert len(run.schedules) == 3 and not run.explanations
    assert "no explanation of refresh 1 is kept (RuntimeError" in caplog.text


def test_token_ids_are_read_by_the_tokenizer_that_is_given(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    folder = record(tmp_path / "run", data=Texts(text=None))
    words = {f"w{i}": i for i in range(97)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "w0"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    plain = Seen(page(load_run(folder)))
    assert "token ids " in plain.text and "--tokenizer" in plain.text
    out = tmp_path / "out.html"
    assert main(["report", str(folder), "--html", str(out), "--tokenizer", str(tmp_path / "tokenizer.json")]) == 0
    seen = Seen(out.read_text("utf-8"))
    explanation = json.loads((folder / "reports" / "report-000002.json").read_text())
    expected = " ".join(f"w{t}" for t in explanation["samples"][0]["tokens"])
    assert expected in seen.text and "token ids " not in seen.text


def test_figures_hold_no_script_and_no_reference(tmp_path: Path) -> None:
    found = re.findall(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)", page(load_run(record(tmp_path))))
    assert len(found) >= 5
    for data in found:
        svg = base64.b64decode(data).decode()
        assert "<script" not in svg and not re.search(r"href=\"(?!#|data:)", svg)  # a colour bar is an image inside


@pytest.mark.timeout(300)
def test_a_page_stays_small_however_large_and_long_the_run(tmp_path: Path) -> None:
    """A window of 100,000 samples and records of 200 refreshes, each text longer than what is shown."""
    folder = record(tmp_path, refreshes=2, data=Texts(100_000, text=MARKUP * 100), window=100_000)
    line = json.loads((folder / "refreshes.jsonl").read_text().splitlines()[-1])
    explanation = json.loads((folder / "reports" / "report-000001.json").read_text())
    with (folder / "refreshes.jsonl").open("a") as f:
        for version in range(2, 200):
            f.write(json.dumps({**line, "version": version, "step": version * INTERVAL}) + "\n")
            (folder / "reports" / f"report-{version:06d}.json").write_text(json.dumps({**explanation, "version": version}))
    np.save(tmp_path / "sources.npy", np.arange(100_000) % 5000)
    assert main(["report", str(folder), "--sources", str(tmp_path / "sources.npy")]) == 0
    assert (folder / "report.html").stat().st_size < 3_000_000
    assert "1,500 samples, drawn uniformly from a window of 100,000," in (folder / "report.html").read_text("utf-8")
    kept = sum(path.stat().st_size for path in (folder / "reports").glob("*.json")) / 200
    assert kept < 200_000  # of a refresh, as the README says


# -- the map -----------------------------------------------------------------------------------------------------------


def test_the_map_is_of_real_samples_with_what_is_known_of_them(tmp_path: Path) -> None:
    run = load_run(record(tmp_path))
    chart, last = run.chart, run.schedules[2]
    assert chart is not None and (chart["version"], chart["window"], chart["used"]) == (2, N, True)
    core = set(last.ids[last.roles == Role.CORE].tolist())
    assert chart["ids"] == list(range(N)) and [i in core for i in chart["ids"]] == chart["chosen"]
    assert max(chart["chance"]) == 0 and 0 < sum(chart["explained"]) < 1
    xy, clean = np.array([chart["x"], chart["y"]]), np.arange(N) % 2 == 1
    centres = np.stack([xy[:, clean].mean(1), xy[:, ~clean].mean(1)])
    assert np.linalg.norm(centres[0] - centres[1]) > 0.05  # runs and noise share no 6-grams, and few words
    known = {s["id"]: s["chance"] for s in run.explanations[2]["samples"]}
    for i, log_chance in zip(chart["ids"], chart["chance"], strict=True):
        assert i not in known or 10**log_chance == pytest.approx(known[i], rel=1e-3)
    said = Seen(page(run)).text
    assert f"All {N} samples of the window" in said and f"{chart['explained'][0]:.1%}" in said
    assert f"sample 7: {MARKUP}"[:100] in json.loads(re.findall(r'{"left".*?}', said)[0])["texts"][7]


def test_the_map_of_the_last_coreset_outlives_a_pause_but_not_a_new_run(tmp_path: Path) -> None:
    def kept(version: int, used: bool) -> int:
        explanation = {"version": version, "step": 0, "level": "content", "used": used, "window": 2, "samples": []}
        keep_explanation({**explanation, "map": {"ids": [3, 5]}}, tmp_path, None, {})
        return int(json.loads((tmp_path / "map.json").read_text())["version"])

    assert [kept(1, False), kept(2, False), kept(3, True), kept(4, False), kept(5, True), kept(5, False)] == [
        1,
        2,
        3,
        3,
        5,
        5,
    ]
    assert kept(2, False) == 2  # begun anew


def test_a_slow_dataset_is_read_for_a_limited_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "PREVIEW_SECONDS", 0.2)
    explanation = {
        "version": 1,
        "step": 0,
        "level": "content",
        "used": True,
        "window": 2,
        "samples": [{"id": i} for i in range(50)],
    }

    def slow(sample: int) -> dict[str, Any]:
        time.sleep(0.05)
        return {"text": f"sample {sample}"}

    known: dict[int, dict[str, Any]] = {}
    started = time.monotonic()
    keep_explanation({**explanation, "map": {"ids": list(range(500))}}, tmp_path, slow, known)
    assert time.monotonic() - started < 2
    samples = json.loads((tmp_path / "report-000001.json").read_text())["samples"]
    assert samples[0] == {"id": 0, "text": "sample 0"} and samples[49] == {"id": 49}
    assert len(json.loads((tmp_path / "map.json").read_text())["ids"]) == 500
    keep_explanation(
        {**explanation, "samples": [], "map": {"ids": [3]}}, tmp_path, slow, known
    )  # asked again for what was not read
    assert json.loads((tmp_path / "map.json").read_text())["shown"] == [{"text": "sample 3"}]


def test_samples_of_a_map_are_read_once(tmp_path: Path) -> None:
    data, asked = Texts(), []
    show = preview_of(data, "auto")

    def counted(sample: int) -> dict[str, Any]:
        asked.append(sample)
        return show(sample)

    run = load_run(record(tmp_path, refreshes=4, data=data, preview=counted))
    assert run.chart is not None and len(asked) == N + sum(len(p["samples"]) for p in run.explanations.values())
    assert all(len(s["text"]) <= 160 for s in run.chart["shown"])


def test_why_there_is_no_map_is_said(tmp_path: Path) -> None:
    assert "does not read it" in page(load_run(record(tmp_path / "a", recipe="uniform")))
    assert "no refresh of this run has weighed" in page(load_run(record(tmp_path / "b", refreshes=1)))
    folder = record(tmp_path / "c")
    chart = json.loads((folder / "reports" / "map.json").read_text())
    for broken in ({**chart, "x": chart["x"][1:]}, {**chart, "chosen": []}, {**chart, "y": ["<b>"] * N}, [1], {}):
        (folder / "reports" / "map.json").write_text(json.dumps(broken))
        said = Seen(page(load_run(folder))).text
        assert "map.json cannot be read" in said and "There is no map: reports/map.json" in said
    (folder / "reports" / "map.json").unlink()
    assert "older version" in page(load_run(folder))


def test_influences_have_a_picture_of_their_own_where_there_are_any(tmp_path: Path) -> None:
    folder = record(tmp_path)
    pictures = [page(load_run(folder)).count('<figure class="map"')]
    chart = json.loads((folder / "reports" / "map.json").read_text())
    chart["influence"][::2] = [-1.5] * len(chart["influence"][::2])
    (folder / "reports" / "map.json").write_text(json.dumps(chart))
    text = page(load_run(folder))
    assert [*pictures, text.count('<figure class="map"')] == [2, 3]  # of the chance and the crowding, and then of them too
    assert text.count("influence -1.5 deviations") == len(chart["ids"][::2])


def test_axes_are_the_principal_ones_whatever_the_order() -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((300, 16)) * np.linspace(3, 0.1, 16)).astype(np.float32)
    xy, explained = principal(x)
    left, values, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    assert np.allclose(np.abs(xy), np.abs(left[:, :2] * values[:2]), atol=1e-3)
    assert explained == pytest.approx(values[:2] ** 2 / (values**2).sum(), rel=1e-4)
    order = rng.permutation(300)
    assert np.allclose(principal(x[order])[0], xy[order], atol=1e-4)
    assert np.isfinite(principal(x[:1])[0]).all() and principal(np.ones((5, 3), np.float32))[1] == (0.0, 0.0)


def test_a_large_window_is_drawn_from_uniformly_and_alike_while_it_rolls() -> None:
    data = Texts(9000)
    chart = PCAProjection(data, "auto", 32, 7)
    state = np.random.get_state()[1].copy()  # type: ignore[union-attr]
    first, second = chart(np.arange(6000)), chart(np.arange(600, 6600))
    assert np.array_equal(np.random.get_state()[1], state)  # type: ignore[index]
    for found, low in ((first, 0), (second, 600)):
        assert len(found.ids) == POINTS and (np.diff(found.ids) > 0).all()
        shares = np.histogram(found.ids, 6, (low, low + 6000))[0] / POINTS
        assert (np.abs(shares - 1 / 6) < 0.05).all()
    assert len(np.intersect1d(first.ids, second.ids)) > 0.85 * POINTS
    assert chart(np.arange(600, 6600)) is second
