"""An op's derivatives against those of its reference in float64, in every dtype that the arguments can be cast to."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from opkit._op import Op
from opkit.dispatch.preference import use_backend
from opkit.errors import GradientError
from opkit.testing.arguments import (
    FLOATING,
    cast,
    castable,
    chosen,
    copied,
    mapped,
    named,
    outputs,
    reason,
    reference,
    widened,
)
from opkit.testing.difference import difference, largest, tolerance
from opkit.testing.report import Record
from opkit.transforms.formula import NoFormula, differentiable_arguments

_CHECKS = {"second derivative": "second derivatives", "tangent": "forward mode", "jvp": "forward mode"}

Tensors = dict[str, Tensor]
Derivatives = Mapping[str, Tensor | None]


def records(op: Op[..., Any], values: Sequence[Any], backend: str = "") -> Iterator[Record]:
    """Yield what is found of the formula, the jvp and the second derivatives, with forward run by a backend."""
    with use_backend(backend) if backend else contextlib.nullcontext():
        for record in _records(op, values, backend):
            check = next((c for start, c in _CHECKS.items() if record.what.startswith(start)), "gradients")
            yield record._replace(backend=backend, check=check)


def _records(op: Op[..., Any], values: Sequence[Any], backend: str) -> Iterator[Record]:
    rule = op._formula
    has_jvp = (op._tangents or rule.tangents) is not None
    missing = None
    if isinstance(rule, NoFormula) and not has_jvp:
        missing = "the op has no gradient formula"
    elif op._table.declared:
        missing = "the op is declared without a reference"
    elif torch.Tag.nondeterministic_seeded in op.overload.tags:
        missing = "the op draws random numbers"
    if missing is not None:
        yield Record(op.name, "", "gradient", "not applicable", missing)
        return
    params = differentiable_arguments(op.schema, op._meta.plan, rule.non_differentiable)
    wanted = frozenset(p.name for p in params)
    names = castable(op, values)
    twice = True
    own = {
        v.dtype for v in named([p.name for p in op.schema.params], values).values() if isinstance(v, Tensor)
    }
    for dtype in FLOATING if names else (None,):
        given = tuple(values) if dtype is None else cast(op, values, dtype)
        if backend and not chosen(op, given, backend):
            text = (
                f"it does not take {str(dtype).removeprefix('torch.')}"
                if dtype
                else "it does not take this call"
            )
            yield Record(op.name, backend, "gradient", "not applicable", text)
            continue
        case = _Case(op, given, wanted, f"in {str(dtype).removeprefix('torch.')}" if dtype else "as given")
        try:
            with torch.no_grad():
                outputs(op, op.overload, mapped(op, given, lambda _, t: copied(t)))
        except Exception as err:
            if dtype is None or dtype in own:
                yield case.record("call", "failed", reason(err), "a result")
            else:
                yield case.record("gradient", "not applicable", f"the op does not run, {reason(err)}")
            continue
        if has_jvp:
            yield from case.forward()
        if not isinstance(rule, NoFormula):
            yield from case.backward(twice=twice)
            twice = False  # it is the formula's composition, not its rounding, that this is about


class _Case:
    """The derivatives for one call."""

    def __init__(self, op: Op[..., Any], values: tuple[Any, ...], wanted: frozenset[str], where: str) -> None:
        self.op = op
        self.values = values
        self.wanted = wanted
        self.where = where
        self.part = tolerance(named([p.name for p in op.schema.params], values).values())
        self.reference = reference(op)

    def record(self, what: str, status: str, found: str = "", expected: str = "") -> Record:
        return Record(self.op.name, "", f"{what} {self.where}", status, found, expected)

    def compare(
        self, what: str, found: Derivatives, expected: Derivatives, like: Tensors, rounded: Derivatives
    ) -> Iterator[Record]:
        """Yield one record for each name; what has no derivative has zeros.

        `rounded` are torch's derivatives of the reference in the dtype itself: being twice as far off is allowed,
        as sums of rounded numbers that nearly cancel are.
        """
        for name, tensor in like.items():
            left, right = (zeros_for(side.get(name), tensor) for side in (found, expected))
            slack = 2 * largest(rounded.get(name), right) if tensor.dtype != torch.float64 else 0.0
            wrong = difference(left, right, self.part, slack)
            yield self.record(f"{what} {name}", "failed" if wrong else "passed", *(wrong or ()))

    # ---------------------------------------------------------------- reverse mode

    def backward(self, *, twice: bool) -> Iterator[Record]:
        leaves, results = self._recorded(self.op.overload, copied)
        if not results:
            yield self.record("gradient", "not applicable", "no result of the op has a gradient")
            return
        along = {name: _drawn(name, o) for name, o in results.items()}
        try:
            wide, its = self._recorded(self.reference, widened)
            its = {name: o for name, o in its.items() if name in results}
            if not its:
                raise RuntimeError("its results have no history")
            right = _pulled(wide, its, along, twice=False)
        except Exception as err:
            yield self.record(
                "gradient", "not applicable", f"the reference cannot be differentiated, {reason(err)}"
            )
            return
        try:
            found = _pulled(leaves, results, along, twice=False)
        except Exception as err:
            yield self.record("gradient", "failed", reason(err), "gradients")
            return
        yield from self.compare("gradient of", found, right, leaves, self._rounded(along))
        if twice:
            yield from self._second(wide, its, along)

    def _second(self, wide: Tensors, its: Tensors, along: Tensors) -> Iterator[Record]:
        what = "second derivative"
        sides = {f"gradient of {name}": a for name, a in along.items()}
        leaves, results = self._recorded(self.op.overload, copied)
        like = {**leaves, **sides}
        again = {name: _drawn(f"second {name}", leaf) for name, leaf in leaves.items()}
        try:
            expected = _pulled_twice(wide, its, along, again)
        except Exception as err:
            yield self.record(
                what, "not applicable", f"the reference cannot be differentiated twice, {reason(err)}"
            )
            return
        try:
            found = _pulled_twice(leaves, results, along, again)
        except Exception as err:
            # A formula without one of its own says so when it is asked; a wrong one is the op's fault.
            loud = isinstance(err, GradientError) and err.op != self.op.name
            if loud or "once_differentiable" in str(err):
                yield self.record(what, "not applicable", f"the formula has none, {reason(err)}")
            else:
                yield self.record(what, "failed", reason(err), "that of the reference")
            return
        yield from self.compare(f"{what} for", found, expected, like, {})

    def _rounded(self, along: Tensors) -> Tensors:
        """Return what torch gives for the reference in the dtype of the call, nothing where that does not run."""
        try:
            leaves, results = self._recorded(self.reference, copied)
            return _pulled(leaves, {n: o for n, o in results.items() if n in along}, along, twice=False)
        except Exception:
            return {}

    def _recorded(
        self, function: Callable[..., Any], form: Callable[[Tensor], Tensor]
    ) -> tuple[Tensors, Tensors]:
        """Return the arguments as leaves, and the results that have a history."""
        leaves: Tensors = {}

        def leaf(name: str, tensor: Tensor) -> Tensor:
            copy = form(tensor)
            if self._is_wanted(name, tensor):
                leaves[name] = copy.requires_grad_()
            return copy

        with torch.enable_grad():
            found = outputs(self.op, function, mapped(self.op, self.values, leaf))
        return leaves, {n: o for n, o in found.items() if isinstance(o, Tensor) and o.requires_grad}

    def _is_wanted(self, name: str, tensor: Tensor) -> bool:
        return name.split("[")[0] in self.wanted and (tensor.dtype in FLOATING or tensor.is_complex())

    # ---------------------------------------------------------------- forward mode

    def forward(self) -> Iterator[Record]:
        try:
            right = self._pushed(self.reference, widened)
        except Exception as err:
            yield self.record(
                "jvp", "not applicable", f"the reference cannot be differentiated, {reason(err)}"
            )
            return
        try:
            # Torch makes no dual number of memory that overlaps, so this is a plain copy.
            found = self._pushed(self.op.overload, lambda t: t.detach().clone())
        except Exception as err:
            yield self.record("jvp", "failed", reason(err), "tangents")
            return
        constant = self.op._formula.non_differentiable
        tangents = {n: t for n, (_, t) in found.items() if n.split("[")[0] not in constant}
        like = {n: found[n][0] for n in tangents}
        expected = {n: t for n, (_, t) in right.items()}
        try:
            rounded = {
                n: t for n, (_, t) in self._pushed(self.reference, lambda t: t.detach().clone()).items()
            }
        except Exception:
            rounded = {}
        yield from self.compare("tangent of", tangents, expected, like, rounded)

    def _pushed(
        self, function: Callable[..., Any], form: Callable[[Tensor], Tensor]
    ) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Return floating results with their tangents."""

        def dual(name: str, tensor: Tensor) -> Tensor:
            if not self._is_wanted(name, tensor):
                return form(tensor)
            return forward_ad.make_dual(form(tensor), form(_drawn(name, tensor)))  # type: ignore[no-any-return]

        with forward_ad.dual_level():
            found = outputs(self.op, function, mapped(self.op, self.values, dual))
            pairs = {n: forward_ad.unpack_dual(o) for n, o in found.items() if isinstance(o, Tensor)}
        return {
            n: (pair.primal, pair.tangent)
            for n, pair in pairs.items()
            if pair.primal.is_floating_point() or pair.primal.is_complex()
        }


