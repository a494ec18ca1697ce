"""Cases: calls of an op as a user lists them, `(x, y)` or `((x, y), {"eps": 1e-3})`; and the op they are for.

They are called with arguments of their own, so that nothing of the caller's is changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from opkit import _registry
from opkit._op import Op
from opkit.errors import ArgumentError
from opkit.spec.schema import tensors

Case = tuple[tuple[Any, ...], dict[str, Any]]


def resolve(op: Any, doing: str) -> Op[..., Any]:
    """Return an op that is given as such or by its name; `doing` begins the text of errors: `preparing`.

    Raises:
        ArgumentError: it is neither.
        OpNotFoundError: there is no op of the name.
    """
    if isinstance(op, Op):
        return op
    if isinstance(op, str):
        return _registry.get(op)
    raise ArgumentError(
        f"{doing} ops: found {op!r}; expected ops or names of ops. Pass what @opkit.op made, or 'demo::f'."
    )


def listed(op: Op[..., Any], cases: Any, doing: str) -> list[Case]:
    """Return cases as pairs (args, kwargs).

    Raises:
        ArgumentError: they are none.
    """
    if isinstance(cases, (str, Tensor)) or not isinstance(cases, Iterable):
        raise _wrong(op, "cases", cases, doing)
    return [_pair(op, case, doing) for case in cases]


def _pair(op: Op[..., Any], case: Any, doing: str) -> Case:
    if not isinstance(case, (tuple, list)):
        raise _wrong(op, "a case", case, doing)
    args, kwargs = case, {}
    if len(case) == 2 and isinstance(case[0], (tuple, list)) and isinstance(case[1], Mapping):
        args, kwargs = case
    return tuple(args), dict(kwargs)


def _wrong(op: Op[..., Any], what: str, found: Any, doing: str) -> ArgumentError:
    names = ", ".join(p.name for p in op.schema.positional) + "," * (len(op.schema.positional) == 1)
    return ArgumentError(
        f"{doing} {op.name}: {what} is of type {type(found).__name__}; expected a list of tuples of arguments. "
        f"Write [({names})], or [(args, kwargs)].",
        op=op.name,
    )


def fill(op: Op[..., Any], case: Case, doing: str) -> tuple[Any, ...]:
    """Return all arguments of a case, in schema order.

    Raises:
        ArgumentError: one of them has no data.
    """
    args, kwargs = case
    values = op.schema.fill(args, kwargs)
    if any(tensor.device.type == "meta" for tensor in tensors(values)):
        raise ArgumentError(
            f"{doing} {op.name}: a case has a tensor on the device 'meta'; expected one with data, as the op is "
            "called with it. Use zeros of the same shape: torch.zeros(shape).",
            op=op.name,
        )
    return values


def own(op: Op[..., Any], values: tuple[Any, ...]) -> list[Any]:
    """Return arguments that the caller does not see again: copies of those that the op overwrites."""
    return [_own(v, copy=p.mutated) for p, v in zip(op.schema.params, values, strict=True)]


def _own(value: Any, *, copy: bool) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_own(v, copy=copy) for v in value) if tensors([value]) else value
    if not isinstance(value, Tensor):
        return value
    own = value.detach().clone() if copy else value.detach()
    if value.requires_grad:
        own.requires_grad_()
        return own.clone() if copy and not value.is_leaf else own
    return own
