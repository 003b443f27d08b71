"""The code blocks of the documentation, with what their first line says about them.

The words behind a fence's language are marks, which GitHub and Sphinx do not show:

    ```bash run            run by the tests, in the page's own folder, in the order of the page
    ```bash run=job        the same, but it starts a training job: the page is in the multirank lane
    ```bash run status=0,1 the same, where another exit status than 0 is an answer and no failure
    ```bash needs=Slurm    cannot be run by the tests; its syntax is checked, and the page says what it takes
    ```json file=ds.json   written to the page's folder before what follows is run
    ```yaml grace          a grace block: read by the real config loader (a JSON file with one is, without a mark)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
ROOT_PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
LANGUAGES = ("bash", "python", "json", "yaml", "diff", "text")


@dataclass(frozen=True)
class Block:
    """One fence.

    Attributes:
        page: that it stands on.
        line: of the page, from 1.
        language: the first word behind the fence; empty where there is none.
        marks: the others, as name → value.
        text: what stands inside.
    """

    page: Path
    line: int
    language: str
    marks: dict[str, str]
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    """The root's pages and every page of the documentation that is written by hand."""
    return [*(ROOT / name for name in ROOT_PAGES), *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """The fences of a page, directives left out."""
    found = []
    for token in MarkdownIt().parse(page.read_text("utf-8")):
        language, *words = token.info.split() or [""]
        if token.type != "fence" or language.startswith("{"):
            continue
        assert token.map is not None
        marks = dict(word.partition("=")[::2] for word in words)
        found.append(Block(page, token.map[0] + 1, language, marks, token.content))
    return found


def every_block() -> list[Block]:
    """Of all pages."""
    return [block for page in pages() for block in blocks(page)]
