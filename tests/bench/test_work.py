"""Bytes and floating-point operations, by the declaration."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import opkit
from opkit.bench import work
from opkit.bench.work import Work


@pytest.fixture
def shift(registry):
    @opkit.op("benched::shift", shapes="*b n, n -> *b n")
    def shift(x: Tensor, by: Tensor) -> Tensor:
        return x + by

    return shift


def test_bytes_are_those_of_arguments_and_results(shift):
    x, by = torch.ones(2, 4), torch.ones(4)
    assert work.forward(shift, (x, by), [x + by]) == Work(32 + 16 + 32, None)
    assert work.forward(shift, (x.half(), by), [x.half()]).bytes == 16 + 16 + 16


def test_a_tensor_that_is_there_twice_counts_once(shift):
    x = torch.ones(4)
    assert work.forward(shift, (x, x), [torch.ones(4)]).bytes == 32
    assert work.forward(shift, (x, x.clone()), [torch.ones(4)]).bytes == 48


def test_what_a_stride_repeats_counts_once(shift):
    x = torch.ones(4).expand(100, 4)
    assert work.forward(shift, (x, torch.ones(4)), [torch.ones(100, 4)]).bytes == 16 + 16 + 1600


def test_empty_tensors_have_no_bytes(shift):
    empty = torch.ones(0, 4), torch.ones(4), torch.ones(0, 4)
    assert work.forward(shift, empty[:2], [empty[2]]).bytes == 16


def test_what_is_overwritten_is_read_and_written(registry):
    @opkit.op("benched::bump", shapes="n, [n] ->", mutates_args=("x",))
    def bump(x: Tensor, others: list[Tensor], scale: float = 1.0) -> None:
        x.add_(1)

    values = torch.ones(4), [torch.ones(4), torch.ones(4)], 1.0
    assert work.forward(bump, values, []).bytes == 2 * 16 + 2 * 16


def test_gradients_that_another_op_computes_are_counted(registry):
    @opkit.op("benched::sine_backward", shapes="n, n -> n", flops=lambda grad, x: 3 * x.numel())
    def sine_backward(grad: Tensor, x: Tensor) -> Tensor:
        return grad * x.cos()

    @opkit.op("benched::sine", shapes="n -> n", flops=lambda x, out_shape: 2 * out_shape.numel())
    def sine(x: Tensor) -> Tensor:
        return x.sin()

    x = torch.ones(4)
    there = work.forward(sine, (x,), [x.sin()])
    assert there == Work(32, 8.0)
    assert work.backward(sine, (x,), [x.sin()]) == Work(None, None)
    sine.register_autograd(sine_backward, saves=("x",))
    back = work.backward(sine, (x,), [x.sin()])
    assert back == Work(48, 12.0)  # the gradient and x are read, and a gradient is written
    assert there + back == Work(80, 20.0)


def test_what_is_unknown_stays_unknown():
    assert Work(1, 2.0) + Work(None, None) == Work(None, None)
    assert Work(1, None) + Work(2, 1.0) == Work(3, None)


def test_a_copy_reads_and_writes_so_many_bytes():
    target = work.copying(1000, "cpu")()
    assert target.numel() == 500
    assert target.tolist() == [1] * 500


def test_a_product_has_so_many_operations(monkeypatch):
    monkeypatch.setitem(work._SIDE, "cpu", 8)
    multiply, flops = work.multiplying(torch.float64, "cpu")
    assert flops == 2 * 8**3
    assert multiply().tolist() == [[8.0] * 8] * 8


def test_the_limit_of_an_op_that_computes_is_a_product(registry, time, compare, monkeypatch):
    monkeypatch.setitem(work._SIDE, "cpu", 8)

    @opkit.op("benched::product", shapes="m k, k n -> m n", flops=lambda x, y: 1000)
    def product(x: Tensor, y: Tensor) -> Tensor:
        time.now += 1
        return x @ y

    report = compare(product, lambda: (torch.ones(2, 2), torch.ones(2, 2)))
    [row] = report.find(name="reference")
    assert row.peak == pytest.approx(
        2 * 8**3 / 1e-3
    )  # a product takes no time but that of looking at the clock
    assert row.throughput == pytest.approx(1000, rel=0.01)
    assert report.of_limit(row) == pytest.approx(max(1000 / row.peak, 1e-3), rel=0.01)
    assert "with a copy of as many bytes as the call must move, or a product of matrices" in " ".join(
        str(report).split()
    )


def test_where_torch_multiplies_no_matrices_the_copy_is_the_limit(registry, compare, monkeypatch):
    def refuse(dtype, device):
        raise RuntimeError("not implemented")

    monkeypatch.setattr(work, "multiplying", refuse)

    @opkit.op("benched::plus", shapes="n -> n", flops=lambda x: x.numel())
    def plus(x: Tensor) -> Tensor:
        return x + 1

    [row] = compare(plus, lambda: (torch.ones(2),)).find(name="reference")
    assert row.peak is None
    assert row.flops == 2
