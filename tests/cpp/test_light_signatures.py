# ruff: noqa: UP045
"""Arguments of every type that a native kernel takes, and a sentence for those that it does not."""

from __future__ import annotations

import enum
from typing import Literal, Optional

import pytest
import torch
from torch import Tensor

import opkit
from opkit import BuildError

pytestmark = pytest.mark.usefixtures("registry")


class Mode(enum.Enum):
    ADD = "add"
    MUL = "mul"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


def test_enum_literal_and_tuple_arrive_as_torch_carries_them():
    @opkit.op("t::f", shapes="n -> n")
    def f(x: Tensor, mode: Mode, level: Level, axis: Literal[0, 1], size: tuple[int, int]) -> Tensor:
        return x + (mode is Mode.MUL) * 100 + level * 10 + axis + size[0] * size[1] * 1000

    f.register_kernel(
        "cpu",
        opkit.cpp.kernel(
            """
            #include <opkit/kernel.h>
            void f(opkit::Tensor x, opkit::StringView mode, int64_t level, int64_t axis, opkit::Span<int64_t> size,
                   opkit::Tensor out) {
              const int64_t more = (mode == "mul" ? 100 : 0) + level * 10 + axis + size[0] * size[1] * 1000;
              for (int64_t i = 0; i < x.numel(); ++i) out.data<float>()[i] = x.data<float>()[i] + more;
            }
            """
        ),
    )
    x, rest = torch.ones(3), (Mode.MUL, Level.HIGH, 1, (2, 3))
    assert f.explain(x, *rest).selected == "cpp"
    assert torch.equal(f(x, *rest), f.reference(x, *rest))
    with pytest.raises(opkit.ArgumentError, match="expected one of 0, 1"):
        f(x, Mode.ADD, Level.LOW, 3, (2, 3))


@pytest.mark.parametrize(
    ("annotation", "value", "text"),
    [
        (complex, 1j, "argument a is complex, .*Pass its real and imaginary parts as two floats"),
        (int | float, 1, "argument a is Scalar, .*Pass it as a float"),
        (
            Optional[torch.layout],
            None,
            r"argument a is Layout\?, .*Pass what the kernel needs of it as an int or a str",
        ),
        (
            torch.memory_format,
            torch.channels_last,
            "argument a is MemoryFormat, which a light kernel cannot take",
        ),
        (torch.Generator, torch.Generator(), "argument a is Generator, which a light kernel cannot take"),
        (list[list[int]], [[1]], r"argument a is SymInt\[\]\[\], which a light kernel cannot take"),
    ],
    ids=str,
)
def test_argument_without_a_form_in_c_is_refused_with_a_way_out(annotation, value, text):
    def f(x, a):
        return x.clone()

    f.__annotations__ = {"x": Tensor, "a": annotation, "return": Tensor}
    op = opkit.op("t::f", shapes="n -> n")(f)
    op.register_kernel("cpu", opkit.cpp.kernel("#include <opkit/kernel.h>\nvoid f();\n"))
    with pytest.raises(BuildError, match=f"building t::f.*: {text}") as caught:
        op(torch.ones(2), value)
    assert caught.value.op == "t::f"


def test_argument_that_no_stable_kernel_takes_is_refused():
    @opkit.op("t::f", shapes="n -> n")
    def f(x: Tensor, a: complex) -> Tensor:
        return x.clone()

    f.register_kernel("cpu", opkit.cpp.kernel("#include <torch/csrc/stable/tensor.h>\nvoid f();\n"))
    with pytest.raises(
        BuildError, match="building t::f: a is complex, which opkit does not pass to a stable kernel"
    ):
        f(torch.ones(2), 1j)
