"""What setup.cfg cannot say: the README as a package index shows it, and that a wheel, which holds the library alone, offers no
extra that is for a checkout."""

import configparser
import re
import runpy
from pathlib import Path
from urllib.parse import urljoin

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

CHECKOUT = ("experiments", "flow", "docs", "dev")
RELATIVE = r"(?!https?:|#)"


class Wheel(bdist_wheel):
    def run(self):
        for holder in (self.distribution, self.distribution.metadata):
            holder.extras_require = {name: needs for name, needs in holder.extras_require.items() if name not in CHECKOUT}
        super().run()


def description(readme: str, url: str, version: str) -> str:
    """The README with links that lead somewhere from an index, which resolves none: into the repository, as tagged; while its
    address is not known, words without links, and no pictures (an index takes none from the text itself)."""

    def absolute(link):
        kind = "raw" if link[2].endswith((".png", ".svg")) else "blob"
        return link[1] + urljoin(f"{url}/{kind}/v{version}/", link[2])

    if url:
        return re.sub(rf'(\]\(|src="){RELATIVE}([^)"]+)', absolute, readme)
    words = re.sub(rf'!\[[^]]*\]\({RELATIVE}[^)]*\)|<img [^>]*src="{RELATIVE}[^>]*>', "", readme)
    return re.sub(rf"\[([^]]*)\]\({RELATIVE}[^)]*\)", r"\1", words)


config = configparser.ConfigParser()
config.read("setup.cfg", encoding="utf-8")
version = runpy.run_path("pdo_jax/_version.py")["__version__"]
setup(cmdclass={"bdist_wheel": Wheel},
      long_description=description(Path("README.md").read_text("utf-8"), config.get("metadata", "url", fallback=""), version))
