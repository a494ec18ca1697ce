"""Bad registrations and calls that are refused at once, each with a text that says what to do."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from torch import Tensor

import opkit

pytestmark = pytest.mark.usefixtures("registry")

T = torch.ones(2, 3)


@pytest.fixture
def op():
    @opkit.op("t::scale", shapes="*b n, n -> *b n")
    def scale(x: Tensor, w: Tensor) -> Tensor:
        return x * w

    return scale


def kernel(x, w):
    return x * w


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"backend": "a,b"}, "found the backend 'a,b'; expected a name of letters"),
        ({"backend": ""}, "found the backend ''"),
        ({"backend": 3}, "found the backend 3"),
        ({"priority": "high"}, "found priority='high'; expected an int"),
        (
            {"when": 3},
            r"the condition \(when=\) of a python kernel of t::scale: found 3; expected a function",
        ),
        ({"when": lambda x: True}, r"expected the op's arguments \(x, w\) in this order"),
        ({"dtypes": ("float32",)}, "dtypes holds 'float32'; expected torch dtypes"),
    ],
)
def test_kernel_that_cannot_work_is_refused(op, options, text):
    with pytest.raises(opkit.RegistrationError, match=text):
        op.register_kernel("cpu", kernel, **options)
    assert len(op.kernels) == 1


def test_kernel_for_the_meta_device_is_refused(op):
    with pytest.raises(opkit.RegistrationError, match="found the device 'meta'.*by register_fake"):
        op.register_kernel("meta", kernel)


def test_one_dtype_is_a_list_of_one(op):
    op.register_kernel("cpu", kernel, dtypes=torch.float64)
    assert op.explain(T.double(), T[0].double()).selected == "python"
    assert op.explain(T, T[0]).selected == "reference"


@pytest.mark.parametrize(
    ("backward", "setup", "text"),
    [
        (lambda ctx: None, None, "found backward .* expected 2 arguments: ctx, grad of out"),
        (lambda ctx, g: None, lambda ctx, inputs: None, "found setup_context .* expected 3 arguments"),
    ],
)
def test_formula_with_another_signature_is_refused(op, backward, setup, text):
    with pytest.raises(opkit.RegistrationError, match=text):
        op.register_autograd(backward, setup_context=setup)


def test_names_may_be_one_string(op):
    @opkit.op("t::two", shapes="n -> n, n")
    def two(x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, x * 3

    two.register_autograd(opkit.from_reference, non_differentiable="out1")
    first, second = two(torch.ones(2, requires_grad=True))
    assert (first.requires_grad, second.requires_grad) == (True, False)


@pytest.mark.parametrize("namespace", ["aten", "prims"])
def test_namespace_of_torch_is_refused(namespace):
    with pytest.raises(opkit.SchemaError, match="a namespace of torch itself.*Write 'mylib::add'"):
        opkit.op(f"{namespace}::add")


def test_lookup_of_a_wrong_name_says_that_it_looks_up():
    with pytest.raises(opkit.SchemaError, match="looking up an op: the name 'f' has no namespace"):
        opkit.get("f")


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_tensors_on_several_devices_are_refused(op, compiled):
    f = torch.compile(op, backend="eager") if compiled else op
    with pytest.raises(
        Exception, match="argument w is on meta and x on cpu; expected all tensors on one device"
    ):
        f(T, T[0].to("meta"))
    with pytest.raises(Exception, match="argument w is on cpu and x on meta"):
        f(T.to("meta"), T[0])


def test_broken_meta_function_is_reported_in_eager(op):
    op.register_fake(lambda x, w: x.new_emptyy(x.shape))
    with pytest.raises(
        opkit.RegistrationError, match="calling t::scale: its meta function failed.*new_emptyy"
    ):
        op(T, T[0])


@pytest.mark.parametrize("forward_mode", [False, True], ids=["plain", "in forward mode"])
def test_sparse_tensor_for_a_native_kernel_is_refused(op, forward_mode):
    source = "#include <opkit/kernel.h>\nvoid scale(opkit::Tensor, opkit::Tensor, opkit::Tensor) {}"
    op.register_kernel("cpu", opkit.cpp.kernel(source))
    with torch.autograd.forward_ad.dual_level() if forward_mode else contextlib.nullcontext():
        with pytest.raises(
            opkit.NoKernelError, match="argument x has the layout torch.sparse_coo.*x.to_dense"
        ):
            op(T.to_sparse(), T[0])


@pytest.mark.parametrize("names", [(["cpp"],), ()], ids=["a list", "none"])
def test_use_backend_of_no_names_is_refused(names):
    with pytest.raises(opkit.BackendError, match="found use_backend.*Write opkit.use_backend"):
        opkit.use_backend(*names, strict=True)


@pytest.mark.parametrize("kind", [int, float, str])
def test_from_reference_takes_lists_of_numbers_and_text(kind):
    def poly(x, c):
        return x * len(c)

    poly.__annotations__ = {"x": Tensor, "c": list[kind], "return": Tensor}
    op = opkit.op("t::poly", shapes="n -> n")(poly)
    op.register_autograd(opkit.from_reference)
    x = torch.ones(2, requires_grad=True)
    op(x, [kind(1), kind(2)]).sum().backward()
    assert x.grad.tolist() == [2, 2]


def test_from_reference_refuses_random_numbers_also_in_a_later_call():
    @opkit.op("t::drop", shapes="n -> n")
    def drop(x: Tensor, train: bool) -> Tensor:
        return x * torch.rand_like(x) if train else x * 1

    drop.register_autograd(opkit.from_reference)
    x = torch.ones(2, requires_grad=True)
    drop(x, False).sum().backward()
    with pytest.raises(opkit.GradientError, match="draws random numbers"):
        drop(x, True).sum().backward()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_from_reference_is_exact_under_autocast(compiled):
    @opkit.op("t::mm", shapes="n k, k m -> n m")
    def mm(a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    mm.register_autograd(opkit.from_reference)
    a, b = torch.rand(8, 8, requires_grad=True), torch.rand(8, 8)
    f = torch.compile(mm, backend="aot_eager", fullgraph=True) if compiled else mm
    with torch.autocast("cpu", dtype=torch.bfloat16):
        f(a, b).sum().backward()
    torch.testing.assert_close(a.grad, b.sum(1).expand(8, 8))


@pytest.mark.parametrize("strict", [False, True])
def test_exported_program_keeps_its_use_backend(op, strict):
    op.register_kernel("cpu", lambda x, w: x * 0 + 5, backend="five")

    class Module(torch.nn.Module):
        def forward(self, x, w):
            with opkit.use_backend("reference"):
                inside = op(x, w)
            return inside, op(x, w)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*side effects")
        exported = torch.export.export(Module(), (T, T[0]), strict=strict).module()
    inside, outside = exported(T, T[0] * 2)
    assert inside.unique().tolist() == [2]
    assert outside.unique().tolist() == [5]


def test_kernel_registered_through_torch_is_respected(op):
    x = T.clone()
    assert op(x, T[0]).sum() == 6
    library = torch.library.Library("t", "FRAGMENT")
    library.impl("scale", lambda x, w: torch.full_like(x, 100.0), "CPU")
    try:
        assert op(x, T[0]).unique().tolist() == [100]
        with torch.inference_mode():
            assert op(x, T[0]).unique().tolist() == [100]
    finally:
        library._destroy()


def test_attributes_of_the_function_do_not_replace_those_of_the_op():
    def f(x: Tensor) -> Tensor:
        return x * 1

    f.schema = f.name = "mine"
    made = opkit.op("t::f", shapes="n -> n")(f)
    assert made.name == "t::f"
    assert made(T[0]).tolist() == [1, 1, 1]
