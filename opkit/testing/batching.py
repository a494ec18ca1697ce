"""An op under `torch.vmap` against a loop over the batch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from opkit._op import Op
from opkit.dispatch.preference import use_backend
from opkit.testing.arguments import copied, is_random, mapped, named, outputs, reason
from opkit.testing.difference import difference, tolerance
from opkit.testing.report import Record

_COUNT = 3


def records(op: Op[..., Any], backend: str, values: Sequence[Any]) -> Iterator[Record]:
    """Yield what vmap gives with all tensors batched, and with the first one only."""
    tensors = [
        n for n, t in named([p.name for p in op.schema.params], values).items() if isinstance(t, Tensor)
    ]
    if not tensors or is_random(op):
        why = "the op draws random numbers" if tensors else "the call has no tensors"
        yield Record(op.name, backend, "vmap", "not applicable", why)
        return
    mutated = any(p.mutated for p in op.schema.params)
    yield from _compared(op, backend, values, tensors, "vmap of all tensors")
    if len(tensors) > 1 and not mutated:
        yield from _compared(op, backend, values, tensors[:1], f"vmap of {tensors[0]}")


def _compared(
    op: Op[..., Any], backend: str, values: Sequence[Any], batched: Sequence[str], what: str
) -> Iterator[Record]:
    def one(i: int) -> tuple[Any, ...]:
        return mapped(op, values, lambda n, t: _turned(t) if i == 1 and n in batched else copied(t))

    part = tolerance(named([p.name for p in op.schema.params], values).values())
    try:
        with use_backend(backend, strict=True), torch.no_grad():
            alone = [outputs(op, op.overload, one(i)) for i in range(_COUNT)]
    except Exception as err:
        yield Record(op.name, backend, what, "not applicable", f"the batch's calls do not run, {reason(err)}")
        return
    kinds = [{n: _kind(o) for n, o in found.items()} for found in alone]
    if kinds != [kinds[0]] * _COUNT:
        text = "results have other sizes for each sample of a batch"
        yield Record(op.name, backend, what, "not applicable", text)
        return
    flat: list[Tensor] = []
    stacks = [_tensors(op, one(i)) for i in range(_COUNT)]
    names = [n for n, _ in stacks[0]]
    for place, name in enumerate(names):
        own = [stacks[i][place][1] for i in range(_COUNT)]
        flat.append(torch.stack(own) if name in batched else own[0])
    order: list[str] = []

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, tensors, strict=True))
        found = outputs(op, op.overload, mapped(op, values, lambda n, _: given[n]))
        kept = {n: o for n, o in found.items() if isinstance(o, Tensor)}
        order[:] = kept
        return tuple(kept.values())

    try:
        with use_backend(backend, strict=True), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is called once per sample is no fault here
            found = torch.vmap(call, in_dims=tuple(0 if n in batched else None for n in names))(*flat)
    except Exception as err:
        yield Record(op.name, backend, what, "failed", reason(err), "what a loop over the batch gives")
        return
    for name, stacked in zip(order, found, strict=True):
        for i in range(_COUNT):
            wrong = difference(stacked[i], alone[i][name], part)
            if wrong is not None:
                text = f"{wrong.found}, in {name} of sample {i}"
                yield Record(op.name, backend, what, "failed", text, f"{wrong.expected}, as alone")
                return
    yield Record(op.name, backend, what, "passed")


def _tensors(op: Op[..., Any], values: Sequence[Any]) -> list[tuple[str, Tensor]]:
    found = named([p.name for p in op.schema.params], values)
    return [(n, t) for n, t in found.items() if isinstance(t, Tensor)]


def _turned(tensor: Tensor) -> Tensor:
    """Return the same elements in the opposite order, so that samples differ and each value stays a legal one."""
    turned = copied(tensor)
    return (
        turned.copy_(tensor.flip(tuple(range(tensor.dim()))))
        if tensor.numel() > 1 and _flips(tensor)
        else turned
    )


def _kind(output: Any) -> Any:
    return tuple(output.shape) if isinstance(output, Tensor) else type(output)


def _flips(tensor: Tensor) -> bool:
    """Whether torch can flip its dtype, and write to it: not where elements share memory."""
    overlaps = any(
        stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return not overlaps and tensor.element_size() > 1
