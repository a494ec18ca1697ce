"""How long things live on the native path: references, threads, ops that go away, and the end of the interpreter.

Everything here holds for the twin in Python, too.
"""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import opkit
from opkit import _registry
from opkit.dispatch import native

pytestmark = pytest.mark.usefixtures("registry")


class Pair(NamedTuple):
    y: Tensor
    z: Tensor


def function_form(kernel=None):
    @opkit.op("t::pair", shapes="*b, *b -> *b, *b")
    def pair(x: Tensor, w: Tensor, k: float = 2.0, *, name: str = "n") -> Pair:
        if kernel is not None:
            return kernel(x, w)
        return Pair(x * w, x * k)

    def save(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], inputs[1], output.y)
        ctx.k = inputs[2]

    def backward(ctx, gy, gz):
        x, w, y = ctx.saved_tensors
        return gy * w + gz * ctx.k, gy * x, None, None

    pair.register_autograd(backward, save)
    return pair


def op_form():
    @opkit.op("t::sine", shapes="*b -> *b")
    def sine(x: Tensor, k: float = 1.0) -> Tensor:
        return (x * k).sin()

    @opkit.op("t::sine_backward", shapes="*b, *b -> *b")
    def sine_backward(g: Tensor, x: Tensor, k: float) -> Tensor:
        return g * (x * k).cos() * k

    sine.register_autograd(sine_backward, saves=("x", "k"))
    return sine


def mutating():
    @opkit.op("t::scale_", shapes="[*s] ->", mutates_args=["xs"])
    def scale_(xs: list[Tensor], by: list[float]) -> None:
        for x, k in zip(xs, by, strict=True):
            x.mul_(k)

    return scale_


LIGHT = """#include <opkit/kernel.h>
void twice(opkit::Tensor x, opkit::Tensor y) {
  OPKIT_CHECK(x.numel() != 3, "three");
  for (int64_t i = 0; i < x.numel(); ++i) y.data<float>()[i] = x.data<float>()[i] * 2;
}
"""


def in_cpp():
    @opkit.op("t::twice", shapes="n -> n")
    def twice(x: Tensor) -> Tensor:
        raise AssertionError("the kernel takes these calls")

    @opkit.op("t::twice_backward", shapes="n -> n")
    def twice_backward(g: Tensor) -> Tensor:
        return g * 2

    twice.register_kernel("cpu", opkit.cpp.kernel(LIGHT, symbol="twice"), backend="cpp")
    twice.register_autograd(twice_backward)
    return twice


def leaf(*sizes):
    return torch.ones(*sizes, requires_grad=True)


# ---------------------------------------------------------------- references


def calls_pair():
    op, x, w, k = function_form(), torch.ones(4), leaf(4), float("2.5")

    def call():
        op(x, w.detach(), k)
        op(x, w, k=k, name="other")
        y, z = op(x, w)
        (y.sum() + z.sum()).backward()
        w.grad = None

    return call, (x, w, k, op.reference)


def calls_raise():
    def fail(x, w):
        raise ValueError("no")

    op, x, w = function_form(fail), torch.ones(4), leaf(4)

    def call():
        for args in ((x, w.detach()), (x, w), (x, 3), (x, w, "k"), (x,), (torch.ones(3), w)):
            with pytest.raises(Exception, match="."):
                op(*args)

    return call, (x, w, op.reference)


def calls_of_an_op_formula():
    op, x = op_form(), leaf(4)

    def call():
        op(x.detach())
        op(x)
        op(op(x, 2.0)).sum().backward()
        x.grad = None
        y = op(x)
        torch.autograd.grad(y.sum(), x, retain_graph=True)
        torch.autograd.grad(y.sum(), x)

    return call, (x, op.reference)


def calls_formulas_that_raise():
    op, x, w = function_form(), torch.ones(4), leaf(4)
    op.register_autograd(
        lambda ctx, gy, gz: 1 // 0, lambda ctx, inputs, output: ctx.save_for_backward(*output)
    )

    def call():
        y, z = op(x, w)
        with pytest.raises(ZeroDivisionError):
            y.sum().backward()

    return call, (x, w, op.reference)


def calls_that_return_too_much():
    op, x, w = function_form(lambda x, w: (x, w, x)), torch.ones(4), leaf(4)

    def call():
        for one in (w, w.detach()):
            with pytest.raises(opkit.OutputError):
                op(x, one)

    return call, (x, w)


def calls_with_lists():
    op, xs, by = mutating(), [torch.ones(2), torch.ones(3)], [1.0, 1.0]

    def call():
        op(xs, by)
        op(tuple(xs), by)
        with pytest.raises(ValueError, match="shorter"):
            op(xs, [1.0])

    return call, (*xs, xs, by)


