"""`Op.overload`: torch's own object for the op, found when it is first needed, and the same whoever needs it first."""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import opkit
from opkit import _registry

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


# ---------------------------------------------------------------- calls of the overload itself


class Halves(NamedTuple):
    half: Tensor
    rest: Tensor


@pytest.fixture
def halves() -> opkit.Op:
    @opkit.op("t::halves", shapes="*b -> *b, *b")
    def halves(x: Tensor, part: float = 0.5) -> Halves:
        return Halves(x * part, x * (1 - part))

    halves.register_autograd(opkit.from_reference)
    for _ in range(2):
        halves(torch.ones(2))
    return halves


def test_overload_returns_what_torch_carries(halves):
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    for found in (halves.overload(x), halves.overload(x, part=0.5), torch.ops.t.halves(x)):
        assert type(found) is tuple
        assert torch.equal(found[0], x / 2)
    torch.autograd.gradcheck(halves.overload, (x, 0.25))


def test_overload_has_the_hash_it_had_before_the_op_was_called(double):
    known = {double.overload: "double"}
    for _ in range(2):
        double(torch.ones(2))
    assert known[torch.ops.t.double.default] == "double"


def test_overload_refuses_in_the_words_of_torch(halves):
    with pytest.raises(RuntimeError, match="Expected a value of type 'Tensor' for argument 'x'"):
        halves.overload("x")
    with pytest.raises(RuntimeError, match="missing value for argument 'x'"):
        halves.overload()
    halves.register_kernel("cpu", lambda x, part: (x, x), backend="wrong", priority=1)
    with pytest.raises(opkit.OutputError, match="shares storage with argument x"):
        halves.overload(torch.ones(2))


def test_overload_shows_its_calls_to_modes(halves):
    seen = []

    class Functions(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    class Dispatches(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    for mode in (Functions(), Dispatches()):
        seen.clear()
        with mode:
            halves.overload(torch.ones(2))
        assert halves.overload in seen


def test_overload_of_a_removed_op_is_torchs_again(halves):
    overload = halves.overload
    own = torch._C._get_operation_overload("t::halves", "")[0]
    _registry.remove("t::halves")
    assert type(overload._op) is type(own)


def test_overload_holds_no_result(halves):
    x = torch.ones(2)
    before = sys.getrefcount(x), sys.getrefcount(None)
    for _ in range(1000):
        halves.overload(x)
        with contextlib.suppress(RuntimeError):
            halves.overload(x, "wrong")
    assert sys.getrefcount(x) == before[0]
    assert abs(sys.getrefcount(None) - before[1]) < 100
