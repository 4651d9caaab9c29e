"""The README and the pages stay true, and lead somewhere: in a checkout, on a package index, on the site."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import pdo_jax

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), ROOT / "experiments" / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("docs/*.ipynb")]
NOTEBOOKS = [page for page in PAGES if page.suffix == ".ipynb"]


def test_example_of_the_readme_runs():
    """The example trains nothing but asserts its own equivariance."""
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    assert example.count("\n") <= 20
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})


def links(text):
    """Where the relative links and pictures of a text lead."""
    return [a or b for a, b in re.findall(r'\]\((?!https?:|#)([^)# ]*[./][^)# ]*)|src=\\?"(?!https?:)([^"\\]+)', text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_commands_name_files_that_exist(page):
    """A badge's address on GitHub, ../../actions/workflows/X/badge.svg, shows the workflow X."""
    text = page.read_text()
    files = [re.sub(r"^../../actions/(workflows/[^/]+).*", r".github/\1", link) for link in links(text)]
    missing = [file for file in files if not (page.parent / file).exists()]
    missing += [path for path in re.findall(r"--config (\w\S+)", text) if "/" in path and not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("address", ["", "https://github.com/someone/something"], ids=["no address", "address"])
def test_one_line_of_setup_cfg_gives_links_on_an_index_and_buttons_on_the_site(address, tmp_path, monkeypatch):
    given = {}
    monkeypatch.setitem(sys.modules, "setuptools", SimpleNamespace(setup=given.update))
    monkeypatch.setitem(sys.modules, "setuptools.command.bdist_wheel", SimpleNamespace(bdist_wheel=object))
    for name in ("README.md", "setup.py", "pdo_jax/_version.py", "docs/conf.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    text = re.sub(r"(?m)^url = .*\n", "", (ROOT / "setup.cfg").read_text())
    (tmp_path / "setup.cfg").write_text(text.replace("[metadata]\n", f"[metadata]\nurl = {address}\n") if address else text)
    monkeypatch.chdir(tmp_path)
    for name in ("PYTHONPATH", "JAX_PLATFORMS"):  # which conf.py sets
        monkeypatch.setenv(name, "cpu")
    runpy.run_path("setup.py")
    shown, options = given["long_description"], runpy.run_path("docs/conf.py")["html_theme_options"]
    assert len(links((ROOT / "README.md").read_text())) > 15 and not links(shown)
    assert "[paper" not in shown and "docs/speed.md" in shown and "arXiv-2007.10408" in shown
    assert options.get("repository_url", "") == address and ("launch_buttons" in options) == bool(address)
    if address:
        pointed = set(re.findall(rf'{address}[^)"]*', shown))
        assert {f"{address}/blob/v{pdo_jax.__version__}/docs/recipes.md#pictures-larger-than-memory",
                f"{address}/raw/v{pdo_jax.__version__}/docs/figures/demo.png", f"{address}/actions/workflows/ci.yml",
                f"{address}/actions/workflows/ci.yml/badge.svg"} <= pointed
    else:
        assert "](" not in re.sub(r"\]\(https://", "", shown) and "<img" not in shown


def test_notebooks_are_clean_and_set_themselves_up():
    """No outputs in the checkout; the second cell fetches the library where it is missing, and is the same in all."""
    books = [json.loads(page.read_text()) for page in NOTEBOOKS]
    assert len(books) >= 4
    assert not [cell for book in books for cell in book["cells"] if cell.get("outputs") or cell.get("execution_count")]
    (setup,) = {"".join(book["cells"][1]["source"]) for book in books}
    assert "pip install" in setup


def test_the_citation_names_this_version():
    assert f"\nversion: {pdo_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()
