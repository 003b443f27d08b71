"""The report in a real browser: headless Chromium, by playwright, with the network off."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grace_ds.report.load import load_run
from grace_ds.report.page import page
from tests.unit.test_report import MARKUP, record

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    target = folder / "report.html"
    target.write_text(page(load_run(record(folder / "run"))), "utf-8")
    return target


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="pip install 'grace_ds[browser]'")
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("no browser here: apt-get install chromium")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=90_000)
        yield started
        started.close()


@pytest.fixture(params=[1280, 390])
def opened(request: pytest.FixtureRequest, browser: Any, report: Path) -> Iterator[Any]:
    """The page at one width; anything that it complains of, asks for or says in a box is an error."""
    context = browser.new_context(viewport={"width": request.param, "height": 800}, offline=True)
    tab, complaints = context.new_page(), []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
    tab.on("request", lambda asked: None if asked.url.startswith(("file:", "data:")) else complaints.append(asked.url))
    tab.goto(report.as_uri())
    yield tab
    assert complaints == []
    context.close()


@pytest.mark.slow
def test_it_fits_the_width_and_draws_every_figure(opened: Any) -> None:
    assert opened.evaluate("document.documentElement.scrollWidth") <= opened.viewport_size["width"]
    drawn = opened.evaluate("[...document.images].map(i => i.complete && i.naturalWidth > 0)")
    assert len(drawn) >= 5 and all(drawn)
    assert opened.evaluate("document.scripts.length") == 1


@pytest.mark.slow
def test_search_and_group_narrow_the_samples(opened: Any) -> None:
    shown = opened.locator("#samples tbody tr:visible")
    everything = shown.count()
    assert everything > 40 and opened.locator("#found").inner_text() == f"{everything} of {everything} samples"
    name = opened.locator("#samples tbody tr").nth(3).locator("td").first.inner_text()
    opened.fill("#search", f"Sample {name}:")
    assert shown.count() >= 1 and f"sample {name}: {MARKUP}" in shown.first.inner_text()
    opened.fill("#search", "")
    opened.select_option("#group", "least kept")
    assert 0 < shown.count() < everything
    assert all("least kept" in text for text in shown.all_inner_texts())
    opened.fill("#search", "no such words anywhere")
    assert shown.count() == 0
    opened.fill("#search", "")
    opened.select_option("#group", "")
    assert shown.count() == everything
    opened.click("summary")
    assert opened.locator("details pre").is_visible()


@pytest.mark.slow
def test_a_sample_of_the_map_shows_its_text(opened: Any) -> None:
    points, card = opened.evaluate("JSON.parse(document.getElementById('points').textContent)"), opened.locator("#point")
    image = opened.locator("figure.map img").first
    image.scroll_into_view_if_needed()
    box = image.bounding_box()
    rng = np.random.default_rng(0)
    for i in rng.choice(len(points["texts"]), 12, replace=False).tolist():
        x, y = points["left"][i] * box["width"], points["top"][i] * box["height"]
        opened.mouse.move(box["x"] + x, box["y"] + y)
        shown = card.inner_text()
        # Samples may lie at one place: what is shown is one that does.
        at = next(j for j, said in enumerate(points["texts"]) if said.startswith(shown.split(";")[0] + ";"))
        assert abs(points["left"][at] - points["left"][i]) * box["width"] < 1.5
        assert abs(points["top"][at] - points["top"][i]) * box["height"] < 1.5
        assert MARKUP[:60] in shown and shown.split(";")[0] == points["texts"][at].split(";")[0]
        spot = opened.locator(".spot").first.bounding_box()
        assert abs(spot["x"] + spot["width"] / 2 - box["x"] - x) < 2 and abs(spot["y"] + spot["height"] / 2 - box["y"] - y) < 2
    assert opened.evaluate("document.querySelectorAll('#point *').length") == 1  # markup stays text
    opened.locator("figure.map").first.focus()
    before = card.inner_text()
    opened.keyboard.press("ArrowRight")
    after = card.inner_text()
    opened.keyboard.press("ArrowLeft")
    assert after != before == card.inner_text()
