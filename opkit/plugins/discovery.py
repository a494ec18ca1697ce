"""Which plugins are installed: the entry points of the group `opkit.plugins`.

Reads what installers wrote and imports nothing. One distribution with unreadable metadata does not
hide the others, whether it is a plugin or not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, PackageNotFoundError, distribution, distributions

GROUP = "opkit.plugins"


@dataclass(frozen=True)
class Found:
    """One entry point of an installed distribution; `problem` says why it could not be read."""

    name: str
    distribution: str
    version: str
    value: str
    location: str
    entry_point: EntryPoint | None = None
    problem: str = ""

    @property
    def source(self) -> str:
        """What `explain` shows as the origin of the plugin's kernels."""
        return f"{self.distribution} {self.version} (plugin {self.name})"

    def __str__(self) -> str:
        return f"plugin {self.name!r} of {self.distribution} {self.version}"


def scan() -> list[Found]:
    """Return the installed plugins, ordered by name and then by distribution."""
    found: list[Found] = []
    seen: set[str] = set()
    for candidate in distributions():
        # importlib.metadata.entry_points() parses every file at once, and raises where one of them is
        # malformed: here only the files that name the group are parsed, each by itself.
        if GROUP not in _entry_points_text(candidate):
            continue
        name, _ = _identity(candidate)
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key not in seen:
            seen.add(key)
            found += _read(_first_on_path(name) or candidate)
    return sorted(found, key=lambda plugin: (plugin.name, plugin.distribution))


def _read(source: Distribution) -> Iterator[Found]:
    name, version = _identity(source)
    location = str(source.locate_file(""))
    try:
        points = [point for point in source.entry_points if point.group == GROUP]
    except Exception as error:
        problem = f"its entry_points.txt cannot be read ({type(error).__name__}: {error})"
        yield Found(name, name, version, "", location, problem=problem)
        return
    for point in points:
        yield Found(point.name, name, version, point.value, location, point)


def _first_on_path(name: str) -> Distribution | None:
    """Return the distribution that Python would take for this name: an earlier one shadows a later one."""
    try:
        return distribution(name)
    except (PackageNotFoundError, ValueError):
        return None


def _entry_points_text(source: Distribution) -> str:
    try:
        return source.read_text("entry_points.txt") or ""
    except (OSError, UnicodeDecodeError):
        return ""


def _identity(source: Distribution) -> tuple[str, str]:
    """Return name and version; metadata that is missing or damaged has stand-ins."""
    try:
        metadata = source.metadata
        return metadata["Name"] or "(no name)", metadata["Version"] or "(no version)"
    except Exception:
        return "(no name)", "(no version)"
