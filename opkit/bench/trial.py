"""One call: which candidates give what the reference gives, and what each of them is timed with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from opkit._op import Op
from opkit.bench import work
from opkit.bench.candidates import Candidate, floating
from opkit.bench.report import FORWARD, TRAINING
from opkit.bench.sweep import Call
from opkit.bench.timing import Contestant
from opkit.bench.truth import Truth, cotangents, leaves_of
from opkit.bench.work import Work
from opkit.spec.schema import tensors
from opkit.testing.arguments import copied, mapped, reason


class Trial:
    """One call: which candidates are right, and what they are timed with."""

    def __init__(
        self, op: Op[..., Any], call: Call, known: Sequence[Candidate], leaves: frozenset[str]
    ) -> None:
        self.op = op
        self.call = call
        self.known = known
        self.leaves = leaves
        self.work: dict[str, Work] = {}
        self._out: dict[str, tuple[str, str]] = {}  # those that are not timed, with status and reason
        self._truth: Truth | None = Truth(op, call, leaves)
        self._unsure = self._truth.missing
        self._into: list[str] = []  # results that gradients flow through, for every candidate
        self._pulls: dict[str, tuple[Callable[[Any], Any], list[torch.Tensor]]] = {}
        self._made: dict[Any, list[torch.Tensor]] = {}

    def outcomes(self) -> Iterator[tuple[str, str, str, str]]:
        """Yield the name, kind, status and reason of each candidate, as far as they are verified."""
        for one in self.known:
            yield one.name, one.kind, *self._out.get(one.name, ("timed", self._unsure))

    def contestants(self, direction: str) -> dict[str, Contestant]:
        """Return the candidates that are right, ready to be timed."""
        make = self._forward if direction == FORWARD else self._training
        return {
            one.name: Contestant(functools.partial(make, one), one.inside)
            for one in self.known
            if one.name not in self._out
        }

    def verify(self, direction: str) -> None:
        """Find out which candidates give what the reference does."""
        assert self._truth is not None
        if direction == FORWARD:
            self.work[FORWARD] = Work(None, None)
            for one in self.known:
                self._verify_results(one)
            return
        self._into = self._flowing()
        self.work[TRAINING] = self.work[FORWARD] + self._backward_work
        for one in self.known:
            if one.name not in self._out:
                self._verify_gradients(one)
        self._truth = None  # in float64 it may be large

    def _verify_results(self, one: Candidate) -> None:
        truth, values = self._truth, self.call.values
        assert truth is not None
        try:
            with one.inside(), torch.no_grad():
                if one.backend is not None and (why := self._why_not(one.backend)):
                    self._out[one.name] = "rejected", why
                    return
                given = mapped(self.op, values, lambda _, t: copied(t))
                found = one.call(given, self.call.given)
            wrong = self._overwritten(given) or truth.wrong_result(found)
        except Exception as error:
            self._out[one.name] = "failed", reason(error)
            return
        if wrong:
            self._out[one.name] = "wrong", wrong
        elif one.backend is not None and self.work[FORWARD].bytes is None:
            self._count(found)

    def _overwritten(self, given: Sequence[Any]) -> str:
        """Return what is wrong where a candidate changed arguments that the op leaves as they are."""
        before = zip(self.op.schema.params, self.call.values, given, strict=True)
        for param, *sides in before:
            if not param.mutated and not all(map(_is_same, *map(tensors, [[side] for side in sides]))):
                return f"it overwrites the argument {param.name}, which the op does not"
        return ""

    def _count(self, found: Mapping[str, Any]) -> None:
        """Note what the call must move and compute, now that its results are there."""
        results = _listed(self.op, found)
        self.work[FORWARD] = work.forward(self.op, self.call.values, results)
        self._backward_work = Work(None, None)
        if self.leaves:
            with torch.no_grad():
                self._backward_work = work.backward(self.op, self.call.values, results)

    _backward_work = Work(None, None)

    def _why_not(self, backend: str) -> str:
        """Return why a backend, which is preferred now, does not take the call, or nothing."""
        args, kwargs = self.op.schema.split(self.call.values)
        explanation = self.op.explain(*args, **kwargs)
        if explanation.selected == backend:
            return ""
        own = [c for c in explanation.candidates if c.backend == backend]
        return own[0].reason or "it is not chosen" if own else f"it has no kernel for {explanation.device}"

    def _flowing(self) -> list[str]:
        """Return the names of results that have a gradient, whichever candidate gives them."""
        shared: dict[str, None] | None = None
        for one in self.known:
            if one.name in self._out:
                continue
            try:
                with one.inside(), torch.enable_grad():
                    _, values = leaves_of(self.op, self.call.values, self.leaves, copied)
                    found = floating(one.call(values, self.call.given))
            except Exception as error:
                self._out[one.name] = "failed", reason(error)
                continue
            if not found:
                self._out[one.name] = "failed", "its results have no gradient"
                continue
            shared = dict.fromkeys(n for n in (found if shared is None else shared) if n in found)
        return list(shared or ())

    def _verify_gradients(self, one: Candidate) -> None:
        truth = self._truth
        assert truth is not None
        if not self._into:
            self._out[one.name] = "failed", "no result has a gradient in all candidates"
            return
        try:
            with one.inside():
                found = truth.gradients(one, self._into)
            wrong = truth.wrong_gradient(found, self._into)
        except Exception as error:
            self._out[one.name] = "failed", reason(error)
            return
        if wrong:
            self._out[one.name] = "wrong", wrong

    def _forward(self, one: Candidate) -> Callable[[], object]:
        _, given = leaves_of(self.op, self.call.values, ())
        args, kwargs = self.call.given.split(self.op, given)
        function = one.function
        return lambda: function(*args, **kwargs)

    def _training(self, one: Candidate) -> Callable[[], object]:
        leaves, given = leaves_of(self.op, self.call.values, self.leaves)
        args, kwargs = self.call.given.split(self.op, given)
        function, wanted = one.function, list(leaves.values())
        if one.name not in self._pulls:
            outs = one.results(function(*args, **kwargs))
            grads = self._cotangents([outs[name] for name in self._into])
            self._pulls[one.name] = self._picker(one, list(outs)), grads
        pick, grads = self._pulls[one.name]

        def call() -> object:
            return torch.autograd.grad(pick(function(*args, **kwargs)), wanted, grads, allow_unused=True)

        return call

    def _cotangents(self, outs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the gradients of results, made once for all candidates that return the like."""
        key = tuple((out.shape, out.dtype) for out in outs)
        if key not in self._made:
            self._made[key] = cotangents(self._into, outs)
        return self._made[key]

    def _picker(self, one: Candidate, names: Sequence[str]) -> Callable[[Any], Any]:
        """Return what takes the results with gradients out of what was returned, at little cost."""
        if self.op.schema.container is None and self._into == names:
            return lambda returned: returned
        places = [names.index(name) for name in self._into]
        if not any("[" in name for name in names):
            whole = [r.name for r in self.op.schema.results]
            places = [whole.index(name) for name in self._into]
            return lambda returned: (
                [returned[i] for i in places]
                if isinstance(returned, tuple)
                else [one.results(returned)[name] for name in self._into]
            )
        return lambda returned: [one.results(returned)[name] for name in self._into]


def _is_same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors have the same bits; where that is not known, they have."""
    if left.layout is not torch.strided or type(left) is not torch.Tensor:
        return True
    left, right = (t.detach().resolve_conj().resolve_neg().contiguous().reshape(-1) for t in (left, right))
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def _listed(op: Op[..., Any], found: Mapping[str, Any]) -> list[Any]:
    """Return results by name as one for each that is declared: those of a list together."""
    results = []
    for result in op.schema.results:
        if result.name in found:
            results.append(found[result.name])
        else:
            results.append([v for name, v in found.items() if name.startswith(f"{result.name}[")])
    return results
