"""What setup.cfg cannot say: a wheel holds the library alone, so it offers no extra that is for a checkout."""

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

CHECKOUT = ("experiments", "flow", "docs", "dev")


class Wheel(bdist_wheel):
    def run(self):
        for extras in (self.distribution.extras_require, self.distribution.metadata.extras_require):
            for extra in CHECKOUT:
                extras.pop(extra, None)
        super().run()


setup(cmdclass={"bdist_wheel": Wheel})
