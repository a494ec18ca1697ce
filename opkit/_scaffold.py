"""New projects, written from folders of templates: jinja2's, each file with the suffix `.in`.

The suffix keeps tools from taking a template for code of opkit's. What is in a project, and which names will do for it,
is known to whoever has the templates. Nothing that exists is ever written over.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from opkit.errors import OpkitError

if TYPE_CHECKING:
    from jinja2 import Environment

PLACEHOLDER = "yourname"  # in the path of a template, for the value of `name`

_SUFFIX = ".in"
_HIDDEN = ("github", "gitignore")  # written with a dot, which package data cannot begin with


def write(doing: str, templates: Sequence[Path], project: Path, values: Mapping[str, str]) -> list[Path]:
    """Write a project's folder, and return its files.

    Args:
        doing: for the text of an error: `writing the plugin fast`.
        templates: folders of templates; what they have in common is of the last one.
        project: the folder, which is not to exist.
        values: what templates ask for by name. Names of files have `yourname` for `name`.

    Raises:
        OpkitError: the folder exists, or something in its place.
    """
    if project.exists() or project.is_symlink():
        raise OpkitError(
            f"{doing}: {project} exists; expected a folder that does not, as nothing is overwritten. Choose another "
            "name, or another folder by --into."
        )
    sources = {target: source for folder in templates for target, source in _files(folder)}
    filled = {
        target: _filled(source, values) for target, source in sources.items()
    }  # all, or nothing is written
    written = []
    for target, text in filled.items():
        path = project / target.replace(PLACEHOLDER, values["name"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return sorted(written)


def _files(folder: Path) -> list[tuple[str, Path]]:
    """Return where each template goes in the project, and the template."""
    found = []
    for source in sorted(folder.rglob(f"*{_SUFFIX}")):
        target = source.relative_to(folder).as_posix().removesuffix(_SUFFIX)
        found.append((f".{target}" if target.startswith(_HIDDEN) else target, source))
    return found


def _filled(source: Path, values: Mapping[str, str]) -> str:
    return _environment().from_string(source.read_text(encoding="utf-8")).render(values)


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, StrictUndefined

    return Environment(undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True)
