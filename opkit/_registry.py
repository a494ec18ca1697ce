"""Every op by name, and what others want to register on ops, now or when they appear.

A store, nothing more: it does not know how an op is made or what is registered on it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from opkit import _sources as sources
from opkit.errors import DuplicateOpError, OpNotFoundError, did_you_mean
from opkit.spec.schema import check_name, describe

if TYPE_CHECKING:
    from opkit._op import Op

_ops: dict[str, Op[..., Any]] = {}
_additions: dict[str, list[Callable[[Op[..., Any]], object]]] = {}
_promised: dict[str, Callable[[], object]] = {}
_lock = threading.RLock()


def find(name: str) -> Op[..., Any] | None:
    """Return the op `namespace::name`, or None. Installed plugins are asked for it.

    Raises:
        SchemaError: `name` is not `namespace::name`.
    """
    check_name(name, "looking up an op")
    if name not in _ops:
        sources.consult_for_ops()
        define = _promised.get(name)
        if define is not None:
            define()
            _promised.pop(name, None)  # kept or broken: nobody is asked twice
    return _ops.get(name)


def promise(name: str, define: Callable[[], object]) -> None:
    """Say that `define` will define the op `name`, once it is asked for. It is listed until then."""
    _promised[name] = define


def withdraw(name: str) -> None:
    """Take back a promise."""
    _promised.pop(name, None)


def get(name: str) -> Op[..., Any]:
    """Return the op `namespace::name`.

    Raises:
        OpNotFoundError: nobody defined it; the text lists the ops that exist.
        SchemaError: `name` is not `namespace::name`.

    Example:
        >>> import opkit
        >>> opkit.get("opkit::rms_norm").name
        'opkit::rms_norm'
    """
    return named(name, f"looking up {name}")


def named(name: str, doing: str) -> Op[..., Any]:
    """Return the op `namespace::name`; the text of an error begins with `doing`.

    Raises:
        OpNotFoundError, SchemaError: as `get` does.
    """
    op = find(name)
    if op is None:
        known = list_ops()
        raise OpNotFoundError(
            f"{doing}: no op has that name; defined are {', '.join(known) or 'none'}."
            f"{did_you_mean(name, known)} Import the module that defines it, or install its plugin.",
            op=name,
        )
    return op


def list_ops() -> list[str]:
    """Return the names of all ops, those of installed plugins included: also those that `get` is still to import."""
    sources.consult_for_ops()
    return sorted({*_ops, *_promised})


def all_ops() -> list[Op[..., Any]]:
    """Return the ops that are defined now; nobody is asked for more."""
    with _lock:
        return list(_ops.values())


def add(op: Op[..., Any]) -> None:
    """Enter an op, and apply to it what was waiting for it."""
    with _lock:
        _ops[op.name] = op
        additions = list(_additions.get(op.name, ()))
    for addition in additions:
        addition(op)


def remove(name: str) -> None:
    """Forget an op and take its definition back from torch; an unknown name is ignored."""
    with _lock:
        op = _ops.pop(name, None)
    if op is not None:
        op._destroy()


def when_defined(name: str, addition: Callable[[Op[..., Any]], object]) -> None:
    """Apply `addition` to the op `name`: now if it exists, whenever it is (re)defined otherwise."""
    check_name(name, "registering on an op")
    with _lock:
        _additions.setdefault(name, []).append(addition)
        op = _ops.get(name)
    if op is not None:
        addition(op)


def make_room(name: str, function: Callable[..., Any]) -> Op[..., Any] | None:
    """Remove and return the op that `function` redefines, which it may if both come from the same place.

    Raises:
        DuplicateOpError: `name` is defined by another function.
    """
    old = _ops.get(name)
    if old is None:
        return None
    if not _same_place(old.reference, function):
        raise DuplicateOpError(
            f"declaring {name}: found two definitions, {describe(old.reference)} and {describe(function)}; "
            "expected one. Give one of them another name or namespace, or remove it; a function that makes ops "
            "takes their name as an argument.",
            op=name,
        )
    remove(name)
    return old


def _enclosed(function: Callable[..., Any]) -> list[int]:
    """Return the identities of the values that a function has from around it."""
    cells = getattr(function, "__closure__", None) or ()
    return [id(cell.cell_contents) for cell in cells if cell != type(cell)()]


def _same_place(old: Callable[..., Any], new: Callable[..., Any]) -> bool:
    """Whether `new` is `old` defined again: a re-run notebook cell, a reloaded module."""
    if getattr(old, "__qualname__", None) != getattr(new, "__qualname__", None):
        return False
    code = getattr(old, "__code__", None)
    if code is not None and code is getattr(new, "__code__", None) and _enclosed(old) != _enclosed(new):
        return False  # a function that makes ops, called again: two ops under one name
    files = [getattr(getattr(f, "__code__", None), "co_filename", None) for f in (old, new)]
    return files[0] == files[1] or old.__module__ == new.__module__
