from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import Tensor

import opkit
from opkit.cpp import compilers

pytestmark = pytest.mark.usefixtures("registry")
needs_compiler = pytest.mark.skipif(compilers.find_cxx() is None, reason="needs a C++ compiler")

SOURCE = """
#include <opkit/kernel.h>
void NAME(opkit::Tensor x, opkit::Tensor y) {
  for (int64_t i = 0; i < x.numel(); ++i) y.data<float>()[i] = 2 * x.data<float>()[i];
}
"""


def make(name):
    @opkit.op(name, shapes="*b -> *b")
    def twice(x: Tensor) -> Tensor:
        return 2 * x

    return twice


@pytest.fixture
def native(cache_dir):
    op = make("p::twice")
    op.register_kernel("cpu", opkit.cpp.kernel(SOURCE.replace("NAME", "twice")), backend="cpp")
    return op


def did(report):
    return [(r.op, r.backend, r.did) for r in report.records]


# ---------------------------------------------------------------- what is done


@needs_compiler
def test_a_case_builds_loads_and_selects_and_the_report_says_which(native):
    report = opkit.prepare(native, [(torch.ones(2, 3),), (torch.ones(4),)])
    assert did(report) == [("p::twice", "cpp", "built"), ("p::twice", "cpp", "ready")]
    first, second = report.records
    assert (first.arguments, second.arguments) == ("x (2, 3) float32 on cpu", "x (4,) float32 on cpu")
    assert 0 < first.seconds <= report.seconds
    lines = str(report).splitlines()
    assert lines[0] == f"prepared in {report.seconds:.2f} s: 1 built, 1 ready"
    assert lines[1].split("  ") == [
        "",
        "p::twice",
        "cpp",
        "built",
        f" {first.seconds:.2f} s",
        first.arguments,
    ]


@needs_compiler
def test_what_is_in_the_cache_is_loaded(native):
    native.build()
    assert did(opkit.prepare("p::twice", [(torch.ones(3),)])) == [("p::twice", "cpp", "loaded")]


@needs_compiler
def test_without_cases_every_native_kernel_of_this_machine_is_loaded_that_of_the_formula_too(native):
    formula = make("p::twice_backward")
    native.register_autograd(formula)
    source = SOURCE.replace("NAME", "twice_backward")
    formula.register_kernel("cpu", opkit.cpp.kernel(source), backend="cpp")
    native.register_kernel("xpu", opkit.cpp.kernel(SOURCE.replace("NAME", "twice")), backend="far")
    report = opkit.prepare(native)
    assert did(report) == [
        ("p::twice", "cpp", "built"),
        ("p::twice", "far", "skipped"),
        ("p::twice_backward", "cpp", "built"),
    ]
    assert report.records[1].reason == "this machine has no device xpu"
    assert str(report).splitlines()[2].endswith("this machine has no device xpu")
    assert did(opkit.prepare(native, device="cpu")) == [
        ("p::twice", "cpp", "ready"),
        ("p::twice_backward", "cpp", "ready"),
    ]
    with opkit.freeze():  # any call may select them
        x = torch.ones(3, requires_grad=True)
        native(x).backward(torch.ones(3))
        assert torch.equal(x.grad, torch.full((3,), 2.0))
        with pytest.raises(opkit.FrozenError), opkit.use_backend("reference"):
            native(x.detach())


@needs_compiler
def test_a_kernel_without_a_compiler_is_skipped_with_the_reason(native, monkeypatch):
    monkeypatch.setattr("opkit.cpp.light.Source.unavailable", lambda self: "g++ was not found")
    (record,) = opkit.prepare(native).records
    assert (record.did, record.reason) == ("skipped", "g++ was not found")


def test_a_case_runs_as_a_call_does_in_the_contexts_in_force():
    op, seen = make("p::cast"), []
    op.register_autocast("cpu", torch.bfloat16)
    op.register_kernel("cpu", lambda x: seen.append(x.dtype) or 2 * x, backend="fast")
    with torch.autocast("cpu"):
        (record,) = opkit.prepare(op, [(torch.ones(3),)]).records
    assert (record.backend, record.arguments, seen) == ("fast", "x (3,) bfloat16 on cpu", [torch.bfloat16])
    with opkit.use_backend("reference"):
        assert did(opkit.prepare(op, [(torch.ones(3),)])) == [("p::cast", "reference", "selected")]


def test_ops_that_a_kernel_or_a_formula_calls_are_prepared_with_it():
    inner, outer = make("p::inner"), make("p::outer")
    outer.register_kernel("cpu", lambda x: inner(x), backend="calling")

    def backward(ctx, grad):
        with opkit.use_backend("reference"):
            return inner(grad)

    outer.register_autograd(backward)
    x = torch.ones(3, requires_grad=True)
    report = opkit.prepare(outer, [(x,)])
    assert did(report) == [("p::outer", "calling", "selected"), ("p::inner", "reference", "selected")]
    with opkit.freeze():
        outer(x).sum().backward()


def test_only_what_requires_grad_is_differentiated_and_not_under_no_grad():
    op, calls = make("p::graded"), []
    op.register_autograd(lambda ctx, grad: calls.append(grad) or 2 * grad)
    opkit.prepare(op, [(torch.ones(3),)])
    with torch.no_grad():
        opkit.prepare(op, [(torch.ones(3, requires_grad=True),)])
    assert calls == []
    opkit.prepare(op, [(torch.ones(3, requires_grad=True).clone(),)])
    assert len(calls) == 1


