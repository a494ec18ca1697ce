"""A new plugin, written from templates: a package that passes its own tests, among them the conformance suite.

The templates are such packages, of a plugin called `yourname`, in `templates/`: each file has the suffix `.in`, so that
nobody takes it for code of opkit's. `common` goes into every kind.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterator
from pathlib import Path

from opkit.errors import PluginError

KINDS = ("kernel-python", "kernel-cpp", "device")

_TEMPLATES = Path(__file__).parent / "templates"
_PLACEHOLDER = "yourname"
_SUFFIX = ".in"
_HIDDEN = ("github", "gitignore")  # written with a dot, which package data cannot begin with
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
        PluginError: the name or the kind will not do, or the project's folder exists.
    """
    _check(name, kind)
    project = into / f"opkit-{name}"
    if project.exists():
        raise PluginError(
            f"writing the plugin {name}: {project} exists; expected a folder that does not, as nothing is overwritten. "
            "Choose another name, or another folder by --into."
        )
    written = []
    for source, target in _files(kind):
        path = project / target.replace(_PLACEHOLDER, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_filled(source.read_text(encoding="utf-8"), name, kind), encoding="utf-8")
        written.append(path)
    return sorted(written)


def _check(name: str, kind: str) -> None:
    if kind not in KINDS:
        raise PluginError(
            f"writing the plugin {name}: its kind is {kind!r}; expected one of {', '.join(KINDS)}. Choose one of them."
        )
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        found = f"the name {name!r}"
        advice = re.sub(r"[^a-z0-9]+", "_", name.lower().removeprefix("opkit")).strip("_0123456789") or "fast"
    elif keyword.iskeyword(name) or name in (*_TAKEN, _PLACEHOLDER, *(_DEVICES if kind == "device" else ())):
        found = f"the name {name!r}, which Python, torch or opkit has taken"
        advice = f"my_{name}"
    else:
        return
    raise PluginError(
        f"writing the plugin: found {found}; expected a lower-case word of letters, digits and single underscores, for "
        f"the package opkit_<name>. Write {advice}."
    )


def _files(kind: str) -> Iterator[tuple[Path, str]]:
    """Yield each template, and where it goes in the project."""
    for folder in (_TEMPLATES / "common", _TEMPLATES / kind):
        for source in sorted(folder.rglob(f"*{_SUFFIX}")):
            target = source.relative_to(folder).as_posix().removesuffix(_SUFFIX)
            if target == "py.typed":
                target = f"opkit_{_PLACEHOLDER}/{target}"
            yield source, f".{target}" if target.startswith(_HIDDEN) else target


def _filled(text: str, name: str, kind: str) -> str:
    entry = f"opkit_{name}" if kind == "device" else f"opkit_{name}:register"
    return (
        text.replace("ENTRY", entry)
        .replace(f"opkit-{_PLACEHOLDER}", f"opkit-{name}")
        .replace(_PLACEHOLDER, name)
    )
