"""`check(op)`: samples from the declaration, and for each thing that it checks an op that is broken in just that."""

from __future__ import annotations

import itertools
import json
import time

import pytest
import torch
from torch import Tensor

import opkit
from opkit.testing import CheckError, check, opchecks
from opkit.testing.report import CHECKS, Record, Report
from tests.testing.cubes import cubing, register

pytestmark = pytest.mark.usefixtures("registry")


def failures(op, *checks, **options):
    """What fails of some checks: found and expected of the first record, by check and backend."""
    with pytest.raises(CheckError) as caught:
        check(op, checks=checks, **options)
    found = {}
    for record in caught.value.report.failed:
        found.setdefault((record.check, record.backend), record)
        assert record.op == op.name
        assert record.input.count(": ") >= 2  # its name, and the arguments
    return found


# ---------------------------------------------------------------- an op that is right


def test_a_right_op_passes_everything_and_the_report_is_of_80_columns():
    cube = cubing()
    cube.register_kernel("cpu", lambda x, w: w * x * x * x, backend="fast", properties=["deterministic"])
    cube.register_jvp(opkit.from_reference)
    cube.register_kernel("cuda", lambda x, w: x, backend="far")
    report = check(cube)
    assert report.ok
    assert report.backends == ("fast", "reference")
    for name in CHECKS:
        statuses = {r.status for r in report.of(name, "fast")}
        assert "passed" in statuses, name
    assert [r.found for r in report.of("compile", "fast")] == ["1 graph for 2 sets of sizes"]
    (far,) = [r for r in report.records if r.backend == "far"]
    assert (far.status, "cuda" in far.found) == ("not applicable", True)
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 80
    assert (
        lines[0] == f"t::cube: {len(report.records) - 1} passed, 0 failed, 1 not applicable, with 14 inputs"
    )
    text = " ".join(str(report).split())
    for sentence in CHECKS.values():
        assert sentence in text
    assert "Tolerance: 1e-05 for float32, 1e-09 for float64, 0.03 for bfloat16, 0.004 for float16." in text
    assert "Found: 1 graph for 2 sets of sizes." in text
    assert " results of far: " in text


# ---------------------------------------------------------------- ops that are broken


def test_a_kernel_that_writes_to_an_argument_it_does_not_declare():
    cube = cubing()

    @cube.register_kernel("cpu", backend="careless")
    def _(x, w):
        out = x**3 * w
        x.zero_()
        return out

    failed = failures(cube, "schema", "opcheck schema")
    assert set(failed) == {("schema", "careless"), ("opcheck schema", "careless")}
    record = failed["schema", "careless"]
    assert record.found == "x was written to"
    assert record.expected == "it to stay as it is, or mutates_args=('x',) in the declaration"
    assert record.input == "small: x: float32[2, 5], w: float32[5]"


def test_a_kernel_that_writes_beside_the_view_it_was_given():
    @opkit.op("w::clear", shapes="n ->", mutates_args=("x",))
    def clear(x: Tensor) -> None:
        x.zero_()

    assert check(clear, checks=["schema", "results"]).ok

    @clear.register_kernel("cpu", backend="broad")
    def _(x):
        torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).zero_()  # noqa
        x.zero_()

    def samples():
        return [(torch.ones(6)[::2],)]

    failed = failures(clear, "schema", samples=samples())
    assert failed["schema", "broad"].found == "memory beside x was written to"
    assert failed["schema", "broad"].expected == "only the elements of the argument to change"


def test_a_kernel_that_returns_its_argument():
    cube = cubing()
    cube.register_kernel("cpu", lambda x, w: x, backend="lazy")
    failed = failures(cube, "schema", "meta")
    assert set(failed) == {("schema", "lazy")}
    assert "shares storage with" in failed["schema", "lazy"].found


def test_a_wrong_meta_function():
    cube = cubing()
    cube.register_fake(lambda x, w: x.new_empty(x.shape, dtype=torch.float64))
    failed = failures(cube, "meta")
    assert set(failed) == {("meta", "reference")}
    assert "torch.float32" in failed["meta", "reference"].found


def test_an_adopted_op_whose_own_meta_function_is_wrong():
    library = torch.library.Library("wadopt", "FRAGMENT")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CPU")
    library.impl("twice", lambda x: x.new_empty(x.shape[0], 3), "Meta")
    twice = opkit.adopt("wadopt::twice")
    x = torch.ones(2, 2)
    failed = failures(twice, "meta", "results", samples=[(x,)])
    assert {check for check, _ in failed} == {"meta"}


