from __future__ import annotations

import warnings
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import opkit

pytestmark = pytest.mark.usefixtures("registry")

X = torch.randn(4, 3, 5, dtype=torch.float64)
W = torch.randn(5, dtype=torch.float64)


@pytest.fixture(autouse=True)
def no_warnings():
    """What goes by one call must not fall back to torch's loop, or to ours, without a test that says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


class Norm(NamedTuple):
    y: Tensor
    rstd: Tensor


class Counted:
    """A function that counts its calls."""

    def __init__(self, function):
        self.function, self.count = function, 0

    def __call__(self, *args, **kwargs):
        self.count += 1
        return self.function(*args, **kwargs)


def counting(op):
    """Register a kernel that is the reference, counted."""
    counted = Counted(op.reference)
    op.register_kernel("cpu", lambda *args, **kwargs: counted(*args, **kwargs), backend="counted", priority=9)
    return counted


@pytest.fixture
def norm():
    @opkit.op("t::norm", shapes="*b n, n -> *b n:x, *b 1:float64")
    def norm(x: Tensor, w: Tensor, eps: float = 1e-6) -> Norm:
        rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        return Norm(x * rstd * w, rstd)

    return norm


def same(op, *args, in_dims=0, calls=None, **kwargs):
    """Compare an op under vmap with its reference under vmap, and count the kernel's calls."""
    counted = counting(op)
    found = torch.vmap(op, in_dims, **kwargs)(*args)
    first = counted.count
    expected = torch.vmap(op.reference, in_dims, **kwargs)(*args)
    torch.testing.assert_close(found, expected)
    counted.count = 0
    torch.testing.assert_close(torch.vmap(op, in_dims, **kwargs)(*args), expected)
    if calls is not None:
        assert (first, counted.count) == (calls + 1, calls)  # the first result is compared with a sample's
    return found


# ---------------------------------------------------------------- derived


@pytest.mark.parametrize("dim", [0, 1, -2], ids=str)
def test_shape_line_gives_one_call_over_any_dimension(norm, dim):
    found = same(norm, X, W, in_dims=(dim, None), calls=1)
    assert type(found) is Norm


def test_batch_of_a_tensor_that_is_not_batched_is_expanded():
    @opkit.op("t::add", shapes="*b n, *b n -> *b n")
    def add(x: Tensor, y: Tensor) -> Tensor:
        return x + y

    same(add, X, X[0], in_dims=(0, None), calls=1)
    same(add, X[0], X, in_dims=(None, 0))


