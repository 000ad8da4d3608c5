"""Sphinx: the pages in this folder, and the reference from the docstrings. Needs no network."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from chunked_embed import __version__ as release  # noqa: E402

project = "chunked-embed"
author = "the chunked-embed authors"
copyright = author
version = release
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"chunked-embed {release}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_theme_options = {"navigation_with_keys": True}
html_copy_source = False

# The reference: one page a family, an entry a name, with its source.
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
autodoc_member_order = "bysource"
autosummary_generate = False  # tables alone
add_module_names = False
maximum_signature_line_length = 88  # one argument a line beyond
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
toc_object_entries_show_parents = "hide"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

# A copied example has no prompts and no results.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def with_shapes(app, what, name, obj, options, lines):
    """Shapes stand as comments beside the arguments in the source: here they go above the other fields."""
    if not inspect.isfunction(inspect.unwrap(obj)):
        return
    header = re.split(r"\n\s*\)(?: ->.*)?:", inspect.getsource(inspect.unwrap(obj)), maxsplit=1)[0]
    shapes = re.findall(r"^\s+(\w+): [^#\n]*,  # (.+)$", header, flags=re.MULTILINE)
    if shapes:
        place = next((n for n, line in enumerate(lines) if line.startswith((":", ".. rubric::"))), len(lines))
        lines[place:place] = ["", ":Shapes:", *(f"   * ``{name}``: {shape}" for name, shape in shapes), ""]


def setup(app):
    app.connect("autodoc-process-docstring", with_shapes)
