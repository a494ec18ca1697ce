from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch

import opkit
from opkit import _registry

pytestmark = pytest.mark.usefixtures("registry")


@pytest.fixture
def x():
    return torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)


@pytest.fixture
def theirs():
    """Operators of another library."""
    library = torch.library.Library("t_theirs", "FRAGMENT")
    library.define("double(Tensor x) -> Tensor")
    library.impl("double", lambda x: x * 2, "CPU")
    library.define("store(Tensor(a!) x) -> ()")
    library.impl("store", lambda x: None, "CPU")
    yield torch.ops.t_theirs
    library._destroy()


def clamped(calls: list[str]):
    def relu(self):
        calls.append("clamp")
        return self.clamp(min=0)

    return relu


def test_adopted_op_without_kernels_is_the_operator(x):
    op = opkit.adopt("aten::relu")
    assert str(op.schema) == "aten::relu(Tensor self) -> (Tensor)"
    assert torch.equal(op(x), x.relu())
    y = op(x.clone().requires_grad_())
    assert type(y.grad_fn).__name__ == "ReluBackward0"
    assert opkit.get("aten::relu") is op
    assert opkit.adopt("aten::relu") is op


def test_kernel_runs_in_calls_through_the_op_alone(x):
    calls: list[str] = []
    before = set(torch.library._impls)
    op = opkit.adopt("aten::relu")
    op.register_kernel("cpu", clamped(calls), backend="clamp")
    assert torch.equal(op(x), x.relu())
    assert calls == ["clamp"]
    torch.relu(x)
    torch.nn.functional.relu(x)
    assert calls == ["clamp"]
    assert torch.library._impls - before == {
        n for n in torch.library._impls if n.startswith("opkit_adopted/")
    }
    assert [(c.backend, c.status) for c in op.explain(x).candidates] == [
        ("clamp", "selected"),
        ("reference", "available"),
    ]
    with opkit.use_backend("reference"):
        op(x)
    assert calls == ["clamp"]


def test_operator_takes_what_no_kernel_does_without_a_warning(x):
    op = opkit.adopt("aten::relu")
    op.register_kernel("cpu", clamped([]), dtypes=(torch.float32,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(op(x), x.relu())


def test_kernel_of_an_adopted_op_goes_through_every_transform(x):
    calls: list[str] = []
    op = opkit.adopt("aten::relu")
    op.register_kernel("cpu", clamped(calls))
    compiled = torch.compile(lambda x: op(x) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), x.relu() * 2)
    assert op(x.to("meta")).shape == x.shape
    assert calls
    torch.autograd.gradcheck(op, (x.clone().requires_grad_(),), check_forward_ad=True)
    assert torch.equal(torch.func.grad(lambda x: op(x).sum())(x), (x > 0).double())
    torch.library.opcheck(op.overload, (x,))


def test_kernel_is_held_to_what_the_operator_returns(x):
    op = opkit.adopt("aten::relu")
    op.register_kernel("cpu", lambda self: self[:1].clone())
    with pytest.raises(opkit.OutputError, match="aten::relu: the python kernel returned out with the shape"):
        op(x)


def test_one_overload_of_several(x):
    op = opkit.adopt("aten::add.Tensor")
    op.register_kernel("cpu", lambda self, other, *, alpha=1: self + alpha * other + 0.5)
    assert torch.equal(op(x, x, alpha=2), 3 * x + 0.5)
    assert opkit.get("aten::add.Tensor") is op


def test_operator_of_another_library(theirs, x):
    op = opkit.adopt("t_theirs::double")
    op.register_kernel("cpu", lambda x: x + x)
    assert torch.equal(op(x), x * 2)  # it has no meta function, so that nothing is known of its output
    with pytest.raises(
        opkit.GradientError, match="t_theirs::double: the operator has no gradient of its own"
    ):
        op(x.clone().requires_grad_()).sum().backward()
    op.register_autograd(lambda ctx, grad: grad * 2)
    y = x.clone().requires_grad_()
    op(y).sum().backward()
    assert y.grad.tolist() == [2, 2, 2]


def test_operator_that_mutates(theirs, x):
    op = opkit.adopt("t_theirs::store")

    @op.register_kernel("cpu")
    def store(x):
        x.fill_(3)

    before = x._version
    op(x)
    assert x.tolist() == [3, 3, 3]
    assert x._version > before


def test_adopted_op_is_pickled_and_copied_by_name():
    op = opkit.adopt("aten::relu")
    assert copy.deepcopy(op) is op
    assert pickle.loads(pickle.dumps(op)) is op


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("aten::reluu", opkit.OpNotFoundError, "torch knows no such operator; .* Did you mean 'aten::relu'"),
        ("t_nobody::f", opkit.OpNotFoundError, "torch knows no such operator; .*Import the library"),
        (
            "aten::relu.Tensr",
            opkit.OpNotFoundError,
            "the operator has the overloads default, out; expected one",
        ),
        ("relu", opkit.SchemaError, "expected namespace::name"),
        ("aten::relu_", opkit.SchemaError, r"its result out is Tensor\(a!\), which shares storage"),
        ("aten::view", opkit.SchemaError, r"its result out is Tensor\(a\), which shares storage"),
    ],
)
def test_what_cannot_be_adopted_is_refused(name, error, text):
    with pytest.raises(error, match=text):
        opkit.adopt(name)


def test_op_of_opkit_is_not_adopted():
    with pytest.raises(
        opkit.DuplicateOpError, match="adopting opkit::rms_norm: it is an op of opkit already"
    ):
        opkit.adopt("opkit::rms_norm")
    opkit.adopt("aten::relu")
    with pytest.raises(opkit.DuplicateOpError, match="it is adopted with override=False already"):
        opkit.adopt("aten::relu", override=True)


# ---------------------------------------------------------------- for everyone


def test_override_replaces_for_everyone_and_is_taken_back(x):
    op = opkit.adopt("aten::gelu", override=True)
    op.register_kernel(
        "cpu", lambda self, *, approximate="none": self * 0 + 7, backend="seven", dtypes=(torch.float64,)
    )
    real = torch.nn.functional.gelu(x.float())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.nn.functional.gelu(x).tolist() == [7, 7, 7]
        assert torch.equal(op(x.float()), real)
    leaf = x.clone().requires_grad_()
    torch.nn.functional.gelu(leaf).sum().backward()  # the operator's own gradient
    with opkit.use_backend("reference"):
        assert torch.allclose(torch.nn.functional.gelu(x).float(), real)
    _registry.remove("aten::gelu")
    again = x.clone().requires_grad_()
    torch.nn.functional.gelu(again).sum().backward()
    assert torch.equal(leaf.grad, again.grad)
    assert torch.allclose(torch.nn.functional.gelu(x).float(), real)


def test_override_of_a_composite_operator_needs_a_formula(x):
    op = opkit.adopt("aten::rms_norm", override=True)

    def twice(input, normalized_shape, weight=None, eps=None):
        return input * 2

    with pytest.raises(
        opkit.RegistrationError, match="for everyone on aten::rms_norm: it is composite, .* Register one"
    ):
        op.register_kernel("cpu", twice)
    op.register_autograd(lambda ctx, grad: (grad * 2, None, None, None))
    op.register_kernel("cpu", twice)
    leaf = x.clone().requires_grad_()
    y = torch.rms_norm(leaf, [3])
    assert torch.equal(y, x * 2)
    y.sum().backward()
    assert leaf.grad.tolist() == [2, 2, 2]
    _registry.remove("aten::rms_norm")
    assert torch.allclose(torch.rms_norm(x, [3]).pow(2).mean(), torch.ones((), dtype=x.dtype))
