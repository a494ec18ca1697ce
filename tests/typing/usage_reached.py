# ruff: noqa: F821  (reveal_type is known to type checkers only)
"""What type checkers see of the package `reached` with the stubs that `opkit stubs` writes for it, as in `usage.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reached import names
from reached.defined import Rounding
from torch import Tensor

import opkit

if TYPE_CHECKING:
    from reached._opkit_ops import hidden
else:
    hidden = opkit.get("reached::hidden")


def ops(x: Tensor) -> None:
    reveal_type(names.split(x))  # reveal: Split
    reveal_type(names.split(x, 0.25, rounding=Rounding.DOWN).low)  # reveal: Tensor
    reveal_type(names.split.name)  # reveal: str
    reveal_type(names.split.explain(x).selected)  # reveal: str | None
    reveal_type(names.scaled(x, factor=2))  # reveal: Tensor
    reveal_type(names.total([x], how="mean").number)  # reveal: int
    reveal_type(hidden(x, (3, 4)).total)  # reveal: Tensor
    reveal_type(names.added(x, x, alpha=2))  # reveal: Tensor
    reveal_type(names.ops.split(x)[1])  # reveal: Tensor

    names.split(x, "0.25")  # error
    names.split(x, rounding="up")  # error
    names.split(x).middle  # error
    names.scaled(x, dtype=3)  # error
    names.total(x)  # error
    names.total([x], how="max")  # error
    hidden(x, (3, 4, 5))  # error
    names.added(x)  # error
    names.ops.splt(x)  # error
    opkit.get("reached::split")(x, "unknown", nothing=3)


def module(x: Tensor) -> None:
    reveal_type(names.native.twice(x, 3))  # reveal: Tensor
    reveal_type(names.native.halves([x])[0])  # reveal: Tensor
    reveal_type(names.native.either("a"))  # reveal: str
    reveal_type(names.native.unsaid(1, two=2))  # reveal: Any
    reveal_type(names.native.version)  # reveal: int
    reveal_type(names.native.__name__)  # reveal: str

    names.native.twice(x)  # error
    names.native.twice(arg0=x, arg1=3)  # error
    names.native.halves(x, by="2")  # error
    names.native.either(2.5)  # error
    names.native.third(x)  # error


def rest(x: Tensor) -> None:
    model = names.Model([1, 2])
    reveal_type(model.last)  # reveal: Tensor | None
    reveal_type(model.calls)  # reveal: int
    reveal_type(names.plain(x, names.limit))  # reveal: list[Tensor]
    names.plain(x, "3")  # error
