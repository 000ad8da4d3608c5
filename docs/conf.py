"""Sphinx: the guides in this folder, and the reference from the docstrings. Needs no network."""

from chunked_embed import __version__ as release

project = "chunked-embed"
copyright = "the chunked-embed authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "alabaster"
html_theme_options = {"description": f"Version {release}", "page_width": "60em", "fixed_sidebar": True}
autodoc_typehints = "description"
autodoc_member_order = "bysource"
add_module_names = False
myst_heading_anchors = 3
