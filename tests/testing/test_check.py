"""The checker: it passes what is right, and says of what is wrong which line is."""

from __future__ import annotations

import itertools
import re
import warnings
from typing import Literal

import pytest
import torch
from torch import Tensor

import opkit
from opkit.spec.plan import OutputMeta
from opkit.testing import CheckError, results
from opkit.testing.difference import TOLERANCES, difference
from opkit_kernels import (
    cross_entropy,
    cross_entropy_backward,
    rms_norm,
    rms_norm_backward,
    swiglu,
    swiglu_backward,
    vector_add,
)
from tests.testing.cubes import cubing, register

pytestmark = pytest.mark.usefixtures("registry")

# What these tests are about takes no compiler; test_whole_check.py has the rest.
QUICK = ("schema", "meta", "results", "gradients", "second derivatives", "forward mode", "properties")


def check(op, *args, **kwargs):
    return opkit.testing.check(op, *args, checks=QUICK, **kwargs)


def arguments(rows=(3,)):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*rows, 4, generator=generator), torch.randn(4, generator=generator)


def failures(op, *args):
    with pytest.raises(CheckError) as caught:
        check(op, *args)
    assert not caught.value.report.ok
    assert str(caught.value).startswith(f"checking {op.name}: found ")
    return {(r.backend, r.what): r for r in caught.value.report.failed}


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("op", "shapes"),
    [
        (vector_add, [(3, 5), (3, 5)]),
        (swiglu, [(3, 5), (3, 5)]),
        (swiglu_backward, [(3, 5)] * 3),
        (rms_norm, [(2, 3, 8), (8,)]),
        (rms_norm_backward, [(2, 3, 8), (2, 3, 8), (8,)]),
    ],
    ids=lambda v: v.name if isinstance(v, opkit.Op) else "",
)
def test_shipped_ops_pass(op, shapes, dtype):
    report = check(op, *(randn(*s, dtype=dtype) for s in shapes))
    assert report.ok
    assert {r.backend for r in report.records} >= {"cpp", "reference"}
    assert {f"gradient of {op.schema.params[0].name} in {d}" for d in ("float64", "bfloat16")} <= {
        r.what for r in report.records if r.status == "passed"
    }


def test_cross_entropy_passes_with_arguments_of_fixed_dtypes():
    logits, target = randn(3, 7), torch.tensor([0, 6, 2])
    assert check(cross_entropy, logits, target).ok
    lse = torch.logsumexp(logits.double(), -1)
    report = check(cross_entropy_backward, randn(3), randn(3).double(), logits, target, lse)
    passed = {r.what for r in report.records if r.status == "passed"}
    assert {"gradient of logits in bfloat16", "gradient of lse in bfloat16"} <= passed


def test_a_right_op_passes_and_the_report_prints():
    cube = cubing()
    x, w = arguments()
    before = x.clone()
    report = check(cube, x.requires_grad_(), w)
    assert torch.equal(x, before)
    assert x.grad is None
    lines = str(report).split("\n")
    assert re.fullmatch(r"t::cube: \d+ passed, 0 failed, 1 not applicable, with 1 input", lines[0])
    assert "passed  results             reference (1)" in lines
    passed = {r.what for r in report.records if r.status == "passed"}
    assert {"result out", "gradient of w in bfloat16", "second derivative for x in float64"} <= passed
    assert {r.input for r in report.failed + report.of("results")} == {
        "as given: x: float32[3, 4], w: float32[4]"
    }


def test_a_wrong_kernel_is_named_with_the_largest_difference():
    cube = cubing()

    @cube.register_kernel("cpu", backend="wrong")
    def _(x, w):
        out = x**3 * w
        out[1, 2] += 1
        return out

    failed = failures(cube, *arguments())
    assert set(failed) == {("wrong", "result out")}
    record = failed["wrong", "result out"]
    assert "at [1, 2], the largest difference (1) of 1 among 12 elements" in record.found
    assert "to 1e-05 of it" in record.expected


def test_where_terms_cancel_a_kernel_may_be_as_far_off_as_the_reference():
    @opkit.op("t::centred", shapes="*b n -> *b n:x")
    def centred(x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True)

    generator = torch.Generator().manual_seed(0)
    x = 0.1 + 1e-7 * torch.randn(4, 7, generator=generator)
    centred.register_kernel("cpu", lambda x: x - x.flip(-1).sum(-1, keepdim=True) / 7, backend="backwards")
    values = centred.schema.fill(*centred.schema.carry((x,), {}))
    assert {r.status for r in results.kernels(centred, values) if r.what != "kernel"} == {"passed"}
    centred.register_kernel("cpu", lambda x: x - x.mean(-1, keepdim=True) + 1e-6, backend="wrong")
    found = {r.backend: r.status for r in results.kernels(centred, values) if r.what == "result out"}
    assert found == {"backwards": "passed", "wrong": "failed", "reference": "passed"}