def zeros_for(derivative: Tensor | None, like: Tensor) -> Tensor:
    """Return a derivative, zeros for None."""
    return torch.zeros_like(like) if derivative is None else derivative


def _drawn(name: str, like: Tensor) -> Tensor:
    """Return numbers that depend on the name alone, of the shape, dtype and device of `like`."""
    numbers = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    wide = torch.complex128 if like.is_complex() else torch.float64
    return torch.randn(like.shape, generator=numbers, dtype=wide).to(like.device, like.dtype)


def _pulled(leaves: Tensors, results: Tensors, along: Tensors, twice: bool) -> Tensors:
    """Return the gradients of the leaves, for `along` as those of the results."""
    given = [along[name].to(o.dtype) for name, o in results.items()]
    found = torch.autograd.grad(
        list(results.values()),
        list(leaves.values()),
        given,
        allow_unused=True,
        create_graph=twice,
        retain_graph=True,
    )
    return {name: g for name, g in zip(leaves, found, strict=True) if g is not None}


def _pulled_twice(leaves: Tensors, results: Tensors, along: Tensors, again: Tensors) -> Tensors:
    """Return the gradients of those gradients, for the leaves and for `along`."""
    sides = {name: along[name].detach().to(o.dtype).requires_grad_() for name, o in results.items()}
    grads = {n: g for n, g in _pulled(leaves, results, sides, twice=True).items() if g.requires_grad}
    if not grads:
        return {}
    everything = {**leaves, **{f"gradient of {name}": side for name, side in sides.items()}}
    return _pulled(everything, grads, again, twice=False)