def calls_of_cpp():
    op, x, three = in_cpp(), leaf(4), torch.ones(3)

    def call():
        op(x.detach())
        op(x).sum().backward()
        x.grad = None
        with pytest.raises(RuntimeError, match="three"):
            op(three)

    return call, (x, three)


CALLS = (
    calls_pair, calls_raise, calls_of_an_op_formula, calls_formulas_that_raise, calls_that_return_too_much,
    calls_with_lists, calls_of_cpp,
)  # fmt: skip


@pytest.mark.parametrize("make", CALLS, ids=lambda f: f.__name__)
def test_references_stay_as_many(make):
    call, watched = make()

    def count():
        return [sys.getrefcount(one) for one in (None, True, *watched)][2:], sys.getrefcount(watched)

    for _ in range(300):
        call()
    gc.collect()
    gc.disable()
    try:
        counts, objects, blocks = count(), len(gc.get_objects()), sys.getallocatedblocks()
        for _ in range(600):
            call()
        gc.collect()
        assert count() == counts
        assert len(gc.get_objects()) - objects < 30
        assert sys.getallocatedblocks() - blocks < 400
    finally:
        gc.enable()


@pytest.mark.skipif("san.so" in os.environ.get("LD_PRELOAD", ""), reason="sanitizers keep what is freed")
@pytest.mark.parametrize("make", CALLS, ids=lambda f: f.__name__)
def test_memory_stays_as_much(make):
    call, _ = make()

    def resident():
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for _ in range(300):
        call()
    before = resident()
    for _ in range(1000):
        call()
    assert resident() - before < 2 << 20


def test_nothing_of_a_graph_is_kept():
    op, x, w = function_form(), leaf(4), leaf(4)
    for _ in range(3):
        y, z = op(x, w)
    gone = [weakref.ref(one) for one in (y, z)]
    del y, z
    assert [one() for one in gone] == [None] * 2  # without the garbage collector's help


def test_saved_tensors_are_freed_by_backward():
    op = function_form()
    for _ in range(3):
        x, w = leaf(4), leaf(4) * 1
        seen = weakref.ref(w)
        y, z = op(x, w)
        del w
        total = y.sum()
        total.backward()
        del y, z
        assert total.grad_fn is not None
        del total
        assert seen() is None


def test_results_share_nothing_between_calls():
    op = function_form()
    x, w = torch.ones(4), torch.ones(4)
    for _ in range(3):
        first, second = op(x, w), op(x, w)
        assert first is not second
        assert {t.data_ptr() for t in first}.isdisjoint(t.data_ptr() for t in second)


# ---------------------------------------------------------------- what a call leaves behind


def state_of_this_thread():
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        str(torch._C._dispatch_tls_local_include_set()),
        str(torch._C._dispatch_tls_local_exclude_set()),
        torch._C._functorch.maybe_current_level()
        if hasattr(torch._C._functorch, "maybe_current_level")
        else None,
        torch._C._len_torch_dispatch_stack(),
        torch._C._len_torch_function_stack(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled("cpu"),
        sys.exc_info(),
    )


@pytest.mark.parametrize("make", CALLS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("enter", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_calls_leave_the_thread_as_it_was(make, enter):
    call, _ = make()
    for _ in range(3):
        with enter():
            before = state_of_this_thread()
            try:
                call()
            except (RuntimeError, pytest.fail.Exception):
                pass  # there is nothing to differentiate
            assert state_of_this_thread() == before


def test_kernel_sees_no_autograd_and_its_error_does_not_change_that():
    seen = []

    def kernel(x, w):
        excluded = torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradFunctionality)
        seen.append((torch.is_grad_enabled(), excluded))
        if len(seen) % 2:
            raise ValueError("odd")
        return x + 1, w + 1

    op = function_form(kernel)
    for index in range(6):
        if index % 2:
            op(torch.ones(2), leaf(2))
        else:
            with pytest.raises(ValueError, match="odd"):
                op(torch.ones(2), leaf(2))
    assert set(seen) == {(False, True)}
    assert torch.is_grad_enabled()


def test_error_of_a_kernel_is_the_one_it_raised():
    error = ValueError("this one")

    def fail(x, w):
        raise error

    op = function_form(fail)
    for gradients in (False, True, False, True):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            op(torch.ones(2), torch.ones(2, requires_grad=gradients))
        assert caught.value is error


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration, MemoryError])
def test_errors_of_every_kind_pass(kind):
    def fail(x, w):
        raise kind("x")

    op = function_form(fail)
    for gradients in (False, True, False, True):
        with pytest.raises(kind):
            op(torch.ones(2), torch.ones(2, requires_grad=gradients))


