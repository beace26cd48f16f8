"""Sphinx configuration; `make docs` builds with warnings as errors."""

import re
from importlib.metadata import version as installed_version

from sphinx.application import Sphinx

project = "gendiff"
author = "The gendiff authors"
copyright = author
version = release = installed_version("gendiff")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"gendiff {release}"

# The reference pages are made from the docstrings of every public module.
autosummary_generate = True
autodoc_default_options = {
    "members": True,
    "show-inheritance": True,
    "exclude-members": "set",  # matplotlib gives every figure class one, in markup of its own
}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_attr_annotations = False  # jaxtyping shapes, "B *dims", are no markup

# Notebooks are run for the pages; one that fails stops the build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3


def shapes_as_code(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Shapes such as [B, *] are written plainly in docstrings; a bare * would open emphasis."""
    lines[:] = [re.sub(r"(?<!`)(\[[^\[\]`]*\*[^\[\]`]*\])", r"``\1``", line) for line in lines]


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", shapes_as_code, priority=100)  # before napoleon reads the lines
