from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

import opkit
from opkit.dispatch import native

pytestmark = pytest.mark.usefixtures("registry")

BACKENDS = ["aot_eager", "inductor"]


def recording(layout=None, tags=(), shapes="m n -> m n"):
    """An op, and the strides that its kernel got."""
    seen = []

    @opkit.op("t::f", shapes=shapes, layout=layout, tags=tags)
    def f(x: Tensor) -> Tensor:
        seen.append(x.stride())
        return x * 2

    return f, seen


def transposed(f):
    return lambda x: f((x + 1).t()) + 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [None, "exact", "order", "contiguous", torch.contiguous_format], ids=str)
def test_compiled_code_hands_over_what_eager_does(layout, backend):
    f, seen = recording(layout)
    x = torch.randn(3, 4)
    expected = transposed(f)(x)
    found = torch.compile(transposed(f), fullgraph=True, backend=backend)(x)
    torch.testing.assert_close(found, expected)
    assert found.stride() == expected.stride()
    contiguous = layout in ("contiguous", torch.contiguous_format)
    assert seen == [(3, 1) if contiguous else (1, 4)] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_flexible_layout_gives_the_same_values(backend):
    f, _ = recording("flexible")
    x = torch.randn(3, 4)
    torch.testing.assert_close(
        torch.compile(transposed(f), fullgraph=True, backend=backend)(x), transposed(f)(x)
    )


@pytest.mark.parametrize(
    ("layout", "tag"),
    [
        ("exact", torch.Tag.needs_exact_strides), ("order", torch.Tag.needs_fixed_stride_order),
        ("contiguous", torch.Tag.needs_contiguous_strides), ("flexible", torch.Tag.flexible_layout),
        (torch.contiguous_format, torch.Tag.needs_contiguous_strides),
        (torch.channels_last, torch.Tag.needs_exact_strides),
    ],
    ids=str,
)  # fmt: skip
def test_layout_is_a_tag_for_torch(layout, tag):
    f, _ = recording(layout, tags=[tag])  # saying it twice is no contradiction
    assert tag in f.overload.tags


@pytest.mark.parametrize("form", ["positional", "keyword", "list"])
def test_argument_that_is_mutated_through_a_copy_is_written(form):
    def positional(x: Tensor) -> None:
        assert x.is_contiguous()
        x.mul_(2)

    def keyword(*, x: Tensor) -> None:
        positional(x)

    def several(x: list[Tensor]) -> None:
        for one in x:
            positional(one)

    function = {"positional": positional, "keyword": keyword, "list": several}[form]
    f = opkit.op("t::f", mutates_args=("x",), layout="contiguous")(function)
    x = torch.ones(3, 4).t()
    {"positional": lambda: f(x), "keyword": lambda: f(x=x), "list": lambda: f([x, torch.ones(1)])}[form]()
    assert (x == 2).all()


def test_gradients_go_to_the_argument_itself():
    f, _ = recording("contiguous")
    f.register_autograd(opkit.from_reference)
    x = torch.randn(3, 4, requires_grad=True)
    f(x.t()).sum().backward()
    assert (x.grad == 2).all()


@pytest.mark.parametrize(("layout", "rank"), [(torch.channels_last, 4), (torch.channels_last_3d, 5)], ids=str)
def test_memory_format_of_arguments_and_results(layout, rank):
    f, seen = recording(layout, shapes="*b -> *b")
    x = torch.randn(2, 3, 4, 5, 6)[..., 0] if rank == 4 else torch.randn(2, 3, 4, 5, 6)
    wanted = x.contiguous(memory_format=layout).stride()
    calls = [f, *(torch.compile(f, fullgraph=True, backend=backend, dynamic=False) for backend in BACKENDS)]
    for call in calls:
        seen.clear()
        found = call(x)
        assert seen == [wanted]
        assert found.stride() == wanted
        torch.testing.assert_close(found, x * 2)
    assert f(x.to("meta")).stride() == wanted
    assert f(torch.ones(2, 3).t()).stride() == (2, 1)  # of another rank: contiguous
    torch.library.opcheck(f.overload, (x,))


def test_memory_format_of_what_a_kernel_returns():
    f, _ = recording(torch.channels_last, shapes="n c h w -> n c h w")
    f.register_kernel("cpu", lambda x: (x * 2).contiguous(), backend="b")
    x = torch.randn(2, 3, 4, 5)
    assert f(x).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(f(x), x * 2)


def test_native_kernel_writes_in_the_memory_format():
    source = """
    #include <opkit/kernel.h>
    void f(opkit::Tensor x, opkit::Tensor y) {
        for (int64_t i = 0; i < x.numel(); ++i) y.data<float>()[i] = 2 * x.data<float>()[i];
        OPKIT_CHECK(x.stride(1) == 1 && y.stride(1) == 1, "not channels last");
    }
    """
    f, _ = recording(torch.channels_last, shapes="n c h w -> n c h w")
    f.register_kernel("cpu", opkit.cpp.kernel(source))
    x = torch.randn(2, 3, 4, 5)
    assert f.explain(x).selected == "cpp"
    torch.testing.assert_close(f(x), x * 2)
    assert f(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_kernel_that_overwrites_gets_the_layout_too(backend):
    f, _ = recording("contiguous")

    def overwrite(x):
        assert x.is_contiguous()
        return x.mul_(2)

    f.register_kernel("cpu", overwrite, backend="b", inplace=("x",))
    x = torch.randn(3, 4)
    expected = (x + 1).t() * 2
    torch.testing.assert_close(f.maybe_inplace((x + 1).t()), expected)
    run = torch.compile(lambda x: f((x + 1).t()), fullgraph=True, backend=backend)
    torch.testing.assert_close(run(x), expected)


@pytest.mark.parametrize(
    ("layout", "tags", "text"),
    [
        (
            "contigous",
            (),
            "found layout='contigous'; expected 'exact', .*channels_last_3d. Did you mean 'contiguous'",
        ),
        (3, (), "found layout=3; expected"),
        (torch.preserve_format, (), "found layout=torch.preserve_format; expected"),
        (
            "flexible",
            (torch.Tag.needs_exact_strides,),
            "found layout='flexible', which means .*flexible_layout, and tags with .*needs_exact_strides",
        ),
    ],
)
def test_layout_that_is_none_is_refused(layout, tags, text):
    with pytest.raises(opkit.SchemaError, match=f"declaring t::f: {text}"):
        recording(layout, tags)


def test_contiguous_arguments_go_to_the_kernel_as_they_are():
    seen = []

    @opkit.op("t::rows", shapes="m n -> m", layout="contiguous")
    def rows(x: Tensor) -> Tensor:
        seen.append((x.data_ptr(), sys._getframe(1).f_code.co_name))
        return x.sum(1)

    x, here = torch.randn(3, 2), sys._getframe().f_code.co_name
    for given in (x, x.t(), x, x.t(), torch.nn.Parameter(x), x.t().conj()):
        assert torch.equal(rows(given), given.sum(1))
    addresses, callers = zip(*seen, strict=True)
    assert [address == x.data_ptr() for address in addresses] == [True, False, True, False, True, False]
    if native.core() is not None:  # which leaves it to Python to make copies
        assert [caller == here for caller in callers[2:]] == [True, False, True, False]