@pytest.mark.parametrize("line", ["n *b -> n *b", "n *b m -> *b m", "n *b m -> *b, n *b"])
def test_star_may_stand_anywhere(line):
    outputs = line.split("->")[1].split(",")

    def f(x: Tensor) -> Tensor:
        return x.sum(0) if outputs[0].split()[0] == "*b" else x * 2

    def g(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.sum((0, -1)), x.sum(-1)

    op = opkit.op("t::f", shapes=line)(f if len(outputs) == 1 else g)
    same(op, torch.randn(2, 3, 4, 5), in_dims=2, calls=1)


def test_nested_vmap_is_one_call(norm):
    counted = counting(norm)
    torch.vmap(norm, (0, None))(X, W)  # compared with one sample
    counted.count = 0
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    found = torch.vmap(torch.vmap(norm, (1, None)), (2, None))(x, W)
    assert counted.count == 1
    torch.testing.assert_close(found, torch.vmap(torch.vmap(norm.reference, (1, None)), (2, None))(x, W))


def test_inner_and_outer_level_may_batch_other_arguments():
    @opkit.op("t::mul", shapes="*b n, *b n -> *b n")
    def mul(x: Tensor, y: Tensor) -> Tensor:
        return x * y

    x, y = torch.randn(2, 5), torch.randn(3, 5)
    found = torch.vmap(torch.vmap(mul, (None, 0)), (0, None))(x, y)
    torch.testing.assert_close(found, x[:, None] * y)


@pytest.mark.parametrize("choice", ["sequential", "elementwise"])
def test_optional_list_keyword_and_numbers(choice):
    @opkit.op("t::many")
    def many(
        x: Tensor,
        others: list[Tensor],
        k: int,
        bias: Tensor | None = None,
        *,
        scale: Tensor,
        flag: bool = True,
    ) -> tuple[Tensor, list[Tensor]]:
        y = x * k + sum(others) + scale
        return (y if bias is None else y + bias), [o * k for o in others]

    many.register_vmap(choice)
    args = (X, [X * 2, X[0]], 3)
    for bias in (None, W):
        for scale, dim in ((W, None), (X * 3, 1)):

            def call(op):
                return torch.vmap(
                    lambda x, a, b, s: op(x, [a, b], 3, bias, scale=s), (0, 0, None, dim)
                )(X, args[1][0], args[1][1], scale if dim is None else scale.movedim(0, 1))  # fmt: skip

            torch.testing.assert_close(call(many), call(many.reference))


def test_lists_in_the_shape_line():
    @opkit.op("t::join", shapes="[*b n], *b m -> *b m, [*b n]")
    def join(items: list[Tensor], x: Tensor) -> tuple[Tensor, list[Tensor]]:
        return x + torch.stack(items).sum((0, -1))[..., None], [i * 2 for i in items]

    @opkit.op("t::each", shapes="[*s], [*s] -> [*s]")
    def each(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
        return [x + y for x, y in zip(a, b)]

    a, b, c = torch.randn(4, 2, 3), torch.randn(2, 3), torch.randn(4, 3)
    for op, run in (
        (join, lambda f: torch.vmap(lambda a, c: f([a[0], b[0]], c))(a, c)),
        (each, lambda f: torch.vmap(lambda a, c: f([a, c], [b, c * 2]))(a, c)),
    ):
        counted = counting(op)
        for _ in range(2):
            counted.count = 0
            torch.testing.assert_close(run(op), run(op.reference))
        assert counted.count == 1


def test_chunks_give_the_same(norm):
    torch.testing.assert_close(
        torch.vmap(norm, (0, None), chunk_size=3)(X, W), torch.vmap(norm.reference, (0, None))(X, W)
    )


def test_size_arguments_are_unaffected():
    @opkit.op("t::pad", shapes="*b n -> *b m")
    def pad(x: Tensor, m: int) -> Tensor:
        return torch.nn.functional.pad(x, (0, m - x.shape[-1]))

    found = torch.vmap(lambda x: pad(x, 7), 1)(X)
    assert found.shape == (3, 4, 7)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_vmap_in_a_compiled_function(norm, backend):
    norm.register_vmap(lambda info, in_dims, x, w, eps: (norm(x.movedim(in_dims[0], 0), w, eps), 0))
    for op in (norm, opkit.op("t::again", shapes="*b n, n -> *b n, *b 1")(norm.reference)):
        run = torch.compile(torch.vmap(op, (1, None)), fullgraph=True, backend=backend)
        torch.testing.assert_close(run(X, W), torch.vmap(norm.reference, (1, None))(X, W))


def test_vmap_of_a_gradient_and_gradient_of_a_vmap(norm):
    norm.register_autograd(opkit.from_reference)
    x = X.clone().requires_grad_()
    torch.vmap(norm, (1, None))(x, W)[0].sin().sum().backward()
    expected = torch.func.grad(lambda x: torch.vmap(norm.reference, (1, None))(x, W)[0].sin().sum())(X)
    torch.testing.assert_close(x.grad, expected)


def test_line_that_only_looks_like_a_batch_is_found_out():
    @opkit.op("t::share", shapes="*b -> *b")
    def share(x: Tensor) -> Tensor:
        return x / x.sum()

    for _ in range(2):  # again, also where somebody caught the first
        with pytest.raises(
            opkit.VmapError,
            match="mapping t::share .* gave out of the first sample otherwise than alone.*sequential",
        ):
            torch.vmap(share)(X)
    share.register_vmap("sequential")
    torch.testing.assert_close(torch.vmap(share)(X), torch.vmap(share.reference)(X))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_line_that_only_looks_like_a_batch_is_found_out_while_compiling(backend):
    @opkit.op("t::share", shapes="*b, *b -> *b")
    def share(x: Tensor, y: Tensor) -> Tensor:
        return x / x.sum() - y

    with pytest.raises(
        Exception, match="mapping t::share .* gave out of the first sample otherwise than alone"
    ):
        torch.compile(lambda x: torch.vmap(share, (0, None))(x, x[0]), fullgraph=True, backend=backend)(X)


def test_samples_that_are_all_alike_do_not_count_as_a_comparison():
    @opkit.op("t::share", shapes="*b -> *b")
    def share(x: Tensor) -> Tensor:
        return x + x.sum()

    torch.vmap(share)(torch.zeros(4, 3))  # where x and share(x) are the same
    with pytest.raises(
        opkit.VmapError, match="mapping t::share .* gave out of the first sample otherwise than alone"
    ):
        torch.vmap(share)(X[:, 0])


def test_trial_while_compiling_leaves_nothing_in_the_graph(norm):
    graphs = []

    def backend(graph, inputs):
        from torch._dynamo.backends.common import aot_autograd

        return aot_autograd(fw_compiler=lambda g, _: graphs.append(g) or g)(graph, inputs)

    run = torch.compile(torch.vmap(norm, (1, None)), fullgraph=True, backend=backend)
    torch.testing.assert_close(run(X, W), torch.vmap(norm.reference, (1, None))(X, W))
    calls = [n for n in graphs[0].graph.nodes if n.target is norm.overload]
    assert len(calls) == 1
    assert not any("uniform" in str(n.target) for n in graphs[0].graph.nodes)


def test_argument_that_counts_dimensions_is_not_shifted():
    @opkit.op("t::total", shapes="*b -> *b")
    def total(x: Tensor, dim: int) -> Tensor:
        return x.cumsum(dim)

    with pytest.warns(UserWarning, match="mapping t::total with torch.vmap over x calls it once per sample"):
        found = torch.vmap(lambda x: total(x, 0))(X)
    torch.testing.assert_close(found, X.cumsum(1))


# ---------------------------------------------------------------- the author's choice


@pytest.fixture
def plain():
    """An op without a shape line."""

    @opkit.op("t::plain")
    def plain(x: Tensor, y: Tensor, k: float = 2.0) -> Tensor:
        return x * k + y

    return plain


@pytest.mark.parametrize("choice", ["sequential", "expand", "elementwise"])
@pytest.mark.parametrize("in_dims", [(0, 0), (1, 0), (0, None), (None, 1)], ids=str)
def test_choice(plain, choice, in_dims):
    assert plain.register_vmap(choice) == choice
    args = [torch.randn(2, 5) if d is None else torch.randn(3, 2, 5).movedim(0, d) for d in in_dims]
    for _ in range(2):
        found = torch.vmap(plain, in_dims)(*args)
        torch.testing.assert_close(found, torch.vmap(plain.reference, in_dims)(*args))


def test_choice_decides_how_often_the_kernel_runs(plain):
    counted = counting(plain)
    for choice, calls in (("sequential", 4), ("expand", 1), ("elementwise", 1)):
        plain.register_vmap(choice)
        torch.vmap(plain)(X, X)  # compared with one sample
        counted.count = 0
        torch.vmap(plain)(X, X)
        assert counted.count == calls, choice


def test_choice_that_is_wrong_is_found_out(plain):
    plain.register_vmap("expand")
    with pytest.raises(
        opkit.VmapError, match="as its rule allows, it gave out of the first sample otherwise than"
    ):
        torch.vmap(plain)(torch.randn(3, 3, 3), torch.randn(3, 3))


def test_elementwise_broadcasts_samples_of_different_rank(plain):
    plain.register_vmap("elementwise")
    x, y = torch.randn(3, 2, 5), torch.randn(3, 5)
    torch.testing.assert_close(torch.vmap(plain)(x, y), torch.vmap(plain.reference)(x, y))
    with pytest.raises(
        opkit.VmapError, match=r"rule is 'elementwise', and .* \(2, 5\), \(4,\); expected shapes that"
    ):
        torch.vmap(plain)(x, torch.randn(3, 4))


def test_function_is_called_as_torch_does():
    seen = []

    @opkit.op("t::f")
    def f(x: Tensor, items: list[Tensor], k: int = 2, *, s: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x * k + sum(items) + s, x * 1

    @f.register_vmap
    def rule(info, in_dims, x, items, k, *, s):
        seen.append((info, in_dims, k))
        x = x.movedim(in_dims[0], 0)
        items = [i if d is None else i.movedim(d, 0) for i, d in zip(items, in_dims[1])]
        return f(x, items, k, s=s.movedim(in_dims[3], 0)), (0, 0)

    x, a, b, s = torch.randn(2, 3), torch.randn(3, 2), torch.randn(2), torch.randn(3, 2)
    found = torch.vmap(lambda x, a, b, s: f(x, [a, b], s=s), (1, 0, None, 0))(x, a, b, s)
    torch.testing.assert_close(found, (x.T * 2 + a + b + s, x.T))
    assert seen[0] == ((3, "error"), (1, [0, None], None, 0), 2)


@pytest.mark.parametrize("out_dims", [0, (0, None), (0, 1)])
def test_function_says_where_the_batch_is(out_dims):
    @opkit.op("t::two", shapes="n -> n, n")
    def two(x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, x * 3

    def rule(info, in_dims, x):
        y = x.movedim(in_dims[0], 0)
        z = {0: y * 3, (0, None): y[0] * 3, (0, 1): (y * 3).T}[out_dims]
        return (y * 2, z), out_dims

    two.register_vmap(rule)
    x = torch.randn(4, 3)
    first, second = torch.vmap(two)(x)
    torch.testing.assert_close(first, x * 2)
    torch.testing.assert_close(second, (x[:1].expand(4, 3) if out_dims == (0, None) else x) * 3)


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (
            "expanded",
            "found 'expanded'; expected 'sequential' .*'elementwise'.*or a function.*Did you mean 'expand'",
        ),
        (3, "found 3; expected 'sequential'"),
        (
            lambda info, x: x,
            r"found .*lambda.* with the signature \(info, x\); expected \(info, in_dims, x, y, k\)",
        ),
    ],
)
def test_rule_that_cannot_work_is_refused(plain, rule, text):
    with pytest.raises(opkit.RegistrationError, match=f"registering a vmap rule of t::plain: {text}"):
        plain.register_vmap(rule)


@pytest.mark.parametrize("choice", ["expand", "elementwise"])
def test_choice_that_the_shape_line_forbids_is_refused(choice):
    @opkit.op("t::f", shapes="n, *b -> *b")
    def f(x: Tensor, y: Tensor) -> Tensor:
        return y * x.sum()

    with pytest.raises(
        opkit.RegistrationError, match=rf"found '{choice}'.*but x is 'n'. Write '\*b n' there"
    ):
        f.register_vmap(choice)
    assert f.register_vmap("sequential")


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        (lambda x: x, "returned Tensor; expected two"),
        (lambda x: (x, x, 0), "returned 3 values; expected two"),
        (lambda x: ((x, x), 0), "returned tuple as out; expected a Tensor"),
        (lambda x: (x, (0, 0)), "returned 2 out_dims for 1 outputs; expected one each"),
    ],
)
def test_function_that_returns_something_else_is_reported(plain, returned, text):
    plain.register_vmap(lambda info, in_dims, x, y, k: returned(x))
    with pytest.raises(opkit.VmapError, match=f"mapping t::plain .*its rule .*lambda.* {text}"):
        torch.vmap(plain)(X, X)


