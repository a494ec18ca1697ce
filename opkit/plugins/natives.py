"""The native libraries that a plugin opens while it is called: each is asked about before it is opened.

`import` of an extension module and `ctypes.CDLL`, which `torch.ops.load_library` calls, are seen; what
native code opens itself is not. A library that may not be opened raises ImportError or OSError in the plugin,
which may have a way to do without it. Libraries of other distributions are none of this module's business.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.machinery
import importlib.util
import os
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from opkit.plugins import namespaces, trial, watchdog


class Refusal(NamedTuple):
    """A library that was not opened; `reason` completes "its library <name> …"."""

    path: str
    cause: Literal["crash", "hang", "conflict"]
    reason: str
    said: str

    def __str__(self) -> str:
        return f"its library {os.path.basename(self.path)} {self.reason}"


class Natives:
    """The native libraries of one plugin: those in its package, or beside its module.

    Args:
        plugin: its name.
        module: the module of its entry point.
        limit: seconds that opening one may take.
    """

    def __init__(self, plugin: str, module: str, *, limit: float) -> None:
        self.plugin = plugin
        self.limit = limit or trial.LIMIT
        self.opened: list[str] = []
        self.refusals: list[Refusal] = []
        self._packages, self._folder = _places(module.partition(".")[0])

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Ask about each library of the plugin that is opened meanwhile, on any thread."""
        _watching.append(self)
        if len(_watching) == 1:
            ctypes.CDLL.__init__ = _open_library  # type: ignore[method-assign]
            importlib.machinery.ExtensionFileLoader.create_module = _create_module  # type: ignore[method-assign]
        try:
            yield
        finally:
            _watching.remove(self)
            if not _watching:
                ctypes.CDLL.__init__ = _cdll  # type: ignore[method-assign]
                importlib.machinery.ExtensionFileLoader.create_module = _create  # type: ignore[method-assign]

    def owns(self, path: str) -> bool:
        """Whether the library is the plugin's; `path` has no links in it."""
        in_package = any(path.startswith(f"{package}{os.sep}") for package in self._packages)
        return in_package or os.path.dirname(path) == self._folder

    def ask(self, path: str, module: str) -> Refusal | None:
        """Return why the library must not be opened, or None; the latter is remembered as its opening."""
        if _is_open(path):
            return None
        with watchdog.paused():
            tried = trial.of(path, plugin=self.plugin, module=module, after=self.opened, limit=self.limit)
        refusal = _refusal(path, tried)
        if refusal:
            self.refusals.append(refusal)
        else:
            self.opened.append(path)
        return refusal


_watching: list[Natives] = []  # of the plugins that are being called, the innermost last
_cdll = ctypes.CDLL.__init__
_create = importlib.machinery.ExtensionFileLoader.create_module


def _open_library(self: ctypes.CDLL, name: Any = None, *args: Any, **kwargs: Any) -> None:
    if isinstance(name, str | os.PathLike) and (refusal := _asked(os.fspath(name), "")):
        raise OSError(f"opkit does not open {refusal.path}: {refusal}")
    _cdll(self, name, *args, **kwargs)


def _create_module(self: Any, spec: Any) -> Any:
    if refusal := _asked(spec.origin, spec.name):
        raise ImportError(f"opkit does not open {refusal.path}: {refusal}", name=spec.name, path=refusal.path)
    return _create(self, spec)


def _asked(name: Any, module: str) -> Refusal | None:
    if isinstance(name, str) and os.sep in name:  # else the system looks for it, in its own folders
        path = os.path.realpath(name)
        for natives in reversed(_watching):
            if natives.owns(path) and os.path.isfile(path):
                return natives.ask(path, module)
    return None


def _refusal(path: str, tried: trial.Trial) -> Refusal | None:
    if tried.outcome == "crashed":
        return Refusal(path, "crash", f"crashes when it is opened: {tried.detail}", tried.said)
    if tried.outcome == "hung":
        return Refusal(path, "hang", f"hangs when it is opened: {tried.detail}", tried.said)
    if found := namespaces.clashes(tried.namespaces, tried.ops):
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        return Refusal(path, "conflict", f"would define once more {found[0]}{more}", "")
    return None


def _places(module: str) -> tuple[list[str], str | None]:
    """Return the folders of a package, or the one that a module without a package is in."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):  # importing it will say so
        spec = None
    if spec is None:
        return [], None
    if spec.submodule_search_locations is not None:
        return [os.path.realpath(folder) for folder in spec.submodule_search_locations], None
    return [], os.path.realpath(os.path.dirname(spec.origin)) if spec.has_location and spec.origin else None


def _is_open(path: str) -> bool:
    """Whether the library is in this process already, so that opening it does nothing."""
    import _ctypes

    try:
        _ctypes.dlclose(_ctypes.dlopen(path, os.RTLD_NOLOAD | os.RTLD_NOW))
    except (OSError, AttributeError):
        return False
    return True
