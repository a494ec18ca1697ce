# ruff: noqa: UP007, UP045  (the older spellings are what is tested)
from __future__ import annotations

from typing import Optional

import pytest
import torch
from torch import Tensor

import opkit

pytestmark = pytest.mark.usefixtures("registry")

T = torch.ones


@pytest.fixture(params=["eager", "compile", "meta"])
def call(request):
    """Call an op, so that its check runs on real tensors, under tracing, or on the meta device."""
    if request.param == "eager":
        return lambda op, *args: op(*args)
    if request.param == "compile":
        return lambda op, *args: torch.compile(lambda *a: op(*a), fullgraph=True, backend="aot_eager")(*args)
    return lambda op, *args: op(*(a.to("meta") if isinstance(a, Tensor) else a for a in args))


def test_size_mismatch_names_op_argument_dimension_both_sizes_and_the_binder(call):
    @opkit.op("t::scale", shapes="*b n, n -> *b n")
    def scale(x: Tensor, factor: Tensor) -> Tensor:
        return x * factor

    with pytest.raises(Exception, match="calling t::scale: ") as caught:
        call(scale, T(2, 3), T(4))
    assert (
        "calling t::scale: dimension 0 of factor (n) is 4, but dimension 1 of x bound n to 3. "
        "Expected '*b n, n -> *b n', got x (2, 3), factor (4). Make the two equal; nothing broadcasts."
    ) in str(caught.value)


def define(line, *, optional=False):
    def f(x, y, k=2, dtype=torch.float32): ...

    second = Optional[Tensor] if optional else Tensor
    f.__annotations__ = {"x": Tensor, "y": second, "k": int, "dtype": torch.dtype, "return": Tensor}
    return opkit.op("t::f", shapes=line)(f)


@pytest.mark.parametrize(
    ("line", "x", "y", "text"),
    [
        ("n m, n -> n", T(2), T(2), r"argument x has 1 dimensions, its entry 'n m' has 2\..* Reshape the argument"),
        ("n *b m, n -> n", T(2), T(2), r"argument x has 1 dimensions, its entry 'n \*b m' has at least 2\."),
        ("(), n -> n", T(2), T(2), r"argument x has 1 dimensions, its entry '\(\)' has 0\."),
        ("*b, *b -> *b", T(2, 3), T(2, 1),
         r"the dimensions of y that \*b stands for are .*2, 1.*, but the dimensions of x bound \*b to .*2, 3"),
        ("n n, _ -> n", T(2, 3), T(1), r"dimension 1 of x \(n\) is 3, but dimension 0 of x bound n to 2"),
        ("n, 3 -> n", T(2), T(4), r"dimension 0 of y is 4, expected 3\. Expected"),
        ("n, n*k -> n", T(2), T(5), r"dimension 0 of y is 5, expected 4 \(n\*k: n = 2 by dimension 0 of x, "
                                    r"k = 2 by the argument k\)"),
        ("k, _ -> k", T(3), T(1), r"dimension 0 of x \(k\) is 3, but the argument k bound k to 2"),
        ("n, n//(k-2) -> n", T(3), T(1), r"the size n//\(k-2\) divides by zero \(n = 3 by dimension 0 of x, k = 2"),
    ],
    ids=lambda v: v if isinstance(v, str) and "->" in v else "",
)  # fmt: skip
def test_mismatch_says_what_differs(line, x, y, text):
    with pytest.raises(opkit.ShapeError, match="calling t::f: " + text) as caught:
        define(line)(x, y)
    assert caught.value.op == "t::f"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("n, n:int8 -> n", r"argument y has dtype torch.float64, expected torch.int8, as the shape line says. "
                           r"Convert it: y.to\(torch.int8\)"),
        ("n, n:x -> n", "expected torch.float32, the dtype of x"),
        ("n, n:dtype -> n", "expected torch.float32, the value of dtype"),
    ],
)  # fmt: skip
def test_dtype_mismatch_says_why(line, text, call):
    with pytest.raises(Exception, match=text) as caught:
        call(define(line), T(2), T(2, dtype=torch.float64))
    if isinstance(caught.value, opkit.OpkitError):
        assert isinstance(caught.value, opkit.DtypeError)


def test_dtype_suffix_of_an_absent_tensor_means_that_of_the_first_present_one():
    @opkit.op("t::f", shapes="n, n, n:a -> n")
    def f(a: Tensor | None, b: Tensor, c: Tensor) -> Tensor:
        return b + c

    assert f(None, T(2), T(2)).tolist() == [2, 2]
    with pytest.raises(
        opkit.DtypeError, match="argument c has dtype torch.float64, expected torch.float32, the dtype of b"
    ):
        f(None, T(2), T(2).double())


def test_output_size_that_only_absent_tensors_bind_is_an_error(call):
    op = define("n, m -> m", optional=True)
    with pytest.raises(
        Exception, match="the size m of output out is bound only by arguments that are None"
    ) as caught:
        call(op, T(2), None)
    assert "got x (2), y None. Pass one of them." in str(caught.value)


def test_op_whose_tensors_are_all_absent_is_an_error():
    @opkit.op("t::f", shapes="n -> 3")
    def f(x: Tensor | None) -> Tensor:
        return T(3)

    with pytest.raises(opkit.ShapeError, match="all of x are None, so nothing says where its outputs live"):
        f(None)


def test_division_by_zero_in_an_output_size_is_an_error():
    @opkit.op("t::f", shapes="n -> n//k")
    def f(x: Tensor, k: int) -> Tensor:
        return x.clone()

    with pytest.raises(
        opkit.ShapeError, match=r"the size n//k divides by zero \(n = 2 by dimension 0 of x, k = 0"
    ):
        f(T(2), 0)
