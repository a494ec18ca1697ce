"""Which packages the distribution holds, and whom it fits; everything else is in pyproject.toml.

`kernels/` is installed as `opkit_kernels`, a renaming that setuptools cannot find by itself. A wheel that carries the
native core (`make wheels`) is for one platform. Where no library in it fits, the core is built as without them.
"""

from pathlib import Path

from setuptools import Distribution, find_namespace_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel

FOLDERS = {"opkit": "opkit", "opkit_kernels": "kernels"}
NO_PACKAGES = ("*include*", "*__pycache__*", "dispatch.native.*", "plugins.templates*", "cli.templates*")
IS_CARRYING = any(Path(__file__).parent.glob("opkit/dispatch/native/prebuilt/*.so"))


class OfPlatform(Distribution):
    def has_ext_modules(self):
        return IS_CARRYING


class OfAnyPython(bdist_wheel):
    def get_tag(self):
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if IS_CARRYING else (python, abi, platform)


setup(
    distclass=OfPlatform,
    cmdclass={"bdist_wheel": OfAnyPython},
    package_dir=FOLDERS,
    py_modules=["opkit_boot"],  # apart from opkit, as every `import torch` imports it
    packages=[
        name
        for package, folder in FOLDERS.items()
        for name in (
            package,
            *(f"{package}.{inner}" for inner in find_namespace_packages(folder, exclude=NO_PACKAGES)),
        )
    ],
)