def test_a_wrong_result_says_where_and_by_how_much():
    cube = cubing()
    cube.register_kernel("cpu", lambda x, w: x**3 * w + (x.numel() > 10), backend="wrong")
    failed = failures(cube, "results")
    record = failed["results", "wrong"]
    assert record.input == "odd sizes: x: float32[3, 1, 7], w: float32[7]"
    assert "the largest difference (1) of 21 among 21 elements" in record.found
    assert "to 1e-05 of it" in record.expected


@pytest.mark.parametrize("name", opchecks.TESTS)
def test_each_test_of_opcheck_has_a_line_of_its_own(name, monkeypatch):
    cube = cubing()
    test = opchecks.TESTS[name]

    def opcheck(overload, args, kwargs, *, test_utils, raise_exception):
        return {test_utils: ValueError("broken\nand so on") if test_utils == test else "SUCCESS"}

    monkeypatch.setattr(torch.library, "opcheck", opcheck)
    failed = failures(cube, *opchecks.TESTS)
    assert set(failed) == {(name, "reference")}
    assert failed[name, "reference"].found == "ValueError: broken"


def test_a_wrong_gradient_is_found_by_small_steps_too():
    cube = cubing()

    def wrong(ctx, grad):
        x, w = ctx.saved_tensors
        return grad * 3 * x**2 * w, 2 * (grad * x**3).sum_to_size(w.shape)

    register(cube, wrong)
    failed = failures(cube, "gradients", "gradcheck")
    assert set(failed) == {("gradients", "reference"), ("gradcheck", "reference")}
    assert "the argument w" in failed["gradcheck", "reference"].found


def test_a_kernel_that_does_not_compute_what_its_gradient_is_of():
    cube = cubing()
    cube.register_kernel("cpu", lambda x, w: x**3 * w * 1.01, backend="off")
    assert set(failures(cube, "gradcheck")) == {("gradcheck", "off")}


def test_a_wrong_second_derivative_and_a_wrong_tangent():
    cube = cubing()

    def detached(ctx, grad):
        x, w = ctx.saved_tensors
        return grad * 3 * x.detach() ** 2 * w, (grad * x**3).sum_to_size(w.shape)

    register(cube, detached)
    cube.register_jvp(lambda ctx, dx, dw: dx * ctx.saved_tensors[0])
    failed = failures(cube, "second derivatives", "forward mode")
    assert set(failed) == {("second derivatives", "reference"), ("forward mode", "reference")}


def test_a_wrong_rule_for_vmap():
    cube = cubing()
    cube.register_vmap(
        lambda info, in_dims, x, w: (cube(x.movedim(in_dims[0] or 0, 0), w[0] if w.dim() > 1 else w), 0)
    )
    failed = failures(cube, "vmap")
    assert set(failed) == {("vmap", "reference")}
    assert "of sample 1" in failed["vmap", "reference"].found
    assert failed["vmap", "reference"].expected.endswith("as alone")


def test_a_kernel_that_is_not_the_same_for_each_index_of_the_batch():
    cube = cubing()
    cube.register_kernel("cpu", lambda x, w: x**3 * w + (x.dim() > 2), backend="lumped")
    assert "vmap" in {name for name, _ in failures(cube, "vmap")}


def test_a_meta_function_that_depends_on_the_numbers_in_sizes():
    cube = cubing()
    cube.register_fake(lambda x, w: x.new_empty([int(size) for size in x.shape]))
    failed = failures(cube, "compile")
    assert failed["compile", "reference"].found == "2 graphs for 2 sets of sizes"
    assert failed["compile", "reference"].expected == "1 graph for 2 sets of sizes"


def test_a_meta_function_that_cannot_be_exported():
    cube = cubing()

    @cube.register_fake
    def _(x, w):
        if torch.compiler.is_exporting():
            raise RuntimeError("not for export")
        return torch.empty_like(x)

    failed = failures(cube, "compile", "export", samples=[(torch.ones(2, 5), torch.ones(5))])
    assert set(failed) == {("export", "reference")}
    assert "not for export" in failed["export", "reference"].found


def test_a_kernel_that_gives_other_bits_each_time():
    cube = cubing()
    calls = itertools.count()
    cube.register_kernel("cpu", lambda x, w: x**3 * w * (1 + 1e-7 * (next(calls) % 2)), backend="atomic")
    failed = failures(cube, "determinism")
    assert failed["determinism", "atomic"].found == "other bits in out in call 2 than in the first"
    assert "nondeterministic_bitwise" in failed["determinism", "atomic"].expected