def test_where_terms_cancel_the_reference_may_be_exact_by_chance():
    @opkit.op("t::nothing", shapes="*b -> *b")
    def nothing(x: Tensor) -> Tensor:
        return (x + 1e6) - 1e6 - x

    x = torch.full((3,), 0.5)
    assert not nothing(x).any()  # and 1/32 for many others
    nothing.register_kernel("cpu", lambda x: torch.full_like(x, 0.03), backend="rounded")
    nothing.register_kernel("cpu", lambda x: torch.full_like(x, 0.5), backend="wrong")
    values = nothing.schema.fill(*nothing.schema.carry((x,), {}))
    found = {r.backend: r.status for r in results.kernels(nothing, values) if r.what == "result out"}
    assert found == {"rounded": "passed", "wrong": "failed", "reference": "passed"}


def test_a_kernel_that_raises_or_is_rejected():
    cube = cubing()

    @cube.register_kernel("cpu", backend="broken", priority=-1)
    def _(x, w):
        raise RuntimeError("no\nluck")

    cube.register_kernel("cpu", lambda x, w: x, backend="choosy", when=lambda x, w: "needs luck")
    with opkit.use_backend("reference"):
        failed = failures(cube, *arguments())
    assert failed["broken", "call"].found == "RuntimeError: no"
    try:
        check(cube, *arguments())
    except CheckError as err:
        (unfit,) = [r for r in err.report.records if r.backend == "choosy"]
    assert str(unfit) == "not applicable  choosy: kernel: needs luck"


def test_a_wrong_meta_function():
    cube = cubing()
    cube.register_fake(lambda x, w: x.new_empty(x.shape, dtype=torch.float64))
    assert "float64" in failures(cube, *arguments())["reference", "meta"].found


def test_meta_is_compared_field_by_field(monkeypatch):
    cube = cubing()
    x, w = arguments()
    real = cube._meta.expect(cube.schema.fill((x, w), {}))[1]
    right = OutputMeta((3, 4), torch.float32)
    cases = [
        right._replace(shape=(4, 3)), right._replace(dtype=torch.float16), right._replace(stride=(1, 3)),
        right._replace(device=torch.device("cuda")), right._replace(shape=(3, 4, 1)),
    ]  # fmt: skip
    found = {"out": cube(x, w)}
    for wrong in cases:
        monkeypatch.setattr(cube._meta, "expect", lambda values, wrong=wrong: ([wrong], real))
        (record,) = results._against_meta(cube, "cpp", (x, w), found)
        assert record.status == "failed"
        assert record.found == "torch.float32 of (3, 4) on cpu with the strides (4, 1)"
    monkeypatch.setattr(cube._meta, "expect", lambda values: ([right], real))
    assert next(results._against_meta(cube, "cpp", (x, w), found)).status == "passed"


def test_a_wrong_formula_is_named_by_argument_and_dtype():
    cube = cubing()

    def wrong(ctx, grad):
        x, w = ctx.saved_tensors
        return grad * 3 * x**2 * w, 2 * (grad * x**3).sum_to_size(w.shape)

    register(cube, wrong)
    failed = failures(cube, *arguments())
    for dtype in ("float32", "float64", "bfloat16", "float16"):
        assert "largest difference" in failed["reference", f"gradient of w in {dtype}"].found
        assert ("reference", f"gradient of x in {dtype}") not in failed


def test_a_formula_that_is_wrong_in_bfloat16_only():
    cube = cubing()

    def wrong(ctx, grad):
        x, w = ctx.saved_tensors
        factor = 2 if x.dtype == torch.bfloat16 else 3
        return grad * factor * x**2 * w, (grad * x**3).sum_to_size(w.shape)

    register(cube, wrong)
    assert set(failures(cube, *arguments())) == {("reference", "gradient of x in bfloat16")}


def test_a_formula_that_gives_none_or_raises():
    cube = cubing()
    register(cube, lambda ctx, grad: (None, None))
    failed = failures(cube, *arguments())
    assert failed["reference", "gradient of x in float32"].found.startswith("0 at ")

    def raising(ctx, grad):
        raise ValueError("no")

    register(cube, raising)
    assert failures(cube, *arguments())["reference", "gradient in float32"].found == "ValueError: no"