def test_an_op_without_a_formula_is_only_called():
    assert did(opkit.prepare(make("p::plain"), [(torch.ones(3, requires_grad=True),)])) == [
        ("p::plain", "reference", "selected")
    ]


def test_it_leaves_arguments_gradients_and_random_numbers_as_they_are():
    @opkit.op("p::add_noise_", shapes="n, n ->", mutates_args=["x"])
    def add_noise_(x: Tensor, y: Tensor) -> None:
        x.add_(torch.rand_like(x) + y)

    x, y = torch.zeros(3), torch.ones(3, requires_grad=True)
    state = torch.get_rng_state()
    with torch.no_grad():
        opkit.prepare(add_noise_, [(x, y)])
    assert torch.equal(x, torch.zeros(3))
    assert torch.equal(torch.get_rng_state(), state)
    op = make("p::leaf")
    op.register_autograd(lambda ctx, grad: 2 * grad)
    opkit.prepare(op, [(y,)])
    assert y.grad is None


def test_cases_are_tuples_or_pairs_with_keywords_and_mappings_for_several_ops():
    @opkit.op("p::scaled")
    def scaled(x: Tensor, *, by: float = 1.0) -> Tensor:
        return x * by

    other = make("p::other")
    report = opkit.prepare(scaled, [((torch.ones(2),), {"by": 2.0}), [torch.ones(2).double()]])
    assert [r.arguments for r in report.records] == ["x (2,) float32, by=2.0 on cpu", "x (2,) float64 on cpu"]
    report = opkit.prepare([scaled, "p::other"], {"p::scaled": [(torch.ones(2),)], other: [(torch.ones(1),)]})
    assert did(report) == [("p::scaled", "reference", "ready"), ("p::other", "reference", "selected")]
    assert did(opkit.prepare([scaled, other], {other: [(torch.ones(1).half(),)]})) == [
        ("p::other", "reference", "selected")
    ]


def test_what_a_case_raises_is_raised():
    op = make("p::raising")
    op.register_kernel("cpu", lambda x: 1 / 0, backend="broken")
    with pytest.raises(ZeroDivisionError):
        opkit.prepare(op, [(torch.ones(3),)])
    with opkit.freeze(), pytest.raises(opkit.FrozenError):
        op(torch.ones(3).half())  # the thread is not left exempt


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("ops", "cases", "text"),
    [
        (
            "p::f",
            (torch.ones(3),),
            "preparing p::f: a case is of type Tensor; expected a list of tuples of arguments. Write [(x,)], or "
            "[(args, kwargs)].",
        ),
        (
            "p::f",
            torch.ones(3),
            "preparing p::f: cases is of type Tensor; expected a list of tuples of arguments.",
        ),
        ("p::f", 3, "preparing p::f: cases is of type int; expected a list of tuples of arguments."),
        (
            ["p::f", "p::g"],
            [(torch.ones(3),)],
            "preparing p::f, p::g: found 2 ops, and cases that do not say whose they are; expected a mapping from ops "
            "to cases. Write {op: [(x, y)]}.",
        ),
        (
            "p::f",
            {"p::g": []},
            "preparing p::f: found cases for p::g; expected some for the ops that are named. Name it in ops, too, or "
            "leave its cases out.",
        ),
        (
            [3],
            None,
            "preparing ops: found 3; expected ops or names of ops. Pass what @opkit.op made, or 'demo::f'.",
        ),
        (
            "p::f",
            [(torch.ones(3, device="meta"),)],
            "preparing p::f: a case has a tensor on the device 'meta'; expected one with data, as the op is called "
            "with it. Use zeros of the same shape: torch.zeros(shape).",
        ),
    ],
)
def test_what_is_no_case_is_refused(ops, cases, text):
    make("p::f"), make("p::g")
    with pytest.raises(opkit.ArgumentError) as caught:
        opkit.prepare(ops, cases)
    assert str(caught.value).startswith(text)


def test_an_unknown_name_is_refused():
    with pytest.raises(opkit.OpNotFoundError, match="looking up p::nothing"):
        opkit.prepare("p::nothing")


# ---------------------------------------------------------------- across processes

SERVER = """
import sys, torch, opkit
from opkit_kernels import vector_add
x = torch.ones(8)
try:
    vector_add(x, x)
except opkit.FrozenError as error:
    print(error.would)
    exec(error.prepare)
print(vector_add(x, x).sum().item())
"""


@needs_compiler
@pytest.mark.slow
def test_a_frozen_process_prepares_itself_from_the_cache_of_another_one(cache_dir):
    def run(code, **environment):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            env={**os.environ, "OPKIT_CACHE_DIR": str(cache_dir), "OPKIT_NATIVE": "0", **environment},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done

    run("import opkit, torch; print(opkit.prepare('opkit::vector_add', [(torch.ones(2), torch.ones(2))]))")
    served = run(SERVER, OPKIT_FROZEN="1")
    assert served.stdout.split() == ["select", "16.0"]
    assert "built" not in served.stderr
