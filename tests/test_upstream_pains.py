# ruff: noqa: UP045  (Optional is what the reports have)
"""What users of torch's custom ops have reported, one situation a test, named after the issue."""

from __future__ import annotations

import enum
import importlib
import inspect
import io
import os
import subprocess
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Optional

import pytest
import torch
from torch import Tensor

import opkit
from opkit import _config
from opkit.cpp import compilers
from opkit.dispatch import preference

pytestmark = pytest.mark.usefixtures("registry")


# ---------------------------------------------------------------- what a kernel returns and writes


def test_pytorch_181851_meta_function_with_other_arguments_is_refused_at_once():
    @opkit.op("t::foo")
    def foo(x: Tensor, n: int) -> Tensor:
        return x.clone().repeat(n)

    with pytest.raises(
        opkit.RegistrationError,
        match=r"registering a meta function of t::foo: found .*; expected the op's arguments \(x, n\) in this order",
    ):
        foo.register_fake(lambda x: x.clone())
    with pytest.raises(opkit.RegistrationError, match="in this order"):  # pytorch#146804
        foo.register_fake(lambda n, x: x.clone())


def test_pytorch_181851_meta_function_with_other_outputs_is_found_out_in_eager_mode():
    @opkit.op("t::foo")
    def foo(x: Tensor, n: int) -> Tensor:
        return x.clone().repeat(n)

    foo.register_fake(lambda x, n: x.clone())  # forgets to repeat
    with pytest.raises(
        opkit.OutputError,
        match=r"t::foo: the reference kernel returned out with the shape \(6,\); expected \(3,\) by the meta function",
    ):
        foo(torch.randn(3), 2)


