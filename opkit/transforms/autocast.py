"""An op under `torch.autocast`: its floating-point arguments are cast, and autocast is off inside.

Keyword-only arguments and lists are cast like the others. Not cast is what the declaration forbids: an argument
whose dtype the shape line fixes, and one that the op mutates, as the caller would not see what went into a copy.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from opkit import _torch, _torch_library
from opkit.errors import RegistrationError
from opkit.spec.plan import Plan
from opkit.spec.schema import Schema
from opkit.transforms.gradient import EXTRA

# float64 stays, as in torch; float8 is a storage format, whose values a cast would tear from their scale.
_CAST = (torch.float32, torch.float16, torch.bfloat16)


class Autocast:
    """The autocast rules of one op: a dtype for each device type."""

    def __init__(self, schema: Schema, plan: Plan | None) -> None:
        self.schema = schema
        self.dtypes: dict[str, torch.dtype] = {}
        self._kept_as_is = _fixed(schema, plan)

    def register(self, device_type: str, dtype: torch.dtype) -> None:
        """Have calls in an autocast region of `device_type` run in `dtype`.

        Raises:
            RegistrationError: the device has no autocast, or the dtype is none to compute in.
        """
        if not isinstance(device_type, str) or not _available(device_type):
            raise RegistrationError(
                f"registering an autocast rule of {self.schema.name}: found the device {device_type!r}; expected a "
                "device type that torch.autocast takes, such as 'cpu' or 'cuda'. Name one.",
                op=self.schema.name,
            )
        if dtype not in _CAST:
            raise RegistrationError(
                f"registering an autocast rule of {self.schema.name}: found the dtype {dtype!r}; expected one of "
                f"{', '.join(map(str, _CAST))}. Name one.",
                op=self.schema.name,
            )
        self.dtypes[device_type] = dtype

    def in_force(self) -> bool:
        """Whether a call would now be cast."""
        return any(torch.is_autocast_enabled(device_type) for device_type in self.dtypes)

    def kernel(self, overload: _torch_library.Overload, device_type: str) -> Callable[..., Any]:
        """Return the kernel for the Autocast key of a device, which asks for the registered dtype at every call."""
        schema = self.schema

        def kernel(keyset: Any, /, *args: Any, **kwargs: Any) -> Any:
            extra = {EXTRA: kwargs.pop(EXTRA)} if EXTRA in kwargs else {}
            values = schema.fill(args, kwargs)
            with _torch.below_autocast(device_type):
                cast = _Cast(device_type, self.dtypes[device_type])
                each = zip(values, self._kept_as_is, strict=True)
                args, kwargs = schema.split([v if as_is else cast(v) for v, as_is in each])
                return overload()(*args, **kwargs, **extra)

        return kernel


def _available(device_type: str) -> bool:
    try:
        return torch.device(device_type).type == device_type and torch.amp.is_autocast_available(device_type)
    except RuntimeError:  # no device type at all
        return False


def _fixed(schema: Schema, plan: Plan | None) -> Sequence[bool]:
    """Return for each argument whether autocast leaves it alone."""
    fixed = {p.name for p in schema.params if p.mutated}
    rules = {t.name: t.dtype for t in plan.inputs if t.dtype is not None} if plan is not None else {}
    fixed |= {name for name, rule in rules.items() if rule.kind in ("fixed", "value")}
    fixed |= {name for name, rule in rules.items() if rule.kind == "tensor" and rule.name in fixed}
    return [p.name in fixed for p in schema.params]


class _Cast:
    """The cast of one call's arguments."""

    def __init__(self, device_type: str, dtype: torch.dtype) -> None:
        self._device_type = device_type
        self._dtype = dtype

    def __call__(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [self(v) for v in value]
        if not isinstance(value, Tensor) or value.device.type != self._device_type:
            return value
        if value.dtype == self._dtype or value.dtype not in _CAST:
            return value
        if self._is_weight(value):
            return _weights.cast(value, self._dtype)
        return value.to(self._dtype)

    def _is_weight(self, value: Tensor) -> bool:
        """Whether torch would keep the cast until the region ends (at::autocast::cached_cast)."""
        return (
            value.requires_grad
            and value.is_leaf
            and value.dtype == torch.float32
            and torch.is_autocast_cache_enabled()
            and torch.get_autocast_dtype(self._device_type) == self._dtype
            and not _torch.is_view(value)
            and _torch.is_plain([value])
        )


class _Weights:
    """Casts of weights, kept for as long as torch keeps its own: until the outermost autocast region ends."""

    def __init__(self) -> None:
        self._kept: dict[Any, tuple[weakref.ref[Tensor], Tensor]] = {}
        self._region: Callable[[], object] = lambda: None

    def cast(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        if self._region() is None:
            self._kept.clear()
            self._region = _torch.autocast_region()
        key = (id(weight), weight.data_ptr(), weight._version, dtype, torch.is_grad_enabled())
        found = self._kept.get(key)
        if found is not None and found[0]() is weight:
            return found[1]
        cast = weight.to(dtype)
        if self._region() is not None:
            self._kept[key] = (weakref.ref(weight), cast)
        return cast


_weights = _Weights()
