"""How much of torch a source uses, told by what it includes.

light    opkit/kernel.h, torch/headeronly/, or nothing of torch: compiled in a tenth of a second
stable   torch/csrc/stable/ or the C shim: one library for every torch since 2.10
aten     any other header of torch: a library for this torch alone
"""

from __future__ import annotations

import functools
import importlib.util
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from opkit.errors import BuildError

LIGHT, STABLE, ATEN = "light", "stable", "aten"
TIERS = (LIGHT, STABLE, ATEN)

_STABLE = ("torch/csrc/stable/", "torch/csrc/inductor/aoti_torch/c/")
_HEADER_ONLY = ("torch/headeronly/",)
_ATEN = ("torch/", "ATen/", "c10/", "caffe2/")
_PYBIND = "pybind11/"
_TARGET = "0x020a000000000000"  # torch 2.10


@dataclass(frozen=True)
class System:
    """What a source outside of the aten tier needs beside the user's folders."""

    folders: tuple[Path, ...] = ()
    defines: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()
    """Of what is in the folders, where the library depends on it."""
    known: tuple[Path, ...] = ()
    """Folders whose content `versions` or the ABI stands for."""
    needs_torch: bool = True


def infer(spellings: Iterable[str]) -> str:
    """Return the tier of a source by the names that it includes.

    >>> infer(["opkit/kernel.h"]), infer(["torch/csrc/stable/tensor.h"]), infer(["torch/extension.h"])
    ('light', 'stable', 'aten')
    """
    found = LIGHT
    for name in spellings:
        if name.startswith(_HEADER_ONLY):
            continue
        if name.startswith(_STABLE):
            found = STABLE
        elif name.startswith(_ATEN):
            return ATEN
    return found


def check(doing: str, tier: str | None) -> None:
    """Refuse a tier that is none."""
    if tier is not None and tier not in TIERS:
        raise BuildError(
            f"{doing}: found tier={tier!r}; expected one of {', '.join(TIERS)}. Leave it out to have it told by "
            "what the source includes."
        )


def system(spellings: Iterable[str]) -> System:
    """Return what a light or stable source needs of torch and Python, by the names that it includes.

    Raises:
        BuildError: it includes pybind11, and neither torch's headers nor PyPI's pybind11 are there.
    """
    names = tuple(spellings)
    torch = any(name.startswith(_ATEN) for name in names)
    pybind = any(name.startswith(_PYBIND) for name in names)
    folders: list[Path] = []
    versions: list[str] = []
    if torch:  # its bundled pybind11 is the one to use beside its headers
        folders.append(_torch_include())
    if pybind and not torch:
        folder, version = _pybind11()
        folders.append(folder)
        versions.append(f"pybind11 {version}")
    if pybind or "Python.h" in names:
        folders.append(Path(sysconfig.get_path("include")))
        versions.append(f"{sysconfig.get_config_var('EXT_SUFFIX')}")
    defines = (f"-DTORCH_TARGET_VERSION={_TARGET}",) if torch else ()
    needs_torch = torch or any(name.startswith("opkit/") for name in names)
    return System(tuple(folders), defines, tuple(versions), tuple(folders), needs_torch)


@functools.cache
def _torch_include() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError(
            "looking for torch's headers: torch is not installed; expected it, as the source includes its headers. "
            "Install torch."
        )
    return Path(spec.origin).parent / "include"


def _pybind11() -> tuple[Path, str]:
    try:
        import pybind11
    except ImportError:
        raise BuildError(
            "looking for pybind11, which the source includes without a header of torch: it is not installed. "
            "Install it: pip install 'torch-opkit[pybind]'."
        ) from None
    return Path(pybind11.get_include()), str(pybind11.__version__)
