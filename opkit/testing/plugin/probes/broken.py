"""Uses a plugin whose code, or whose native libraries, cannot be loaded."""

from __future__ import annotations

import importlib.abc
import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def main(what: str, name: str, package: str, folder: str, device: str, calls: str) -> dict[str, Any]:
    """Return what is wrong with torch and opkit then, and whether `why` says what happened.

    Args:
        what: `package` refuses every module of it; `library` refuses native libraries in `folder` and opkit's cache.
        name: the plugin's.
        package: the plugin's.
        folder: of the package.
        device: the plugin's, or nothing.
        calls: a file with calls of ops, see `opkit.testing.plugin.calls.save`.
    """
    refused: list[str] = []
    if what == "package":
        sys.meta_path.insert(0, _Refusing(package, refused))
    else:
        _refuse_libraries([folder, os.environ["OPKIT_CACHE_DIR"]], refused)
    import torch

    import opkit

    problems: list[str] = []
    if torch.ones(2).add(1).tolist() != [2, 2]:
        problems.append("torch.ones(2) + 1 is not [2, 2]")
    _try("opkit.plugins.load", lambda: opkit.plugins.load(name), problems)
    if device:
        _try(f"torch.ones(2, device={device!r})", lambda: torch.ones(2, device=device), problems)
        torch.ones(2).add(1)
    from opkit.testing.plugin import calls as saved

    for call in saved.load(calls):
        _try(f"calling {call.op}", lambda: problems.extend(saved.wrong(call)), problems)  # noqa: B023
    return {"problems": problems, "refused": refused, "why": opkit.plugins.why(name)}


class _Refusing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of a package as ever, and raises where one is run."""

    def __init__(self, package: str, refused: list[str]) -> None:
        self._package = package
        self._refused = refused

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return where a module of the package is, with this as its loader."""
        if fullname.partition(".")[0] != self._package:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if found is not None:
            found.loader = self
        return found

    def exec_module(self, module: ModuleType) -> None:
        """Refuse."""
        self._refused.append(module.__name__)
        raise ImportError(f"{module.__name__} is broken by opkit's conformance kit")


def _refuse_libraries(folders: Sequence[str], refused: list[str]) -> None:
    """Have every opening of a native library in some folders fail."""
    roots = tuple(os.path.realpath(folder) + os.sep for folder in folders)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "ctypes.dlopen":
            opened = arguments[0]
        elif event == "import":
            opened = arguments[1]  # of an extension module, as it is opened
        else:
            return
        if isinstance(opened, (str, os.PathLike)) and os.path.realpath(opened).startswith(roots):
            refused.append(os.path.basename(opened))
            raise OSError(f"{opened} is broken by opkit's conformance kit")

    sys.addaudithook(hook)


def _try(doing: str, function: Callable[[], object], problems: list[str]) -> None:
    """Note what is raised that is not an error of opkit's, which explains itself."""
    import opkit

    try:
        function()
    except (opkit.OpkitError, NotImplementedError):
        pass
    except Exception as error:
        problems.append(f"{doing} raised {type(error).__name__}: {error}")