def test_an_op_that_says_that_bits_differ():
    @opkit.op("w::loose", shapes="n -> n", tags=(torch.Tag.nondeterministic_bitwise,))
    def loose(x: Tensor) -> Tensor:
        return x + 0

    (record, *_) = check(loose, checks=["determinism"]).of("determinism")
    assert (record.status, record.found) == ("not applicable", "the op is tagged nondeterministic_bitwise")


def test_a_kernel_that_keeps_what_it_computes_where_all_threads_see_it():
    cube = cubing()
    kept = {}

    @cube.register_kernel("cpu", backend="shared")
    def _(x, w):
        kept["x"] = x**3
        time.sleep(0.0005)
        return (kept["x"] * w).to(x.dtype) if kept["x"].shape == x.shape else x * 0

    failed = failures(cube, "thread safety")
    assert set(failed) == {("thread safety", "shared")}
    assert "while 3 other threads made calls" in failed["thread safety", "shared"].found


def test_a_kernel_that_does_not_build_is_tried_once(monkeypatch):
    cube = cubing()
    cube.register_kernel("cpu", opkit.cpp.kernel("#error nothing here\n"))
    builds = []
    raised = opkit.BuildError("building t::cube [cpp]: 1 error")

    def native(self, kernel, values):
        builds.append(kernel.backend)
        raise raised

    monkeypatch.setattr(type(cube._runner), "_native", native)
    with pytest.raises(CheckError) as caught:
        check(cube, checks=["results", "vmap", "thread safety"])
    report = caught.value.report
    assert builds == ["cpp"]
    assert [r.found for r in report.failed] == ["BuildError: building t::cube [cpp]: 1 error"]
    assert {r.found for r in report.of("vmap", "cpp")} == {"none of its calls runs"}
    assert {r.status for r in report.of("vmap", "reference")} == {"passed"}


# ---------------------------------------------------------------- what does not apply


def test_what_an_op_has_not_is_said_with_the_reason():
    @opkit.op("w::plain", shapes="n, m:int64 ->")
    def plain(x: Tensor, index: Tensor) -> None:
        pass

    checks = [c for c in CHECKS if c not in ("export", "compile", "opcheck aot", "opcheck fake tensor")]
    report = check(plain, torch.ones(3), torch.tensor([0]), checks=checks)
    assert report.ok
    for name in ("opcheck autograd", "gradients", "gradcheck", "second derivatives", "forward mode"):
        (record,) = report.of(name)
        assert (record.status, record.found) == ("not applicable", "the op has no gradient formula")
    assert "gradcheck of reference: the op has no gradient formula" in str(report)


def test_an_op_that_nothing_can_trace_and_one_that_draws():
    @opkit.op("w::blind")
    def blind(x: Tensor) -> Tensor:
        return x + 1

    @opkit.op("w::noise", shapes="n -> n", tags=(torch.Tag.nondeterministic_seeded,))
    def noise(x: Tensor) -> Tensor:
        return torch.rand_like(x)

    names = ("opcheck fake tensor", "opcheck aot", "compile", "export")
    report = check(blind, torch.ones(2), checks=names)
    assert {r.status for r in report.records} == {"not applicable"}
    assert all("nothing says the shapes of its outputs" in r.found for r in report.records)
    checks = ["results", "compile", "export", "vmap", "determinism", "thread safety"]
    for record in check(noise, checks=checks).records:
        if record.what != "meta of out":
            assert (record.status, record.found) == ("not applicable", "the op draws random numbers"), record


def test_derivatives_that_small_steps_cannot_take():
    @opkit.op("w::single", shapes="*b:float32 -> *b")
    def single(x: Tensor) -> Tensor:
        return x * 2

    single.register_autograd(opkit.from_reference)
    (record,) = check(single, checks=["gradcheck"]).of("gradcheck")
    assert record.found == "its arguments are fixed to float32, and small steps take float64"
    cube = cubing()
    cube.register_kernel("cpu", lambda x, w: x**3 * w, backend="narrow", dtypes=(torch.float32,))
    report = check(cube, checks=["gradcheck", "second derivatives", "gradients"])
    assert [r.found for r in report.of("gradcheck", "narrow")] == ["it does not take float64"]
    assert "it does not take bfloat16" in {r.found for r in report.of("gradients", "narrow")}
    infinite = (torch.full((2, 5), float("inf")), torch.ones(5))
    (record, _) = check(cube, *infinite, checks=["gradcheck"]).of("gradcheck")
    assert record.found.startswith("results are not finite") or record.found == "it does not take float64"


