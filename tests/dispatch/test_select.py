from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

import opkit
from opkit.cpp import compilers

pytestmark = pytest.mark.usefixtures("registry")

T = torch.zeros(3)
NUMBER = {"reference": 0}


@pytest.fixture
def op():
    @opkit.op("t::f", shapes="*b -> *b")
    def f(x: Tensor, k: int = 1, *, s: str = "a") -> Tensor:
        return torch.full_like(x, NUMBER["reference"])

    return f


def add(op, backend, **kwargs):
    """A kernel that writes a number of its own; `ran` reads from a result which backend it was."""
    number = NUMBER.setdefault(backend, len(NUMBER))
    op.register_kernel(
        kwargs.pop("device", "cpu"),
        lambda x, k=1, *, s="a": torch.full_like(x, number),
        backend=backend,
        **kwargs,
    )


def ran(result):
    return next(name for name, number in NUMBER.items() if number == result.flatten()[0].item())


def test_higher_priority_goes_first_and_then_the_name(op):
    add(op, "b")
    add(op, "a")
    assert ran(op(T)) == "a"
    add(op, "c", priority=1)
    assert ran(op(T)) == "c"
    add(op, "d", priority=-1)
    assert [k.backend for k in op.kernels] == ["c", "a", "b", "d", "reference"]
    assert ran(op(T)) == "c"


def test_kernel_registered_after_a_call_is_used(op):
    assert ran(op(T)) == "reference"
    add(op, "a")
    assert ran(op(T)) == "a"


def test_dtypes_are_about_the_first_tensor(op):
    add(op, "a", dtypes=(torch.float64,))
    add(op, "b", dtypes=[torch.float32])
    assert ran(op(T)) == "b"
    assert ran(op(T.double())) == "a"
    assert ran(op(T)) == "b"
    with pytest.warns(UserWarning, match="dtype float16 is not among float64; b: dtype float16"):
        assert ran(op(T.half())) == "reference"


@pytest.mark.parametrize(
    ("answer", "status", "reason"),
    [
        (True, "selected", "priority 0"),
        (1, "selected", "priority 0"),
        (False, "rejected", "its condition (when=) is not met"),
        (None, "rejected", "its condition (when=) is not met"),
        ("needs n % 8 == 0", "rejected", "needs n % 8 == 0"),
    ],
)
def test_when_answers_true_false_or_a_reason(op, answer, status, reason):
    add(op, "a", when=lambda x, k, *, s: answer)
    record = op.explain(T).candidates[0]
    assert (record.backend, record.status, record.reason) == ("a", status, reason)
    with opkit.use_backend("reference" if status == "rejected" else "a"):
        assert ran(op(T)) == ("a" if status == "selected" else "reference")


def test_when_gets_all_arguments_with_defaults_and_keyword_only_ones_by_name(op):
    seen = []
    add(op, "a", when=lambda *args, **kwargs: seen.append((args, kwargs)) or True)
    op(T)
    op(T, 5, s="b")
    op.explain(T, k=7)
    assert [(a[1:], k) for a, k in seen] == [((1,), {"s": "a"}), ((5,), {"s": "b"}), ((7,), {"s": "a"})]


def test_when_is_asked_in_every_call(op):
    answers = iter([True, False, True])
    add(op, "a", when=lambda x, k, *, s: next(answers))
    with opkit.use_backend("a", "reference"):
        assert [ran(op(T)) for _ in range(3)] == ["a", "reference", "a"]


def test_when_is_not_asked_below_the_selected_kernel(op):
    add(op, "a", priority=1)
    add(op, "b", when=lambda *a, **k: pytest.fail("asked"))
    assert ran(op(T)) == "a"


def test_when_is_not_called_while_tracing(op):
    seen = []
    add(op, "a", when=lambda x, k, *, s: seen.append(type(x)) or True)
    compiled = torch.compile(lambda x: op(x), fullgraph=True, backend="aot_eager")
    compiled(T)
    compiled(T)
    assert seen == [Tensor, Tensor]
    op(T.to("meta"))
    assert len(seen) == 2


