"""What an op's outputs are, before a kernel runs: from the shape line, or from a registered function.

The shape line's checks of the inputs hold in either case; a registered function replaces only what the
line says of the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from opkit.dispatch.outputs import ABSENT
from opkit.errors import ArgumentError, RegistrationError, ShapeError
from opkit.spec.plan import OpenSize, OutputMeta, Plan
from opkit.spec.schema import Schema, tensors

_REMEMBERED = 4096  # kinds of call per op whose registered metadata is kept


class Meta:
    """The metadata of one op's outputs."""

    def __init__(self, schema: Schema, plan: Plan | None) -> None:
        self.schema = schema
        self.plan = plan
        self.function: Callable[..., Any] | None = None
        self.lenient = False  # whether a function that fails just says nothing
        self._remembered: dict[Hashable, tuple[Sequence[Any], torch.device | None] | None] = {}

    @property
    def known(self) -> bool:
        """Whether anything says what the outputs are."""
        return (self.plan is not None and self.plan.missing is None) or self.function is not None

    def replace(self, function: Callable[..., Any]) -> None:
        """Let `function` say what the outputs are."""
        self.function = function
        self._call = self.schema.adapt(function)
        self._remembered.clear()

    def check_traceable(self) -> None:
        """Raise RegistrationError where nothing can say what the outputs are without running a kernel."""
        late = next((r for r in self.schema.results if r.is_known_late), None)
        if late is not None:
            raise RegistrationError(
                f"tracing {self.schema.name}: its result {late.name} is a {late.type}, which only a kernel can "
                "compute; expected results that a graph can hold, Tensor or int. Call the op outside of the compiled "
                "function (torch.compiler.disable), or return a Tensor of no dimensions.",
                op=self.schema.name,
            )
        if self.function is None:
            self._check_described()

    def trace(self, values: Sequence[Any]) -> Any:
        """Return empty outputs for fake or meta tensors, in the form torch expects."""
        self.check_traceable()
        return self._describe(values)

    def _describe(self, values: Sequence[Any]) -> Any:
        schema = self.schema
        metas, device = ((), None) if self.plan is None else self.plan.infer_symbols(*values)
        if self.function is not None:
            args, kwargs = schema.split(values)
            return schema.raw(schema.flatten(self._call(*args, **kwargs)))
        self._check_described()
        if not schema.results:
            return None
        made: dict[str, Any] = {}
        outputs: list[Any] = []
        for result, meta in zip(schema.results, metas, strict=True):
            if isinstance(meta, list):
                outputs.append([self._empty(m, result.name, device, made) for m in meta])
            else:
                outputs.append(self._empty(meta, result.name, device, made))
        return schema.raw(outputs)

    def _check_described(self) -> None:
        schema, plan = self.schema, self.plan
        if not schema.results or (plan is not None and plan.missing is None):
            return
        number = any(r.is_number for r in schema.results)
        types = ", ".join(str(r.type) for r in schema.results)
        advice = "Register one with register_fake" + (
            "; an int that depends on data is torch.library.get_ctx().new_dynamic_size() there."
            if number
            else "."
        )
        if plan is not None:
            raise RegistrationError(
                f"tracing {schema.name}: its shape line '{plan.line}' does not describe all results: "
                f"{plan.missing}; expected a meta function that does. {advice}",
                op=schema.name,
            )
        if number:
            raise RegistrationError(
                f"tracing {schema.name}: nothing says what its results ({types}) are; expected a meta function. "
                f"{advice}",
                op=schema.name,
            )
        raise RegistrationError(
            f"tracing {schema.name}: nothing says the shapes of its outputs; expected a shape line or a meta "
            "function. Declare it with shapes=, or register one with register_fake.",
            op=schema.name,
        )

    def _empty(
        self, meta: OutputMeta, output: str, device: torch.device | None, made: dict[str, Any]
    ) -> Tensor:
        shape = [self._size(s, output, made) if isinstance(s, OpenSize) else s for s in meta.shape]
        if all(type(s) is int for s in shape) and math.prod(shape) * meta.dtype.itemsize >= 2**63:
            raise ShapeError(
                f"calling {self.schema.name}: output {output} would have the shape {tuple(shape)} of {meta.dtype}; "
                "expected one whose bytes 64 bits can count. Pass smaller sizes.",
                op=self.schema.name,
            )
        return torch.empty(shape, dtype=meta.dtype, device=device)

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
            except ArgumentError:
                raise
            except Exception as err:
                if not self.lenient and not any(n in str(err) for n in ("get_ctx", "new_dynamic_size")):
                    raise RegistrationError(
                        f"calling {self.schema.name}: its meta function failed for these arguments, "
                        f"{type(err).__name__}: {err}; expected one that describes the outputs of every call that "
                        "the kernels take. Correct the function given to register_fake.",
                        op=self.schema.name,
                    ) from err
                self._remembered[key] = None  # a size that depends on data, known to a tracer only
        return self._remembered[key] or (None, None)

    def outputs(self, values: Sequence[Any]) -> tuple[Sequence[Any], torch.device | None]:
        """Return what is to be allocated for a call: as `expect`, where everything must be known."""
        metas, device = self.expect(values)
        return (metas, device) if metas is not None else self.of_registered(values)

    def promised(self, values: Sequence[Any]) -> tuple[Sequence[Any] | None, torch.device | None]:
        """Return of a call that is being traced what `expect` returns of a real one."""
        if self.function is None:
            return (None, None) if self.plan is None else self.plan.infer(*values)
        flat = self.schema.flatten(self._describe(values))
        return [_metas(o) for o in flat], next((t.device for t in tensors(values)), None)

    def of_registered(self, values: Sequence[Any]) -> tuple[Sequence[Any], torch.device | None]:
        """Ask the registered function, with meta tensors in the place of real ones."""
        outputs = self.schema.flatten(self._describe([_to_meta(v) for v in values]))
        return [_metas(o) for o in outputs], next((t.device for t in tensors(values)), None)


def _metas(output: Any) -> Any:
    if isinstance(output, (list, tuple)):
        return [_metas(o) for o in output]
    if output is None:
        return ABSENT
    if not isinstance(output, Tensor):  # a number: nothing is known of it
        return None
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