def test_warning_that_is_an_error_comes_from_the_kernel():
    import warnings

    def warn(x, w):
        warnings.warn("careful", stacklevel=1)
        return x + 1, w + 1

    op = function_form(warn)
    for _ in range(3):
        with pytest.warns(UserWarning, match="careful"):
            op(torch.ones(2), torch.ones(2))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match="careful"):
                op(torch.ones(2), leaf(2))


# ---------------------------------------------------------------- ops that call ops


def test_kernel_may_call_its_own_op():
    @opkit.op("t::countdown", shapes="n -> n")
    def countdown(x: Tensor, steps: int) -> Tensor:
        return countdown(x, steps - 1) + 1 if steps else x.clone()

    countdown.register_autograd(opkit.from_reference)
    for _ in range(3):
        x = leaf(2)
        y = countdown(x, 50)
        assert y.tolist() == [51, 51]
        y.sum().backward()
        assert x.grad.tolist() == [1, 1]


def test_endless_recursion_ends_in_pythons_error():
    @opkit.op("t::endless", shapes="n -> n")
    def endless(x: Tensor) -> Tensor:
        return endless(x)

    for _ in range(3):
        with pytest.raises(RecursionError):
            endless(torch.ones(2))
    assert torch.is_grad_enabled()


@pytest.mark.skipif("native.core() is None", reason="torch frees a kernel in Python that runs")
@pytest.mark.parametrize("through", ["call", "overload"])
def test_op_may_be_removed_inside_of_its_call(through):
    for _ in range(3):

        def kernel(x, w):
            _registry.remove("t::pair")
            gc.collect()
            return x * w, x + 1

        op = function_form(lambda x, w: (x * w, x + 1))
        x, w = torch.ones(3), leaf(3)
        for _ in range(3):
            op(x, w)
        op.register_kernel("cpu", lambda x, w, k=2.0, *, name="n": kernel(x, w), backend="last")
        y, _ = op(x, w) if through == "call" else op.overload(x, w)
        y.sum().backward()
        assert w.grad.tolist() == [1, 1, 1]
        del op


def test_graph_outlives_its_op():
    op, x, w = function_form(), leaf(3), leaf(3)
    for _ in range(3):
        y, z = op(x, w)
    _registry.remove("t::pair")
    del op
    gc.collect()
    (y.sum() + z.sum()).backward()
    assert x.grad.tolist() == [3, 3, 3]
    assert w.grad.tolist() == [1, 1, 1]


def test_another_op_takes_the_name_of_one_that_was_removed():
    for factor in (2.0, 3.0, 4.0):

        @opkit.op("t::again", shapes="n -> n")
        def again(x: Tensor) -> Tensor:
            return x * factor  # noqa: B023

        again.register_autograd(lambda ctx, g: g * factor)  # noqa: B023
        for _ in range(3):
            x = leaf(2)
            again(x).sum().backward()
            assert again(x).tolist() == x.grad.tolist() == [factor, factor]
        _registry.remove("t::again")


def test_an_op_defined_anew_is_itself_to_modes_where_calls_of_the_first_are_held():
    """torch keeps its object for an overload as long as a kernel is there; compiled code holds what it calls."""
    held = []
    for factor in (1, 2):

        @opkit.op("t::again", shapes="n -> n", flops=lambda x, factor=factor: factor)
        def again(x: Tensor) -> Tensor:
            return x * 1

        with FlopCounterMode(display=False) as counter:
            again(torch.ones(2))
        assert counter.get_total_flops() == factor
        held.append(again.overload._op)
        _registry.remove("t::again")


def test_kernels_may_change_inside_of_a_call():
    def first(x, w):
        op.register_kernel("cpu", second, backend="fast", priority=9)
        return x * w, x + 1

    def second(x, w, k=2.0, *, name="n"):
        return x + 5, w + 5

    op = function_form(first)
    x = torch.ones(2)
    for _ in range(2):
        first_result = op(x, x)
    assert first_result.y.tolist() == [6, 6]
    _registry.remove("t::pair")
    op = function_form(lambda x, w: (x * w, x + 1))
    for _ in range(3):
        op(x, x)
    op.register_kernel("cpu", second, backend="fast", priority=9)
    assert op(x, x).y.tolist() == [6, 6]


