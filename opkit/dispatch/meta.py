"""What an op's outputs are, before a kernel runs: from the shape line, or from a registered function.

The shape line's checks of the inputs hold in either case; a registered function replaces only what the
line says of the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from opkit.errors import RegistrationError, ShapeError
from opkit.spec.plan import OpenSize, OutputMeta, Plan
from opkit.spec.schema import Schema

_REMEMBERED = 4096  # kinds of call per op whose registered metadata is kept


class Meta:
    """The metadata of one op's outputs."""

    def __init__(self, schema: Schema, plan: Plan | None) -> None:
        self.schema = schema
        self.plan = plan
        self.function: Callable[..., Any] | None = None
        self._remembered: dict[Hashable, tuple[Sequence[Any], torch.device | None] | None] = {}

    def replace(self, function: Callable[..., Any]) -> None:
        """Let `function` say what the outputs are."""
        self.function = function
        self._remembered.clear()

    def trace(self, values: Sequence[Any]) -> Any:
        """Return empty outputs for fake or meta tensors, in the form torch expects."""
        schema = self.schema
        metas, device = ((), None) if self.plan is None else self.plan.infer(*values)
        if self.function is not None:
            args, kwargs = schema.split(values)
            return schema.raw(schema.flatten(self.function(*args, **kwargs)))
        if not schema.results:
            return None
        if self.plan is None:
            raise RegistrationError(
                f"tracing {schema.name}: nothing says the shapes of its outputs; expected a shape line or a meta "
                "function. Declare it with shapes=, or register one with register_fake.",
                op=schema.name,
            )
        made: dict[str, Any] = {}
        outputs = []
        for result, meta in zip(schema.results, metas, strict=True):
            shape = [self._size(s, result.name, made) if isinstance(s, OpenSize) else s for s in meta.shape]
            outputs.append(torch.empty(shape, dtype=meta.dtype, device=device))
        return schema.raw(outputs)

    def _size(self, size: OpenSize, output: str, made: dict[str, Any]) -> Any:
        """Return a symbol for a size that depends on data, one for each name."""
        if size.name not in made:
            try:
                context = torch.library.get_ctx()
            except RuntimeError:
                raise ShapeError(
                    f"calling {self.schema.name} on the meta device: the size {size!r} of output {output} depends on "
                    "data; expected tensors that have some, or a tracer such as torch.compile and torch.export. "
                    "Move the arguments to another device.",
                    op=self.schema.name,
                ) from None
            made[size.name] = context.new_dynamic_size()
            if size.bound is not None:
                from torch.fx.experimental.symbolic_shapes import expect_true  # a second, and tracers have it

                expect_true(made[size.name] <= size.bound)
        return made[size.name]

    def expect(self, values: Sequence[Any]) -> tuple[Sequence[Any] | None, torch.device | None]:
        """Check real arguments, and return what the outputs must be; None where that cannot be known.

        Raises:
            ShapeError, DtypeError: the arguments do not fit the shape line.
        """
        derived = (None, None) if self.plan is None else self.plan.infer(*values)
        if self.function is None:
            return derived
        key = tuple(map(_kind, values))
        if key not in self._remembered:
            if len(self._remembered) == _REMEMBERED:
                self._remembered.clear()
            try:
                self._remembered[key] = self.of_registered(values)
            except Exception as err:
                if not any(name in str(err) for name in ("get_ctx", "new_dynamic_size")):
                    raise RegistrationError(
                        f"calling {self.schema.name}: its meta function failed for these arguments, "
                        f"{type(err).__name__}: {err}; expected one that describes the outputs of every call that "
                        "the kernels take. Correct the function given to register_fake.",
                        op=self.schema.name,
                    ) from err
                self._remembered[key] = None  # a size that depends on data, known to a tracer only
        return self._remembered[key] or (None, None)

    def of_registered(self, values: Sequence[Any]) -> tuple[Sequence[Any], torch.device | None]:
        """Ask the registered function, with meta tensors in the place of real ones."""
        outputs = self.schema.flatten(self.trace([_to_meta(v) for v in values]))
        flat = [v for value in values for v in (value if isinstance(value, (list, tuple)) else (value,))]
        device = next((v.device for v in flat if isinstance(v, Tensor)), None)
        return [_metas(o) for o in outputs], device


def _metas(output: Any) -> Any:
    if isinstance(output, (list, tuple)):
        return [_metas(o) for o in output]
    device = output.device if output.device.type != "meta" else None
    return OutputMeta(tuple(output.shape), output.dtype, output.stride(), device)


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, (list, tuple)):
        return [_to_meta(v) for v in value]
    return value


def _kind(value: Any) -> Hashable:
    """Return what a meta function can see of an argument."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, (list, tuple)):
        return tuple(map(_kind, value))
    return type(value), value