def test_a_wrong_jvp():
    cube = cubing()
    cube.register_jvp(lambda ctx, dx, dw: dx * 3 * ctx.saved_tensors[0] ** 2 * ctx.saved_tensors[1])
    failed = failures(cube, *arguments())
    dtypes = ("float64", "float32", "bfloat16", "float16")
    assert set(failed) == {("reference", f"tangent of out in {d}") for d in dtypes} | {
        ("reference", "forward mode")
    }
    cube.register_jvp(opkit.from_reference)
    assert check(cube, *arguments()).ok


def test_a_formula_that_saves_an_intermediate():
    cube = cubing()

    def save(ctx, inputs, output):
        x, w = inputs
        ctx.save_for_backward(x, w, x**2)

    def backward(ctx, grad):
        x, w, square = ctx.saved_tensors
        return grad * 3 * square * w, (grad * x**3).sum_to_size(w.shape)

    cube.register_autograd(backward, save)
    failed = failures(cube, *arguments())
    assert set(failed) == {("reference", "second derivative in float64"), ("reference", "second derivatives")}
    assert "saves a tensor" in failed["reference", "second derivative in float64"].found


def test_a_formula_whose_second_derivative_is_silently_wrong():
    cube = cubing()

    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad * 3 * x.detach() ** 2 * w, (grad * x**3).sum_to_size(w.shape)

    register(cube, backward)
    assert set(failures(cube, *arguments())) == {
        ("reference", "second derivative for x in float64"),
        ("reference", "second derivatives"),  # by small steps
    }


def test_what_has_no_formula_or_no_second_derivative_is_noted():
    @opkit.op("t::plain", shapes="*b -> *b")
    def plain(x: Tensor) -> Tensor:
        return x * x

    (record,) = [r for r in check(plain, torch.ones(2)).records if r.what == "gradient"]
    assert str(record) == "not applicable  reference: gradient: the op has no gradient formula"

    @opkit.op("t::plain_backward", shapes="*b, *b -> *b")
    def plain_backward(grad: Tensor, x: Tensor) -> Tensor:
        return 2 * grad * x

    plain.register_autograd(plain_backward, saves=("x",))
    (record,) = [r for r in check(plain, torch.ones(2)).records if r.what == "second derivative in float64"]
    assert "t::plain_backward: it has no gradient formula" in record.found


def test_a_kernel_that_is_not_deterministic_though_it_says_so():
    cube = cubing()
    calls = itertools.count()

    @cube.register_kernel("cpu", backend="atomic", properties=["deterministic"])
    def _(x, w):  # another order every seventh time
        return x**3 * w * (1 + 1e-7 * (next(calls) % 7 == 6))

    failed = failures(cube, *arguments())
    assert set(failed) == {("atomic", "deterministic")}
    assert "other bits in out with" in failed["atomic", "deterministic"].found


def test_a_kernel_that_depends_on_the_number_of_threads():
    cube = cubing()
    before = torch.get_num_threads()

    @cube.register_kernel("cpu", backend="split", properties=["deterministic"])
    def _(x, w):
        return x**3 * w * (1 + 2e-7 * (torch.get_num_threads() - before))

    assert set(failures(cube, *arguments())) == {("split", "deterministic")}
    assert torch.get_num_threads() == before


def test_a_kernel_that_is_not_batch_invariant_though_it_says_so():
    cube = cubing()

    @cube.register_kernel("cpu", backend="tiled", properties=["batch_invariant"])
    def _(x, w):
        return x**3 * w * (1 + 3e-7 * (x[..., 0].numel() > 1))

    failed = failures(cube, *arguments((2, 3)))
    assert set(failed) == {("tiled", "batch_invariant")}
    assert "out at [0, 0] of the batch" in failed["tiled", "batch_invariant"].found


def test_properties_that_hold_or_cannot_be_tested():
    cube = cubing()
    stated = ["batch_invariant", "deterministic", "graph_safe"]
    threads = []

    @cube.register_kernel("cpu", backend="good", properties=stated)
    def _(x, w):
        threads.append(torch.get_num_threads())
        return x**3 * w

    records = {r.what: r for r in check(cube, *arguments((2, 3))).records if r.backend == "good"}
    assert [records[name].status for name in stated] == ["passed", "passed", "not applicable"]
    assert "takes a GPU" in records["graph_safe"].found
    assert min(threads.count(n) for n in (1, 2, torch.get_num_threads())) >= 10
    report = check(cube, *arguments(()))
    (alone,) = [r for r in report.records if r.what == "batch_invariant"]
    assert alone.found == "the batch is (); pass one of several rows"


