"""The documentation as a site, every code cell executed: pip install -e ".[docs]" && python -m sphinx -W docs docs/_build"""

import configparser
import os
import re
from pathlib import Path

import pdo_jax

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["PYTHONPATH"] = root = str(Path(__file__).parents[1])  # for `import experiments` in the pages' cells
config = configparser.ConfigParser()
config.read(Path(root, "setup.cfg"), encoding="utf-8")
address = config.get("metadata", "url", fallback="")  # of the repository, once it has one
author = "the authors of pdo_jax"
project, release = "pdo_jax", pdo_jax.__version__
copyright = "the authors of pdo_jax; MIT licence"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "demo/*"]
html_theme = "sphinx_book_theme"
html_title = "pdo_jax"
html_static_path, html_css_files = ["_static"], ["wide.css"]
html_math_renderer = "mathml"  # what browsers read by themselves, without a script from elsewhere
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True, "navbar_persistent": []}
if address:
    html_theme_options |= {"repository_url": address, "repository_branch": "main", "path_to_docs": "docs",
                           "use_repository_button": True, "launch_buttons": {"colab_url": "https://colab.research.google.com"}}
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
autodoc_default_options = {"member-order": "bysource"}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_use_ivar = True


def outside(app, page, source):
    """Links to files outside of docs/: the recorded runs are a page here; what else there is can be downloaded."""
    if page == "runs":
        text = Path(root, "experiments", "README.md").read_text("utf-8").replace("[results/](results/)", "`results/`")
        source[0] = text.replace("](results/", "](../experiments/results/").replace("](../docs/", "](")
    source[0] = source[0].replace("](../experiments/README.md", "](runs.md").replace("](../", "](path:../")


def escape(app, what, name, obj, options, lines):
    """Docstrings write |x| and *space, which reStructuredText takes for marks of its own."""
    for k, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            parts = line.split("``")  # every second one is code
            parts[::2] = [part.replace("|", r"\|").replace("*", r"\*") for part in parts[::2]]
            lines[k] = "``".join(parts)


def shorter(app, what, name, obj, options, signature, result):
    """Without what Flax adds to each module; functions and classes by their names."""
    if signature:
        words = re.sub(r"(, )?parent=.*name=None", "", signature)
        return re.sub(r"<(?:function|class|PjitFunction of) '?([\w.]+)[^>]*>", r"\1", words), result


def formula(display):
    from docutils.nodes import SkipNode
    from latex2mathml.converter import convert

    def visit(writer, node):
        writer.body.append(f'<span class="formula {display}">{convert(node.astext(), display=display)}</span>')
        raise SkipNode

    return visit, None


def setup(app):
    app.add_html_math_renderer("mathml", formula("inline"), formula("block"))
    app.connect("source-read", outside)
    app.connect("autodoc-process-docstring", escape)
    app.connect("autodoc-process-signature", shorter)
