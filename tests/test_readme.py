"""The README stays true."""

import re
from pathlib import Path

import pdo_jax

ROOT = Path(__file__).parent.parent


def test_example_of_the_readme_runs():
    """The example trains nothing but asserts its own equivariance."""
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    assert example.count("\n") <= 20
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})


def test_files_named_in_the_readme_exist():
    named = re.findall(r"\]\((?!http)([^)#]+)\)|--config (\S+)", (ROOT / "README.md").read_text())
    paths = [a or b for a, b in named]
    assert len(paths) >= 4
    assert not [p for p in paths if not (ROOT / p).exists()]


def test_the_citation_names_this_version():
    assert f"\nversion: {pdo_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()
