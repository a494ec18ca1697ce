"""Which packages the distribution holds; everything else is in pyproject.toml.

`kernels/` is installed as `opkit_kernels`, a renaming that setuptools cannot find by itself.
"""

from setuptools import find_namespace_packages, setup

FOLDERS = {"opkit": "opkit", "opkit_kernels": "kernels"}
NO_PACKAGES = ("*include*", "*__pycache__*")

setup(
    package_dir=FOLDERS,
    packages=[
        name
        for package, folder in FOLDERS.items()
        for name in (
            package,
            *(f"{package}.{inner}" for inner in find_namespace_packages(folder, exclude=NO_PACKAGES)),
        )
    ],
)
