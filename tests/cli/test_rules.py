"""The rules of an op, in the words of `opkit info`."""

from __future__ import annotations

import re

import pytest
from torch import Tensor

import opkit
from opkit.cli import _rules


@pytest.fixture
def plain(registry):
    @opkit.op("cliinfo::plain", shapes="*b n, n -> *b n")
    def plain(x: Tensor, w: Tensor) -> Tensor:
        return x * w

    return plain


def test_rules_of_a_bare_op(plain):
    assert _rules.described(plain) == {
        "meta": "from the shape line",
        "gradient": "none: differentiating it raises",
        "forward mode": "none: forward mode raises",
        "vmap": "from *b in the shape line",
        "autocast": "none: it runs in the dtypes that it is given",
        "sharding": "along *b of the shape line",
    }


def test_rules_that_are_functions_are_named_with_their_place(plain):
    def rule(*args, **kwargs): ...

    plain.register_autograd(rule)
    plain.register_jvp(rule)
    plain.register_vmap(rule)
    plain.register_fake(lambda x, w: x)
    plain.register_sharding(rule)
    found = _rules.described(plain)
    place = rf".*rule \({re.escape(__file__)}:\d+\)"
    for what in ("gradient", "forward mode", "vmap", "sharding"):
        assert re.fullmatch(place, found[what]), found[what]
    assert "lambda" in found["meta"]


def test_rules_from_the_reference_and_from_ops(plain):
    @opkit.op("cliinfo::back", shapes="*b n, *b n, n -> *b n, n")
    def back(g: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return g * w, (g * x).sum(0)

    plain.register_autograd(back, saves=("x", "w"))
    assert _rules.described(plain)["gradient"] == "cliinfo::back, which takes x, w too"
    plain.register_autograd(opkit.from_reference)
    found = _rules.described(plain)
    assert found["gradient"] == "from the reference, which runs once more in backward"
    assert found["forward mode"] == "from the reference"


def test_rules_of_an_op_without_a_shape_line(registry):
    @opkit.op("cliinfo::bare")
    def bare(x: Tensor) -> Tensor:
        return x.clone()

    @opkit.op("cliinfo::silent")
    def silent(x: Tensor) -> None: ...

    found = _rules.described(bare)
    assert found["meta"] == "none: the op cannot be traced"
    assert found["vmap"] == "one call per sample"
    assert found["sharding"] == "replicated"
    assert _rules.described(silent)["meta"] == "nothing to say, as there are no results"


def test_sharding_names_further_dimensions(registry):
    @opkit.op("cliinfo::product", shapes="m k, k n -> m n")
    def product(a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    product.register_sharding(dims=["m", "n"])
    assert _rules.described(product)["sharding"] == "along m, n of the shape line"
