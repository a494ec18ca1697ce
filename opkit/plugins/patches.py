"""What was replaced in torch while a plugin was called: functions, classes, methods and custom ops, by name.

Compares what torch's modules and main classes hold before and after. Data is left out, as torch changes
it itself; so are functions of torch that torch puts in the place of its own. Nothing is undone: what was
patched may have been meant, and a manifest can declare it.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Collection, Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any

_GONE = object()
_FOLLOWS = "torch.Storage"  # which torch replaces itself when the default dtype changes
# Where the classes are whose methods vendors replace.
_CLASSES = (
    "torch",
    "torch.nn",
    "torch.nn.parallel",
    "torch.autograd",
    "torch.autograd.function",
    "torch.cuda",
    "torch.distributed",
    "torch.library",
    "torch.optim",
    "torch.storage",
    "torch.utils.data",
)


class Patches:
    """What torch holds now; nothing while torch is not imported."""

    def __init__(self) -> None:
        self._ops = _custom_ops()
        self._owners = dict(_owners())
        # Two long lists instead of a dict for each owner: a thousand new dicts set the garbage collector off.
        self._names: list[str] = []
        self._values: list[Any] = []
        self._sizes: list[int] = []
        for owner in self._owners.values():
            held = vars(owner)
            self._names.extend(held)
            self._values.extend(held.values())
            self._sizes.append(len(held))

    def found(self) -> list[str]:
        """Return the names of what has been replaced, added or removed since: `torch.nn.Module.to`."""
        found = [] if self._is_as_before() else list(self._replaced())
        now_ops = _custom_ops()
        replaced = [name for name, op in self._ops.items() if now_ops.get(name) is not op]
        found += [f"torch.ops.{name.replace('::', '.')}" for name in replaced]
        return [name for name in found if name != _FOLLOWS]

    def _is_as_before(self) -> bool:
        """Whether everything is what it was, as nearly always; one comparison of 50 000 values is a tenth of many."""
        now: list[Any] = []
        for owner in self._owners.values():
            now.extend(vars(owner).values())
        try:
            return now == self._values  # which looks at identity first
        except Exception:  # of an object that cannot be compared, which is another then
            return False

    def _replaced(self) -> Iterator[str]:
        end = 0
        for (name, owner), size in zip(self._owners.items(), self._sizes, strict=True):
            start, end = end, end + size
            values, now = self._values[start:end], vars(owner)
            if size != len(now) or not all(map(operator.is_, values, now.values())):
                before = dict(zip(self._names[start:end], values, strict=True))
                yield from (f"{name}.{attribute}" for attribute in _changed(before, now))


def undeclared(found: Collection[str], declared: Collection[str]) -> list[str]:
    """Return what of `found` is not declared, by itself or with the module or class it is in.

    Example:
        >>> undeclared(["torch.nn.Module.to", "torch.save"], ["torch.nn"])
        ['torch.save']
    """
    return [name for name in found if not any(f"{name}.".startswith(f"{one}.") for one in declared)]


def _custom_ops() -> dict[str, Any]:
    if "torch" not in sys.modules:
        return {}
    from opkit import _torch_library

    return _torch_library.custom_ops()


def _owners() -> Iterator[tuple[str, Any]]:
    modules = {
        name: module
        for name, module in list(sys.modules.items())
        if (name == "torch" or name.startswith("torch.")) and isinstance(module, ModuleType)
    }
    yield from modules.items()
    seen: set[type] = set()
    for name in _CLASSES:
        for attribute, value in list(vars(modules.get(name, sys)).items()) if name in modules else ():
            # Not isinstance, which asks the value for its class: some of torch's warn when asked for anything.
            if issubclass(type(value), type) and value not in seen and _is_of_torch(value):
                seen.add(value)
                yield f"{name}.{attribute}", value


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name, old in before.items():
        new = now.get(name, _GONE)
        if new is not old and _is_code(old) and not _is_own(name, new):
            yield name
    for name in now.keys() - before.keys():
        if _is_code(now[name]) and not _is_of_torch(now[name]):
            yield name


def _is_code(value: Any) -> bool:
    return callable(value) or type(value) in (property, staticmethod, classmethod)


def _is_own(name: str, value: Any) -> bool:
    """Whether it is torch itself that has put it there, as parts of it do when they are first used."""
    if not isinstance(value, FunctionType) or not _is_of_torch(value):
        return False
    return value.__name__ == name or "._" in value.__module__


def _is_of_torch(value: Any) -> bool:
    value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    module = getattr(value, "__module__", None) or ""
    return module == "torch" or module.startswith("torch.")
