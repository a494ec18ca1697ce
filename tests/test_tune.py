from __future__ import annotations

import time
import warnings

import pytest
import torch
from torch import Tensor

import opkit
from opkit import _torch
from opkit.cpp import compilers
from opkit.dispatch import measured
from tests.tune_cases import LARGE, RAN, SMALL, files, make, ran, selected, tune, wait

pytestmark = pytest.mark.usefixtures("registry", "cache_dir")
needs_compiler = pytest.mark.skipif(compilers.find_cxx() is None, reason="needs a C++ compiler")

SOURCE = """
#include <opkit/kernel.h>
void NAME(opkit::Tensor x, opkit::Tensor y) {
  for (int64_t i = 0; i < x.numel(); ++i) y.data<float>()[i] = x.data<float>()[i];
}
"""


@pytest.fixture
def op():
    return make()


# ---------------------------------------------------------------- what is chosen


def test_the_choice_flips_with_the_size_and_holds_at_once_also_where_another_was_made_before(op):
    assert (ran(op, SMALL), ran(op, LARGE)) == ("large", "large")
    tune(op, SMALL, LARGE)
    for _ in range(2):
        assert (ran(op, SMALL), ran(op, LARGE)) == ("small", "large")
    assert (ran(op, torch.ones(7)), ran(op, torch.ones(2, 500))) == ("small", "large")


def test_a_size_or_a_dtype_that_was_not_measured_goes_by_priority(op):
    tune(op, SMALL)
    assert ran(op, torch.ones(8)) == "large"
    assert ran(op, torch.ones(0)) == "large"
    assert ran(op, SMALL.double()) == "large"
    assert ran(op, SMALL) == "small"


def test_sizes_are_those_of_all_tensors_lists_included_and_both_twins_count_alike():
    @opkit.op("t::many")
    def many(x: Tensor, others: list[Tensor], y: Tensor | None = None) -> Tensor:
        wait("reference", True)
        return x.clone()

    many.register_kernel("cpu", lambda x, others, y=None: (wait("fast", False), x.clone())[1], backend="fast")
    many.register_kernel(
        "cpu", lambda x, others, y=None: (wait("first", True), x.clone())[1], backend="first", priority=1
    )
    x = torch.ones(3)
    (record,) = (r for r in tune(many, (x, [x, x], x)).records if r.chosen)
    assert (record.bucket, record.backend) == (4, "fast")
    assert ran(many, x, [torch.ones(12)]) == "fast"
    assert ran(many, x, [x, x], x) == "fast"
    assert ran(many, x, [x]) == "first"
    assert ran(many, x, [torch.ones(13)]) == "first"


def test_no_elements_and_no_tensors_have_a_bucket_too(op):
    tune(op, torch.ones(0))
    assert ran(op, torch.ones(0)) == "small"
    assert ran(op, torch.ones(1)) == "large"

    @opkit.op("t::made")
    def made(n: int) -> Tensor:
        wait("reference", True)
        return torch.zeros(n)

    made.register_kernel(
        "cpu", lambda n: (wait("fast", False), torch.zeros(n))[1], backend="fast", priority=-1
    )
    assert [(r.dtype, r.bucket) for r in tune(made, (3,)).records] == [("none", 0)] * 2
    assert ran(made, 3) == "fast"


def test_a_preferred_backend_goes_first(op):
    tune(op, SMALL)
    with opkit.use_backend("large"):
        assert ran(op, SMALL) == "large"
        assert selected(op, SMALL).reason == "preferred (large)"
    assert ran(op, SMALL) == "small"


@pytest.mark.filterwarnings("ignore:.* replaces the one from")
def test_a_winner_that_cannot_take_a_call_leaves_it_to_priority(op):
    op.register_kernel(
        "cpu", lambda x: (wait("even", False), x.clone())[1], backend="even", when=lambda x: len(x) % 2 == 0
    )
    op.register_kernel("cpu", lambda x: (wait("small", True), x.clone())[1], backend="small")
    tune(op, SMALL)
    assert ran(op, SMALL) == "even"
    assert ran(op, torch.ones(5)) == "large"
    assert selected(op, torch.ones(5)).reason == "priority 1 (even was measured fastest)"


def test_of_several_cases_of_a_size_the_kernel_wins_with_which_all_of_them_take_least():
    @opkit.op("t::several", shapes="*b -> *b")
    def several(x: Tensor) -> Tensor:
        time.sleep(0.004)
        return x.clone()

    def add(backend, seconds, **options):
        several.register_kernel(
            "cpu", lambda x: (time.sleep(seconds), x.clone())[1], backend=backend, **options
        )

    add("row", 0, when=lambda x: x.dim() == 1)
    add("any", 0.001)
    add("first", 0.004, priority=1)
    report = tune(several, SMALL, torch.ones(2, 2), torch.ones(1, 2, 2))
    assert {r.backend for r in report.records if r.chosen} == {"any"}
    assert len([r for r in report.records if r.backend == "row"]) == 1
    tune(several, SMALL)
    assert selected(several, SMALL).backend == "row"


