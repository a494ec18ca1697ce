"""The native library of the device: the one that the wheel carries for this torch, or one that is compiled, once."""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

NAME = "opkit_refdev_native"
SOURCES = sorted((Path(__file__).parent / "csrc").glob("*.cpp"))


def load() -> ModuleType:
    """Load the library, and return what `torch.refdev` is from now on.

    Raises:
        opkit.BuildError: it has to be compiled, and that fails.
    """
    from opkit_refdev import runtime

    return runtime


def native() -> Any:
    """Return the library as a module."""
    carried = prebuilt()
    return _open(carried if carried.is_file() else build())


def prebuilt() -> Path:
    """Return where the wheel has its library for this torch and Python, if it has one."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    return Path(__file__).parent / "_prebuilt" / f"torch-{torch.__version__}" / f"{NAME}{suffix}"


def build() -> Path:
    """Return the library compiled for this torch, from opkit's cache if it is there."""
    import opkit.cpp

    # torch installs the headers of its profiler in a folder that is not on its own list.
    kineto = Path(torch.__file__).parent / "include" / "kineto"
    return opkit.cpp.build(NAME, SOURCES, extra_cflags=["-O1"], extra_include_paths=[kineto])


def _open(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(NAME, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no extension module of this Python")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
