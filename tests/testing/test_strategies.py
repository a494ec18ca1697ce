"""Strategies for hypothesis: what they draw fits the op, and finds what is wrong with it."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from torch import Tensor

import opkit
from opkit.testing import strategies
from opkit.testing.strategies import arguments
from opkit_kernels import cross_entropy, layer_norm, topk_softmax, vector_add

pytestmark = pytest.mark.usefixtures("registry")
FEW = settings(max_examples=30, phases=(Phase.explicit, Phase.generate), deadline=None)


def compare(op, sample):
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in sample.args]
    found, expected = op(*sample.args, **sample.kwargs), op.reference(*wide, **sample.kwargs)
    for a, b in zip(op.schema.flatten(found), op.schema.flatten(expected)):
        torch.testing.assert_close(a.to(b.dtype), b, rtol=1e-4, atol=1e-4, equal_nan=True)


@FEW
@given(arguments(vector_add, dtypes=[torch.float32, torch.float64]))
def test_vector_add(sample):
    compare(vector_add, sample)


@FEW
@given(arguments(layer_norm, sizes={"n": st.integers(2, 9)}, layouts=["contiguous", "transposed", "sliced"]))
def test_layer_norm(sample):
    compare(layer_norm, sample)


@FEW
@given(arguments(topk_softmax, sizes={"n": st.integers(3, 9), "k": st.integers(0, 3)}))
def test_topk_softmax(sample):
    compare(topk_softmax, sample)


@FEW
@given(
    arguments(
        cross_entropy,
        sizes={"n": st.integers(1, 9)},
        values={"target": lambda shape, sizes: torch.arange(shape.numel()).view(shape) % sizes["n"]},
    )
)
def test_cross_entropy_with_targets_that_fit_the_sizes(sample):
    assert sample.args[1].shape == sample.args[0].shape[:-1]
    compare(cross_entropy, sample)


def every(op, condition, **options):
    """The smallest call for which the condition holds."""
    return find(arguments(op, **options), condition, settings=settings(database=None, deadline=None))


def test_all_that_is_declared_is_drawn_and_shrinks_to_small_sizes():
    @opkit.op("h::f", shapes="*b n, n, [*s] -> *b n")
    def f(x: Tensor, w: Tensor | None, xs: list[Tensor], up: bool = False, eps: float = 0.5) -> Tensor:
        return x

    assert every(f, lambda s: s.args[0].dim() == 3).args[0].numel() == 0
    assert every(f, lambda s: s.args[1] is not None).args[1].shape == (0,)
    assert every(f, lambda s: s.args[1] is None)
    assert every(f, lambda s: len(s.args[2]) == 3)
    assert every(f, lambda s: s.args[3])
    assert every(f, lambda s: s.args[4] == 0.5)
    assert every(f, lambda s: s.args[0].numel() > 3).args[0].numel() == 4
    assert every(f, lambda s: not s.args[0].is_contiguous()).args[0].numel() <= 4
    assert every(f, lambda s: s.args[0].dtype == torch.float16, dtypes=[torch.float32, torch.float16])


def test_a_fault_is_found():
    @opkit.op("h::broken", shapes="*b n -> *b n")
    def broken(x: Tensor) -> Tensor:
        return x * 2

    broken.register_kernel("cpu", lambda x: x * 2 if x.is_contiguous() else x * 3, backend="careless")
    wrong = every(broken, lambda s: not torch.equal(broken(*s.args), broken.reference(*s.args)))
    assert not wrong.args[0].is_contiguous()


def test_what_is_written_to_is_never_expanded():
    @opkit.op("h::fill", shapes="n ->", mutates_args=("x",))
    def fill(x: Tensor) -> None:
        x.fill_(1)

    @FEW
    @given(arguments(fill))
    def check(sample):
        assert 0 not in sample.args[0].stride() or sample.args[0].numel() < 2
        fill(*sample.args)

    check()


def test_names_that_are_none_and_what_a_declaration_lacks():
    with pytest.raises(opkit.ArgumentError, match=r"making a strategy for opkit::vector_add: found a size for 'n'; "
                       r"expected some of b\. Correct the name"):  # fmt: skip
        arguments(vector_add, sizes={"n": st.just(1)})
    with pytest.raises(opkit.ArgumentError, match=r"found values for 'c'; expected some of a, b"):
        arguments(vector_add, values={"c": st.just(1)})
    with pytest.raises(
        opkit.ArgumentError, match=r"its argument target is of torch\.int64, and nothing says"
    ):
        arguments(cross_entropy)


def test_hypothesis_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(
        opkit.OpkitError, match=r"hypothesis is not installed.*pip install 'torch-opkit\[test\]'"
    ):
        strategies.arguments(vector_add)