def test_mutated_arguments_are_compared_and_not_changed():
    @opkit.op("t::accumulate", shapes="n, n ->", mutates_args=("total",))
    def accumulate(total: Tensor, x: Tensor) -> None:
        total += x

    total = torch.zeros(6)[::2]
    assert check(accumulate, total, torch.ones(3)).ok
    accumulate.register_kernel("cpu", lambda total, x: None, backend="lazy")
    assert set(failures(accumulate, total, torch.ones(3))) == {("lazy", "result argument total")}
    assert total.tolist() == [0, 0, 0]


def test_nothing_is_warned_of_and_a_later_call_still_warns():
    cube = cubing()
    cube.register_kernel("cpu", lambda x, w: x**3 * w, backend="narrow", dtypes=(torch.float32,))
    x, w = arguments()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check(cube, x, w).ok
    with pytest.warns(UserWarning, match="t::cube runs its reference"):
        cube(x.double(), w.double())


def test_lists_keyword_only_tensors_complex_numbers_and_any_strides():
    @opkit.op("t::scaled", shapes="[*s], n -> [*s]")
    def scaled(xs: list[Tensor], *, w: Tensor, mode: Literal["a", "b"] = "a") -> list[Tensor]:
        return [x * w.sum() for x in xs]

    scaled.register_autograd(opkit.from_reference)
    report = check(scaled, [randn(2), randn(3)], w=randn(4), mode="b")
    assert {"gradient of xs[1] in float16", "gradient of w in float16"} <= {r.what for r in report.records}

    @opkit.op("t::conj", shapes="*b -> *b")
    def conj(x: Tensor) -> Tensor:
        return x * x.conj() * x

    conj.register_autograd(opkit.from_reference)
    assert check(conj, randn(3, dtype=torch.complex64)).ok
    for x in (randn(3, 1, dtype=torch.float64).expand(3, 4), randn(0, 4), randn(4, 3).t()):
        assert check(conj, x).ok


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_compared_is_noted():
    @opkit.op("t::noise", shapes="*b -> *b", tags=(torch.Tag.nondeterministic_seeded,))
    def noise(x: Tensor) -> Tensor:
        return x * torch.rand_like(x)

    declared = opkit.declare("t::declared(Tensor x) -> Tensor", shapes="n -> n")
    declared.register_kernel("cpu", lambda x: x + 1)

    @opkit.op("t::single", shapes="*b:float32 -> *b")
    def single(x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError("float32 only")
        return x + 1

    for op, why in (
        (noise, "the op draws random numbers"),
        (declared, "the op is declared without a reference"),
        (single, "the reference does not run in float64, TypeError: float32 only"),
    ):
        (record,) = [r for r in check(op, randn(3)).records if r.what == "results"]
        assert (record.status, record.found) == ("not applicable", why)


def test_a_dtype_that_the_op_does_not_take_is_noted():
    @opkit.op("t::wide", shapes="*b -> *b")
    def wide(x: Tensor) -> Tensor:
        if x.dtype == torch.float16:
            raise TypeError("not half")
        return x + 1

    wide.register_autograd(opkit.from_reference)
    (record,) = [r for r in check(wide, randn(3)).records if r.what == "gradient in float16"]
    assert (record.status, record.found) == ("not applicable", "the op does not run, TypeError: not half")


def test_what_is_no_op_is_refused():
    with pytest.raises(
        opkit.ArgumentError, match=r"found a function; expected an opkit\.Op\. Pass what @opkit"
    ):
        check(lambda x: x, torch.ones(1))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_difference_beyond_the_tolerance_of_a_dtype_is_found(dtype):
    right = torch.linspace(1, 2, 8, dtype=torch.float64).to(dtype).double()
    assert difference(right.to(dtype), right, 0) is None
    assert difference((right * (1 + TOLERANCES[dtype] / 2)).to(dtype), right, 0) is None
    wrong = right.to(dtype).clone()
    wrong[3] *= 1 + 4 * TOLERANCES[dtype]
    assert " at [3]," in difference(wrong, right, 0).found


def test_infinities_nans_shapes_and_integers_are_compared():
    special = torch.tensor([float("inf"), float("nan"), 70000.0]).double()
    assert difference(special.to(torch.float16), special, 0) is None
    assert difference(torch.zeros(3), special, 0) is not None
    assert difference(special.float(), torch.zeros(3).double(), 0) is not None
    assert difference(torch.zeros(2), torch.zeros(3), 0).found == "the shape (2,)"
    assert difference(torch.tensor([1, 2]), torch.tensor([1, 3]), 0).found.startswith("2 at [1]")
    assert difference(None, torch.ones(1), 0).found == "None"
    assert difference(2, 2.0, 0) is None
    assert difference(torch.zeros(2), torch.ones(2), 0, slack=1.0) is None
    assert difference(torch.zeros(2), torch.ones(2), 0, slack=0.9) is not None
