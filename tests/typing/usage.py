# ruff: noqa: F821  (reveal_type is known to type checkers only)
"""What type checkers see of an op; `test_typing.py` compares their answers with the comments.

A comment says which type a line reveals, or that the line is an error.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

import opkit


class Norm(NamedTuple):
    y: Tensor
    rstd: Tensor


@opkit.op("typing::norm", shapes="*b n, n -> *b n, *b 1")
def norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, flag: bool = False) -> Norm:
    raise NotImplementedError


@opkit.op("typing::total", mutates_args=["y"])
def total(x: list[Tensor], y: Tensor | None, k: int) -> None: ...


def calls(x: Tensor) -> None:
    reveal_type(norm(x, x))  # reveal: Norm
    reveal_type(norm(x, weight=x, eps=1.0, flag=True).rstd)  # reveal: Tensor
    y, rstd = norm(x, x)
    reveal_type(rstd)  # reveal: Tensor
    reveal_type(norm.reference(x, x))  # reveal: Norm
    reveal_type(norm.name)  # reveal: str
    reveal_type(total([x], None, 3))  # reveal: None
    reveal_type(norm.explain(x, x).selected)  # reveal: str | None

    norm(x)  # error
    norm(x, x, "1e-6")  # error
    norm(x, x, 1e-6, True)  # error
    norm(x, x, unknown=1)  # error
    norm(x, x).nothing  # error
    total([x], 3, 3)  # error
    total(x, None, 3)  # error
    norm.explain(x)  # error
    norm.register_kernel()  # error
    opkit.op(3)  # error


@norm.register_fake
def fake(x: Tensor, weight: Tensor, eps: float = 1e-6, *, flag: bool = False) -> Norm:
    raise NotImplementedError


@norm.register_kernel("cpu", backend="fast", priority=3)
def fast(x: Tensor, weight: Tensor, eps: float = 1e-6, *, flag: bool = False) -> Norm:
    raise NotImplementedError


def kept(x: Tensor) -> None:
    reveal_type(fake(x, x))  # reveal: Norm
    reveal_type(fast(x, x))  # reveal: Norm
    with opkit.use_backend("cpp", strict=True):
        pass
    with opkit.use_backend(3):  # error
        pass
    reveal_type(opkit.list_ops())  # reveal: list[str]
    reveal_type(opkit.get("a::b").name)  # reveal: str