def test_a_reference_that_was_the_fastest_runs_without_a_warning():
    @opkit.op("t::plain", shapes="*b -> *b")
    def plain(x: Tensor) -> Tensor:
        return x.clone()

    plain.register_kernel("cpu", lambda x: (time.sleep(0.001), x.clone())[1], backend="slow")
    tune(plain, SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain(SMALL)
    assert selected(plain, SMALL).backend == "reference"


def test_gradients_and_compiled_functions_run_what_was_measured(op):
    op.register_autograd(lambda ctx, grad: grad)
    tune(op, SMALL)
    assert ran(op, SMALL.clone().requires_grad_()) == "small"
    compiled = torch.compile(lambda x: op(x) + 1, fullgraph=True, backend="aot_eager")
    compiled(SMALL)
    assert ran(compiled, SMALL) == "small"
    assert ran(torch.ops.t.tuned.default, SMALL) == "small"


@needs_compiler
def test_a_native_kernel_is_built_measured_and_called_by_size_from_the_dispatcher_too():
    @opkit.op("t::mixed", shapes="*b -> *b")
    def mixed(x: Tensor) -> Tensor:
        wait("reference", True)
        return x.clone()

    mixed.register_kernel("cpu", opkit.cpp.kernel(SOURCE.replace("NAME", "mixed")), backend="cpp")
    mixed.register_kernel(
        "cpu", lambda x: (wait("python", x.numel() > 100), x.clone())[1], backend="python", priority=1
    )
    tune(mixed, LARGE)
    traced = torch.jit.trace(lambda x: torch.ops.t.mixed.default(x), LARGE, check_trace=False)
    RAN.clear()
    for call in (
        mixed,
        torch.ops.t.mixed.default,
        traced,
    ):
        for _ in range(2):
            assert torch.equal(call(LARGE), LARGE)
    assert "python" not in RAN
    assert ran(mixed, SMALL) == "python"
    assert ran(torch.ops.t.mixed.default, SMALL) == "python"
    RAN.clear()
    mixed(LARGE)
    assert RAN == []


# ---------------------------------------------------------------- what is said


def test_the_report_has_each_time_and_prints_as_a_table(op):
    report = tune(op, SMALL)
    assert [(r.backend, r.chosen) for r in report.records] == [
        ("large", False),
        ("small", True),
        ("reference", False),
    ]
    assert {r[:5] for r in report.records} == {("t::tuned", "x (4,) float32 on cpu", "cpu", "float32", 3)}
    times = {r.backend: r.seconds for r in report.records}
    assert 0 < times["small"] < 0.002 <= min(times["large"], times["reference"])
    lines = str(report).splitlines()
    assert lines[0] == f"tuned in {report.seconds:.2f} s: 3 measured"
    row = f"t::tuned  x (4,) float32 on cpu  4 to 7 elements  small      {measured.shown(times['small']):>7}  chosen"
    assert [word for word in lines[2].split("  ") if word] == [word for word in row.split("  ") if word]


def test_explain_says_what_was_measured(op):
    assert selected(op, SMALL).reason == "priority 1"
    times = {r.backend: measured.shown(r.seconds) for r in tune(op, SMALL).records}
    others = sorted(("large", "reference"), key=lambda name: float(times[name].split()[0]))
    said = ", ".join(f"{name} {times[name]}" for name in others)
    assert selected(op, SMALL)[3:] == ("selected", f"measured {times['small']} ({said})")
    assert selected(op, torch.ones(8)).reason == "priority 1 (8 to 15 elements of float32 were not measured)"
    assert (
        selected(op, SMALL.to(torch.int8)).reason == "priority 1 (4 to 7 elements of int8 were not measured)"
    )


def test_a_kernel_that_is_alone_is_measured_alone():
    @opkit.op("t::alone", shapes="n -> n")
    def alone(x: Tensor) -> Tensor:
        return x.clone()

    (record,) = tune(alone, SMALL).records
    assert selected(alone, SMALL).reason == f"measured {measured.shown(record.seconds)}"


# ---------------------------------------------------------------- what is left as it is


def test_arguments_gradients_and_random_numbers_stay():
    @opkit.op("t::add_noise_", shapes="n, n ->", mutates_args=["x"])
    def add_noise_(x: Tensor, y: Tensor) -> None:
        time.sleep(0.001)
        x.add_(torch.rand_like(x) + y)

    seen = []

    @add_noise_.register_kernel("cpu", backend="fast")
    def _(x, y):
        seen.append(x.abs().max().item())
        x.add_(torch.rand_like(x) + y)

    x, y = torch.zeros(3), torch.ones(3, requires_grad=True)
    state = torch.get_rng_state()
    tune(add_noise_, (x, y))
    assert torch.equal(x, torch.zeros(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert y.grad is None
    assert 0 in seen[1:]  # each block of calls begins with the arguments of the case


def test_autocast_is_off_so_that_arguments_are_those_of_the_kernels(op):
    seen = set()
    op.register_autocast("cpu", torch.bfloat16)
    op.register_kernel("cpu", lambda x: (seen.add(x.dtype), x.clone())[1], backend="seeing", priority=-1)
    with torch.autocast("cpu"):
        assert {r.dtype for r in tune(op, SMALL).records} == {"float32"}
        assert seen == {torch.float32}
        assert ran(op, SMALL) == "large"
    assert selected(op, SMALL).reason.startswith("measured ")


# ---------------------------------------------------------------- what is refused


def test_a_frozen_process_tunes_nothing(op):
    with opkit.freeze(), pytest.raises(opkit.FrozenError) as caught:
        tune(op, SMALL)
    assert str(caught.value) == (
        "tuning t::tuned: opkit.freeze() is in force, and every kernel of the op would run and others be chosen "
        "afterwards; expected a process that may do so. Tune in a process that is not frozen: what is measured is kept "
        "for later ones."
    )
    assert (caught.value.would, caught.value.op) == ("tune", "t::tuned")
    with opkit.freeze(warn=True), pytest.warns(UserWarning, match="is in force") as warned:
        tune(op, SMALL)
    assert len(warned) == 1


def test_nothing_is_tuned_while_a_graph_is_captured(op, monkeypatch):
    monkeypatch.setattr(_torch, "is_capturing", lambda: True)
    with pytest.raises(
        opkit.FrozenError, match="a CUDA graph is being captured.* Tune before the capture begins"
    ):
        tune(op, SMALL)
    assert selected(op, SMALL).reason == "priority 1"


def test_what_was_measured_is_prepared_as_any_other_choice(op):
    tune(op, SMALL)
    opkit.prepare(op, [(SMALL,)])
    with opkit.freeze():
        assert ran(op, SMALL) == "small"
        with pytest.raises(
            opkit.FrozenError, match="would select large, where small was selected for float32"
        ):
            op(LARGE)


def test_kernels_that_are_excluded_cannot_be_measured(op):
    with opkit.require("deterministic"), pytest.raises(opkit.ArgumentError) as caught:
        tune(op, SMALL)
    assert str(caught.value) == (
        "tuning t::tuned: opkit.require('deterministic') is in force and excludes kernels; expected all of them to be "
        "measured, as what is found holds for every call. Tune without it."
    )
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(
            opkit.ArgumentError, match=r"torch.use_deterministic_algorithms\(True\) is in force"
        ):
            tune(op, SMALL)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("cases", "text"),
    [
        (None, "tuning t::tuned: cases is of type NoneType; expected a list of tuples of arguments."),
        (
            [],
            "tuning t::tuned: found no cases; expected calls to measure. Write opkit.tune(op, [(x, y)]), or ",
        ),
        (
            [SMALL],
            "tuning t::tuned: a case is of type Tensor; expected a list of tuples of arguments. Write [(x,)]",
        ),
        (
            [(SMALL.to("meta"),)],
            "tuning t::tuned: a case has a tensor on the device 'meta'; expected one with data",
        ),
    ],
)
def test_what_is_no_case_is_refused(op, cases, text):
    with pytest.raises(opkit.ArgumentError) as caught:
        opkit.tune(op, cases)
    assert str(caught.value).startswith(text)
    with pytest.raises(opkit.OpNotFoundError, match="looking up t::nothing"):
        opkit.tune("t::nothing", cases)


def test_results_of_different_shapes_are_refused():
    @opkit.op("t::nonzero", shapes="n -> ?m")
    def nonzero(x: Tensor) -> Tensor:
        return x[x != 0]

    nonzero.register_kernel("cpu", lambda x: x[:1].clone(), backend="wrong")
    with pytest.raises(opkit.OutputError) as caught:
        tune(nonzero, SMALL)
    assert str(caught.value) == (
        "tuning t::nonzero with x (4,) float32 on cpu: reference returned results of the shapes [(4,)]; expected "
        "[(1,)], as wrong returned. Find the wrong one with opkit.testing.check."
    )
    assert selected(nonzero, SMALL).reason == "priority 0"


def test_what_a_case_raises_is_raised_and_nothing_is_kept(op, cache_dir):
    op.register_kernel("cpu", lambda x: 1 / 0, backend="broken")
    with pytest.raises(ZeroDivisionError):
        tune(op, SMALL)
    nowhere = opkit.declare("t::nowhere(Tensor x) -> Tensor", shapes="n -> n")
    with pytest.raises(opkit.NoKernelError, match="the op is declared without a reference"):
        tune(nowhere, SMALL)
    assert files(cache_dir) == []
