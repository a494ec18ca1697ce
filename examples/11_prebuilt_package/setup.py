"""Ships the kernels compiled. Without this file the package works too: they are compiled on first use."""

from setuptools import setup

from opkit.cpp.setuptools import kernels

setup(**kernels(["opkit_scan"]))
