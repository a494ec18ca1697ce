"""An op's derivatives against small steps of its arguments: `torch.autograd.gradcheck`, through one backend."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from opkit._op import Op
from opkit.dispatch.preference import use_backend
from opkit.errors import GradientError
from opkit.testing.arguments import (
    cast,
    castable,
    chosen,
    differentiable,
    is_random,
    mapped,
    named,
    outputs,
    reason,
)
from opkit.testing.report import Record
from opkit.transforms.formula import NoFormula

_FEW = 100  # elements whose derivatives are taken one by one; of more, along random directions
_MANY = 1 << 16
_DOUBLE = (torch.float64, torch.complex128)
CHECKS = ("gradcheck", "second derivatives", "forward mode")


def records(op: Op[..., Any], backend: str, values: Sequence[Any], wanted: Sequence[str]) -> Iterator[Record]:
    """Yield what small steps say of gradients, of theirs and of tangents."""
    names = [c for c in CHECKS if c in wanted]
    given = cast(op, values, torch.float64)
    why = _why_not(op, backend, given)
    for check in names:
        lack = why or _lacks(op, check)
        if lack is not None:
            yield Record(op.name, backend, check, "not applicable", lack, check=check)
            continue
        try:
            with use_backend(backend), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of gradcheck, about what is no leaf in double
                yield _put_to_the_test(op, backend, given, check)._replace(check=check)
        except Exception as err:  # of the call itself
            yield Record(op.name, backend, check, "failed", reason(err), "derivatives", check=check)


def _why_not(op: Op[..., Any], backend: str, given: Sequence[Any]) -> str | None:
    """Return why there is nothing that small steps could say."""
    wanted = differentiable(op)
    if not wanted:
        return "the op has no gradient formula"
    if is_random(op):
        return "the op draws random numbers"
    tensors = named([p.name for p in op.schema.params], given)
    own = {n: t for n, t in tensors.items() if isinstance(t, Tensor) and n.split("[")[0] in wanted}
    if not any(t.dtype in _DOUBLE for t in own.values()):
        fixed = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in own.values()})) or "none"
        return f"its arguments are fixed to {fixed}, and small steps take float64"
    if sum(t.numel() for t in own.values()) > _MANY:
        return f"the arguments have more than {_MANY} elements; pass smaller ones"
    if not chosen(op, given, backend):
        return "it does not take float64" if castable(op, given) else "it does not take this call"
    return None


def _lacks(op: Op[..., Any], check: str) -> str | None:
    """Return what the op has no derivative for."""
    if check == "forward mode":
        if (op._tangents or op._formula.tangents) is None:
            return "the op has no jvp: forward mode raises"
        if any(p.mutated for p in op.schema.params):
            return "tangents of what the op writes to are lost"
    elif isinstance(op._formula, NoFormula):
        return "the op has no gradient formula"
    return None


def _put_to_the_test(op: Op[..., Any], backend: str, given: Sequence[Any], check: str) -> Record:
    function, leaves, names = _function(op, given)
    with torch.enable_grad():
        ends = function(*leaves)
    if not ends:
        return Record(
            op.name, backend, check, "not applicable", "no result of the op in float64 has a gradient"
        )
    if not all(bool(torch.isfinite(e.detach()).all()) for e in ends):
        text = "results are not finite, and have no derivatives to step along; pass samples where they are"
        return Record(op.name, backend, check, "not applicable", text)
    fast = sum(leaf.numel() for leaf in leaves) > _FEW
    try:
        if check == "gradcheck":
            gradcheck(function, leaves, fast_mode=fast)
        elif check == "forward mode":
            gradcheck(
                function,
                leaves,
                fast_mode=fast,
                check_forward_ad=True,
                check_backward_ad=False,
                check_undefined_grad=False,
            )
        else:
            gradgradcheck(function, leaves, fast_mode=fast)
    except Exception as err:
        if check == "second derivatives" and has_none(op, err):
            return Record(op.name, backend, check, "not applicable", f"the formula has none, {reason(err)}")
        text = _text(err, names, [f"result {i}" for i in range(len(ends))])
        return Record(op.name, backend, check, "failed", text, "what small steps of the arguments give")
    return Record(op.name, backend, check, "passed")


def has_none(op: Op[..., Any], err: Exception) -> bool:
    """Whether an error says of a formula that it has no derivative: loudly, or in torch's own words."""
    loud = isinstance(err, GradientError) and err.op != op.name
    return loud or "once_differentiable" in str(err) or "has no gradient formula" in str(err)


def _function(
    op: Op[..., Any], given: Sequence[Any]
) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...], list[str]]:
    """Return the op as a function of its differentiable arguments, those, and their names."""
    wanted = differentiable(op)
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, tensor: Tensor) -> Tensor:
        if name.split("[")[0] in wanted and tensor.dtype in _DOUBLE:
            leaves[name] = tensor.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        return tensor

    mapped(op, given, leaf)

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        own = dict(zip(leaves, values, strict=True))
        arguments = mapped(op, given, lambda n, t: own[n] if n in own else t.detach().clone())
        found = outputs(op, op.overload, arguments).values()
        return tuple(o for o in found if isinstance(o, Tensor) and o.dtype in _DOUBLE and _follows(o))

    return call, tuple(leaves.values()), list(leaves)


def _follows(output: Tensor) -> bool:
    """Whether an output depends on the arguments that are differentiated, in the mode that is on."""
    return output.requires_grad or torch.autograd.forward_ad.unpack_dual(output).tangent is not None


def _text(err: Exception, names: Sequence[str], results: Sequence[str]) -> str:
    """Return what gradcheck says, with names in the place of numbers."""
    text = " ".join(str(err).split())

    def name(match: re.Match[str]) -> str:
        number = int(match.group(1))
        return f"the argument {names[number]}" if number < len(names) else match.group()

    text = re.sub(r"\binput (\d+)", name, text)
    return text if len(text) < 400 else f"{text[:400]} …"
