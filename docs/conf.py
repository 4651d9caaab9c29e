"""The documentation as a site, every code cell executed: pip install -e ".[docs]" && python -m sphinx -W docs docs/_build"""

import os
from pathlib import Path

import pdo_jax

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])  # for `import experiments` in the pages' cells
author = "the authors of pdo_jax"
project, release = "pdo_jax", pdo_jax.__version__
copyright = "the authors of pdo_jax; MIT licence"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "demo/*"]
html_theme = "sphinx_book_theme"
html_title = "pdo_jax"
html_static_path, html_css_files = ["_static"], ["wide.css"]
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True}
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]  # links to files of the checkout, such as ../README.md; a test sees that they exist
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
autodoc_default_options = {"members": True, "member-order": "bysource", "show-inheritance": False}
autodoc_typehints = "signature"
autosummary_generate = False
napoleon_google_docstring = True
napoleon_use_ivar = True


def setup(app):
    """Docstrings write |x| and *space, which reStructuredText takes for marks of its own."""

    def escape(app, what, name, obj, options, lines):
        for k, line in enumerate(lines):
            if not line.lstrip().startswith((">>>", "...")):
                parts = line.split("``")  # every second one is code
                parts[::2] = [part.replace("|", r"\|").replace("*", r"\*") for part in parts[::2]]
                lines[k] = "``".join(parts)

    app.connect("autodoc-process-docstring", escape)
