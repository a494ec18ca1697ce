"""The plugin that a suite is about: where it is installed, and what its manifest says."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from opkit.errors import PluginError
from opkit.plugins import loader
from opkit.plugins.manifest import KernelEntry, Manifest
from opkit.plugins.state import State

_NATIVE = (".so", ".cpp", ".cc", ".cu", ".c")
_COMPILED = (".pyc", ".pyo")


@dataclass(frozen=True)
class Subject:
    """An installed plugin with a manifest."""

    state: State
    manifest: Manifest

    @property
    def name(self) -> str:
        """Its name, that of its entry point."""
        return self.manifest.name

    @property
    def package(self) -> str:
        """The package that its entry point names."""
        return self.state.found.module.partition(".")[0]

    @property
    def folder(self) -> Path:
        """Where the package is, which need not be beside its metadata."""
        beside = Path(self.state.found.location, self.package)
        if beside.is_dir():
            return beside
        spec = importlib.util.find_spec(self.package)
        places = spec.submodule_search_locations if spec is not None else None
        return Path(next(iter(places))) if places else beside

    @property
    def device(self) -> str:
        """The device that it brings, or nothing."""
        return self.manifest.device.name if self.manifest.device is not None else ""

    @property
    def foreign(self) -> tuple[str, ...]:
        """The ops of others that it has kernels for."""
        return tuple(dict.fromkeys(k.op for k in self.manifest.kernels if k.op not in self.manifest.ops))

    @property
    def kernels(self) -> tuple[KernelEntry, ...]:
        """Its kernels."""
        return self.manifest.kernels

    @property
    def is_native(self) -> bool:
        """Whether there is native code in its package."""
        return any(path.suffix in _NATIVE for path in self.folder.rglob("*"))

    def unrecorded(self) -> Iterator[str]:
        """Yield the files in its package that no installer knows of, which therefore stay when it is uninstalled."""
        record = Path(self.state.found.metadata, "RECORD")
        if not record.is_file():
            return
        root = Path(self.state.found.location)
        lines = record.read_text(encoding="utf-8").splitlines()
        known = {line.rsplit(",", 2)[0].strip('"') for line in lines}
        if not any(one.startswith(f"{self.package}/") for one in known):
            return  # an editable install: the package is the author's working copy
        for path in sorted(self.folder.rglob("*")):
            inside = path.relative_to(root).as_posix()
            if path.is_file() and path.suffix not in _COMPILED and inside not in known:
                yield inside


def find(name: str) -> Subject:
    """Return the installed plugin `name`.

    Raises:
        PluginError: it is not installed, is left out, or has no manifest.
    """
    if not name:
        raise PluginError(
            "running the conformance suite: it has no name; expected that of the plugin. Write name = '...' in the "
            "class."
        )
    state = loader.named(name)
    if state.is_out:
        raise PluginError(
            f"running the conformance suite for {state.found}: it is {state.status}: {state.reason}. Expected it to be "
            f"used here. {state.remedy}"
        )
    manifest = state.found.manifest
    if manifest is None or not state.found.manifest_path:
        raise PluginError(
            f"running the conformance suite for {state.found}: it has no manifest; expected an opkit-plugin.toml in "
            "its package, by which opkit knows it without importing it. Write one, see opkit.plugins.manifest, and "
            "have it installed as package data."
        )
    return Subject(state, manifest)
