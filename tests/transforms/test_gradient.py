from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import opkit

pytestmark = pytest.mark.usefixtures("registry")


@pytest.fixture
def square():
    @opkit.op("t::square", shapes="*b -> *b")
    def square(x: Tensor) -> Tensor:
        return x * x

    return square


def leaf(*values):
    return torch.tensor(values or [3.0], requires_grad=True)


# ---------------------------------------------------------------- without a formula


def test_backward_without_a_formula_raises_and_names_the_op():
    @opkit.op("t::f", shapes="*b -> *b")
    def f(x: Tensor) -> Tensor:
        return x * x

    y = f(leaf())
    assert y.requires_grad
    assert y.grad_fn.name() == "fBackward"
    with pytest.raises(
        opkit.GradientError, match=r"differentiating t::f: it has no gradient formula. Register one"
    ) as caught:
        y.sum().backward()
    assert caught.value.op == "t::f"


def test_compiled_backward_without_a_formula_raises_and_names_the_op():
    @opkit.op("t::f", shapes="*b -> *b")
    def f(x: Tensor) -> Tensor:
        return x * x

    with pytest.raises(Exception, match="differentiating t::f: it has no gradient formula"):
        torch.compile(lambda x: f(x), fullgraph=True, backend="aot_eager")(leaf()).sum().backward()


@pytest.mark.parametrize("formula", [False, True], ids=["no formula", "formula"])
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_nothing_is_recorded_where_gradients_are_off(square, guard, formula):
    if formula:
        square.register_autograd(opkit.from_reference)
    with guard():
        y = square(leaf())
    assert not y.requires_grad
    assert y.tolist() == [9]


def test_formula_registered_later_replaces_the_earlier_one():
    @opkit.op("t::f", shapes="*b -> *b")
    def f(x: Tensor) -> Tensor:
        return x * x

    for factor in (2, 3):
        f.register_autograd(lambda ctx, g: g * factor)
        x = leaf()
        f(x).sum().backward()
        assert x.grad.item() == factor


# ---------------------------------------------------------------- several kinds of autograd


