"""A new plugin, written from templates: a package that passes its own tests, among them the conformance suite.

The templates are in `templates/`, a folder for each kind; `common` goes into every one.
"""

from __future__ import annotations

import keyword
import re
from pathlib import Path

from opkit import _scaffold
from opkit.errors import PluginError

KINDS = ("kernel-python", "kernel-cpp", "device")

_TEMPLATES = Path(__file__).parent / "templates"
_TAKEN = ("torch", "opkit", "aten", "prim", "prims", "test")
# What torch.device takes already.
_DEVICES = (
    "cpu", "cuda", "mps", "xpu", "meta", "hip", "xla", "hpu", "mtia", "ipu", "vulkan", "lazy", "maia", "fpga", "ve",
    "opengl", "opencl", "ideep", "mkldnn", "privateuseone",
)  # fmt: skip


def write(name: str, kind: str, into: Path) -> list[Path]:
    """Write the project `opkit-<name>` into a folder, and return its files.

    Args:
        name: of the plugin, its ops' namespace or its device: a lower-case word.
        kind: one of `KINDS`.
        into: the folder in which that of the project is made.

    Raises:
        PluginError: the name or the kind will not do.
        OpkitError: the project's folder exists.
    """
    _check(name, kind)
    entry = f"opkit_{name}" if kind == "device" else f"opkit_{name}:register"
    return _scaffold.write(
        f"writing the plugin {name}",
        [_TEMPLATES / "common", _TEMPLATES / kind],
        into / f"opkit-{name}",
        {"name": name, "entry": entry},
    )


def _check(name: str, kind: str) -> None:
    if kind not in KINDS:
        raise PluginError(
            f"writing the plugin {name}: its kind is {kind!r}; expected one of {', '.join(KINDS)}. Choose one of them."
        )
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        found = f"the name {name!r}"
        advice = re.sub(r"[^a-z0-9]+", "_", name.lower().removeprefix("opkit")).strip("_0123456789") or "fast"
    elif keyword.iskeyword(name) or name in (
        *_TAKEN,
        _scaffold.PLACEHOLDER,
        *(_DEVICES if kind == "device" else ()),
    ):
        found = f"the name {name!r}, which Python, torch or opkit has taken"
        advice = f"my_{name}"
    else:
        return
    raise PluginError(
        f"writing the plugin: found {found}; expected a lower-case word of letters, digits and single underscores, for "
        f"the package opkit_<name>. Write {advice}."
    )