def test_when_that_raises_is_not_swallowed(op):
    add(op, "a", when=lambda x, k, *, s: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        op(T)


def test_reference_fallback_warns_once_with_the_reasons(op):
    add(op, "a", when=lambda x, k, *, s: "too small")
    add(op, "b", dtypes=(torch.int8,))
    with pytest.warns(
        UserWarning,
        match=r"t::f runs its reference on cpu, which may be slow: a: too small; b: dtype float32 is not among int8\. "
        r'Register a kernel for this case, or accept it with opkit.use_backend\("reference"\)',
    ):
        op(T)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        op(T)


def test_reference_fallback_on_another_device_names_the_devices(op):
    add(op, "a", device="cuda")
    with pytest.warns(UserWarning, match="its kernels are for cuda"):
        op(T)


def test_op_without_kernels_runs_its_reference_silently(op):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ran(op(T)) == "reference"


def test_explain_lists_every_candidate_and_prints_a_table(op):
    add(op, "a", when=lambda x, k, *, s: "too small", source="here")
    add(op, "b", source="there")
    add(op, "c", priority=-1, source="there")
    found = op.explain(T)
    assert [tuple(c) for c in found.candidates[:3]] == [
        ("a", "cpu", "here", "rejected", "too small"),
        ("b", "cpu", "there", "selected", "priority 0"),
        ("c", "cpu", "there", "available", ""),
    ]
    assert (found.op, found.device, found.selected) == ("t::f", "cpu", "b")
    lines = str(found).splitlines()
    assert lines[0] == "t::f on cpu:"
    assert lines[1].split() == ["a", "rejected", "too", "small", "here"]
    assert lines[2].split() == ["b", "selected", "priority", "0", "there"]
    assert lines[4].split()[:2] == ["reference", "available"]


def test_explain_says_when_a_preference_decides(op):
    add(op, "a")
    with opkit.use_backend("reference"):
        assert op.explain(T).candidates[0].reason == "preferred (reference)"
    assert op.explain(T.to("meta")).selected == "reference"
    assert op.explain(T.to("meta")).candidates[0].reason == "last fallback"


def test_kernels_are_the_same_records_on_every_device(op):
    add(op, "a", device="cuda", source="x")
    add(op, "a", source="y", when=lambda *_, **__: pytest.fail("asked"))
    assert [tuple(k) for k in op.kernels[:2]] == [
        ("a", "cpu", "y", "available", ""),
        ("a", "cuda", "x", "available", ""),
    ]
    assert op.kernels[-1][:2] == ("reference", "any")
    assert "test_select.py" in op.kernels[-1].source


def test_kernel_for_another_device_is_no_candidate(op):
    add(op, "a", device="cuda")
    assert [c.backend for c in op.explain(T).candidates] == ["reference"]


def test_native_kernel_without_a_compiler_is_rejected_with_the_reason(op, monkeypatch):
    op.register_kernel("cpu", opkit.cpp.kernel("void f();\n"))
    monkeypatch.setattr(compilers, "find_cxx", lambda: None)
    assert op.explain(T).candidates[0].reason == "no C++ compiler was found (install g++ or set CXX)"
    assert op.kernels[0].status == "rejected"
    with pytest.warns(UserWarning, match="cpp: no C.. compiler was found"):
        assert ran(op(T)) == "reference"


def test_strict_preference_that_nothing_can_serve_raises_with_all_reasons(op):
    add(op, "a", dtypes=(torch.int8,))
    add(op, "b")
    with opkit.use_backend("a", strict=True):
        with pytest.raises(opkit.NoKernelError) as caught:
            op(T)
    assert str(caught.value).startswith(
        "calling t::f on cpu: no kernel can take this call; use_backend('a', strict=True) is in force.\n"
        "    a: dtype float32 is not among int8\n"
        "    b: only a allowed (strict)\n"
        "    reference: only a allowed (strict)\n"
        "Leave strict=True out"
    )
    assert caught.value.op == "t::f"


def test_device_of_a_call_is_that_of_a_tensor_in_a_list_or_of_a_device_argument():
    @opkit.op("t::g")
    def g(xs: list[Tensor], device: torch.device) -> Tensor:
        return torch.zeros(1)

    assert g.explain([T.to("meta")], torch.device("cpu")).device == "meta"
    assert g.explain([], torch.device("cuda", 1)).device == "cuda"