@pytest.fixture(params=["function", "op", "from_reference"])
def sine(request):
    """An op whose gradient is given in each form."""

    @opkit.op("t::sine", shapes="*b -> *b")
    def sine(x: Tensor, k: float) -> Tensor:
        return (x * k).sin()

    @opkit.op("t::sine_backward", shapes="*b, *b -> *b")
    def sine_backward(g: Tensor, x: Tensor, k: float) -> Tensor:
        return g * (x * k).cos() * k

    def save(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.k = inputs[1]

    if request.param == "function":
        sine.register_autograd(lambda ctx, g: (g * (ctx.saved_tensors[0] * ctx.k).cos() * ctx.k, None), save)
    elif request.param == "op":
        sine.register_autograd(sine_backward, saves=("x", "k"))
    else:
        sine.register_autograd(opkit.from_reference)
    return sine


def test_saved_tensors_hooks_see_what_is_saved(sine):
    x, packed = leaf(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        y = sine(x, 2.0)
    assert [t.tolist() for t in packed] == [[3]]
    y.backward()
    torch.testing.assert_close(x.grad, 2 * (2 * x.detach()).cos())


def test_saved_tensors_may_be_kept_on_the_cpu(sine):
    x = leaf()
    with torch.autograd.graph.save_on_cpu():
        y = sine(x, 2.0)
    y.backward()
    torch.testing.assert_close(x.grad, 2 * (2 * x.detach()).cos())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_calls_have_their_gradients(sine, reentrant):
    x = leaf()
    y = torch.utils.checkpoint.checkpoint(lambda x: sine(sine(x, 2.0), 3.0), x, use_reentrant=reentrant)
    y.backward()
    expected = torch.autograd.grad(((x * 2).sin() * 3).sin(), x)
    torch.testing.assert_close((x.grad,), expected)


def test_backward_may_run_in_many_threads(sine):
    x = torch.randn(8, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad((x * 2).sin().sum(), x)[0]
    y = sine(x, 2.0).sum()

    def derive(_):
        shared = torch.autograd.grad(y, x, retain_graph=True)[0]
        own = torch.autograd.grad(sine(x, 2.0).sum(), x)[0]
        return shared, own

    with ThreadPoolExecutor(4) as pool:
        for shared, own in pool.map(derive, range(40)):
            torch.testing.assert_close(shared, expected)
            torch.testing.assert_close(own, expected)


def test_compiled_autograd_is_right_for_every_value_and_formula(sine):
    from torch._dynamo import compiled_autograd
    from torch._dynamo.utils import counters

    def derive(k):
        x = leaf()
        with compiled_autograd._enable(torch.compile(backend="aot_eager")):
            sine(x * 2, k).backward()
        expected = 2 * k * (2 * x.detach() * k).cos()
        return x.grad / expected

    before = counters["compiled_autograd"]["captures"]
    for k in (2.0, 3.0, 2.0):
        torch.testing.assert_close(derive(k), torch.ones(1))
    assert counters["compiled_autograd"]["captures"] > before
    sine.register_autograd(
        lambda ctx, g: (g * ctx.factor, None), lambda ctx, inputs, output: setattr(ctx, "factor", inputs[1])
    )
    expected = 3 / (3 * torch.tensor([18.0]).cos())
    torch.testing.assert_close(derive(3.0), expected)


def test_compiled_autograd_without_a_formula_raises():
    from torch._dynamo import compiled_autograd

    @opkit.op("t::f", shapes="*b -> *b")
    def f(x: Tensor) -> Tensor:
        return x * x

    y = f(leaf())
    with compiled_autograd._enable(torch.compile(backend="eager")):
        with pytest.raises(Exception, match="differentiating t::f: it has no gradient formula"):
            y.backward()


def test_retained_graph_can_be_walked_twice(square):
    square.register_autograd(opkit.from_reference)
    x = leaf()
    y = square(x).sum()
    y.backward(retain_graph=True)
    y.backward()
    assert x.grad.item() == 12


def test_argument_used_twice_gets_both_gradients():
    @opkit.op("t::mul", shapes="*b, *b -> *b")
    def mul(x: Tensor, y: Tensor) -> Tensor:
        return x * y

    mul.register_autograd(opkit.from_reference)
    x = leaf()
    mul(x, x).sum().backward()
    assert x.grad.item() == 6


def test_output_that_setup_context_marks_has_no_gradient():
    @opkit.op("t::f", shapes="n -> n, n, n")
    def f(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x * 2, x * 3, x * 4

    def save(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])

    f.register_autograd(lambda ctx, a, b, c: a * 2, save, non_differentiable=("out2",))
    assert [y.requires_grad for y in f(leaf())] == [True, False, False]


# ---------------------------------------------------------------- gradients that cannot be


@pytest.fixture
def mul():
    @opkit.op("t::mul", shapes="n, n -> n")
    def mul(x: Tensor, k: float, weight: Tensor) -> Tensor:
        return x * k * weight

    return mul


@pytest.mark.parametrize(
    ("grads", "text"),
    [
        (
            lambda g: (g, None, g[:1]),
            r"one of shape \(1,\) as the gradient of weight; expected \(2,\), that of",
        ),
        (lambda g: (g[None, :, None], None, g), r"one of shape \(1, 2, 1\) as the gradient of x"),
        (
            lambda g: (g * 1j, None, g),
            "one of dtype torch.complex64 as the gradient of x; expected a real one",
        ),
        (
            lambda g: (g.to("meta"), None, g),
            "one on meta as the gradient of x; expected cpu, where the argument",
        ),
        (lambda g: (g, g, g), "Tensor as the gradient of k; expected None, as it is not a tensor"),
        (lambda g: (g, 1.0, g), "float 1.0 as the gradient of k"),
        (lambda g: (g, None, 0.0), "float 0.0 as the gradient of weight; expected a Tensor or None"),
        (lambda g: (g, None, [g]), "list as the gradient of weight"),
    ],
    ids=[
        "shape",
        "more dimensions",
        "dtype",
        "device",
        "of a number",
        "number of a number",
        "number",
        "list",
    ],
)
def test_gradient_that_cannot_be_is_reported_by_name(mul, grads, text):
    mul.register_autograd(lambda ctx, g: grads(g))
    x = leaf(1.0, 2.0)
    with pytest.raises(opkit.GradientError, match=f"differentiating t::mul: the formula returned {text}"):
        mul(x, 2.0, x).sum().backward()


def test_gradient_that_torch_can_bring_to_the_argument_is_taken(mul):
    mul.register_autograd(lambda ctx, g: (g.double(), None, torch.stack([g, g])))
    x, w = leaf(1.0, 2.0), leaf(1.0, 2.0)
    mul(x, 2.0, w).sum().backward()
    assert (x.grad.tolist(), x.grad.dtype, w.grad.tolist()) == ([1, 1], torch.float32, [2, 2])


def test_gradient_in_a_list_is_reported_by_its_place():
    @opkit.op("t::total")
    def total(xs: list[Tensor]) -> Tensor:
        return xs[0].sum() + xs[1].sum()

    x = leaf(1.0, 2.0)
    total.register_autograd(lambda ctx, g: ([g.expand(2), g.expand(3)],))
    with pytest.raises(opkit.GradientError, match=r"one of shape \(3,\) as the gradient of xs\[1\]"):
        total([x, x]).backward()
    total.register_autograd(lambda ctx, g: (3.0,))
    with pytest.raises(
        opkit.GradientError, match="float 3.0 as the gradient of xs; expected a list of 2, one"
    ):
        total([x, x]).backward()


def test_compiled_autograd_takes_the_formula_registered_last():
    from torch._dynamo import compiled_autograd

    @opkit.op("t::f", shapes="n -> n")
    def f(x: Tensor) -> Tensor:
        return x.clone()

    for factor in (2.0, 3.0, 5.0, 7.0, 11.0):
        f.register_autograd(lambda ctx, grad, factor=factor: grad * factor)
        x = torch.ones(3, requires_grad=True)
        with compiled_autograd._enable(torch.compile(backend="aot_eager", dynamic=False)):
            f(x).sum().backward()
        assert x.grad.tolist() == [factor] * 3


def test_compiled_autograd_knows_lists_by_their_lengths():
    from torch._dynamo import compiled_autograd

    @opkit.op("t::two", shapes="[n], [n] -> n")
    def two(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
        return sum(xs) * 2 + sum(ys) * 3

    @opkit.op("t::two_backward", shapes="n, [n], [n] -> [n]:xs, [n]:ys")
    def two_backward(g: Tensor, xs: list[Tensor], ys: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return [g * 2 for _ in xs], [g * 3 for _ in ys]

    two.register_autograd(two_backward, saves=("xs", "ys"))
    for counts in ((1, 2), (2, 1), (1, 2)):
        xs, ys = ([torch.ones(2, requires_grad=True) for _ in range(n)] for n in counts)
        with compiled_autograd._enable(torch.compile(backend="aot_eager", dynamic=False)):
            two(xs, ys).sum().backward()
        assert [x.grad[0].item() for x in xs] == [2] * counts[0]
        assert [y.grad[0].item() for y in ys] == [3] * counts[1]


def test_formula_that_raises_in_compiled_autograd_is_right_afterwards():
    from torch._dynamo import compiled_autograd

    raising = [True]

    @opkit.op("t::f", shapes="n -> n")
    def f(x: Tensor) -> Tensor:
        return x * x

    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        if raising[0]:
            raise ValueError("not now")
        return 2 * grad * x

    f.register_autograd(backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
    x = torch.full((2,), 3.0, requires_grad=True)
    y = f(x).sum()
    with pytest.raises(Exception, match="not now"):  # noqa: SIM117
        with compiled_autograd._enable(torch.compile(backend="eager")):
            y.backward(retain_graph=True)
    raising[0] = False
    x.grad = None
    y.backward()
    assert type(x.grad) is Tensor
    assert x.grad.tolist() == [6, 6]


@pytest.mark.parametrize("form", ["function", "op"])
def test_kernel_that_consumes_its_list_changes_no_gradient(form):
    @opkit.op("t::total", shapes="[n] -> n")
    def total(xs: list[Tensor]) -> Tensor:
        result = xs.pop() * 1
        while xs:
            result = result + xs.pop()
        return result

    @opkit.op("t::total_backward", shapes="n, [n] -> [n]:xs")
    def total_backward(g: Tensor, xs: list[Tensor]) -> list[Tensor]:
        return [g * 1 for _ in xs]

    if form == "op":
        total.register_autograd(total_backward, saves=("xs",))
    else:
        total.register_autograd(lambda ctx, g: [g] * 2)
    for _ in range(2):
        xs = [torch.ones(2, requires_grad=True) for _ in range(2)]
        total(xs).sum().backward()
        assert [x.grad.tolist() for x in xs] == [[1, 1], [1, 1]]


CELL = """
@opkit.op("t::f_backward", shapes="n -> n")
def f_backward(g: Tensor) -> Tensor:
    return g * {factor}
"""


def run_cell(text):
    names = {"opkit": opkit, "Tensor": Tensor, "__name__": "cell"}
    exec(compile(text, "<cell>", "exec"), names)
    return names["f_backward"]


@pytest.fixture
def clone():
    @opkit.op("t::f", shapes="n -> n")
    def f(x: Tensor) -> Tensor:
        return x.clone()

    return f


def test_formula_defined_again_is_the_one_that_is_called(clone):
    clone.register_autograd(run_cell(CELL.format(factor=2)))

    def gradient():
        x = torch.ones(1, requires_grad=True)
        clone(x).sum().backward()
        return x.grad.item()

    assert [gradient(), gradient()] == [2, 2]
    kept = clone(y := torch.ones(1, requires_grad=True))
    run_cell(CELL.format(factor=3))
    assert gradient() == 3
    kept.sum().backward()
    assert y.grad.item() == 3


def test_formula_defined_again_with_another_default_takes_that(clone):
    cell = CELL.format(factor="k").replace("g: Tensor", "g: Tensor, k: float = 2.0")
    clone.register_autograd(run_cell(cell))
    for default in (2.0, 5.0):
        run_cell(cell.replace("2.0", str(default)))
        for _ in range(2):
            x = torch.ones(1, requires_grad=True)
            clone(x).sum().backward()
            assert x.grad.item() == default


def test_formula_defined_again_with_another_argument_is_refused(clone):
    cell = CELL.format(factor=2)
    clone.register_autograd(run_cell(cell))
    for _ in range(2):
        y = clone(torch.ones(1, requires_grad=True))
    run_cell(cell.replace("g: Tensor", "g: Tensor, k: float"))
    with pytest.raises(TypeError, match=r"calling t::f_backward: argument 'k' is missing"):
        y.sum().backward()


def test_compiled_autograd_makes_zeros_of_the_size_at_hand():
    from torch._dynamo import compiled_autograd

    @opkit.op("t::f", shapes="n, m -> n, m:w")
    def f(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, w.clone()

    def save(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])

    f.register_autograd(lambda ctx, g, h: (g * 2 + h.numel(), None), save)
    for size, dtype in ((3, torch.float32), (4, torch.float32), (5, torch.float64), (3, torch.float32)):
        x = torch.ones(2, requires_grad=True)
        y, _ = f(x, torch.ones(size, dtype=dtype))
        with compiled_autograd._enable(torch.compile(backend="aot_eager")):
            y.sum().backward()
        assert x.grad.tolist() == [2 + size] * 2


@pytest.mark.parametrize("through", ["op", "overload"])
def test_op_may_be_defined_again_in_a_call_of_it(through):
    from opkit import _registry

    def define(factor):
        @opkit.op("t::f", shapes="n -> n")
        def f(x: Tensor) -> Tensor:
            if again:
                again.clear()
                _registry.remove("t::f")
                define(factor + 1)
            return x * factor

        return f

    again: list[int] = []
    f = define(2.0)
    for _ in range(3):
        f(torch.ones(2))
    again.append(1)
    call = f if through == "op" else torch.ops.t.f
    assert call(torch.ones(2)).tolist() == [2, 2]
    assert opkit.get("t::f")(torch.ones(2)).tolist() == [3, 3]
