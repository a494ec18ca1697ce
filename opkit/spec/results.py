"""What an op returns: one `Result` per value, and the container in which the caller gets them."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opkit.spec import types
from opkit.spec.types import ValueType

ACCEPTED = (
    "Tensor, Optional[Tensor], list[Tensor], list[Optional[Tensor]], int, float, bool, a tuple, NamedTuple or "
    "dataclass of these, or None"
)
_NUMBERS = ("SymInt", "int", "float", "bool")


@dataclass(frozen=True)
class Result:
    """One result of an op; `name` is the field of the NamedTuple or dataclass, or out, or out0, out1, …"""

    name: str
    type: ValueType

    @property
    def is_number(self) -> bool:
        """Whether it is an int, float or bool, which has no shape."""
        return self.type.base != "Tensor"

    @property
    def is_known_late(self) -> bool:
        """Whether it is a float or bool: torch has no symbol for one that a kernel computes."""
        return self.type.base in ("float", "bool")


class RefusedError(Exception):
    """A return annotation that no op can have; the text says what was found."""


def from_annotation(
    annotation: Any, names: Callable[[str], Any], scope: Mapping[str, Any]
) -> tuple[tuple[Result, ...], Callable[..., Any] | None]:
    """Return the results that a return annotation declares, and their container: a class, `tuple` or None.

    `names` evaluates a string inside of it; `scope` holds the caller's local names.

    Raises:
        RefusedError: no op can return that.
    """
    if annotation is None or annotation is type(None):
        return (), None
    if is_container(annotation):
        return tuple(_result(f, a, names) for f, a in _fields(annotation, scope)), annotation
    parts: Sequence[Any] | None = None
    if isinstance(annotation, tuple):  # the tutorials' spelling: -> (Tensor, Tensor)
        parts = annotation
    elif typing.get_origin(annotation) is tuple:
        parts = typing.get_args(annotation)
    if parts is not None:
        if not parts or Ellipsis in parts:
            raise RefusedError(
                f"the return annotation is {types.shown(annotation)}, which has no fixed length, unlike list[Tensor]"
            )
        return tuple(_result(f"out{i}", part, names) for i, part in enumerate(parts)), tuple
    return (_result("out", annotation, names),), None


def is_container(annotation: Any) -> bool:
    """Whether it is a NamedTuple or a dataclass."""
    if not isinstance(annotation, type):
        return False
    return dataclasses.is_dataclass(annotation) or (
        issubclass(annotation, tuple) and hasattr(annotation, "_fields")
    )


def names(container: Any) -> tuple[str, ...]:
    """Return the names of a container's fields."""
    if dataclasses.is_dataclass(container):
        return tuple(f.name for f in dataclasses.fields(container))
    return tuple(container._fields)


def fields(container: Any, value: Any) -> tuple[Any, ...]:
    """Return the fields of a value in the container, in order."""
    if dataclasses.is_dataclass(container):
        return tuple(getattr(value, f.name) for f in dataclasses.fields(container))
    return tuple(value)


def build(container: Callable[..., Any], results: Sequence[Result], values: Sequence[Any]) -> Any:
    """Return the values in the container."""
    if container is tuple:
        return tuple(values)
    if dataclasses.is_dataclass(container):
        return container(**{r.name: v for r, v in zip(results, values, strict=True)})
    return container(*values)


def _fields(container: type, scope: Mapping[str, Any]) -> list[tuple[str, Any]]:
    try:
        hints = typing.get_type_hints(container, localns=dict(scope))
    except NameError as err:
        raise RefusedError(f"a field of {container.__name__} uses {err.name!r}, not defined there") from None
    if not dataclasses.is_dataclass(container):
        return [(f, hints.get(f)) for f in names(container)]
    fixed = next((f.name for f in dataclasses.fields(container) if not f.init), None)
    if fixed is not None:
        raise RefusedError(
            f"{types.shown(container)}.{fixed} has init=False, so its value cannot be passed in"
        )
    return [(f, hints[f]) for f in names(container)]


def _result(name: str, annotation: Any, names: Callable[[str], Any]) -> Result:
    found = types.of_annotation(annotation, names)
    if found is None or not can_be_returned(found):
        what = "nothing" if annotation is None else types.shown(annotation)
        raise RefusedError(f"the return annotation holds {what} (for {name})")
    return Result(name, found)


def can_be_returned(t: ValueType) -> bool:
    """Whether an op can return values of the type."""
    if t.base == "Tensor":
        return not (t.optional and t.is_list) and t.length is None
    return t.base in _NUMBERS and not (t.is_list or t.optional or t.choices)
