"""The documentation's build: Markdown in this folder to pages that are read without a network."""

from __future__ import annotations

import sys
from importlib.metadata import version as installed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "grace_ds"
author = "the grace_ds authors"
release = version = installed("grace_ds")
language = "en"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "mathml", "generated"]
exclude_patterns = ["_ext"]
html_math_renderer = "mathml"
nitpicky = True
nitpick_ignore_regex = [("py:.*", ".*")]  # types of other libraries in signatures: their pages are not linked
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
maximum_signature_line_length = 80
add_module_names = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"grace_ds {release}"
html_static_path = ["_static"]
html_css_files = ["grace.css"]
html_show_sphinx = False
html_show_copyright = False
smartquotes = False  # messages and options are to be read as they are typed
html_copy_source = False
html_show_sourcelink = False
