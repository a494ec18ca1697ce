"""`adopt`: an Op over an operator that someone else defined.

Its kernels run in calls that are made through the Op. Nothing is registered on the operator's own dispatch keys,
unless it is to be replaced for everyone.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from types import FrameType
from typing import Any, cast

import torch

from opkit import _make, _registry, _torch, _torch_library
from opkit._declare import place
from opkit._op import Op
from opkit.dispatch import select
from opkit.errors import DuplicateOpError, GradientError, OpNotFoundError, RegistrationError, did_you_mean
from opkit.spec import text
from opkit.spec.schema import Schema
from opkit.transforms import gradient
from opkit.transforms.recompute import ReferenceFormula

_HOME = "opkit_adopted"  # the namespace of the overloads that carry kernels of adopted ops
_KEPT = ("nondeterministic_seeded", "data_dependent_output", "dynamic_output_shape", "needs_exact_strides")
_lock = threading.RLock()


def adopt(name: str, *, override: bool = False) -> Adopted:
    """Return an Op over an operator of torch or of another library.

    Kernels that are registered on it run in the calls that are made through the Op, under every transform. Where
    none takes the call, the operator itself does. Its metadata is what the operator says; its gradient, where a kernel
    of opkit ran, is that of the operator, by recomputation, unless `register_autograd` gives a formula.

    Args:
        name: `namespace::name`, with `.overload` where it is not the default one.
        override: register the kernels on the operator's own dispatch keys, so that they run for everyone. Refused, as
            soon as a kernel is registered, for a composite operator without a formula: its autograd would be lost.

    Raises:
        OpNotFoundError: torch knows no such operator.
        SchemaError: a result shares storage with an argument.
        DuplicateOpError: the name is that of an op of opkit, or adopted already with another `override`.

    Example:
        >>> import opkit, torch
        >>> relu = opkit.adopt("aten::relu")
        >>> @relu.register_kernel("cpu", backend="clamp")
        ... def _(x):
        ...     return x.clamp(min=0)
        >>> relu(torch.tensor([-1.0, 2.0]))
        tensor([0., 2.])
        >>> relu.explain(torch.ones(2)).selected
        'clamp'
    """
    return adopting(name, sys._getframe(1), override=override)


def adopting(name: str, frame: FrameType, *, override: bool = False) -> Adopted:
    """Do what `adopt` does, for a caller in `frame`."""
    with _lock:
        known = _registry.find(name)
        if isinstance(known, Adopted) and known.override == override:
            return known
        if known is not None:
            what = (
                f"adopted with override={known.override}" if isinstance(known, Adopted) else "an op of opkit"
            )
            raise DuplicateOpError(
                f"adopting {name}: it is {what} already; expected an operator of torch or of another library. Use "
                f"opkit.get({name!r}).",
                op=name,
            )
        original = _find(name)
        schema = text.of_parsed(original._schema, "adopting")
        made: Any = _make.make(
            _named(schema, name),
            _calling(original, name, frame),
            kind=Adopted,
            original=original,
            override=override,
            tags=tuple(t for t in original.tags if t.name in _KEPT),
        )
        return cast("Adopted", made)


class Adopted(Op[..., Any]):
    """An Op over an operator that someone else defined. Made by `opkit.adopt`.

    Attributes:
        original: the operator's overload in `torch.ops`.
        override: whether kernels run for everyone.
    """

    original: Any
    override: bool

    def __init__(
        self, schema: Schema, reference: Callable[..., Any], *, original: Any, override: bool, **options: Any
    ) -> None:
        super().__init__(schema, reference, **options)
        self.original = original
        self.override = override
        self._table.quiet = True
        self._meta.replace(reference)
        self._meta.lenient = True
        self._own_formula = self._formula
        if not any(p.mutated for p in schema.params):
            self._own_formula = self._formula = ReferenceFormula(schema, _differentiated(original, self.name))
        self._theirs: torch.library.Library | None = None
        self._replaced: set[str] = set()

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        if self.override or not self._table.has_kernels():
            return self.original(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def register_kernel(self, device: str, function: Any = None, **options: Any) -> Any:
        """Add a kernel for a device, see `Op.register_kernel`."""
        if function is not None and self.override:
            self._refuse_lost_autograd()
        made = super().register_kernel(device, function, **options)
        if function is not None and self.override:
            self._replace(torch.device(device).type)
        return made

    def _refuse_lost_autograd(self) -> None:
        if _torch_library.is_composite(self.original) and self._formula is self._own_formula:
            raise RegistrationError(
                f"registering a kernel for everyone on {self.name}: it is composite, torch differentiates what it "
                "calls, and a kernel would take its gradient away; expected a formula. Register one first with "
                "register_autograd, or adopt it without override=True.",
                op=self.name,
            )

    def _replace(self, device: str) -> None:
        """Put the choice among the kernels in the place of the operator's kernel for a device."""
        key = _torch.dispatch_key(device)
        if key in self._replaced:
            return
        before = torch.library.get_kernel(self.original, key)
        schema, name = self.schema, self.original.name()

        def kernel(keyset: Any, /, *args: Any, **kwargs: Any) -> Any:
            values = schema.fill(args, kwargs)
            if select.choose(self._table, values) is self._table.reference:
                return before.call_boxed(keyset, *args, **kwargs)
            return self._runner(*values)

        if self._theirs is None:
            self._theirs = torch.library.Library(name.split("::")[0], "IMPL")
        _torch_library.override(self._theirs, name.split("::")[1], kernel, key)
        if _torch_library.is_composite(self.original) and not self._replaced:
            autograd = gradient.autograd_kernel(
                schema, _torch_library.Overload(*name.split("::")), self._runner, lambda: self._formula,
                lambda: self._tangents or self._formula.tangents, variant=False,
            )  # fmt: skip
            _torch_library.override(self._theirs, name.split("::")[1], autograd, "Autograd")
        self._replaced.add(key)

    def _destroy(self) -> None:
        super()._destroy()
        if self._theirs is not None:
            _torch_library.destroy(self._theirs)