def test_pytorch_134278_output_that_is_an_argument_names_kernel_output_and_argument():
    @opkit.op("t::flash_attn_bwd", shapes="n, n -> n, n")
    def flash_attn_bwd(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return grad * x, grad

    with pytest.raises(
        opkit.OutputError,
        match="calling t::flash_attn_bwd: the reference kernel returned as out1 a tensor that shares storage with "
        r"argument grad; expected fresh storage, .* Return a copy: \.clone\(\)",
    ):
        flash_attn_bwd(torch.ones(2), torch.ones(2))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_pytorch_180620_view_of_a_mutated_argument_is_refused_in_every_mode(mode):
    @opkit.op("t::bar", mutates_args=("buf",), shapes="m -> n")
    def bar(buf: Tensor, n: int) -> Tensor:
        buf[:n].fill_(1.0)
        return buf[:n]

    with (
        mode(),
        pytest.raises(
            opkit.OutputError, match="returned as out a tensor that shares storage with argument buf"
        ),
    ):
        bar(torch.zeros(100), 10)


def test_pytorch_137437_contiguous_argument_is_contiguous_in_compiled_code():
    seen = []

    @opkit.op("t::attention", shapes="*b n, *b n -> *b n")
    def attention(q: Tensor, k: Tensor) -> Tensor:
        seen.append((q.stride(), k.stride()))
        return q * k

    weight = torch.randn(2 * 128, 128)

    def forward(x):
        q, k = (x @ weight.t()).reshape(2, 49, 2, 4, 32).permute(2, 0, 3, 1, 4)
        return attention(q.reshape(2, 4, 7, 7, 32).contiguous(), k.reshape(2, 4, 7, 7, 32).contiguous()) + 1

    x = torch.randn(2, 7, 7, 128)
    torch.testing.assert_close(torch.compile(forward, fullgraph=True)(x), forward(x))
    assert set(seen) == {((6272, 1568, 224, 32, 1),) * 2}


@pytest.mark.parametrize("shapes", ["n m -> m n", None], ids=["shape line", "meta function"])
def test_pytorch_149732_kernel_with_other_strides_never_meets_inductors_assertion(shapes):
    @opkit.op("t::transpose", shapes=shapes)
    def transpose(x: Tensor) -> Tensor:
        return x.clone().t()

    if shapes is None:
        transpose.register_fake(lambda x: x.new_empty(x.shape[1], x.shape[0]))
    x = torch.randn(3, 4)
    assert torch.equal(torch.compile(lambda x: transpose(x) + 1, fullgraph=True)(x), x.t() + 1)
    assert transpose(x).stride() == (3, 1)


def test_pytorch_149732_shape_other_than_the_meta_functions_names_the_op():
    @opkit.op("t::half")
    def half(x: Tensor) -> Tensor:
        return x[: len(x) // 2].clone()

    half.register_fake(torch.empty_like)
    with pytest.raises(
        opkit.OutputError, match=r"t::half: the reference kernel returned out with the shape \(2,\)"
    ):
        torch.compile(lambda x: half(x) + 1, fullgraph=True)(torch.ones(4))


def test_undeclared_mutation_is_named_where_calls_are_validated(monkeypatch):
    monkeypatch.setenv("OPKIT_VALIDATE", "1")
    _config.refresh()

    @opkit.op("t::normalize", shapes="n -> n")
    def normalize(x: Tensor) -> Tensor:
        return x.div_(x.sum()).clone()

    with pytest.raises(opkit.OutputError, match="the reference kernel wrote into argument x"):
        normalize(torch.tensor([1.0, 3.0]))


# ---------------------------------------------------------------- signatures


class Layout(enum.Enum):
    ROWS = "rows"
    COLUMNS = "columns"


class Split(NamedTuple):
    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class Stats:
    mean: Tensor
    count: Optional[Tensor]


def compiled(call):
    return torch.compile(call, fullgraph=True, backend="aot_eager")


def test_pytorch_142353_enum_and_list_of_str_as_arguments():
    @opkit.op("t::f", shapes="n -> n")
    def f(x: Tensor, names: list[str], layout: Layout = Layout.ROWS) -> Tensor:
        assert isinstance(layout, Layout)
        return x + len("".join(names)) + (layout is Layout.COLUMNS)

    x = torch.zeros(2)
    for call in (f, compiled(lambda *args: f(*args))):
        assert call(x, ["ab", "c"], Layout.COLUMNS).tolist() == [4, 4]
        assert call(x, ["ab", "c"]).tolist() == [3, 3]


def test_pytorch_183957_concrete_enum_is_checked_and_comes_back_as_its_member():
    @opkit.op("t::f", shapes="n -> n")
    def f(x: Tensor, layout: Layout) -> Tensor:
        return x + (layout is Layout.COLUMNS)

    assert compiled(lambda x: f(x, Layout.COLUMNS))(torch.zeros(1)).tolist() == [1]
    with pytest.raises(
        opkit.ArgumentError, match="layout is 'diagonal'; expected one of Layout.ROWS, Layout.COLUMNS"
    ):
        f(torch.zeros(1), "diagonal")


def test_pytorch_127621_tuple_of_fixed_length_arrives_as_a_tuple():
    seen = []

    @opkit.op("t::f")
    def f(x: tuple[Tensor, Tensor], k: tuple[int, int]) -> Tensor:
        seen.append((type(x), type(k)))
        return x[0] * k[0] + x[1] * k[1]

    f.register_fake(lambda x, k: torch.empty_like(x[0]))
    x = (torch.ones(2), torch.ones(2))
    for call in (f, compiled(lambda *args: f(*args))):
        assert call(x, (2, 3)).tolist() == [5, 5]
        assert call(list(x), [2, 3]).tolist() == [5, 5]
    assert set(seen) == {(tuple, tuple)}
    with pytest.raises(opkit.ArgumentError, match="expected a tuple of 2 values"):
        f(x, (1, 2, 3))


@pytest.mark.parametrize(
    "annotation",
    [
        Optional[list[Tensor]],
        Optional[list[Optional[Tensor]]],
        list[Optional[Tensor]],
        Optional[Sequence[Tensor]],
    ],
    ids=str,
)
def test_pytorch_160094_every_list_of_tensors(annotation):
    def f(x):
        return torch.ones(2) * sum(1 for t in x or () if t is not None)

    f.__annotations__ = {"x": annotation, "return": Tensor}
    op = opkit.op("t::f")(f)
    op.register_fake(lambda x: torch.empty(2))
    for call in (op, compiled(lambda x: op(x))):
        assert call([torch.ones(1), torch.ones(2)]).tolist() == [2, 2]


def test_pytorch_46187_named_tuple_is_returned_from_every_call():
    @opkit.op("t::f", shapes="n -> n, n")
    def f(x: Tensor) -> Split:
        return Split(x - 1, x + 1)

    for call in (f, compiled(lambda x: f(x))):
        assert type(call(torch.ones(2))) is Split
    f.register_vmap("sequential")
    assert type(torch.vmap(f)(torch.ones(3, 2))) is Split


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("container", [Split, Stats])
def test_pytorch_150472_program_that_returns_a_container_is_saved(container, strict):
    def f(x):
        return Split(x - 1, x + 1) if container is Split else Stats(x.mean(0, keepdim=True), None)

    f.__annotations__ = {"x": Tensor, "return": container}
    op = opkit.op("t::f")(f)
    op.register_fake(f)

    class Model(torch.nn.Module):
        def forward(self, x):
            return op(x)

    stream = io.BytesIO()
    torch.export.save(torch.export.export(Model(), (torch.ones(3),), strict=strict), stream)
    stream.seek(0)
    assert type(torch.export.load(stream).module()(torch.ones(3))) is container


def test_pytorch_187434_gradients_go_through_a_list_with_holes():
    @opkit.op("t::f")
    def f(x: Tensor) -> list[Optional[Tensor]]:
        return [x * 2, None, x * 3]

    f.register_fake(lambda x: [torch.empty_like(x), None, torch.empty_like(x)])
    f.register_autograd(opkit.from_reference)
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    for call in (f, compiled(lambda x: f(x))):
        first, hole, last = call(x)
        assert hole is None
        assert torch.autograd.grad((first + last).sum(), x)[0].tolist() == [5, 5]


def define_under_future_annotations(tmp_path, monkeypatch, name, text):
    (tmp_path / f"{name}.py").write_text("from __future__ import annotations\nimport opkit, torch\n" + text)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module(name)


def test_pytorch_105157_annotations_from_the_future(tmp_path, monkeypatch):
    text = '@opkit.op("t::f", shapes="n -> n")\ndef f(x: torch.Tensor, k: int = 2) -> torch.Tensor:\n    return x * k\n'
    module = define_under_future_annotations(tmp_path, monkeypatch, "opkit_105157", text)
    assert compiled(lambda x: module.f(x))(torch.ones(2)).tolist() == [2, 2]


def test_pytorch_145481_typing_list_from_the_future(tmp_path, monkeypatch):
    text = """
from typing import List, Optional
@opkit.op("t::f")
def f(xs: List[torch.Tensor], k: Optional[List[int]] = None) -> List[torch.Tensor]:
    return [x + 1 for x in xs]
"""
    module = define_under_future_annotations(tmp_path, monkeypatch, "opkit_145481", text)
    assert str(module.f.schema) == "t::f(Tensor[] xs, SymInt[]? k=None) -> (Tensor[])"
    assert module.f([torch.ones(1)])[0].tolist() == [2]


def test_pytorch_185659_type_that_is_imported_in_a_function(tmp_path, monkeypatch):
    text = """
def make():
    from torch import Tensor as T
    @opkit.op("t::f", shapes="n -> n")
    def f(x: T) -> T:
        return x + 1
    return f
def broken():
    @opkit.op("t::g", shapes="n -> n")
    def g(x: Unknown) -> torch.Tensor: ...
"""
    module = define_under_future_annotations(tmp_path, monkeypatch, "opkit_185659", text)
    assert module.make()(torch.ones(1)).tolist() == [2]
    with pytest.raises(opkit.SchemaError, match="an annotation uses 'Unknown', which is not defined there"):
        module.broken()


@pytest.mark.parametrize("number", [176078, 180618])
def test_pytorch_176078_and_180618_optional_mutated_argument_is_refused_at_once(number):
    with pytest.raises(
        opkit.SchemaError, match="mutates_args names 'out', .* that is always given can be mutated"
    ):

        @opkit.op("t::f", mutates_args=("out",))
        def f(x: Tensor, out: Optional[Tensor] = None) -> None: ...

    with pytest.raises(
        opkit.SchemaError, match=r"its argument out is Tensor\(a!\)\? out=None; only a Tensor"
    ):
        opkit.declare("t::f(Tensor x, Tensor(a!)? out=None) -> ()")


def test_pytorch_155641_op_has_the_annotations_of_its_function():
    @opkit.op("t::f", shapes="n -> n")
    def f(x: Tensor, k: int = 2) -> Tensor:
        """Do it."""
        return x * k

    assert typing.get_type_hints(f) == {"x": Tensor, "k": int, "return": Tensor}
    assert str(inspect.signature(f)) == "(x: 'Tensor', k: 'int' = 2) -> 'Tensor'"
    assert (f.__name__, f.__doc__) == ("f", "Do it.")


# ---------------------------------------------------------------- autocast, effects, layout, DTensor


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_pytorch_137033_op_under_autocast_in_a_compiled_model_with_gradients(backend):
    @opkit.op("t::linear", shapes="*b k, n k -> *b n")
    def linear(x: Tensor, w: Tensor) -> Tensor:
        return x @ w.T

    linear.register_autograd(opkit.from_reference)
    linear.register_autocast("cpu", torch.bfloat16)
    x, w = torch.randn(2, 3), torch.randn(4, 3, requires_grad=True)
    run = torch.compile(lambda x, w: linear(x, w).float().sum(), fullgraph=True, backend=backend)
    with torch.autocast("cpu"):
        assert linear(x, w).dtype == torch.bfloat16
        found = run(x, w)
    found.backward()
    assert w.grad.dtype == torch.float32
    torch.testing.assert_close(w.grad, x.bfloat16().float().sum(0).expand(4, 3), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_pytorch_158414_autocast_rule_and_compile_together_with_keyword_only_tensors(backend):
    @opkit.op("t::conv", shapes="*b n, n -> *b n")
    def conv(x: Tensor, *, w: Tensor, k: float = 1.0) -> Tensor:
        return x * w * k

    conv.register_autocast("cpu", torch.bfloat16)

    @torch.compile(fullgraph=True, backend=backend)
    def run(x, w):
        with torch.autocast("cpu"):
            return conv(x, w=w, k=2.0)

    x, w = torch.randn(2, 3), torch.randn(3)
    torch.testing.assert_close(run(x, w), x.bfloat16() * w.bfloat16() * 2)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_pytorch_121270_call_for_its_effect_only_is_not_removed(backend):
    printed = []

    @opkit.op("t::log", shapes="*b -> ", effects=True)
    def log(x: Tensor, text: str) -> None:
        printed.append(text)

    def run(x):
        log(x, "before")
        y = x.sin()
        log(y, "after")
        return y

    torch.compile(run, fullgraph=True, backend=backend)(torch.ones(2))
    assert printed == ["before", "after"]


@pytest.mark.parametrize("layout", [None, "exact"])
def test_pytorch_148367_and_137979_strides_of_a_product_are_those_of_eager(layout):
    """Inductor pads products of odd sizes, and must not hand the padded strides to the op."""
    seen = []

    @opkit.op("t::look", shapes="*b -> *b", layout=layout)
    def look(x: Tensor) -> Tensor:
        seen.append(x.stride())
        return x * 1

    a, b = torch.randn(7, 5), torch.randn(5, 13)
    for f in (
        lambda a, b: look((a @ b).t()),
        lambda a, b: look((a @ b)[:, ::2]),
        lambda a, b: look((a + 1).t()),
    ):
        seen.clear()
        f(a, b)
        torch.compile(f, fullgraph=True)(a, b)
        assert seen[0] == seen[1]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")
def test_pytorch_167219_mutation_of_a_dtensor_is_refused_before_anything_is_lost():
    import torch.distributed as dist

    @opkit.op("t::scatter_add", shapes="n, n, n:int64 -> ", mutates_args=("y",))
    def scatter_add(x: Tensor, y: Tensor, index: Tensor) -> None:
        y.scatter_add_(0, index, x)

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

        mesh = init_device_mesh("cpu", (1,))
        x, y, index = (
            DTensor.from_local(t, mesh, [Replicate()])
            for t in (torch.ones(3), torch.zeros(3), torch.zeros(3, dtype=int))
        )
        with pytest.raises(
            NotImplementedError, match=r"t.scatter_add.default does not have a sharding strategy"
        ):
            scatter_add(x, y, index)
        with pytest.raises(
            opkit.RegistrationError, match="found an op that mutates y; expected one that mutates nothing"
        ):
            scatter_add.register_sharding(lambda x, y, index: [])
        scatter_add(*(t.to_local() for t in (x, y, index)))
        assert y.to_local().tolist() == [3, 0, 0]
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------- gradients


@pytest.fixture
def numpy_mul():
    """The op of torch's own documentation of custom ops."""

    @opkit.op("t::numpy_mul", shapes="*b -> *b")
    def numpy_mul(x: Tensor, y: float) -> Tensor:
        return torch.from_numpy(x.numpy(force=True) * y).to(x.device)

    def setup_context(ctx, inputs, output):
        _, ctx.y = inputs

    numpy_mul.register_autograd(lambda ctx, grad: (grad * ctx.y, None), setup_context=setup_context)
    return numpy_mul


def test_pytorch_168393_func_grad_of_an_op_with_a_formula(numpy_mul):
    x = torch.randn(3)
    torch.testing.assert_close(torch.func.grad(lambda x: numpy_mul(x, 3.14).sum())(x), torch.full((3,), 3.14))
    per_sample = torch.vmap(torch.func.grad(lambda x: numpy_mul(x, 3.14).sum()))(torch.randn(2, 3))
    torch.testing.assert_close(per_sample, torch.full((2, 3), 3.14))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_pytorch_170834_func_grad_inside_of_a_compiled_function(numpy_mul, backend):
    @torch.compile(fullgraph=True, backend=backend)
    def input_gradients(x):
        return torch.func.grad(lambda x: numpy_mul(x, 2.0).pow(2).sum())(x)

    x = torch.randn(3)
    torch.testing.assert_close(input_gradients(x), 8 * x)


def test_pytorch_179652_jacrev_of_an_op_with_a_formula():
    @opkit.op("t::solve", shapes="*b -> *b")
    def solve(x: Tensor) -> Tensor:
        return x * 2

    solve.register_autograd(
        lambda ctx, grad: grad * 2, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
    )
    torch.testing.assert_close(torch.func.jacrev(solve)(torch.tensor([1.0, 2.0])), torch.eye(2) * 2)


def test_pytorch_131116_forward_mode_formula_that_uses_an_output():
    @opkit.op("t::cube", shapes="*b -> *b, *b")
    def cube(x: Tensor) -> tuple[Tensor, Tensor]:
        return x**3, 3 * x**2

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], output[1])
        ctx.save_for_forward(inputs[0], output[1])

    def backward(ctx, grad_output, grad_saved):
        x, derivative = ctx.saved_tensors
        return grad_output * derivative + 6 * grad_saved * x

    def jvp(ctx, tangent):
        x, derivative = ctx.saved_tensors
        return tangent * derivative, 6 * tangent * x

    cube.register_autograd(backward, setup_context=setup_context)
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    with pytest.raises(opkit.GradientError, match="torch would go on with zeros"):  # torch gives zeros
        torch.func.jvp(cube, (x,), (torch.ones_like(x),))
    cube.register_jvp(jvp, setup_context=setup_context)
    torch.testing.assert_close(torch.func.jvp(cube, (x,), (torch.ones_like(x),))[1], (3 * x**2, 6 * x))
    x.requires_grad_()
    assert torch.autograd.gradcheck(cube, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(cube, (x,), check_fwd_over_rev=True)


def test_pytorch_130282_output_is_marked_non_differentiable():
    @opkit.op("t::top", shapes="n -> 1, 1:int64, n")
    def top(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, index = x.max(0, keepdim=True)
        return value, index, x * 2

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output[1])
        ctx.n = len(inputs[0])

    def backward(ctx, grad, *_):
        return torch.zeros(ctx.n).index_put(tuple(ctx.saved_tensors), grad)

    top.register_autograd(backward, setup_context=setup_context, non_differentiable=("out2",))
    x = torch.tensor([1.0, 3.0, 2.0], requires_grad=True)
    for call in (top, torch.compile(top, fullgraph=True, backend="aot_eager")):
        found = call(x)
        assert [y.requires_grad for y in found] == [True, False, False]
        assert torch.autograd.grad(found[0], x)[0].tolist() == [0, 1, 0]


def test_pytorch_124805_keyword_only_tensor_has_a_gradient():
    @opkit.op("t::scale", shapes="n, n -> n")
    def scale(x: Tensor, *, factor: Tensor) -> Tensor:
        return x * factor

    def backward(ctx, grad):
        x, factor = ctx.saved_tensors
        return grad * factor, grad * x

    scale.register_autograd(
        backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
    )
    x, factor = torch.tensor([2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    for call in (scale, torch.compile(scale, fullgraph=True, backend="aot_eager")):
        assert torch.autograd.grad(call(x, factor=factor), (x, factor)) == (3, 2)
    assert torch.func.grad(lambda f: scale(x, factor=f).sum())(factor.detach()) == 2


def test_pytorch_58509_double_backward_through_a_saved_intermediate_raises():
    @opkit.op("t::bad", shapes="*b -> *b")
    def bad(x: Tensor) -> Tensor:
        return (x * 2) ** 2

    bad.register_autograd(
        lambda ctx, grad: 2 * 2 * ctx.foo * grad,
        lambda ctx, inputs, output: setattr(ctx, "foo", inputs[0] * 2),
    )
    x = torch.rand(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(bad, (x,))
    with pytest.raises(opkit.GradientError, match="differentiating t::bad twice: .*Save the arguments"):
        torch.autograd.gradgradcheck(bad, (x,))


def test_pytorch_76185_intermediates_on_the_context_are_no_constants():
    @opkit.op("t::mine", shapes="*b -> *b")
    def mine(x: Tensor) -> Tensor:
        return x * 2 * 3

    def setup_context(ctx, inputs, output):
        (ctx.inp,) = inputs
        ctx.temp = inputs[0] * 2

    mine.register_autograd(
        lambda ctx, grad: grad * torch.full_like(grad, 3) * ctx.temp / ctx.inp, setup_context=setup_context
    )
    x = torch.rand(10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mine, (x,))
    with pytest.raises(opkit.GradientError, match="differentiating t::mine twice"):
        torch.autograd.gradgradcheck(mine, (x,))


def test_pytorch_137219_number_of_gradients_is_counted_as_the_author_does():
    @opkit.op("t::foo", shapes="n -> n")
    def foo(x: Tensor) -> Tensor:
        return x.sin()

    foo.register_autograd(
        lambda ctx, grad: (), setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
    )
    with pytest.raises(
        opkit.GradientError, match="returned 0 gradients; expected 1, one per argument in order: x"
    ):
        foo(torch.randn(3, requires_grad=True)).sum().backward()


def test_pytorch_102720_vmap_keeps_the_gradient(numpy_mul):
    x = torch.zeros(3, 1, requires_grad=True)
    y = torch.vmap(numpy_mul, (0, None))(x, 2.0)
    assert y.requires_grad
    y.sum().backward()
    assert x.grad.tolist() == [[2], [2], [2]]


def test_gradient_lost_by_a_mutation_raises():
    """`mutates_args` of torch gives the gradient 1 in the first case, and 2 in the second, without a word."""

    @opkit.op("t::double_", shapes="n -> ", mutates_args=["x"])
    def double_(x: Tensor) -> None:
        x.mul_(2)

    w = torch.ones(1, requires_grad=True)
    y = w * 1
    with pytest.raises(opkit.GradientError, match="argument x requires grad and is overwritten"):
        double_(y)
    b = torch.ones(1)
    y = w * b
    double_(b)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---------------------------------------------------------------- mutation in compiled graphs, choice of kernels


def code_of(function, *args):
    """Return the code that Inductor makes of a function."""
    from torch._inductor.utils import run_and_get_code

    with torch.compiler.config.patch(force_disable_caches=True), torch.no_grad():
        _, codes = run_and_get_code(torch.compile(function, fullgraph=True), *args)
    return codes[0][codes[0].index("def call") :]


def test_pytorch_127660_workspace_that_is_an_input_is_not_copied():
    @opkit.op("t::foo", shapes="n, m ->", mutates_args=["workspace"])
    def foo(x: Tensor, workspace: Tensor) -> None:
        workspace.fill_(x.sum())

    x, workspace = torch.ones(4), torch.zeros(3)
    code = code_of(lambda x, w: foo(x * 2, w), x, workspace)
    assert workspace.tolist() == [8, 8, 8]
    assert code.count("empty_strided") == 1  # x * 2
    assert code.count("cpp_fused") == 1


def test_pytorch_131192_view_of_an_input_is_mutated_in_place():
    @opkit.op("t::foo", shapes="() ->", mutates_args=["x"])
    def foo(x: Tensor) -> None:
        x.sin_()

    x = torch.ones(2)
    code = code_of(lambda x: foo(x[0]), x)
    torch.testing.assert_close(
        x, torch.tensor([1.0, 1.0]).where(torch.tensor([False, True]), torch.ones(2).sin())
    )
    assert "empty_strided" not in code
    assert "cpp_fused" not in code


@pytest.mark.skipif(
    torch.__version__.startswith("2.11."), reason="torch 2.11 mixes up inputs that are views of one tensor"
)
def test_pytorch_153389_compiled_mutation_of_views_is_that_of_eager():
    @opkit.op("t::foo_inplace", shapes="n, n ->", mutates_args=["x1", "x2"])
    def foo_inplace(x1: Tensor, x2: Tensor) -> None:
        x1.add_(1)
        x2.add_(2)

    @opkit.op("t::bar_out", shapes="(), (), n n ->", mutates_args=["out"])
    def bar_out(x1_0: Tensor, x2_0: Tensor, out: Tensor) -> None:
        out.copy_(x1_0 + x2_0 + 2)

    def f(x1, x2, out):
        foo_inplace(x1, x2)
        bar_out(x1[0], x2[0], out)
        return out

    def run(x, function):
        out = torch.zeros_like(x)
        function(x[0], x[1], out)
        return x, out

    start = torch.arange(9.0).reshape(3, 3)
    torch.testing.assert_close(
        run(start.clone(), torch.compile(f, fullgraph=True)), run(start.clone(), f), rtol=0, atol=0
    )


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_pytorch_198031_clone_of_what_is_mutated_stays_another_tensor(backend):
    @opkit.op("t::reverse_into", shapes="n, n ->", mutates_args=["dst"])
    def reverse_into(src: Tensor, dst: Tensor) -> None:
        for k in range(len(src)):
            dst[len(src) - 1 - k] = src[k]

    def f(x):
        y = x.clone()
        reverse_into(y, x)
        return x * 2

    x = torch.arange(8.0)
    assert torch.compile(f, backend=backend)(x).tolist() == [14, 12, 10, 8, 6, 4, 2, 0]
    assert x.tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
    both = torch.arange(8.0)
    reverse_into(both, both)
    assert both.tolist() == [7, 6, 5, 4, 3, 2, 1, 0]


def test_vllm_32358_kernel_that_overwrites_its_inputs_behind_a_functional_op():
    @opkit.op("t::silu", shapes="*b n -> *b n")
    def silu(x: Tensor) -> Tensor:
        return torch.nn.functional.silu(x)

    @silu.register_kernel("cpu", backend="vendor", inplace=["x"])
    def _(x):
        return torch.nn.functional.silu(x, inplace=True)

    x = torch.linspace(-1, 1, 8)
    wanted = torch.nn.functional.silu(x + 1)
    torch.testing.assert_close(silu(x + 1), wanted)
    code = code_of(lambda x: silu(x + 1), x)
    assert code.count("empty_strided") == 1  # x + 1, which holds the result then
    assert x[0] == -1


def test_vllm_40628_kernel_that_is_not_batch_invariant_is_not_taken_where_that_is_required():
    @opkit.op("t::norm", shapes="b n -> b n")
    def norm(x: Tensor) -> Tensor:
        return x / x.sum(-1, keepdim=True)

    norm.register_kernel("cpu", lambda x: x / x.sum(-1, keepdim=True), backend="fast", priority=9)
    one_by_one = norm.register_kernel(
        "cpu",
        lambda x: torch.stack([row / row.sum() for row in x]),
        backend="row",
        properties=["batch_invariant"],
    )
    x = torch.rand(3, 4)
    with opkit.require("batch_invariant"):
        assert norm.explain(x).selected == "row"
        assert torch.equal(norm(x), one_by_one(x))
        assert torch.equal(norm(x)[:1], norm(x[:1]))


def test_vllm_33825_and_liger_1416_backends_of_one_op_are_chosen_by_what_they_can_do(monkeypatch):
    @opkit.op("t::gelu", shapes="*b n -> *b n")
    def gelu(x: Tensor) -> Tensor:
        return torch.nn.functional.gelu(x)

    taken = []

    def register(backend, **options):
        gelu.register_kernel(
            "cpu", lambda x: taken.append(backend) or gelu.reference(x), backend=backend, **options
        )

    register("tiled", priority=9, when=lambda x: x.shape[-1] % 8 == 0 or "needs n % 8 == 0")
    register("half", priority=5, dtypes=[torch.bfloat16])
    register("any")
    small, large = torch.ones(3), torch.ones(8)
    for x in (large, small, small.bfloat16()):
        gelu(x)
    assert taken == ["tiled", "any", "half"]
    assert "needs n % 8 == 0" in str(gelu.explain(small))
    monkeypatch.setenv("OPKIT_BACKEND", "half,any")
    _config.refresh()
    preference.refresh()
    gelu(large)
    assert taken.pop() == "any"
    with (
        opkit.use_backend("half", strict=True),
        pytest.raises(opkit.NoKernelError, match="needs bfloat16|dtype"),
    ):
        gelu(large)
    with (
        pytest.raises(opkit.BackendError, match="any, .*half, .*Did you mean 'tiled'"),
        opkit.use_backend("tilde"),
    ):
        gelu(large)


def test_helion_1346_op_is_fused_with_what_is_before_and_behind_it():
    def scale(x: Tensor) -> Tensor:
        return x * x.sigmoid()

    x = torch.linspace(-1, 1, 8)
    fused = opkit.op("t::fused", shapes="*b -> *b", inline=True)(scale)
    opaque = opkit.op("t::opaque", shapes="*b -> *b")(scale)
    found = [code_of(lambda x, op=op: op(x + 1) * 2, x) for op in (fused, opaque)]
    assert [("torch.ops.t." in code, code.count("cpp_fused")) for code in found] == [(False, 1), (True, 2)]


# ---------------------------------------------------------------- export, CUDA graphs, several packages


class Gated(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(torch.ops.t.gate(x)) * 2


@pytest.fixture
def gate():
    @opkit.op("t::gate", shapes="n -> n")
    def gate(x: Tensor) -> Tensor:
        return x + 1

    return gate


def loaded_elsewhere(path, *imports):
    """Run a package of AOTInductor in a process that has imported only what is named."""
    code = f"import torch, {', '.join(['sys', *imports])}\n" + (
        f"found = torch._inductor.aoti_load_package({str(path)!r})(torch.tensor([-2.0, 3.0]))\n"
        "print(found.tolist(), 'opkit' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path.parent), *sys.path])}
    environment["OPKIT_AUTOLOAD"] = "0"  # or torch has opkit look for devices
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


needs_compiler = pytest.mark.skipif(compilers.find_cxx() is None, reason="AOTInductor needs a C++ compiler")


@needs_compiler
@pytest.mark.slow
def test_pytorch_143786_program_with_an_op_runs_without_python_code_of_it(gate, tmp_path):
    """By the reference, of which nothing but torch's own operations is left."""
    program = torch.export.export(Gated(), (torch.ones(2),)).run_decompositions(opkit.decompositions())
    path = tmp_path / "gated.pt2"
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    run = loaded_elsewhere(path)
    assert run.stdout.splitlines()[-1:] == ["[0.0, 8.0] False"], run.stderr


@needs_compiler
@pytest.mark.slow
def test_pytorch_145394_packaged_program_calls_the_op_of_whoever_loads_it(gate, tmp_path):
    path = tmp_path / "gated.pt2"
    torch._inductor.aoti_compile_and_package(
        torch.export.export(Gated(), (torch.ones(2),)), package_path=str(path)
    )
    (tmp_path / "opkit_gate.py").write_text("""
import opkit, torch
@opkit.op("t::gate", shapes="n -> n")
def gate(x: torch.Tensor) -> torch.Tensor:
    return x + 1
""")
    run = loaded_elsewhere(path, "opkit_gate")
    assert run.stdout.splitlines()[-1:] == ["[0.0, 8.0] True"], run.stderr
    run = loaded_elsewhere(path)
    assert "Could not find schema for t::gate" in run.stderr


@pytest.mark.parametrize("tags", [(), (torch.Tag.cudagraph_unsafe,)], ids=["safe", "unsafe"])
def test_pytorch_149782_op_that_a_cuda_graph_cannot_hold_is_told_to_inductor(tags):
    decides = getattr(importlib.import_module("torch._inductor.utils"), "is_cudagraph_unsafe_fx_node", None)
    if decides is None:
        pytest.skip("this torch decides by another function")

    @opkit.op("t::f", shapes="n -> n", tags=tags)
    def f(x: Tensor) -> Tensor:
        return x + 1

    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda x: f(x))(torch.ones(2)).graph
    (node,) = (n for n in graph.nodes if n.target is f.overload)
    assert decides(node) == bool(tags)


@pytest.mark.parametrize("same", [False, True], ids=["two ops", "one op"])
def test_kernel_builder_11_vllm_ascend_1239_metatensor_871_packages_share_a_namespace(
    tmp_path, monkeypatch, same
):
    names = ("one", "one" if same else "two")
    packages = [f"opkit_{which}_{same}" for which in ("first", "second")]
    for package, name in zip(packages, names, strict=True):
        (tmp_path / f"{package}.py").write_text(f"""
import opkit, torch
@opkit.op("t::{name}", shapes="n -> n")
def {name}(x: torch.Tensor) -> torch.Tensor:
    return x + 1
""")
    monkeypatch.syspath_prepend(tmp_path)
    first = importlib.import_module(packages[0])
    if same:
        text = r"declaring t::one: found two definitions, one \(.*first_True.py:3\) and one \(.*second_True.py:3\)"
        with pytest.raises(opkit.DuplicateOpError, match=text):
            importlib.import_module(packages[1])
    else:
        assert importlib.import_module(packages[1]).two(torch.ones(1)).tolist() == [2]
    assert first.one(torch.ones(1)).tolist() == [2]


# ---------------------------------------------------------------- traps without an issue of their own


def test_int_argument_compiles_once_for_all_values():
    """`int k` in a schema would compile anew for each."""
    from torch._dynamo.testing import CompileCounterWithBackend

    @opkit.op("t::repeat", shapes="n -> n*k")
    def repeat(x: Tensor, k: int) -> Tensor:
        return x.repeat(k)

    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(lambda x, k: repeat(x, k) + 1, fullgraph=True, dynamic=True, backend=counter)
    for k in (2, 3, 7):
        assert torch.equal(run(torch.ones(3), k), torch.full((3 * k,), 2.0))
    assert counter.frame_count == 1


def test_setup_context_has_one_form_whatever_is_keyword_only():
    """torch passes `(ctx, inputs, keyword_only_inputs, output)` where an argument is keyword-only."""
    seen = []

    @opkit.op("t::scale", shapes="n -> n")
    def scale(x: Tensor, k: float = 2.0, *, p: int = 3, mode: str = "a") -> Tensor:
        return x * k * p

    scale.register_autograd(
        lambda ctx, grad: (grad * 6, None, None, None),
        setup_context=lambda ctx, inputs, output: seen.append((inputs[1:], type(output))),
    )
    x = torch.ones(2, requires_grad=True)
    scale(x, mode="b").sum().backward()
    assert (x.grad.tolist(), seen) == ([6, 6], [((2.0, 3, "b"), Tensor)])


def test_result_that_is_the_mutated_argument_is_refused():
    """Under torch's Tag.inplace, autograd misses what is done to such a result afterwards."""
    with pytest.raises(
        opkit.SchemaError, match=r"its result out is Tensor\(a!\), which shares storage with an argument"
    ):
        opkit.declare("t::triple_(Tensor(a!) x) -> Tensor(a!)")

    @opkit.op("t::triple_", shapes="n -> n", mutates_args=["x"])
    def triple_(x: Tensor) -> Tensor:
        return x.mul_(3)

    with pytest.raises(
        opkit.OutputError, match="returned as out a tensor that shares storage with argument x"
    ):
        triple_(torch.ones(2))
    with pytest.raises(opkit.GradientError, match="argument x requires grad and is overwritten"):
        triple_(torch.ones(2, requires_grad=True) * 1)
