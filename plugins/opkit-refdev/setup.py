"""Carries the library for the torch that is installed, where it was built: python -m opkit_refdev.carry.

Without one the wheel is for every platform, and the library is compiled at the first tensor on the device.
"""

from pathlib import Path

from setuptools import Distribution, setup


class OfPlatform(Distribution):
    def has_ext_modules(self):
        return any(Path(__file__).parent.glob("opkit_refdev/_prebuilt/*/*.so"))


setup(distclass=OfPlatform)
