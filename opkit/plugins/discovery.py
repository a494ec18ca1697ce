"""Which plugins a folder of `sys.path` holds: the entry points of the group `opkit.plugins`, and their manifests.

Reads what installers wrote, without importlib.metadata, which parses every file, and imports nothing. One
distribution with unreadable metadata does not hide the others. Keeping what was read is the catalog's part.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import opkit_boot
from opkit.plugins.manifest import FILE, Manifest, parse

GROUP = "opkit.plugins"
_SUFFIXES = (".dist-info", ".egg-info")

Stamp = tuple[int, int] | None  # of a file: its time of change and its size


class _Row(NamedTuple):
    name: str
    distribution: str
    version: str
    value: str
    location: str
    metadata: str = ""
    problem: str = ""
    manifest_path: str = ""
    plain: tuple[Any, ...] | None = None
    watched: tuple[tuple[str, Stamp], ...] = ()


class Listing(NamedTuple):
    """What a folder holds: the names of all distributions, each between slashes, torch's version, and the plugins."""

    names: str = ""
    torch: str = ""
    plugins: tuple[Found, ...] = ()
    watched: tuple[tuple[str, Stamp], ...] = ()


class Found(_Row):
    """One entry point of an installed distribution; `problem` says why it could not be read.

    Attributes:
        name: of the entry point.
        value: of the entry point, `module:function`, or `module` where the manifest says everything.
        location: the folder of `sys.path` that has it.
        metadata: the distribution's folder of metadata.
        manifest_path: where the manifest is, empty where there is none.
        plain: the manifest, as `Manifest.plain` gave it.
        watched: where its manifest can be, if that is its author's project.
    """

    _manifest: Manifest | None = None

    @property
    def manifest(self) -> Manifest | None:
        """What the plugin says of itself."""
        if self._manifest is None and self.plain is not None:
            self._manifest = Manifest.from_plain(self.plain)
        return self._manifest

    @property
    def module(self) -> str:
        """The module that the entry point names."""
        return self.value.partition(":")[0].partition("[")[0].strip()

    @property
    def function(self) -> str:
        """The object that the entry point names in its module, or nothing."""
        return self.value.partition(":")[2].partition("[")[0].strip()

    @property
    def source(self) -> str:
        """What `explain` shows as the origin of the plugin's kernels."""
        return f"{self.distribution} {self.version} (plugin {self.name})"

    def __str__(self) -> str:
        return f"plugin {self.name!r} of {self.distribution} {self.version}"


def normalized(name: str) -> str:
    """Return the name of a distribution as installers compare them."""
    name = name.lower().replace("_", "-").replace(".", "-")
    while "--" in name:  # compiling an expression would take longer than all of this
        name = name.replace("--", "-")
    return name


def read(folder: str) -> Listing:
    """Return what a folder of `sys.path` holds. A zip file is read by importlib.metadata."""
    try:
        with os.scandir(folder or ".") as entries:
            found = sorted(entry.name for entry in entries if entry.name.endswith(_SUFFIXES))
    except NotADirectoryError:
        return _read_archive(folder)
    except OSError:
        return Listing()
    names: dict[str, str] = {}
    plugins: list[Found] = []
    watched: list[tuple[str, Stamp]] = []
    torch = ""
    for metadata in found:
        name, version = _identity(metadata)
        if names.setdefault(normalized(name), metadata) != metadata:  # what an interrupted upgrade left
            continue
        torch = version if name == "torch" and not torch else torch
        path = os.path.join(folder, metadata, "entry_points.txt")
        if metadata.endswith(
            ".egg-info"
        ):  # a build writes into it again, and the folder's time stays as it is
            watched.append((path, opkit_boot.stamp(path)))
        content = _bytes(path)
        if GROUP.encode() in content:
            plugins += _plugins(folder, metadata, content)
    return Listing(_joined(names), torch, tuple(plugins), tuple(watched))


def _joined(names: Iterable[str]) -> str:
    return "".join(f"/{name}/" for name in names)


def _identity(metadata: str) -> tuple[str, str]:
    """Return name and version as the name of a folder has them."""
    name, _, version = metadata.rpartition(".")[0].partition("-")
    return name, version.partition("-py")[0] if metadata.endswith(".egg-info") else version


