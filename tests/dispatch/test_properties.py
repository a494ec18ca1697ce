from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import opkit

pytestmark = pytest.mark.usefixtures("registry")

T = torch.zeros(3)
NUMBERS = {"reference": 0, "fast": 1, "exact": 2, "invariant": 3}
STATED = {
    "fast": (),
    "exact": ["deterministic"],
    "invariant": {"deterministic", "batch_invariant", "graph_safe"},
}


@pytest.fixture
def op():
    """An op that writes the number of the backend that ran."""

    @opkit.op("t::f", shapes="*b -> *b")
    def f(x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    for priority, (backend, properties) in zip((3, 2, 1), STATED.items(), strict=True):
        f.register_kernel(
            "cpu",
            lambda x, n=NUMBERS[backend]: torch.full_like(x, n),
            backend=backend,
            properties=properties,
            priority=priority,
        )
    f.register_autograd(lambda ctx, grad: f(grad))
    return f


@pytest.fixture
def torch_deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def ran(result):
    return next(name for name, number in NUMBERS.items() if number == result.flatten()[0].item())


def test_require_takes_the_first_kernel_that_states_it(op):
    assert ran(op(T)) == "fast"
    with opkit.require("deterministic"):
        assert ran(op(T)) == "exact"
        with opkit.require("batch_invariant"):
            assert ran(op(T)) == "invariant"
        assert ran(op(T)) == "exact"
    with opkit.require("deterministic", "graph_safe"):
        assert ran(op(T)) == "invariant"
    assert ran(op(T)) == "fast"


def test_explain_says_what_a_kernel_does_not_state(op):
    with opkit.require("batch_invariant", "deterministic"):
        found = {c.backend: (c.status, c.reason) for c in op.explain(T).candidates}
    assert found == {
        "fast": ("rejected", "does not state that it is batch_invariant or deterministic"),
        "exact": ("rejected", "does not state that it is batch_invariant"),
        "invariant": ("selected", "priority 1, batch_invariant, deterministic"),
        "reference": ("rejected", "does not state that it is batch_invariant"),
    }


def test_require_holds_inside_use_backend_and_around_it(op):
    with opkit.require("deterministic"), opkit.use_backend("fast", "invariant"):
        assert ran(op(T)) == "invariant"
    with opkit.use_backend("invariant"), opkit.require("deterministic"):
        assert ran(op(T)) == "invariant"
        with opkit.use_backend():
            assert ran(op(T)) == "exact"


def test_no_kernel_with_the_property_raises_with_reasons():
    @opkit.op("t::g", shapes="n -> n")
    def g(x: Tensor) -> Tensor:
        return x

    g.register_kernel("cpu", lambda x: x + 1, backend="fast", properties=["deterministic"])
    with (
        opkit.require("graph_safe"),
        pytest.raises(
            opkit.NoKernelError,
            match=r"calling t::g on cpu: no kernel can take this call; require\('graph_safe'\) is in force\.\n"
            r"    fast: does not state that it is graph_safe\n"
            r"    reference: does not state that it is graph_safe\nRequire less, or register a kernel with properties",
        ),
    ):
        g(T)


def test_strict_preference_and_requirement_are_both_named(op):
    with (
        opkit.use_backend("fast", strict=True),
        opkit.require("deterministic"),
        pytest.raises(
            opkit.NoKernelError,
            match=r"use_backend\('fast', strict=True\) and require\('deterministic'\) are in force",
        ),
    ):
        op(T)


def test_torchs_setting_requires_deterministic_kernels(op, torch_deterministic):
    assert ran(op(T)) == "exact"
    torch.use_deterministic_algorithms(False)
    assert ran(op(T)) == "fast"


def test_torchs_setting_is_named_where_no_kernel_is_left(op, torch_deterministic):
    with (
        opkit.use_backend("fast", strict=True),
        pytest.raises(
            opkit.NoKernelError, match=r"and torch.use_deterministic_algorithms\(True\) are in force"
        ),
    ):
        op(T)


def test_reference_runs_deterministically_where_that_is_required():
    @opkit.op("t::g", shapes="n -> n")
    def g(x: Tensor) -> Tensor:
        return x + float(torch.are_deterministic_algorithms_enabled())

    assert g(T)[0] == 0
    with opkit.require("deterministic"):
        assert g(T)[0] == 1
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("name", ["determinstic", 3, None])
def test_unknown_property_raises_with_the_list(op, name):
    with pytest.raises(
        opkit.BackendError,
        match=r"choosing kernels: found the property .*; expected some of batch_invariant, deterministic, graph_safe",
    ):
        opkit.require(name)
    with pytest.raises(
        opkit.RegistrationError,
        match=r"registering a x kernel for t::f: found the property .*; expected some of",
    ):
        op.register_kernel("cpu", lambda x: x, backend="x", properties=[name])


def test_unknown_property_has_a_hint():
    with pytest.raises(opkit.BackendError, match="Did you mean 'deterministic'"):
        opkit.require("determinstic")


# ---------------------------------------------------------------- compiled functions, threads, backward


def compiled(function, **kwargs):
    return torch.compile(function, fullgraph=True, backend="aot_eager", **kwargs)


def test_require_inside_a_compiled_function_takes_effect(op):
    @compiled
    def f(x):
        a = op(x)
        with opkit.require("deterministic"):
            b = op(x)
            with opkit.require("batch_invariant"):
                c = op(x)
            with opkit.use_backend("invariant"):
                d = op(x)
        return a, b, c, d, op(x)

    assert [ran(r) for r in f(T)] == ["fast", "exact", "invariant", "invariant", "fast"]
    with opkit.use_backend("invariant"):  # what the function leaves open follows the caller
        assert [ran(r) for r in f(T)] == ["invariant"] * 5
    with opkit.require("graph_safe"):
        assert [ran(r) for r in f(T)] == ["invariant"] * 5


def test_require_around_a_compiled_function_recompiles_nothing(op):
    f = compiled(lambda x: op(x) + 0)
    assert ran(f(T)) == "fast"
    with torch._dynamo.config.patch(error_on_recompile=True):
        with opkit.require("deterministic"):
            assert ran(f(T)) == "exact"
        assert ran(f(T)) == "fast"


def test_unknown_property_inside_a_compiled_function_raises(op):
    @compiled
    def f(x):
        with opkit.require("tow"):
            return op(x)

    with pytest.raises(Exception, match="found the property 'tow'"):
        f(T)


def test_graph_break_inside_require_keeps_it(op):
    @torch.compile(backend="aot_eager")
    def f(x):
        with opkit.require("deterministic"):
            a = op(x)
            torch._dynamo.graph_break()
            b = op(x)
        return a, b, op(x)

    assert [ran(r) for r in f(T)] == ["exact", "exact", "fast"]


@pytest.mark.parametrize("compile_", [False, True], ids=["eager", "compile"])
def test_backward_follows_what_is_required_where_it_is_called(op, compile_):
    call = compiled(lambda x: op(x)) if compile_ else op
    x = T.clone().requires_grad_()
    y = call(x).sum()
    with opkit.require("deterministic"):
        y.backward()
    assert ran(x.grad) == "exact"


def test_compiled_checkpoint_recomputes_with_what_the_function_requires(op):
    seen = []
    op.register_kernel(
        "cpu", lambda x: seen.append("exact") or x, backend="exact", properties=["deterministic"]
    )
    op.register_autograd(lambda ctx, grad: grad)
    op.register_kernel("cpu", lambda x: x.clone(), backend="exact", properties=["deterministic"], priority=9)
    op.register_kernel("cpu", lambda x: seen.append("fast") or x.clone(), backend="fast", priority=10)

    def f(x):
        with opkit.require("deterministic"):
            return op(x) * x

    x = T.clone().requires_grad_()
    compiled(lambda x: checkpoint(f, x, use_reentrant=False))(x).sum().backward()
    assert seen == []


def test_other_threads_require_nothing(op):
    found = []
    with opkit.require("deterministic"):
        thread = threading.Thread(target=lambda: found.append(ran(op(T))))
        thread.start()
        thread.join()
    assert found == ["fast"]
