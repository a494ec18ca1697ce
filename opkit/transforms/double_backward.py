"""Second derivatives of an op: what a formula saved without its history must not count as a constant there.

A formula may save what depends on the arguments and is neither an argument nor a differentiable output: a tensor that
`setup_context` computed, or an output declared non-differentiable. In the first derivative it is a number. In
the second one torch takes it for a constant and goes on, with a wrong result (pytorch#58509, #76185).
Here differentiating through it raises.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from opkit import _torch
from opkit.errors import GradientError
from opkit.spec.schema import Schema, tensors
from opkit.transforms.formula import Formula
from opkit.transforms.recompute import ReferenceFormula


class Lost:
    """Which of the saved tensors have lost their history, and where the others lead."""

    __slots__ = ("attributes", "roots", "saved")

    def __init__(self, saved: frozenset[int], attributes: frozenset[int], roots: Sequence[Tensor]) -> None:
        self.saved = saved
        self.attributes = attributes
        """The identities of those that are attributes of the context, or in lists, tuples and dicts there."""
        self.roots = roots


def lost_history(
    ctx: Any, rule: Formula, values: Sequence[Any], outputs: Sequence[Any], constant: Sequence[Tensor]
) -> Lost | None:
    """Return which of the tensors that `rule` saved on `ctx` have lost their history; None for none of them."""
    if isinstance(rule, ReferenceFormula):
        return None  # saves arguments only
    saved = ctx.to_save or ()
    if not ctx.__dict__ and _are_among(saved, values):
        return None  # as nearly always, and in every call
    known = set(map(id, values))
    foreign = [i for i, t in enumerate(saved) if id(t) not in known]
    stashed = [t for t in _within(ctx.__dict__) if id(t) not in known]
    if not foreign and not stashed:
        return None
    inputs = tensors(values)
    without = {id(c) for c in constant}
    followed = {id(o) for o in tensors(outputs) if id(o) not in without}
    known = {id(v) for v in inputs} | followed
    lost = [i for i in foreign if _is_lost(saved[i], known)]
    stashed = [t for t in stashed if _is_lost(t, known)]
    if not lost and not stashed:
        return None
    # What was saved with its history leads to every argument that it is; a followed output leads to all.
    led = {id(t) for t in saved}
    roots = []
    if not led & followed:
        roots = [_root(v) for v in inputs if v.requires_grad and id(v) not in led]
    return Lost(frozenset(lost), frozenset(map(id, stashed)), roots)


def lost_outputs(saves: Sequence[tuple[str, int]], values: Sequence[Any], without: Collection[int]) -> Lost:
    """Return which of the values that an op saved have lost their history: outputs of these places."""
    lost, index = [], 0
    for (side, place), value in zip(saves, values, strict=True):
        found = tensors([value])
        if side == "out" and place in without:
            lost += [index + i for i, t in enumerate(found) if t.is_floating_point() or t.is_complex()]
        index += len(found)
    return Lost(frozenset(lost), frozenset(), ())


def tracked(schema: Schema, ctx: Any, lost: Lost) -> Any:
    """Return `ctx` as a formula must see it where its result is differentiated once more."""
    return _Tracked(schema, ctx, lost)


class _Tracked:
    """A context whose tensors without history raise when they are differentiated."""

    def __init__(self, schema: Schema, ctx: Any, lost: Lost) -> None:
        saved = ctx.saved_tensors
        roots = [*lost.roots, *(t for i, t in enumerate(saved) if t is not None and i not in lost.saved)]
        roots = [r for r in roots if r.requires_grad]
        text = (
            f"differentiating {schema.name} twice: its formula saves a tensor that depends on the arguments but has "
            "no history, computed in setup_context or declared non-differentiable, and a gradient flows into it; "
            "torch would take it for a constant, and the second derivative would be wrong. Save the arguments "
            "(or a differentiable output) and compute it in the formula."
        )
        self._ctx = ctx
        self._attributes = lost.attributes
        self._lose = lambda tensor: _WithoutHistory.apply(tensor, schema.name, text, *roots)
        self.saved_tensors = tuple(self._lose(t) if i in lost.saved else t for i, t in enumerate(saved))

    def __getattr__(self, name: str) -> Any:
        return self._seen(getattr(self._ctx, name))

    def _seen(self, value: Any) -> Any:
        """Return an attribute with the tensors in it that have lost their history tied to what they depend on."""
        if isinstance(value, Tensor):
            return self._lose(value) if id(value) in self._attributes else value
        if not any(id(t) in self._attributes for t in _within(value)):
            return value
        if isinstance(value, dict):
            return {k: self._seen(v) for k, v in value.items()}
        seen = map(self._seen, value)
        return type(value)(*seen) if hasattr(value, "_fields") else type(value)(seen)


class _WithoutHistory(torch.autograd.Function):
    """Return a tensor as it is, tied to what it may depend on; a gradient or tangent of it raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor, op: str, text: str, *roots: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        _, ctx.op, ctx.text, *roots = inputs
        ctx.count = len(roots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is not None:
            raise GradientError(ctx.text, op=ctx.op)
        return (None,) * (3 + ctx.count)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        if any(t is not None for t in tangents[3:]):
            raise GradientError(ctx.text, op=ctx.op)
        return tangents[0]


def _are_among(tensors: Sequence[Any], values: Sequence[Any]) -> bool:
    for tensor in tensors:
        for value in values:
            if tensor is value:
                break
        else:
            return False
    return True


def _is_lost(tensor: Any, known: set[int]) -> bool:
    """Whether a tensor is none of those whose history is followed, and could have one."""
    if not isinstance(tensor, Tensor):
        return False  # None, or what torch refuses
    return id(tensor) not in known and (tensor.is_floating_point() or tensor.is_complex())


def _within(value: Any) -> list[Tensor]:
    """Return the tensors in lists, tuples and dicts, at any depth."""
    if isinstance(value, (list, tuple, dict)):
        return [t for v in (value.values() if isinstance(value, dict) else value) for t in _within(v)]
    return [value] if isinstance(value, Tensor) else []


def _root(tensor: Tensor) -> Tensor:
    """Return a tensor of no elements that leads to `tensor` in the graph, without keeping its memory."""
    with _torch.differentiating(True, True):
        return tensor.unsqueeze(0).narrow(0, 0, 0).clone()
