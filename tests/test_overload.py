"""`Op.overload`: torch's own object for the op, found when it is first needed, and the same whoever needs it first."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import opkit

pytestmark = pytest.mark.usefixtures("registry")


@pytest.fixture
def double() -> opkit.Op:
    @opkit.op("t::double", shapes="*b -> *b")
    def double(x: Tensor) -> Tensor:
        return 2 * x

    double.register_autograd(opkit.from_reference)
    return double


def test_overload_is_that_of_torch_ops(double):
    assert double.overload is torch.ops.t.double.default
    assert double.overload is double.overload


def test_overload_that_torch_ops_gave_first(double):
    theirs = torch.ops.t.double.default
    assert double.overload is theirs


def calling(op):
    return lambda x: op(x)


def calling_the_overload(op):
    return lambda x: op.overload(x)


def in_a_checkpoint(op):
    return lambda x: checkpoint(lambda y: op(y), x, use_reentrant=False)


def the_overload_in_a_checkpoint(op):
    return lambda x: checkpoint(lambda y: op.overload(y), x, use_reentrant=False)


def in_vmap(op):
    return lambda x: torch.vmap(op)(x)


@pytest.mark.parametrize(
    "use", [calling, calling_the_overload, in_a_checkpoint, the_overload_in_a_checkpoint, in_vmap]
)
def test_compiled_before_anything_has_asked_for_the_overload(double, use):
    x = torch.ones(2, 3)
    compiled = torch.compile(use(double), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), 2 * x)


@pytest.mark.parametrize("use", [calling, in_a_checkpoint, in_vmap])
def test_eager_call_after_compiling_compiles_nothing_anew(double, use):
    counter = CompileCounter()
    compiled = torch.compile(use(double), backend=counter, fullgraph=True)
    x = torch.ones(2, 3)
    compiled(x)
    double(x)
    assert double.overload is torch.ops.t.double.default
    compiled(x)
    assert counter.frame_count == 1


def test_threads_that_call_first_get_one_overload(double):
    ready, found = threading.Barrier(8), []

    def ask() -> None:
        ready.wait()
        found.append(double.overload)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(map(id, found))) == 1


def test_op_whose_name_has_overloads_of_another_library():
    library = torch.library.Library("t", "FRAGMENT")
    library.define("shared.twice(Tensor x, int k) -> Tensor")
    assert torch.ops.t.shared.overloads() == ["twice"]  # torch has made its object for the name

    @opkit.op("t::shared", shapes="n -> n")
    def shared(x: Tensor) -> Tensor:
        return x + 1

    assert set(torch.ops.t.shared.overloads()) == {"twice", "default"}
    assert torch.equal(torch.ops.t.shared(torch.ones(2)), torch.full((2,), 2.0))
    assert shared.overload is torch.ops.t.shared.default
