from __future__ import annotations

import contextlib
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import opkit
from opkit import _config
from opkit.dispatch import native, preference, select
from opkit.dispatch.preference import Preference

pytestmark = pytest.mark.usefixtures("registry")

T = torch.zeros(3)
NUMBERS = {"reference": 0, "one": 1, "two": 2}


@pytest.fixture
def op():
    """An op that writes the number of the backend that ran."""

    @opkit.op("t::f", shapes="*b -> *b")
    def f(x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    for backend in ("one", "two"):
        f.register_kernel("cpu", lambda x, n=NUMBERS[backend]: torch.full_like(x, n), backend=backend)
    return f


def ran(result):
    return next(name for name, number in NUMBERS.items() if number == result.flatten()[0].item())


@pytest.fixture
def environment(monkeypatch):
    def set_backend(value):
        monkeypatch.setenv("OPKIT_BACKEND", value)
        _config.refresh()
        preference.refresh()

    return set_backend


def test_use_backend_nests_and_ends(op):
    assert ran(op(T)) == "one"
    with opkit.use_backend("two"):
        assert ran(op(T)) == "two"
        with opkit.use_backend("reference"):
            assert ran(op(T)) == "reference"
            with opkit.use_backend():
                assert ran(op(T)) == "one"
        assert ran(op(T)) == "two"
    assert ran(op(T)) == "one"


def test_first_named_backend_that_fits_is_taken(op):
    op.register_kernel("cpu", lambda x: x + 3, backend="never", when=lambda x: False)
    with opkit.use_backend("never", "two", "one"):
        assert ran(op(T)) == "two"


def test_equal_preferences_are_decided_once(op, monkeypatch):
    x, asked = torch.ones(2), []
    choose = select.choose
    monkeypatch.setattr(select, "choose", lambda *args: asked.append(args) or choose(*args))

    def run(enter):
        with enter():
            return ran(op(x))

    states = (
        contextlib.nullcontext,
        lambda: opkit.use_backend("one"),
        lambda: opkit.use_backend("two"),
        lambda: opkit.use_backend("reference", strict=True),
    )
    first = [run(state) for state in states * 2][4:]  # the core takes over after the very first call
    assert first == ["one", "one", "two", "reference"]
    del asked[:]
    assert [run(state) for state in states * 3] == first * 3
    if native.core() is not None:
        assert not asked
    op.register_kernel("cpu", lambda x: torch.full_like(x, 2), backend="three", priority=99)
    assert [run(state) for state in states] == ["two", *first[1:]]


def test_backends_that_are_not_named_remain_unless_strict(op):
    op.register_kernel("cpu", lambda x: x + 3, backend="never", when=lambda x: False)
    with opkit.use_backend("never"):
        assert ran(op(T)) == "one"
    with opkit.use_backend("never", strict=True), pytest.raises(opkit.NoKernelError):
        op(T)


def test_exception_inside_restores_what_was_in_force(op):
    with pytest.raises(ZeroDivisionError), opkit.use_backend("two"):
        1 / 0
    assert ran(op(T)) == "one"


def test_one_context_object_can_be_entered_again(op):
    prefer = opkit.use_backend("two")
    with prefer, opkit.use_backend("reference"), prefer:
        assert ran(op(T)) == "two"
    assert ran(op(T)) == "one"


def test_unknown_backend_raises_with_the_list_and_a_hint(op):
    with pytest.raises(
        opkit.BackendError,
        match=r"no kernel has the backend 'tow'; registered are .*one.* Did you mean 'two'",
    ):
        with opkit.use_backend("tow"):
            pytest.fail("entered")
    assert ran(op(T)) == "one"


def test_other_threads_have_their_own_preference(op):
    found = []
    with opkit.use_backend("two"):
        thread = threading.Thread(target=lambda: found.append(ran(op(T))))
        thread.start()
        thread.join()
    assert found == ["one"]


def test_concurrent_threads_do_not_mix(op):
    barrier, found = threading.Barrier(3), {}

    def work(name):
        with opkit.use_backend(name):
            barrier.wait(10)
            found[name] = {ran(op(T)) for _ in range(50)}
            barrier.wait(10)

    threads = [threading.Thread(target=work, args=(name,)) for name in NUMBERS]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert found == {name: {name} for name in NUMBERS}


def test_environment_prefers_backends_below_use_backend(op, environment):
    environment("two, reference")
    assert ran(op(T)) == "two"
    assert op.explain(T).candidates[0].reason == "preferred (two, reference)"
    with opkit.use_backend("one"):
        assert ran(op(T)) == "one"


def test_environment_with_an_unknown_backend_raises(op, environment):
    environment("tow")
    with pytest.raises(
        opkit.ConfigError, match=r"reading OPKIT_BACKEND: found 'tow'; expected one of .* Did you mean 'two'"
    ):
        op(T)


def test_environment_is_read_in_a_fresh_process():
    code = """
        import opkit, torch
        from torch import Tensor
        @opkit.op("t::f", shapes="n -> n")
        def f(x: Tensor) -> Tensor: return x + 1
        @f.register_kernel("cpu", backend="fast")
        def _(x): return x + 2
        print(f.explain(torch.ones(1)).selected)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    run = subprocess.run(command, env={"OPKIT_BACKEND": "reference"}, capture_output=True, text=True)
    assert run.stdout.strip() == "reference", run.stderr


@pytest.mark.parametrize(
    "wanted", [Preference(), Preference(("a",)), Preference(("a", "b"), True), Preference((), True)]
)
def test_preference_survives_being_written_into_a_graph(wanted):
    assert Preference.decode(wanted.encode()) == wanted


# ---------------------------------------------------------------- compiled functions


def compiled(function, **kwargs):
    return torch.compile(function, fullgraph=True, backend="aot_eager", **kwargs)


def test_use_backend_inside_a_compiled_function_takes_effect(op):
    @compiled
    def f(x):
        a = op(x)
        with opkit.use_backend("two"):
            b = op(x)
            with opkit.use_backend():
                c = op(x)
        return a, b, c, op(x)

    assert [ran(r) for r in f(T)] == ["one", "two", "one", "one"]
    with opkit.use_backend("reference"):
        assert [ran(r) for r in f(T)] == ["reference", "two", "one", "reference"]
    assert ran(op(T)) == "one"
    assert not preference.contexts
    assert not any(preference._traced_inside.values())


def test_changing_the_backend_around_a_compiled_function_recompiles_nothing(op):
    f = compiled(lambda x: op(x) + 0)
    assert ran(f(T)) == "one"
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name in ("two", "reference", "one"):
            with opkit.use_backend(name):
                assert ran(f(T)) == name
        assert ran(f(T)) == "one"


def test_strict_preference_inside_a_compiled_function_is_strict(op):
    op.register_kernel("cpu", lambda x: x + 3, backend="never", when=lambda x: False)

    @compiled
    def f(x):
        with opkit.use_backend("never", strict=True):
            return op(x)

    with pytest.raises(opkit.NoKernelError, match=r"use_backend\('never', strict=True\) is in force"):
        f(T)


def test_unknown_backend_inside_a_compiled_function_raises(op):
    @compiled
    def f(x):
        with opkit.use_backend("tow"):
            return op(x)

    with pytest.raises(opkit.BackendError, match="'tow'"):
        f(T)


def test_failed_tracing_leaves_no_preference_behind(op):
    @compiled
    def f(x):
        with opkit.use_backend("two"):
            torch._dynamo.graph_break()
            return op(x)

    with pytest.raises(Exception, match="graph_break"):
        f(T)
    assert ran(compiled(lambda x: op(x))(T)) == "one"


def test_graph_break_inside_use_backend_keeps_it(op):
    @torch.compile(backend="aot_eager")
    def f(x):
        with opkit.use_backend("two"):
            a = op(x)
            torch._dynamo.graph_break()
            b = op(x)
        return a, b, op(x)

    assert [ran(r) for r in f(T)] == ["two", "two", "one"]
    assert [ran(r) for r in f(T)] == ["two", "two", "one"]


def test_mutating_op_works_inside_use_backend_in_a_compiled_function():
    @opkit.op("t::add_", shapes="n -> ", mutates_args=["x"])
    def add_(x: Tensor) -> None:
        x.add_(1)

    @add_.register_kernel("cpu", backend="two")
    def _(x):
        x.add_(2)

    @compiled
    def f(x):
        y = x.clone()
        with opkit.use_backend("two"):
            add_(y)
        with opkit.use_backend("reference"):
            add_(y)
        return y

    assert f(T).tolist() == [3, 3, 3]


def test_keyword_only_tensors_and_defaults_work_inside_use_backend_in_a_compiled_function():
    @opkit.op("t::g", shapes="n, n -> n")
    def g(x: Tensor, k: int = 2, *, y: Tensor, s: str = "a") -> Tensor:
        return x * k + y + len(s)

    @compiled
    def f(x):
        with opkit.use_backend("reference"):
            return g(x, y=x), g(x, 3, s="bc", y=x + 1)

    one = torch.ones(2)
    assert [r[0].item() for r in f(one)] == [4, 7]


# ---------------------------------------------------------------- backward


@pytest.fixture
def seen():
    """The backends that ran in forward and backward, in order."""
    return []


@pytest.fixture
def differentiable(seen):
    @opkit.op("t::g_backward", shapes="*b -> *b")
    def g_backward(grad: Tensor) -> Tensor:
        seen.append("backward reference")
        return grad * 2

    @opkit.op("t::g", shapes="*b -> *b")
    def g(x: Tensor) -> Tensor:
        seen.append("forward reference")
        return x * 2

    for op, name in ((g, "forward"), (g_backward, "backward")):
        op.register_kernel("cpu", lambda x, name=name: seen.append(f"{name} two") or x * 2, backend="two")
    g.register_autograd(g_backward)
    return g


def leaf():
    return torch.ones(2, requires_grad=True)


@pytest.mark.parametrize("compile_", [False, True], ids=["eager", "compile"])
def test_backward_follows_the_preference_where_it_is_called(differentiable, seen, compile_):
    call = compiled(lambda x: differentiable(x)) if compile_ else differentiable
    with opkit.use_backend("reference"):
        y = call(leaf()).sum()
    y.backward()
    assert seen == ["forward reference", "backward two"]
    seen.clear()
    y = call(leaf()).sum()
    with opkit.use_backend("reference"):
        y.backward()
    assert seen == ["forward two", "backward reference"]


def test_checkpoint_recomputation_follows_the_function(differentiable, seen):
    def f(x):
        with opkit.use_backend("reference"):
            return differentiable(x) * x

    x = leaf()
    checkpoint(f, x, use_reentrant=False).sum().backward()
    assert seen == ["forward reference", "forward reference", "backward two"]


@pytest.mark.parametrize("use_backend", ["reference", "two"])
def test_compiled_checkpoint_recomputes_with_the_preference_of_the_function(
    differentiable, seen, use_backend
):
    def f(x):
        with opkit.use_backend(use_backend):
            return differentiable(x) * x

    x = leaf()
    compiled(lambda x: checkpoint(f, x, use_reentrant=False))(x).sum().backward()
    assert {s for s in seen if s.startswith("forward")} == {f"forward {use_backend}"}
    assert x.grad.tolist() == [4, 4]


def test_compiled_checkpoint_inside_use_backend_recomputes_with_it(differentiable, seen):
    def inner(x):
        a = differentiable(x)
        with opkit.use_backend("two"):
            return differentiable(a) * x

    @compiled
    def f(x):
        with opkit.use_backend("reference"):
            y = checkpoint(inner, x, use_reentrant=False)
        return differentiable(y)

    f(leaf())
    assert seen == ["forward reference", "forward two", "forward two"]
    seen.clear()
    with opkit.use_backend("reference"):
        f(leaf()).sum().backward()
    assert seen[:3] == ["forward reference", "forward two", "forward reference"]
    assert [s for s in seen[3:] if s.startswith("forward")] == ["forward reference", "forward two"]


def test_preference_reaches_threads_of_autograd(differentiable, seen):
    y = differentiable(leaf()).sum()
    seen.clear()
    with opkit.use_backend("reference"):
        thread = threading.Thread(target=y.backward)
        thread.start()
        thread.join()
    assert seen == ["backward two"]  # a thread of the user's is not one of autograd's


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA device")
def test_preference_reaches_the_device_thread_of_autograd(differentiable, seen):
    differentiable.register_kernel("cuda", lambda x: x * 2, backend="two")
    backward = opkit.get("t::g_backward")
    backward.register_kernel("cuda", lambda x: seen.append("backward two") or x * 2, backend="two")
    x = torch.ones(2, device="cuda", requires_grad=True)
    y = differentiable(x).sum()
    seen.clear()
    with opkit.use_backend("reference"):
        y.backward()
    assert seen == ["backward reference"]
