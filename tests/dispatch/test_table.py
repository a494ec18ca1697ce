from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

import opkit

pytestmark = pytest.mark.usefixtures("registry")

T = torch.zeros(3)


@pytest.fixture
def op():
    @opkit.op("t::f", shapes="*b -> *b")
    def f(x: Tensor) -> Tensor:
        return x + 1

    return f


@pytest.mark.parametrize(
    ("device", "hint"),
    [("gpu", "Did you mean 'cuda'"), ("cpuu", "Did you mean 'cpu'"), ("python", "backend=")],
)
def test_unknown_device_is_refused_with_the_list(op, device, hint):
    with pytest.raises(
        opkit.RegistrationError, match=rf"torch knows no device '{device}'; expected .*cpu, cuda.*{hint}"
    ):
        op.register_kernel(device, torch.sin)


def test_device_with_an_index_means_its_type(op):
    op.register_kernel("cuda:1", lambda x: x + 2)
    assert op.kernels[0].device == "cuda"


def test_dtypes_must_be_dtypes(op):
    with pytest.raises(
        opkit.RegistrationError, match=r"dtypes holds 'float32'; expected torch dtypes. Write dtypes="
    ):
        op.register_kernel("cpu", lambda x: x + 2, dtypes=("float32",))


def test_dtypes_may_be_an_iterator(op):
    op.register_kernel("cpu", lambda x: x + 2, dtypes=iter([torch.float32]))
    assert op(T).tolist() == [2, 2, 2]


def test_backend_reference_is_reserved(op):
    with pytest.raises(
        opkit.RegistrationError, match="the backend name 'reference' belongs to the decorated function"
    ):
        op.register_kernel("cpu", lambda x: x + 2, backend="reference")


def test_kernel_must_be_a_function(op):
    with pytest.raises(opkit.RegistrationError, match=r"found 3; expected a function or opkit.cpp.kernel"):
        op.register_kernel("cpu", 3)


@pytest.mark.parametrize(
    "kernel", [lambda x, y: x, lambda: None, lambda *, x: x], ids=["two", "none", "keyword"]
)
def test_kernel_with_another_signature_is_refused(op, kernel):
    with pytest.raises(opkit.RegistrationError, match="registering a python kernel of t::f: found"):
        op.register_kernel("cpu", kernel)


def test_kernel_replaced_from_elsewhere_warns_and_names_both(op):
    op.register_kernel("cpu", lambda x: x + 2, backend="a", source="one.py")
    with pytest.warns(
        UserWarning, match=r"t::f: the a kernel for cpu from two.py replaces the one from one.py. Give one"
    ):
        op.register_kernel("cpu", lambda x: x + 3, backend="a", source="two.py")
    assert op(T).tolist() == [3, 3, 3]
    assert len(op.kernels) == 2


def test_kernel_registered_again_from_the_same_place_replaces_silently(op):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in (2, 3):
            op.register_kernel("cpu", lambda x: x + k, backend="a")
            assert op(T).tolist() == [k] * 3


def test_decorator_returns_the_function(op):
    @op.register_kernel("cpu", backend="a")
    def fast(x):
        return x + 5

    assert fast(1) == 6
    assert op(T).tolist() == [5, 5, 5]


def test_source_file_registered_again_is_built_again(op, tmp_path):
    path = tmp_path / "f.cpp"
    text = """#include <opkit/kernel.h>
    void f(opkit::Tensor x, opkit::Tensor y) { for (int64_t i = 0; i < x.numel(); ++i) y.data<float>()[i] = VALUE; }"""
    for value in (1, 2):
        path.write_text(text.replace("VALUE", str(value)))
        op.register_kernel("cpu", opkit.cpp.kernel(path))
        assert op(T).tolist() == [value] * 3