# ---------------------------------------------------------------- what one may ask for


def test_only_some_backends_and_checks():
    cube = cubing()
    cube.register_kernel("cpu", lambda x, w: x, backend="wrong")
    report = check(cube, backends=["reference"], checks=["results"])
    assert {(r.backend, r.check) for r in report.records} == {("reference", "results")}
    with pytest.raises(opkit.BackendError, match=r"checking t::cube: it has no kernel of the backend 'rong'; expected "
                       r"some of wrong, reference\. Did you mean 'wrong'\?"):  # fmt: skip
        check(cube, backends=["rong"])
    with pytest.raises(opkit.OpkitError, match=r"checking t::cube: found the check 'result'; expected some of schema.*"
                       r"Did you mean 'results'\? Name one"):  # fmt: skip
        check(cube, checks=["result"])
    with pytest.raises(
        opkit.ArgumentError, match="found the arguments of a call and samples; expected one of them"
    ):
        check(cube, torch.ones(2), samples=[])


def test_an_argument_named_as_an_option_is_the_argument():
    @opkit.op("w::resample", shapes="n -> n")
    def resample(x: Tensor, *, samples: int) -> Tensor:
        return x * samples

    report = check(resample, torch.ones(3), samples=2, checks=["results"])
    assert report.inputs == ("as given: x: float32[3], samples=2",)


def test_an_op_without_arguments():
    @opkit.op("w::three", shapes="-> ():float32")
    def three(*, device: torch.device = torch.device("cpu")) -> Tensor:
        return torch.full((), 3.0, device=device)

    assert check(three, checks=["results", "schema"]).ok


# ---------------------------------------------------------------- the report


def report_of_a_failure():
    cube = cubing()
    cube.register_kernel("cpu", lambda x, w: x**3 * w + 1, backend="wrong")
    with pytest.raises(CheckError) as caught:
        check(cube, checks=["results", "gradcheck"])
    return caught.value


def test_a_report_as_json_markdown_and_html():
    error = report_of_a_failure()
    report = error.report
    content = json.loads(report.to_json())
    assert (content["op"], content["ok"], content["backends"]) == ("t::cube", False, ["wrong", "reference"])
    assert content["counts"]["failed"] == len(report.failed)
    assert content["tolerances"]["float64"] == 1e-9
    assert set(content["checks"]) == {"results", "gradcheck"}
    record = next(r for r in content["records"] if r["status"] == "failed")
    assert set(record) == {"op", "backend", "what", "status", "found", "expected", "input", "check"}
    markdown = report.to_markdown()
    count = len(report.failed)
    assert f"| results | FAILED {count} of {len(report.of('results', 'wrong'))} | passed |" in markdown
    assert "  - input: `small: x: float32[2, 5], w: float32[5]`" in markdown
    page = report._repr_html_()
    assert '<td style="text-align:left;color:#1a7f37">passed</td>' in page
    assert "small: x: float32[2, 5]" in page
    assert "<script" not in Report("a<script>", ())._repr_html_()


def test_the_error_says_each_failure_once_with_how_many_inputs_alike():
    error = report_of_a_failure()
    lines = str(error).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("checking t::cube: found ")
    assert lines[1].startswith(
        "  failed  wrong: result out for small: x: float32[2, 5], w: float32[5]: found "
    )
    assert lines[1].endswith(f"(and for {len(error.report.failed) - 1} more inputs)")
    records = tuple(Record("w::f", "b", f"what {i}", "failed", "1", "2", "in", "results") for i in range(5))
    assert (
        str(CheckError(Report("w::f", records))).splitlines()[-1]
        == "  and 2 more, which print(error.report) shows"
    )


def test_a_failure_in_the_text_has_input_found_and_expected():
    text = str(report_of_a_failure().report)
    block = text[text.index("What failed") :].splitlines()
    assert block[2].startswith("  t::cube wrong: result out (and for ")
    assert [line.split()[0] for line in block[3:] if line.startswith("    ") and line[4] != " "] == [
        "input", "found", "expected",
    ]  # fmt: skip


def test_a_report_is_asked_for_a_check_by_name():
    report = Report("w::f", (Record("w::f", "", "x", "passed", check="results"),))
    assert len(report.of("results")) == 1
    with pytest.raises(
        opkit.OpkitError, match=r"reading a report: found the check 'resluts'.*Did you mean 'results'"
    ):
        report.of("resluts")