# ---------------------------------------------------------------- without a rule


def test_op_without_a_rule_is_called_per_sample_and_warns_once(plain):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(3):
            torch.testing.assert_close(torch.vmap(plain, (1, None))(X, W), X.movedim(1, 0) * 2 + W)
    assert len(found) == 1
    assert "mapping t::plain with torch.vmap over x calls it once per sample" in str(found[0].message)
    assert "it has no shape line" in str(found[0].message)
    assert "register_vmap with 'sequential', 'expand', 'elementwise'" in str(found[0].message)
    assert found[0].filename == __file__


def test_batch_of_what_the_shape_line_has_once_is_a_loop(norm):
    with pytest.warns(UserWarning, match=r"its shape line has no '\*b' for w"):
        found = torch.vmap(norm)(X, torch.stack([W] * 4))
    torch.testing.assert_close(found.y, norm(X, W).y)


def test_result_without_a_batch_is_a_loop():
    @opkit.op("t::weight_grad", shapes="*b n, *b n -> *b n, n")
    def weight_grad(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return x * g, (x * g).flatten(0, -2).sum(0)

    with pytest.warns(UserWarning, match=r"its shape line has no '\*b' for out1"):
        found = torch.vmap(weight_grad)(X, X)
    torch.testing.assert_close(found, (X * X, (X * X).sum(1)))


def test_samples_of_different_size_are_refused():
    @opkit.op("t::nonzero", shapes="n -> ?m:int64")
    def nonzero(x: Tensor) -> Tensor:
        return x.nonzero().flatten()

    nonzero.register_vmap("sequential")
    with pytest.raises(
        opkit.VmapError, match=r"mapping t::nonzero .* returned as out \(2,\) and \(1,\); expected the"
    ):
        torch.vmap(nonzero)(torch.tensor([[1, 1, 0], [0, 1, 0]]))


@pytest.mark.parametrize("rule", ["sequential", "expand", None])
def test_batch_of_no_samples_has_shapes(rule):
    @opkit.op("t::f", shapes="*b n -> *b n, *b:int64")
    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, x.argmax(-1)

    if rule:
        f.register_vmap(rule)
    first, second = torch.vmap(f, 1)(torch.randn(2, 0, 3))
    assert (first.shape, second.shape, second.dtype) == ((0, 2, 3), (0, 2), torch.int64)


# ---------------------------------------------------------------- mutation


@pytest.fixture(params=["derived", "sequential", "expand", "elementwise"])
def scale_(request):
    @opkit.op("t::scale_", shapes="*b, *b -> ", mutates_args=("x",))
    def scale_(x: Tensor, by: Tensor) -> None:
        x.mul_(by)

    if request.param != "derived":
        scale_.register_vmap(request.param)
    return scale_


def test_mutation_is_seen_by_the_caller(scale_):
    for _ in range(2):
        x, by = torch.randn(2, 3, 4), torch.randn(2, 4)
        expected = x * by[:, None]
        torch.vmap(lambda x, by: (scale_(x, by), x)[1], (1, None))(x, by)
        torch.testing.assert_close(x, expected)


def test_mutation_of_what_the_samples_share_is_refused(scale_):
    x = torch.randn(2, 4)
    with pytest.raises(
        opkit.VmapError, match=r"mapping t::scale_ .*mutates x, of which there is one for all samples"
    ):
        torch.vmap(scale_, (None, 0))(x, torch.randn(3, 2, 4))


def test_mutation_under_vmap_counts_as_a_version():
    @opkit.op("t::double_", shapes="*b -> ", mutates_args=("x",))
    def double_(x: Tensor) -> None:
        x.mul_(2)

    b, w = torch.ones(2, 3), torch.ones(2, 3, requires_grad=True)
    y = w * b
    torch.vmap(lambda b: (double_(b), b)[1])(b)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---------------------------------------------------------------- random numbers


@pytest.fixture(params=["derived", "sequential"])
def noise(request):
    @opkit.op("t::noise", shapes="*b -> *b", tags=[torch.Tag.nondeterministic_seeded])
    def noise(x: Tensor) -> Tensor:
        return x + torch.rand_like(x)

    if request.param != "derived":
        noise.register_vmap(request.param)
    return noise


def test_randomness_must_be_said(noise):
    with pytest.raises(
        opkit.VmapError, match='mapping t::noise .*draws random numbers.*randomness="different"'
    ):
        torch.vmap(noise)(X)


def test_randomness_same_and_different(noise):
    zeros = torch.zeros(3, 4)
    different = torch.vmap(noise, randomness="different")(zeros)
    assert not (different[0] == different[1]).any()
    same = torch.vmap(noise, randomness="same")(zeros)
    assert (same[0] == same[1]).all()
    assert not (torch.vmap(noise, randomness="same")(zeros) == same).any()


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_randomness_of_a_tensor_that_is_not_batched(noise, randomness):
    found = torch.vmap(lambda i: noise(torch.zeros(4)), randomness=randomness)(torch.zeros(3))
    assert found.shape == (3, 4)
    assert bool((found[0] == found[1]).all()) == (randomness == "same")


def test_randomness_of_nested_maps(noise):
    def run(outer, inner):
        return torch.vmap(torch.vmap(noise, randomness=inner), randomness=outer)(torch.zeros(2, 3, 4))

    found = run("different", "same")
    assert (found[:, 0] == found[:, 1]).all()
    assert not (found[0] == found[1]).any()


# ---------------------------------------------------------------- results that are no tensors


def test_numbers_and_absent_results_must_be_those_of_every_sample():
    @opkit.op("t::count")
    def count(x: Tensor, with_sum: bool = False) -> tuple[Tensor, int, Tensor | None]:
        return x * 2, int((x > 0).sum()), x.sum() if with_sum else None

    count.register_vmap("sequential")
    numbers = []

    def run(x, with_sum):
        doubled, number, total = count(x, with_sum)
        numbers.append((number, total is None))
        return doubled if total is None else doubled + total

    x = torch.tensor([[1.0, -1.0], [-2.0, 3.0]])
    torch.testing.assert_close(torch.vmap(lambda x: run(x, False))(x), x * 2)
    torch.testing.assert_close(torch.vmap(lambda x: run(x, True))(x), x * 2 + x.sum(1, keepdim=True))
    assert numbers == [(1, True), (1, False)]
    with pytest.raises(
        opkit.VmapError, match="its samples returned as out1 1 and 2; expected the same for every sample"
    ):
        torch.vmap(lambda x: run(x, False))(x.abs() - torch.tensor([[0, 5], [0, 0]]))


def test_kernel_is_never_given_integers_that_are_made_up():
    """It may take them for places; where no tensors can be made up, the first real ones are the test."""
    seen = []

    @opkit.op("t::pick", shapes="*b n, *b -> *b")
    def pick(x: Tensor, at: Tensor) -> Tensor:
        return x.gather(-1, at.unsqueeze(-1)).squeeze(-1)

    pick.register_autograd(opkit.from_reference)

    @pick.register_kernel("cpu")
    def _(x, at):
        seen.append(at.tolist())
        return pick.reference(x, at)

    x, at = torch.arange(6.0).reshape(2, 3), torch.tensor([2, 2])
    grads = torch.vmap(torch.func.grad(pick))(x, at)
    assert grads.tolist() == [[0.0, 0.0, 1.0]] * 2
    assert {value for one in seen for value in (one if isinstance(one, list) else [one])} == {2}

    @opkit.op("t::shares", shapes="*b n, *b -> *b")
    def shares(x: Tensor, at: Tensor) -> Tensor:
        return x.sum() + 0 * x[..., 0] + at

    shares.register_autograd(opkit.from_reference)
    with pytest.raises(opkit.VmapError):
        torch.vmap(torch.func.grad(shares))(x, at)
