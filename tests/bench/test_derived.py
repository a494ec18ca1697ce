"""Calls that the declaration makes, where nobody names a case."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import opkit
from opkit.bench import derived
from opkit.errors import ArgumentError, ShapeError


def calls(op, over=None, **options):
    """The shapes of all arguments of every call, by its sizes."""
    case, over = derived.case_of(op, over, None)
    [(name, values)] = over.items()
    found = {}
    for value in values:
        args, kwargs = case(**{name: value}, **options)
        found[value] = [tuple(a.shape) if isinstance(a, Tensor) else a for a in (*args, *kwargs.values())]
    return name, found


def test_a_leading_batch_grows_and_rows_stay(scale):
    assert calls(scale) == (
        "b",
        {rows: [(rows, 1024), (1024,), 1] for rows in (4, 64, 1024, 4096)},
    )


def test_names_of_the_shape_line_are_sizes(scale, compare):
    report = compare(scale, None, over={"n": [8, 16], "b": [3]}, backends=["fast"], dtypes=["float64"])
    assert [(dict(r.sizes), r.dtype) for r in report.find(name="fast")] == [
        ({"n": 8, "b": 3}, "float64"), ({"n": 16, "b": 3}, "float64"),
    ]  # fmt: skip
    assert report.find(name="copy")[0].bytes == 2 * 3 * 8 * 8 + 8 * 8


def test_a_star_alone_is_the_elements(registry):
    @opkit.op("benched::plus", shapes="*b -> *b")
    def plus(x: Tensor) -> Tensor:
        return x + 1

    assert calls(plus) == ("b", {n: [(n,)] for n in derived.ELEMENTS})


def test_without_a_star_all_dimensions_grow_together(registry, compare):
    @opkit.op("benched::product", shapes="m k, k n -> m n")
    def product(x: Tensor, y: Tensor) -> Tensor:
        return x @ y

    assert calls(product) == ("size", {n: [(n, n), (n, n)] for n in (64, 256, 1024)})
    assert calls(product, {"k": [3]}) == ("k", {3: [(64, 3), (3, 64)]})

    @opkit.op("benched::line", shapes="n -> n")
    def line(x: Tensor) -> Tensor:
        return x + 1

    assert calls(line) == ("n", {n: [(n,)] for n in derived.ELEMENTS[:-1]})


def test_lists_and_keywords_and_int_arguments_are_made(registry, compare):
    @opkit.op("benched::top", shapes="*b n, [*b n], n -> *b k")
    def top(x: Tensor, others: list[Tensor], k: int, *, scale: Tensor | None = None) -> Tensor:
        return (x + others[0])[..., :k].clone()

    report = compare(top, None, over={"k": [2], "n": [4], "b": [3]})
    assert report.ok
    assert report.find(name="reference")[0].sizes == {"k": 2, "n": 4, "b": 3}


def test_registered_samples_are_measured(registry, compare):
    @opkit.op("benched::pick", shapes="n, k:int64 -> k:x")
    def pick(x: Tensor, index: Tensor) -> Tensor:
        return x[index]

    pick.register_samples(lambda: [(torch.ones(3), torch.tensor([0, 2])), (torch.ones(5), torch.tensor([4]))])
    report = compare(pick, None)
    assert [dict(row.sizes) for row in report.find(name="reference")] == [{"sample": 0}, {"sample": 1}]
    with pytest.raises(ArgumentError, match="over= names 'n', which the case does not take; it takes sample"):
        compare(pick, None, over={"n": [1]})


def test_a_declaration_that_makes_no_call_is_said(registry, compare):
    @opkit.op("benched::pick", shapes="n, k:int64 -> k:x")
    def pick(x: Tensor, index: Tensor) -> Tensor:
        return x[index]

    with pytest.raises(ArgumentError) as caught:
        compare(pick, None)
    assert str(caught.value) == (
        "benchmarking benched::pick: found no case, and its argument index is of torch.int64, and nothing says which "
        "values it may have, so that its declaration makes no call; expected a function of sizes that returns (args, "
        "kwargs). Write: def case(n): return (x, index,), {}"
    )


def test_an_op_without_a_shape_line_needs_a_case(registry, compare):
    @opkit.op("benched::free")
    def free(x: Tensor) -> Tensor:
        return x + 1

    with pytest.raises(ArgumentError, match="benchmarking benched::free: found no case, and "):
        compare(free, None)


def test_names_that_the_shape_line_has_not_are_said(scale, compare):
    with pytest.raises(
        ArgumentError, match="over= names 'm', which the case does not take; it takes n, b. Name"
    ):
        compare(scale, None, over={"m": [1]})


def test_sizes_that_do_not_fit_are_said(registry, compare):
    @opkit.op("benched::halves", shapes="2*n, n -> n")
    def halves(x: Tensor, y: Tensor, *, n: int = 3) -> Tensor:
        return x[:n] + y

    with pytest.raises((ArgumentError, ShapeError), match="benched::halves"):
        compare(halves, None, over={"n": [-1]})
