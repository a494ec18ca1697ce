"""The names that a stub uses: those that its module has, and what has to be imported beside them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any


class Names:
    """Finds a name in a stub for an object, by which the module itself may mean another one.

    Args:
        module: what the module has, by name.
    """

    def __init__(self, module: Mapping[str, Any]) -> None:
        self._module = module
        self._imports: dict[str, str] = {}  # statements, by the name that each binds
        self._defined: set[str] = set()

    def use(self, module: str, name: str = "") -> str:
        """Return what the object `name` of a module is called in the stub, or the module where no name is given."""
        meant: Any = importlib.import_module(module)
        wanted, found = module, f"import {module}"
        if name:
            meant, wanted, found = getattr(meant, name, None), name, f"from {module} import {name}"
        if self._module.get(wanted) is meant:
            return wanted
        alias = f"_{wanted}" if wanted in self._module else wanted
        self._imports[alias] = found if alias == wanted else f"{found} as {alias}"
        return alias

    def define(self, name: str) -> bool:
        """Return whether a class that the module does not have is still to be written."""
        is_new = name not in self._defined
        self._defined.add(name)
        return is_new

    def imports(self) -> list[str]:
        """Return the import statements for what was used and the module does not have."""
        return sorted(self._imports.values(), key=lambda line: (line.startswith("from"), line))
