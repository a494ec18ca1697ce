"""Whether a manifest says what is true of its plugin: found out by importing and calling everything that it names.

For `opkit plugins validate`, and for tests of plugins. Do it in a process of its own: what a plugin does stays done.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opkit.errors import PluginError
from opkit.plugins import calls, doctor, loader, manifest, requirements, toml
from opkit.plugins.discovery import GROUP, Found
from opkit.plugins.manifest import FILE, Manifest
from opkit.plugins.registry import Registry
from opkit.plugins.standin import StandIn
from opkit.plugins.state import State, describe

_SKIPPED = re.compile(r"^(\..*|build|dist|node_modules|.*\.egg-info)$")


def find(path: str) -> list[Path]:
    """Return the manifests that a path means: a manifest, or a folder that has some in it.

    Raises:
        PluginError: there is none.
    """
    start = Path(path)
    found = [start] if start.is_file() else sorted(_walk(start))
    if not found:
        raise PluginError(
            f"looking for a manifest in {path}: there is none; expected a file {FILE}, or a folder with one in it. Put "
            "it into the plugin's package, beside its __init__.py."
        )
    return found


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not _SKIPPED.match(name)]
        if FILE in files:
            yield Path(root, FILE)


def differences(path: Path) -> list[str]:
    """Return what is wrong with a manifest, and where the plugin is not what it says; nothing if all is well."""
    try:
        said = manifest.parse(path.read_text(encoding="utf-8"), str(path))
    except PluginError as error:
        return [str(error)]
    except (OSError, ValueError) as error:
        return [f"the manifest {path} cannot be read ({describe(error)})"]
    package, root = _package(path)
    project = _project(path, said, package)
    found = _found(said, path, package, project)
    problems = list(_project_differences(said, project, package))
    state = State(found)
    requirements.apply([state])
    if state.status == "rejected":
        return [*problems, f"{state.reason}; expected to be tried with what it requires. {state.remedy}"]
    sys.path.insert(0, str(root))
    return [*problems, *_differences(state, said)]


def _package(path: Path) -> tuple[str, Path]:
    """Return the package that a manifest is in, and the folder from which that is imported."""
    folder = path.absolute().parent
    names = [folder.name]
    while (folder.parent / "__init__.py").is_file():
        folder = folder.parent
        names.insert(0, folder.name)
    return ".".join(names), folder.parent


def _project(path: Path, said: Manifest, package: str) -> dict[str, Any]:
    """Return what is said of the project: what is installed beside the package, else the pyproject.toml above it."""
    root = path.absolute().parents[package.count(".") + 1]
    installed: dict[str, Any] = {}
    for point in doctor.entry_points(GROUP):
        if (
            point.name == said.name
            and point.module.partition(".")[0] == package.partition(".")[0]
            and point.dist
        ):
            points = {GROUP: {point.name: point.value}}
            installed = {"name": point.dist.name, "version": point.dist.version, "entry-points": points}
            if _has_metadata(root) and Path(str(point.dist.locate_file(""))).resolve() == root.resolve():
                return installed
    for folder in path.absolute().parents:
        file = folder / "pyproject.toml"
        if file.is_file():
            try:
                content = toml.loads(file.read_text(encoding="utf-8")).get("project", {})
            except (OSError, ValueError):
                break
            return content if isinstance(content, dict) else {}
    return installed


def _has_metadata(folder: Path) -> bool:
    """Whether distributions are installed in a folder, which a project's own is not."""
    return any(folder.glob("*.dist-info"))


def _entry_point(said: Manifest, package: str, project: dict[str, Any]) -> str:
    points = project.get("entry-points", {}).get(GROUP, {})
    return str(points.get(said.name, package))


def _found(said: Manifest, path: Path, package: str, project: dict[str, Any]) -> Found:
    return Found(
        name=said.name,
        distribution=str(project.get("name", package)),
        version=said.version,
        value=_entry_point(said, package, project),
        location=str(path.parent),
        manifest_path=str(path),
        plain=said.plain(),
    )


def _project_differences(said: Manifest, project: dict[str, Any], package: str) -> Iterator[str]:
    if not project:
        return
    points = project.get("entry-points", {}).get(GROUP, {})
    if said.name not in points:
        yield (
            f"the project has no entry point {said.name!r} in the group {GROUP}; expected one in "
            f'[project.entry-points."{GROUP}"]. Write {said.name} = "{package}:register".'
        )
    elif str(points[said.name]).partition(":")[0].partition(".")[0] != package.partition(".")[0]:
        yield f"the entry point {said.name} is {points[said.name]}; expected a module in {package}, as the manifest is"
    version = project.get("version")
    if version is not None and version != said.version:
        yield f"its version is {said.version!r}; expected that of the distribution, {version!r}"


def _differences(state: State, said: Manifest) -> Iterator[str]:
    registry = Registry(state.found.source)
    if state.found.function:
        try:
            calls.entry_point(state, registry)
        except (Exception, SystemExit) as error:
            yield f"calling {state.found.value} raised {describe(error)}"
        registry.close()
    yield from _of_function(said, registry, _ops_of_import(state))
    for entry in said.kernels:
        if entry.factory:
            yield from _of_factory(StandIn(entry, state, loader.fetch))
    for name in sorted({op.partition("::")[0] for op in registry.ops} - set(said.namespaces)):
        yield f"it defines ops in the namespace {name}; expected only {', '.join(said.namespaces) or 'none'}"
    yield from (note for note in state.notes if not note.startswith("as its manifest says"))


def _ops_of_import(state: State) -> set[str]:
    """Return the ops that are defined where the plugin's modules are imported, as those of a package for users are."""
    from opkit import _registry

    own = state.found.module.partition(".")[0]
    return {op.name for op in _registry.all_ops() if op.__module__.partition(".")[0] == own}


def _of_function(said: Manifest, registry: Registry, imported: set[str]) -> Iterator[str]:
    """Yield how what the function registered, and the import defined, differs from what the manifest names."""
    named = {entry[:3]: entry for entry in said.kernels}
    registered = {(r.op, r.device, r.backend): r for r in registry.registrations}
    for what, here, there in (
        ("op", imported | set(registry.ops), set(said.ops)),
        ("toolchain", set(registry.toolchains), {said.toolchain.name} if said.toolchain else set()),
    ):
        for name in sorted(here - there):
            yield f"its function brings the {what} {name}, which the manifest does not name. Add it"
        for name in sorted(there - here):
            yield f"the manifest names the {what} {name}, which its function does not bring. Take it out"
    for key, registration in registered.items():
        if key not in named:
            yield f"its function registers a kernel for {registration}, which the manifest does not name. Add it"
            continue
        for field in ("priority", "properties"):
            here, there = getattr(registration, field), getattr(named[key], field)
            if here != there:
                yield f"its kernel for {registration} has the {field} {here!r}; the manifest says {there!r}"
    for key, entry in named.items():
        if not entry.factory and key not in registered:
            yield f"the manifest names a kernel for {entry}, which its function does not register. Take it out"


def _of_factory(stand_in: StandIn) -> Iterator[str]:
    """Yield what is wrong with a kernel that a factory makes."""
    from opkit import _registry

    entry = stand_in.entry
    try:
        registration = calls.factory(stand_in)
    except (Exception, SystemExit) as error:
        yield f"its kernel for {entry}: {describe(error)}"
        return
    op = _registry.find(entry.op)
    if op is None:
        return  # nobody has defined it here
    try:
        registration.apply(op, stand_in.state.found.source)
    except Exception as error:
        yield f"its kernel for {entry} does not fit: {describe(error)}"
