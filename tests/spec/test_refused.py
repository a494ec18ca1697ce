"""Arguments of the wrong type: opkit's text in the place of torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import opkit

pytestmark = pytest.mark.usefixtures("registry")

X = torch.ones(2)


def call(**given):
    """Call an op that has arguments of every kind, all right but for those given."""

    @opkit.op("t::every")
    def every(
        x: Tensor,
        k: int = 1,
        a: float = 1.0,
        b: bool = True,
        s: str = "s",
        c: complex = 1j,
        n: int | float = 1,
        ks: list[int] = [1],
        pair: tuple[float, float] = (1.0, 2.0),
        xs: list[Tensor] | None = None,
        some: list[Tensor | None] | None = None,
        maybe: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        *,
        key: int = 1,
    ) -> Tensor:
        return x * 2

    x = given.pop("x", X)
    return every(x, **given)


@pytest.mark.parametrize(
    ("given", "found", "expected"),
    [
        ({"x": "a"}, r"'a' \(str\)", "a Tensor"),
        ({"x": None}, "None", "a Tensor"),
        ({"x": [X]}, r"a list of \(a Tensor\)", "a Tensor"),
        ({"k": "a"}, r"'a' \(str\)", "an int"),
        ({"k": 1.5}, r"1.5 \(float\)", "an int"),
        ({"k": None}, "None", "an int"),
        ({"k": "a" * 99}, r"'a{55} … \(str\)", "an int"),
        ({"a": "a"}, r"'a' \(str\)", "a float"),
        ({"b": "a"}, r"'a' \(str\)", "a bool"),
        ({"s": 1}, r"1 \(int\)", "a str"),
        ({"c": "a"}, r"'a' \(str\)", "a complex"),
        ({"n": "a"}, r"'a' \(str\)", "an int or a float"),
        ({"ks": ["a"]}, r"a list of \('a' \(str\)\)", "a list of ints"),
        ({"ks": "a"}, r"'a' \(str\)", "a list of ints"),
        ({"pair": ("a", "b")}, r"a tuple of \('a' \(str\), 'b' \(str\)\)", "a list of 2 floats"),
        ({"xs": [1, 2, 3, 4]}, r"a list of \(1 \(int\), 2 \(int\), 3 \(int\), …\)", "a list of Tensors or None"),
        ({"some": [1]}, r"a list of \(1 \(int\)\)", "a list of Tensors and Nones or None"),
        ({"maybe": "a"}, r"'a' \(str\)", "an int or None"),
        ({"dtype": "a"}, r"'a' \(str\)", "a torch.dtype"),
        ({"device": 1.5}, r"1.5 \(float\)", "a torch.device or None"),
        ({"key": X}, "a Tensor", "an int"),
    ],
)  # fmt: skip
def test_argument_of_another_type_is_named(given, found, expected):
    (name,) = given
    with pytest.raises(
        opkit.ArgumentError,
        match=f"^calling t::every: argument {name} is {found}; expected {expected}. Pass one.$",
    ) as caught:
        call(**given)
    assert caught.value.op == "t::every"
    assert call().tolist() == [2, 2]


def key(x: Tensor, *, k: int = 1) -> Tensor:
    return x * k


def test_missing_and_surplus_arguments_are_named():
    @opkit.op("t::two", shapes="n -> n")
    def two(x: Tensor, k: int) -> Tensor:
        return x * k

    with pytest.raises(TypeError, match="calling t::two: argument 'k' is missing; it takes t::two"):
        two(X)
    with pytest.raises(TypeError, match="calling t::two: 3 positional arguments, it takes 2"):
        two(X, 1, 2)
    with pytest.raises(TypeError, match="calling t::key: 2 positional arguments, it takes 1"):
        opkit.op("t::key", shapes="n -> n")(key)(X, 2)
    with pytest.raises(TypeError, match="calling t::two: unexpected argument 'q'; it takes t::two"):
        two(X, 1, q=2)
    with pytest.raises(TypeError, match="calling t::two: argument 'x' is given twice; it takes t::two"):
        two(X, 1, x=X)


def test_error_of_an_op_that_a_kernel_calls_is_left_as_it_is():
    @opkit.op("t::outer", shapes="n -> n")
    def outer(x: Tensor, k: int = 1) -> Tensor:
        return torch.ops.aten.cumsum.default(x, k="a")

    with pytest.raises(RuntimeError, match=r"^aten::cumsum\(\)"):
        outer(X)
