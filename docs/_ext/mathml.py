"""Formulae as MathML, which browsers draw by themselves: no script, no font and no picture is loaded for them."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.errors import ExtensionError


def setup(app: Any) -> dict[str, Any]:
    """Makes ``mathml`` a value of html_math_renderer."""
    app.add_html_math_renderer("mathml", inline_renderers=(_inline, None), block_renderers=(_block, None))
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


def _inline(writer: Any, node: Any) -> None:
    _draw(writer, node, "span", block=False)


def _block(writer: Any, node: Any) -> None:
    _draw(writer, node, "div", block=True)


def _draw(writer: Any, node: Any, tag: str, block: bool) -> None:
    tex = node.astext()
    try:
        drawn = latex2mathml.tex2mathml(tex, as_block=block)
    except Exception as error:  # docutils' own class of it differs between versions
        raise ExtensionError(f"a formula cannot be drawn ({error}): {tex}") from error
    # A long formula scrolls by itself, not with the page; it can then be reached by the keyboard too.
    writer.body.append(writer.starttag(node, tag, CLASS="math notranslate", **({"tabindex": "0"} if block else {})))
    writer.body.append(drawn + f"</{tag}>")
    raise nodes.SkipNode