def test_formula_may_change_inside_of_backward():
    op = op_form()
    x = leaf(2)
    for _ in range(3):
        y = op(x)

    def backward(ctx, g):
        op.register_autograd(lambda ctx, g: (g * 7, None))
        return g * 5, None

    op.register_autograd(backward)
    y, later = op(x), op(x)
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [5, 5]
    assert torch.autograd.grad(op(x).sum(), x)[0].tolist() == [7, 7]
    assert torch.autograd.grad(later.sum(), x)[0].tolist() == [5, 5]


def test_op_is_copied_and_pickled_as_itself():
    from opkit_kernels import vector_add

    x = torch.ones(2)
    for _ in range(3):
        vector_add(x, x)
    for one in (copy.copy(vector_add), copy.deepcopy(vector_add), pickle.loads(pickle.dumps(vector_add))):
        assert one is vector_add
        assert one(x, x).tolist() == [2, 2]
    assert copy.deepcopy({"op": vector_add})["op"] is vector_add


def test_results_with_a_graph_are_refused_by_deepcopy_as_torchs_own():
    op = op_form()
    x = leaf(2)
    for _ in range(3):
        y = op(x)
    with pytest.raises(RuntimeError, match="Only Tensors created explicitly by the user"):
        copy.deepcopy(y)
    assert pickle.loads(pickle.dumps(op(x.detach()))).tolist() == y.tolist()


def test_weak_references_subclasses_and_attributes_of_an_op():
    op = function_form()
    for _ in range(3):
        op(torch.ones(2), torch.ones(2))
    assert weakref.ref(op)() is op
    op.mine = 3
    assert op.mine == 3
    assert callable(op)
    assert op.__call__(torch.ones(2), torch.ones(2)).y.tolist() == [1, 1]
    assert type(op).__call__(op, torch.ones(2), torch.ones(2)).y.tolist() == [1, 1]
    assert list(map(op, [torch.ones(2)], [torch.ones(2)]))[0].z.tolist() == [2, 2]


# ---------------------------------------------------------------- threads


def in_threads(call, count=4):
    """Run a function in threads at once, and return what it gave."""
    barrier = threading.Barrier(count)

    def run(index):
        barrier.wait()
        return call(index)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


@pytest.mark.parametrize("make", [function_form, op_form, in_cpp])
def test_threads_call_and_differentiate_at_once(make):
    op = make()
    takes = 2 if make is function_form else 1

    def work(index):
        for step in range(60):
            x = torch.full((4,), float(index + 1), requires_grad=True)
            outputs = op(*[x] * takes)
            total = sum(o.sum() for o in outputs) if isinstance(outputs, tuple) else outputs.sum()
            total.backward()
            if make is function_form:
                wanted = 2 * (index + 1) + 2
            else:
                wanted = 2 if make is in_cpp else torch.tensor(float(index + 1)).cos().item()
            torch.testing.assert_close(x.grad, torch.full((4,), float(wanted)))
        return step

    assert in_threads(work) == [59] * 4


def test_first_calls_may_come_from_many_threads():
    for _ in range(10):
        op = op_form()
        x = torch.ones(2)
        assert in_threads(lambda _: op(x).tolist()) == [x.sin().tolist()] * 4  # noqa: B023
        _registry.remove("t::sine")
        _registry.remove("t::sine_backward")


@pytest.mark.parametrize("late", [False, True], ids=["the core is there", "the core comes later"])
@pytest.mark.parametrize("make", [function_form, op_form])
def test_calls_register_nothing_in_torch(make, late, monkeypatch):
    """Other threads may be reading torch's table of kernels, which it does without a lock."""
    with pytest.MonkeyPatch.context() as patch:
        if late:
            patch.setattr(native, "_core", None)
        op = make()
    before = torch._C._dispatch_dump(op.name)
    arguments = [torch.randn(3, requires_grad=True) for p in op.schema.params if p.type.base == "Tensor"]
    exact = [a.detach().double().requires_grad_() for a in arguments]
    for call in (op, op.overload, op, op.overload):
        found, wanted = (torch.autograd.grad(sum(flat(call(*a))).sum(), a) for a in (arguments, exact))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one.double(), other)
    assert torch._C._dispatch_dump(op.name) == before


