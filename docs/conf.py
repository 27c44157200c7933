"""How the documentation is built: `make docs`, which needs no network.

What the pages of the interface list comes from the shelves themselves, by `shelves.py`.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import tvlens

project = "tvlens"
author = "The tvlens authors"
copyright = "The tvlens authors, MIT licence"
version = release = tvlens.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "shelves"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"tvlens {release}"
html_show_sphinx = False
html_copy_source = False

# Headings are link targets, as a code host makes them.
myst_heading_anchors = 4
myst_enable_extensions = ["deflist"]
suppress_warnings: list[str] = []

# Backticks in docstrings are code; `shelves.py` makes links of what names something.
default_role = "code"
# Signatures say what parameters are, in the words of the source.
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
toc_object_entries = False
