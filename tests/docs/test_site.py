"""The documentation builds without a warning, and its pages load nothing from elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import grace_ds
import grace_ds.data
import grace_ds.huggingface
import grace_ds.megatron
from tests.docs.blocks import ROOT, ROOT_PAGES

LOADED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc="([^"]+)"|<link\b[^>]*\bhref="([^"]+)"|"""
    r"""url\(([^)]+)\)|@import\s+["']?([^"';]+)"""
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    # Proxies that nobody listens on: a build that asks the network for something fails.
    env = {"PATH": "/usr/bin:/bin", "HOME": str(out), "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E", "docs", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out


def test_every_page_of_the_folder_is_built_and_reachable(site: Path) -> None:
    index = (site / "index.html").read_text("utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix(".html")
        assert (site / name).is_file(), name
        assert page.stem == "index" or f'href="{name}"' in index, f"{name} is in no toctree of the first page"


def test_no_page_loads_anything_from_a_network(site: Path) -> None:
    files = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert len(files) > 5
    for file in files:
        for match in LOADED.finditer(file.read_text("utf-8")):
            target = next(group for group in match.groups() if group)
            assert not re.match(r"""["']?(?:https?:)?//""", target), f"{file.name} loads {target}"


def test_formulae_messages_commands_and_figures_are_on_their_pages(site: Path) -> None:
    """What is drawn or made from the code is there, as elements and not as its source."""
    assert (site / "how-it-works.html").read_text("utf-8").count("<math") > 30
    assert "$" not in _shown(site / "how-it-works.html")
    assert "holds no GRACE state" in _shown(site / "messages.html")
    assert "usage: grace-ds plan [-h]" in _shown(site / "commands.html")
    assert "facility location, 100,000 rows" in _shown(site / "measured.html")


def _shown(page: Path) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", page.read_text("utf-8")))


@pytest.mark.parametrize("page", ROOT_PAGES)
def test_links_of_the_roots_pages_lead_to_files(page: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text("utf-8"))
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_pages_that_include_the_roots_lead_to_their_neighbours(site: Path) -> None:
    """``docs/messages.md`` in ``CONTRIBUTING.md`` is ``messages.html`` beside the page that includes it."""
    assert 'href="messages.html"' in _article(site / "contributing.html")
    assert 'href="measured.html"' in _article(site / "changelog.html")


def test_the_api_page_shows_every_public_name(site: Path) -> None:
    page = (site / "api.html").read_text("utf-8")
    for module in (grace_ds, grace_ds.megatron, grace_ds.huggingface, grace_ds.data):
        for name in module.__all__:
            assert f'id="{module.__name__}.{name}"' in page, f"docs/api.md lacks {module.__name__}.{name}"
    assert "step_seconds" in _article(site / "api.html")  # an option of what watch_preemption returns


def _article(page: Path) -> str:
    return page.read_text("utf-8").split("<article")[1].split("</article>")[0]