def flat(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("make", [function_form, op_form])
def test_one_graph_is_walked_by_many_threads(make):
    op = make()
    x = torch.linspace(0, 1, 16, requires_grad=True)
    for _ in range(3):
        outputs = op(x, x) if make is function_form else op(x)
    total = sum(o.sum() for o in outputs) if isinstance(outputs, tuple) else outputs.sum()
    wanted = 2 * x.detach() + 2 if make is function_form else x.detach().cos()

    def derive(_):
        for _ in range(40):
            torch.testing.assert_close(torch.autograd.grad(total, x, retain_graph=True)[0], wanted)

    in_threads(derive)


def test_kernels_change_while_threads_call():
    op = op_form()
    x = torch.ones(2)
    stop = threading.Event()

    def work(index):
        if index == 0:
            for number in range(30):
                op.register_kernel(
                    "cpu", lambda x, k=1.0: (x * k).sin(), backend=f"b{number}", priority=number
                )
                op.register_autograd(lambda ctx, g: (g, None))
            stop.set()
            return 0
        calls = 0
        while not stop.is_set():
            y = op(leaf(2))
            torch.testing.assert_close(y.detach(), x.sin())
            y.sum().backward()
            calls += 1
        return calls

    assert sum(in_threads(work)) > 0


def test_ops_are_defined_and_removed_while_threads_call():
    op, x, stop = op_form(), torch.ones(2), threading.Event()

    def work(index):
        if index == 0:
            for _ in range(15):
                other = function_form()
                for _ in range(3):
                    other(x, leaf(2)).y.sum().backward()
                _registry.remove("t::pair")
            stop.set()
            return
        while not stop.is_set():
            op(leaf(2)).sum().backward()

    in_threads(work)


# ---------------------------------------------------------------- the end of the interpreter

PROGRAM = """
import atexit, gc, sys, threading
import torch
from torch import Tensor
import opkit

@opkit.op("t::f", shapes="*b, *b -> *b, *b")
def f(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return x * w, x + w

def save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[0])
    ctx.kept = [output[1] if cyclic else None]

cyclic = False
f.register_autograd(lambda ctx, g, h: (g * ctx.saved_tensors[1] + h, g * ctx.saved_tensors[0] + h), save)

@opkit.op("t::s", shapes="*b -> *b")
def s(x: Tensor) -> Tensor:
    return x.sin()

@opkit.op("t::sb", shapes="*b, *b -> *b")
def sb(g: Tensor, x: Tensor) -> Tensor:
    return g * x.cos()

s.register_autograd(sb, saves=("x",))
x = torch.ones(3, requires_grad=True)

def call():
    y, z = f(x, s(x))
    return y + z

for _ in range(3):
    call().sum().backward()
x.grad = None
"""

# Not among them: a daemon thread that the interpreter stops inside of an op. torch's own operations abort there, too.
ENDS = {
    "plainly": "",
    "with a graph": "kept = call()",
    "with a cyclic graph": "cyclic = True; kept = call(); del kept; gc.disable()",
    "with a kept context": """
contexts = []
f.register_autograd(lambda ctx, g, h: (g, h), lambda ctx, inputs, output: contexts.append(ctx))
kept = call()
""",
    "in atexit": "atexit.register(lambda: call().sum().backward())",
    "graph walked in atexit": "kept = call(); atexit.register(lambda: kept.sum().backward())",
    "from a thread that outlives the program": """
def work():
    import time
    time.sleep(0.3)
    for _ in range(50):
        call().sum().backward()
threading.Thread(target=work).start()
""",
    "in a destructor": """
class Last:
    def __del__(self, call=call):
        call()
last = Last()
sys.last = Last()
""",
    "with the graph in a module": "sys.kept = call(); torch.kept = call(); opkit.kept = call()",
    "with the modules taken apart": "kept = call(); sys.modules.pop('opkit'); sys.modules.pop('torch')",
    "after the op is removed": "kept = call(); opkit._registry.remove('t::f'); del f",
    "with a hook": "kept = call(); kept.grad_fn.register_hook(lambda *_: call)",
    "by sys.exit in a kernel": """
def leave(x, w):
    sys.exit(0)
f.register_kernel("cpu", leave, backend="last", priority=99)
kept = s(x)
call()
""",
    "by sys.exit in backward": """
def leave(ctx, g, h):
    sys.exit(0)
f.register_autograd(leave)
call().sum().backward()
""",
    "by os._exit": "import os; kept = call(); os._exit(0)",
    "after a fork": """
import os
child = os.fork()
assert call().tolist()
if child:
    assert os.waitpid(child, 0)[1] == 0
""",
}


@pytest.mark.parametrize("end", ENDS)
def test_interpreter_ends_cleanly(end, tmp_path, monkeypatch):
    core = native.core()
    environment = {**os.environ, "OPKIT_NATIVE": "0" if core is None else "1"}
    if core is not None:  # where it is, not where this test would build one
        environment["OPKIT_CACHE_DIR"] = str(Path(core.__file__).parents[3])
    program = tmp_path / "program.py"
    check = "" if core is None else "from opkit.dispatch import native; assert native.core() is not None\n"
    program.write_text(PROGRAM + check + ENDS[end])
    done = subprocess.run(
        [sys.executable, program], env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
