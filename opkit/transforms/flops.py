"""An op under `torch.utils.flop_counter.FlopCounterMode`: the count that its author gives."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from opkit.errors import RegistrationError
from opkit.spec.schema import Schema, describe
from opkit.transforms.gradient import EXTRA

_SHAPES = "out_shape"  # torch's word for the shapes of the results


def counting(schema: Schema, formula: Callable[..., Any]) -> Callable[..., Any]:
    """Return `formula` in the form that torch calls.

    The formula gets the op's arguments with shapes (`torch.Size`) in the place of tensors, and the shapes of the
    results as `out_shape` where it has a parameter of that name.

    Raises:
        RegistrationError: it cannot be called with the op's arguments.
    """
    wants_shapes = _check(schema, formula)

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> Any:
        kwargs.pop(EXTRA, None)
        args, kwargs = schema.split(schema.restore([_shapes(v) for v in schema.fill(args, kwargs)]))
        if wants_shapes:
            shapes = [_shapes(o) for o in schema.flatten(out_val)]
            kwargs[_SHAPES] = shapes[0] if schema.container is None and shapes else tuple(shapes)
        found = formula(*args, **kwargs)
        if isinstance(found, bool) or not isinstance(found, (int, float, torch.SymInt)):
            raise RegistrationError(
                f"counting the operations of {schema.name}: its formula {describe(formula)} returned {found!r}; "
                "expected a number. Correct the function given as flops=.",
                op=schema.name,
            )
        return found

    return count


def count_calls(packet: Any, count: Callable[..., Any]) -> None:
    """Count calls of all overloads of `packet`; a later overload of an op may have another one (torch/library.py)."""
    # Imported here, as only ops with a formula need it; the table is one dict for all counters to come.
    from torch.utils.flop_counter import flop_registry

    flop_registry[packet] = count


def forget_count(packets: Iterable[Any], count: Callable[..., Any]) -> None:
    """Take back what `count_calls` did."""
    from torch.utils.flop_counter import flop_registry

    for packet in packets:
        if flop_registry.get(packet) is count:
            del flop_registry[packet]


def _check(schema: Schema, formula: Any) -> bool:
    """Return whether the formula wants the shapes of the results."""
    names = [p.name for p in schema.params]
    expected = f"a function of the op's arguments ({', '.join(names)}), and of {_SHAPES} where it wants it"
    if not callable(formula):
        raise RegistrationError(
            f"declaring {schema.name}: found flops={formula!r}; expected {expected}. Pass one.",
            op=schema.name,
        )
    try:
        own = inspect.signature(formula)
    except ValueError:  # a builtin without a signature
        return False
    wants_shapes = _SHAPES in own.parameters and _SHAPES not in names
    args, kwargs = schema.split(names)
    try:
        own.bind(*args, **kwargs, **({_SHAPES: ()} if wants_shapes else {}))
    except TypeError:
        raise RegistrationError(
            f"declaring {schema.name}: found flops={describe(formula)} with the signature {own}; expected {expected}. "
            "Change its parameters.",
            op=schema.name,
        ) from None
    return wants_shapes


def _shapes(value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_shapes(v) for v in value]
    return value.shape if isinstance(value, Tensor) else value