def _find(name: str) -> Any:
    """Return the overload that a name stands for."""
    space, _, rest = name.partition("::")
    opname, _, overload = rest.partition(".")
    try:
        packet = getattr(getattr(torch.ops, space), opname)
    except (AttributeError, RuntimeError):
        near = did_you_mean(name, _torch_library.operators(space))
        raise OpNotFoundError(
            f"adopting {name}: torch knows no such operator; expected namespace::name of one that is loaded.{near} "
            "Import the library that defines it first.",
            op=name,
        ) from None
    overloads = packet.overloads()
    if (overload or "default") not in overloads:
        raise OpNotFoundError(
            f"adopting {name}: the operator has the overloads {', '.join(overloads)}; expected one of these. Write "
            f"'{space}::{opname}.{overloads[0]}'.",
            op=name,
        )
    return getattr(packet, overload or "default")


def _named(schema: Schema, name: str) -> Schema:
    """Return the schema under the name that it is adopted by, and the one that opkit defines in torch."""
    space, _, rest = name.partition("::")
    return replace(schema, name=name, home=f"{_HOME}::{space}__{rest.replace('.', '__')}")


def _calling(original: Any, name: str, frame: FrameType) -> Callable[..., Any]:
    """Return a function that calls the operator, for error texts at the place where it is adopted."""

    def reference(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    place(reference, frame, name.split("::")[1], f"adopt({name})", str(original._schema))
    return reference


def _differentiated(original: Any, name: str) -> Callable[..., Any]:
    """Return the operator as a formula calls it: where it has no gradient, that is an error, not None."""

    def reference(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and not _torch_library.has_autograd(original):
            raise GradientError(
                f"differentiating {name}: the operator has no gradient of its own, and the Op that adopts it has no "
                "formula; expected one of them. Register a formula with register_autograd.",
                op=name,
            )
        return original(*args, **kwargs)

    return reference