def _plugins(folder: str, metadata: str, content: bytes) -> Iterator[Found]:
    """Yield the plugins of one distribution."""
    name, version = _stated(os.path.join(folder, metadata))
    place = os.path.join(folder, metadata)
    try:
        points = list(_points(content.decode()))
    except ValueError as error:
        problem = f"its entry_points.txt cannot be read ({type(error).__name__}: {error})"
        yield Found(name, name, version, "", folder, place, problem)
        return
    for point, value in points:
        problem, plain = "", None
        places = _manifests(folder, value.partition(":")[0].strip())
        found = next(filter(os.path.exists, places), "")
        if found:
            plain, problem = _read_manifest(found, point)
        watched = tuple(
            (path, opkit_boot.stamp(path)) for path in places if _is_edited(path, folder, metadata)
        )
        yield Found(point, name, version, value, folder, place, problem, found, plain, watched)


def _is_edited(path: str, folder: str, metadata: str) -> bool:
    """Whether a file may change where it is: its project's own, and not what an installer has put into the folder."""
    return metadata.endswith(".egg-info") or not path.startswith(f"{folder}/")


def _points(text: str) -> Iterator[tuple[str, str]]:
    """Yield name and value of the entry points of the group, as importlib.metadata reads them."""
    group = ""
    for line in map(str.strip, text.splitlines()):
        if not line or line.startswith("#"):
            continue
        if line.startswith("[") and line.endswith("]"):
            group = line[1:-1]
        elif group == GROUP:
            name, equals, value = line.partition("=")
            if not equals:
                raise ValueError(f"the line {line!r} has no equals sign")
            yield name.strip(), value.strip()


def _stated(metadata: str) -> tuple[str, str]:
    """Return name and version as the metadata state them; what is missing or damaged has stand-ins."""
    file = "METADATA" if metadata.endswith(".dist-info") else "PKG-INFO"
    head = _bytes(os.path.join(metadata, file)).partition(b"\n\n")[0].decode(errors="replace")
    fields = dict(re.findall(r"^(Name|Version):[ \t]*(\S+)", head, re.MULTILINE))
    return fields.get("Name", "(no name)"), fields.get("Version", "(no version)")


def _manifests(folder: str, module: str) -> list[str]:
    """Return where the manifest of a module can be: in its package, the innermost first."""
    parts = module.split(".")
    if not all(part.isidentifier() for part in parts):
        return []
    for root in (os.path.join(folder, parts[0]), _elsewhere(folder, parts[0])):
        if os.path.isdir(root):
            return [os.path.join(root, *parts[1:depth], FILE) for depth in range(len(parts), 0, -1)]
    return []


def _elsewhere(folder: str, package: str) -> str:
    """Return where Python finds a package that is not beside its metadata, as after an editable install."""
    if os.path.exists(os.path.join(folder, package)) or os.path.exists(os.path.join(folder, f"{package}.py")):
        return ""
    from importlib.util import find_spec

    try:
        spec = find_spec(package)
    except Exception:  # a finder of somebody's, or a module that has none
        return ""
    places = spec.submodule_search_locations if spec else None
    return next(iter(places), "") if places else ""


def _read_manifest(path: str, name: str) -> tuple[tuple[Any, ...] | None, str]:
    """Return a manifest as the catalog keeps it, or what is wrong with it."""
    from opkit.errors import PluginError

    try:
        with open(path, encoding="utf-8") as file:
            made = parse(file.read(), path)
    except PluginError as error:
        return None, str(error)
    except (OSError, ValueError) as error:
        return None, f"its manifest {path} cannot be read ({type(error).__name__}: {error})"
    if made.name != name:
        return (
            None,
            f"its manifest {path} has the name {made.name!r}; expected that of the entry point, {name!r}",
        )
    return made.plain(), ""


def _bytes(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def _read_archive(path: str) -> Listing:
    """Return what a zip file holds; no manifest is looked for in it."""
    from importlib.metadata import distributions

    names: list[str] = []
    plugins: list[Found] = []
    for source in distributions(path=[path]):
        try:
            name, version = source.metadata["Name"], source.version
            names.append(normalized(name))
            points = _points(source.read_text("entry_points.txt") or "")
            plugins += [Found(point, name, version, value, path) for point, value in points]
        except Exception:  # metadata that cannot be read
            continue
    return Listing(_joined(names), "", tuple(plugins))
