"""`opkit.bench.compare`: what is verified, what is timed, and what it says where it cannot be."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import opkit
from opkit.bench import machine, work
from opkit.errors import ArgumentError, OpNotFoundError, ShapeError

QUICK = {"min_run_time": 1e-4, "progress": False}


def statuses(report, **wanted):
    return {row.name: row.status for row in report.find(**wanted)}


def vector(n):
    return (torch.randn(n),), {}


def sentences(report):
    """The text of a report without its line ends."""
    return " ".join(str(report).split())


# ---------------------------------------------------------------- what is timed


def test_backends_and_sizes_are_measured_and_ratios_are_those_of_the_rounds(scale, compare):
    report = compare(scale, over={"n": [4, 8], "rows": [1, 3]})
    assert [dict(r.sizes) for r in report.find(name="fast")] == [
        {"n": 4, "rows": 1}, {"n": 4, "rows": 3}, {"n": 8, "rows": 1}, {"n": 8, "rows": 3},
    ]  # fmt: skip
    fast, slow = report.find(name="fast")[0], report.find(name="slow")[0]
    assert report.standard == "reference"
    assert report.speedup(fast) == pytest.approx(4, rel=0.01)
    assert report.speedup(slow) == pytest.approx(0.5, rel=0.01)
    assert report.speedup(fast, to="slow") == pytest.approx(8, rel=0.01)
    assert fast.seconds == pytest.approx(1, rel=0.01)


def test_a_wrong_backend_is_shown_as_wrong_and_not_timed(scale, compare):
    report = compare(scale, over={"n": [4]})
    assert statuses(report) == {
        "fast": "timed", "slow": "timed", "broken": "wrong", "far": "rejected", "reference": "timed",
        "copy": "timed",
    }  # fmt: skip
    [wrong] = report.wrong
    assert wrong.times == ()
    assert wrong.reason.startswith("out is ")
    assert "expected" in wrong.reason
    assert not report.ok
    assert "wrong: broken at n=4, float32, forward, and not timed: out is " in sentences(report)
    assert compare(scale, over={"n": [4]}, backends=["fast"]).ok


def test_what_a_tolerance_allows_is_not_wrong(registry, compare):
    @opkit.op("benched::near", shapes="n -> n")
    def near(x: Tensor) -> Tensor:
        return x / 3

    near.register_kernel("cpu", lambda x: x * (1 / 3 * (1 + 1e-6)), backend="close")
    near.register_kernel("cpu", lambda x: x * (1 / 3 * (1 + 1e-4)), backend="off")
    assert statuses(compare(near, vector, over={"n": [64]}), kind="backend") == {
        "close": "timed", "off": "wrong", "reference": "timed",
    }  # fmt: skip


def test_a_backend_that_raises_is_failed_with_its_error(scale, compare):
    @scale.register_kernel("cpu", backend="raising")
    def raising(x, weight, power):
        raise ValueError("no such luck")

    report = compare(scale, over={"n": [4]}, backends=["raising", "fast"])
    assert report.find(name="raising")[0].reason == "ValueError: no such luck"
    assert "failed: raising at n=4, float32, forward, and not timed: ValueError: no such luck" in sentences(
        report
    )


def test_a_backend_that_cannot_take_the_call_is_named_with_its_reason(scale, compare):
    scale.register_kernel(
        "cpu", lambda x, w, p: x * w**p, backend="even", when=lambda x, *_: x.shape[-1] % 2 == 0 or "n is odd"
    )
    report = compare(scale, over={"n": [4, 5]}, backends=["even", "far", "fast"])
    assert statuses(report, n=4) == {"even": "timed", "far": "rejected", "fast": "timed", "copy": "timed"}
    assert statuses(report, n=5)["even"] == "rejected"
    assert report.ok
    text = str(report)
    assert "not measured: even: n is odd" in text
    assert "not measured: far: it has no kernel for cpu" in text


def test_warm_calls_and_cold_ones_are_rows_of_their_own(scale, compare):
    report = compare(scale, over={"n": [4]}, caches=["cold", "warm"])
    assert [row.caches for row in report.find(name="fast")] == ["warm", "cold"]
    assert report.find(name="fast", caches="cold")[0].number == 1
    assert report.settings["flushed"] == 1024 * 5 // 4
    assert [r.caches for r in compare(scale, over={"n": [4]}, caches="cold").find(name="fast")] == ["cold"]


def test_arguments_are_as_the_case_gives_them(scale, compare):
    seen = []

    def peer(*args, **kwargs):
        seen.append((len(args), kwargs))
        return scale.reference(*args, **kwargs)

    compare(scale, lambda: ((torch.ones(2, 3), torch.ones(3)), {"power": 2}), against={"peer": peer})
    assert {(count, *kwargs.items()) for count, kwargs in seen} == {(2, ("power", 2))}
    seen.clear()
    compare(scale, lambda: (torch.ones(2, 3), torch.ones(3)), against={"peer": peer})
    assert {(count, *kwargs.items()) for count, kwargs in seen} == {(2,)}


def test_the_limit_copies_as_many_bytes_as_the_call_moves(scale, compare, monkeypatch):
    copied = []
    real = work.copying
    monkeypatch.setattr(
        work, "copying", lambda size, device: copied.append((size, device)) or real(size, device)
    )
    report = compare(scale, over={"n": [4]}, backends=["fast"])
    assert copied == [(2 * 4 * 4 + 4 * 4 + 2 * 4 * 4, "cpu")]
    assert {row.bytes for row in report.rows} == {80}


def test_nothing_is_measured_while_the_core_is_being_built(scale, compare, monkeypatch):
    events = []
    monkeypatch.setattr(machine, "settle", lambda: events.append("settled"))
    compare(scale, over={"n": [4]}, against={"peer": lambda x, w: events.append("called") or x * w})
    assert events[0] == "settled"


def test_ops_are_taken_by_name(scale, compare):
    assert compare("benched::scale", over={"n": [4]}).op == "benched::scale"
    with pytest.raises(OpNotFoundError, match="benched::none"):
        compare("benched::none")


def test_the_reference_runs_without_a_warning_that_it_is_slow(scale, compare):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(scale, over={"n": [4]}, backends=["reference"])


def test_random_numbers_go_on_as_if_nothing_had_run(registry, compare):
    @opkit.op("benched::noise", shapes="n -> n", tags=[torch.Tag.nondeterministic_seeded])
    def noise(x: Tensor) -> Tensor:
        return torch.rand_like(x)

    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    x = torch.ones(3)
    report = compare(noise, lambda: (x,))
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    assert statuses(report) == {"reference": "timed", "copy": "timed"}
    assert "Results were not compared: the op draws random numbers." in sentences(report)


def test_an_op_without_a_reference_is_timed_and_said_to_be_unverified(registry, compare):
    op = opkit.declare("benched::bare(Tensor x) -> Tensor", shapes="n -> n")
    op.register_kernel("cpu", lambda x: x + 1, backend="only")
    report = compare(op, vector, over={"n": [4]})
    assert report.standard == "only"
    assert statuses(report) == {"only": "timed", "copy": "timed"}
    assert "Results were not compared: the op is declared without a reference." in sentences(report)


def test_what_an_op_overwrites_is_a_copy(registry, compare):
    @opkit.op("benched::bump", shapes="n ->", mutates_args=("x",))
    def bump(x: Tensor) -> None:
        x.add_(1)

    @bump.register_kernel("cpu", backend="twice")
    def twice(x):
        x.add_(2)

    x = torch.zeros(4)
    report = compare(bump, lambda: (x,))
    assert x.tolist() == [0] * 4
    assert statuses(report, kind="backend") == {"twice": "wrong", "reference": "timed"}
    assert report.wrong[0].reason.startswith("argument x is 2 at [0]")


def test_autocast_is_off(registry, compare):
    @opkit.op("benched::product", shapes="m k, k n -> m n")
    def product(x: Tensor, y: Tensor) -> Tensor:
        assert not torch.is_autocast_enabled("cpu")
        return x @ y

    with torch.autocast("cpu", torch.bfloat16):
        assert compare(product, lambda: (torch.randn(4, 4), torch.randn(4, 4))).ok


# ---------------------------------------------------------------- dtypes and devices


def test_arguments_are_cast_where_the_case_takes_no_dtype(scale, compare):
    report = compare(scale, over={"n": [4]}, dtypes=["float64", torch.bfloat16], backends=["fast"])
    assert [row.dtype for row in report.find(name="fast")] == ["float64", "bfloat16"]
    assert report.ok


def test_a_case_is_given_the_dtype_and_the_device_that_it_takes(scale, compare):
    seen = []

    def case(n, dtype, device):
        seen.append((dtype, device))
        return (torch.ones(2, n, dtype=dtype, device=device), torch.ones(n, dtype=dtype)), {}

    assert compare(scale, case, over={"n": [4]}).rows[0].dtype == "float32"
    compare(scale, case, over={"n": [4]}, dtypes=["float16"], device="cpu")
    assert seen == [(torch.float32, "cpu"), (torch.float16, "cpu")]


def test_dtypes_that_the_shape_line_fixes_are_said(registry, compare):
    @opkit.op("benched::fixed", shapes="n:float32 -> n")
    def fixed(x: Tensor) -> Tensor:
        return x + 1

    with pytest.raises(ArgumentError, match="leaves the dtype of no floating argument open"):
        compare(fixed, vector, over={"n": [3]}, dtypes=["float64"])


# ---------------------------------------------------------------- gradients


@pytest.fixture
def cube(registry, time):
    @opkit.op("benched::cube", shapes="n -> n")
    def cube(x: Tensor) -> Tensor:
        return x**3

    cube.register_kernel("cpu", time.taking(1, lambda x: x * x * x), backend="fast")
    return cube


def powers(time):
    def backward(ctx, grad):
        time.now += 2
        return grad * 3 * ctx.saved_tensors[0] ** 2

    return backward


def save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


def test_gradients_are_measured_where_there_is_a_formula(cube, time, compare):
    assert {row.direction for row in compare(cube, vector, over={"n": [4]}, backward=None).rows} == {
        "forward"
    }
    cube.register_autograd(powers(time), setup_context=save)
    report = compare(cube, vector, over={"n": [4]}, backward=None)
    forward, training = report.find(name="fast")
    assert (forward.direction, training.direction) == ("forward", "forward + backward")
    assert training.seconds == pytest.approx(3, rel=0.01)
    assert report.ok


def test_a_wrong_gradient_is_shown_as_wrong_where_the_result_is_right(cube, compare):
    cube.register_autograd(lambda ctx, grad: grad * 2 * ctx.saved_tensors[0], setup_context=save)
    report = compare(cube, vector, over={"n": [4]}, backward=None)
    assert statuses(report, direction="forward", kind="backend") == {"fast": "timed", "reference": "timed"}
    assert set(statuses(report, direction="forward + backward").values()) == {"wrong"}
    assert report.wrong[0].reason.startswith("the gradient of x is ")


def test_a_wrong_result_is_not_differentiated(cube, time, compare):
    cube.register_autograd(powers(time), setup_context=save)
    cube.register_kernel("cpu", lambda x: x + 1, backend="broken")
    report = compare(cube, vector, over={"n": [4]}, backward=None)
    assert statuses(report, direction="forward + backward")["broken"] == "wrong"
    assert str(report).count("wrong: broken") == 1
    assert "and 1 more" in str(report)


def test_a_formula_that_raises_fails(cube, compare):
    cube.register_autograd(lambda ctx, grad: grad / 0 if False else 1 / 0)
    report = compare(cube, vector, over={"n": [4]}, backward=None)
    assert "ZeroDivisionError" in report.find(direction="forward + backward")[0].reason


def test_only_marked_arguments_are_differentiated(scale, compare):
    seen = []

    def peer(x, weight):
        seen.append((x.requires_grad, weight.requires_grad))
        return x * weight

    def case():
        return (torch.ones(2, 3, requires_grad=True), torch.ones(3)), {}

    report = compare(scale, case, backward=True, backends=["fast"], against={"peer": peer})
    assert report.ok
    assert (True, False) in seen
    assert (True, True) not in seen


def test_arguments_stay_marked_when_they_are_cast(scale, compare):
    def case():
        return (torch.ones(2, 3, requires_grad=True), torch.ones(3)), {}

    seen = []

    def peer(x, weight):
        seen.append((x.dtype, x.requires_grad, weight.requires_grad))
        return x * weight

    compare(scale, case, backward=True, dtypes=["float64"], backends=["fast"], against={"peer": peer})
    assert (torch.float64, True, False) in seen
    assert (torch.float64, True, True) not in seen


class Split(NamedTuple):
    y: Tensor
    rest: Tensor


def test_gradients_go_through_the_results_that_all_candidates_have(registry, compare):
    @opkit.op("benched::split", shapes="n -> n, n")
    def split(x: Tensor) -> Split:
        return Split(x.sin(), x.cos())

    split.register_autograd(opkit.from_reference)
    first = {"first": lambda x: x.sin(), "both": lambda x: (x.sin(), x.cos()), "none": lambda x: x.cos()}
    report = compare(split, vector, over={"n": [4]}, backward=None, against=first)
    for direction in ("forward", "forward + backward"):
        assert statuses(report, direction=direction, kind="peer") == {
            "first": "timed", "both": "timed", "none": "wrong",
        }  # fmt: skip


def test_gradients_of_lists_are_measured(registry, compare):
    @opkit.op("benched::doubled", shapes="[n] -> [n]")
    def doubled(xs: list[Tensor]) -> list[Tensor]:
        return [x * 2 for x in xs]

    doubled.register_autograd(lambda ctx, grads: [g * 2 for g in grads])
    report = compare(doubled, lambda: ([torch.ones(3), torch.ones(3)],), backward=None)
    assert [r.direction for r in report.find(name="reference", status="timed")] == [
        "forward",
        "forward + backward",
    ]


def test_a_backend_without_a_kernel_for_the_gradient_is_measured_with_what_there_is(registry, compare):
    @opkit.op("benched::sine_backward", shapes="n, n -> n")
    def sine_backward(grad: Tensor, x: Tensor) -> Tensor:
        return grad * x.cos()

    @opkit.op("benched::sine", shapes="n -> n")
    def sine(x: Tensor) -> Tensor:
        return x.sin()

    sine.register_kernel("cpu", torch.sin, backend="fast")
    sine.register_autograd(sine_backward, saves=("x",))
    report = compare(sine, vector, over={"n": [4]}, backward=True)
    assert statuses(report, direction="forward + backward") == {
        "fast": "timed", "reference": "timed", "copy": "timed",
    }  # fmt: skip
    assert [report.find(name="copy", direction=d)[0].bytes for d in ("forward", "forward + backward")] == [
        2 * 16,
        5 * 16,
    ]


def test_a_peer_without_a_gradient_fails_alone(scale, compare):
    detached = {"detached": lambda x, w: (x * w).detach()}
    report = compare(scale, over={"n": [4]}, backward=True, backends=["fast"], against=detached)
    training = {r.name: (r.status, r.reason) for r in report.find(direction="forward + backward")}
    assert training["fast"] == ("timed", "")
    assert training["detached"] == ("failed", "its results have no gradient")


# ---------------------------------------------------------------- peers


def test_a_wrong_peer_is_not_timed_either(scale, compare):
    report = compare(scale, over={"n": [4]}, against={"sum": lambda x, w: x + w, "odd": lambda x, w: (1, 2)})
    assert statuses(report, kind="peer") == {"sum": "wrong", "odd": "wrong"}


def test_a_peer_with_too_many_results_fails(registry, compare):
    @opkit.op("benched::pair", shapes="n -> n, n")
    def pair(x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x + 2

    report = compare(pair, vector, over={"n": [2]}, against={"three": lambda x: (x + 1, x + 2, x)})
    assert report.find(name="three")[0].reason == "TypeError: it returned 3 values, and the op 2"


def test_a_peer_that_overwrites_arguments_is_wrong(scale, compare):
    def sneaky(x, weight):
        y = x * weight
        x.add_(1)
        return y

    report = compare(scale, over={"n": [4]}, against={"sneaky": sneaky})
    assert report.find(name="sneaky")[0].reason == "it overwrites the argument x, which the op does not"
    nan = torch.full((2, 3), torch.nan)
    assert compare(scale, lambda: (nan, torch.ones(3)), backends=["fast"]).ok


def test_compiled_is_a_peer_and_compiled_for_each_size(scale, compare, monkeypatch):
    made, resets = [], []
    monkeypatch.setattr(torch, "compile", lambda f, **options: made.append((f, options)) or f)
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    report = compare(scale, over={"n": [4, 8]}, compiled=True)
    assert made == [(scale.reference, {"dynamic": False})]
    assert [row.status for row in report.find(name="compiled")] == ["timed"] * 2
    assert len(resets) in (0, 2)  # none where nothing has loaded Dynamo


def test_compiled_peers_are_compiled_for_each_of_many_sizes(registry, time, compare):
    """Dynamo runs a function as it is once it was compiled too often, and says so on stderr only."""

    @opkit.op("benched::plus", shapes="n -> n")
    def plus(x: Tensor) -> Tensor:
        return x + 1

    compiled = []

    def backend(graph, inputs):
        compiled.append(tuple(inputs[0].shape))
        return graph.forward

    sizes = list(range(4, 16))
    assert len(sizes) > torch._dynamo.config.recompile_limit
    peer = torch.compile(lambda x: x + 1, backend=backend, dynamic=False)
    report = compare(plus, vector, over={"n": sizes}, against={"compiled": peer})
    assert report.ok
    assert sorted(set(compiled)) == [(n,) for n in sizes]


# ---------------------------------------------------------------- errors


def give(value):
    return lambda n: value


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"case": 3}, "benchmarking benched::scale: the case is of type int; expected a function of sizes that"),
        (
            {"over": {"m": [1]}},
            "over= names 'm', which the case does not take; it takes n, rows. Name its arguments.",
        ),
        (
            {"over": {"row": [1]}},
            "over= names 'row', which the case does not take; it takes n, rows. Did you mean 'rows'?",
        ),
        (
            {"over": {"rows": [1]}},
            "the case needs n, and over= has rows; expected a list for each. Write over={\"n\": [256, 1024]}, or give "
            "the argument a default.",
        ),
        ({}, "the case needs n, and over= has nothing; expected a list for each."),
        (
            {"over": {"size": [1]}, "case": lambda sizes, **others: None},
            "the case needs sizes, and over= has size; expected a list for each. Perhaps size is another name of it.",
        ),
        ({"over": [1]}, "over= is of type list; expected lists of sizes by name. Write over={\"n\": [256, 1024]}."),
        ({"over": {"n": 4}}, "over= has n=4; expected a list of numbers or texts. Write over={\"n\": [256, 1024]}."),
        ({"over": {"n": []}}, "over= has n=[]; expected a list of numbers or texts."),
        (
            {"over": {"n": [4]}, "case": give(torch.ones(2))},
            "the case returned a Tensor; expected (args, kwargs). Write: return (x, weight, power,), {}.",
        ),
        (
            {"over": {"n": [4]}, "case": give((torch.ones(2),))},
            "what the case returned for n=4 does not fit: calling benched::scale: argument 'weight' is missing",
        ),
        (
            {"over": {"n": [4]}, "case": lambda n: 1 / 0},
            "the case called with n=4 failed with ZeroDivisionError: division by zero. Expected it to return (args, "
            "kwargs); call it in Python to see where it fails.",
        ),
        (
            {"over": {"n": [4]}, "dtypes": ["float31"]},
            "dtypes= has 'float31'; expected dtypes of torch, such as torch.float32 or 'bfloat16'. Did you mean",
        ),
        (
            {"over": {"n": [4]}, "backends": ["fats"]},
            "backends= names 'fats'; expected some of fast, slow, broken, far, reference. Did you mean 'fast'?",
        ),
        (
            {"over": {"n": [4]}, "against": [torch.mul]},
            "against= is of type list; expected functions by name. Write against={\"eager\": function}.",
        ),
        (
            {"over": {"n": [4]}, "against": {"eager": 3}},
            "against= has 'eager': 3, which is no function; expected functions of the op's arguments.",
        ),
        (
            {"over": {"n": [4]}, "against": {"fast": torch.mul}},
            "against= has the name 'fast', which is that of a backend; expected another. Rename it.",
        ),
        (
            {"over": {"n": [4]}, "against": {"copy": torch.mul}},
            "against= has the name 'copy', which is that of the limit; expected another. Rename it.",
        ),
        ({"over": {"n": [4]}, "caches": ["hot"]}, "caches= is ['hot']; expected some of warm, cold. Write caches="),
        ({"over": {"n": [4]}, "rounds": 2}, "rounds= is 2; expected a whole number from 3. Write rounds=3."),
        ({"over": {"n": [4]}, "min_run_time": "1"}, "min_run_time= is '1'; expected a number from 0."),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_said(scale, compare, options, text):
    with pytest.raises(ArgumentError) as caught:
        compare(scale, **options)
    assert text in str(caught.value)
    assert str(caught.value).startswith("benchmarking benched::scale: ")
    assert caught.value.op == "benched::scale"


def test_shapes_that_do_not_fit_are_said_before_anything_runs(scale, compare):
    with pytest.raises(ShapeError, match="benched::scale"):
        compare(scale, lambda: (torch.ones(2, 3), torch.ones(4)))


def test_gradients_that_there_are_not_are_said(cube, registry, compare):
    with pytest.raises(
        ArgumentError, match="backward=True, and the op has no gradient formula; expected one"
    ):
        compare(cube, vector, over={"n": [4]}, backward=True)

    @opkit.op("benched::count", shapes="n -> n")
    def count(x: Tensor) -> Tensor:
        return x + 1

    count.register_autograd(lambda ctx, grad: grad)
    with pytest.raises(ArgumentError, match="backward=True, and no argument of the case is floating"):
        compare(count, lambda: (torch.arange(3),), backward=True)


def test_compiled_needs_a_reference(registry, compare):
    op = opkit.declare("benched::bare(Tensor x) -> Tensor", shapes="n -> n")
    with pytest.raises(ArgumentError, match="found an op that is declared without one"):
        compare(op, vector, over={"n": [4]}, compiled=True)


def test_a_device_whose_caches_cannot_be_emptied_is_measured_warm(scale, compare, monkeypatch):
    from opkit.bench import caches

    monkeypatch.setattr(caches, "can_flush", lambda device: False)
    assert {row.caches for row in compare(scale, over={"n": [4]}, caches=None).rows} == {"warm"}
    with pytest.raises(ArgumentError, match="opkit does not know how to empty those of cpu"):
        compare(scale, over={"n": [4]}, caches=["cold"])


def test_the_case_that_the_design_shows_runs(tmp_path):
    """With the real clock and a shipped op."""
    from opkit_kernels import vector_add

    def case(n):
        return (torch.randn(n), torch.randn(n)), {}

    report = opkit.bench.compare(
        vector_add, case, over={"n": [16, 64]}, backends=["reference"], min_run_time=1e-3, rounds=3
    )
    assert report.ok
    # Two sizes, warm and cold: the reference and the copy forward, and as its gradient is a function only it again.
    assert len(report.rows) == 2 * 2 * 3
    pytest.importorskip("matplotlib")
    assert report.plot(tmp_path / "vector_add.svg").is_file()
