"""`?m<=bound` in a light kernel: allocated at the bound, returned with the size that the kernel sets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import opkit
from opkit.cpp import compilers

pytestmark = [
    pytest.mark.usefixtures("registry"),
    pytest.mark.skipif(compilers.find_cxx() is None, reason="needs a C++ compiler"),
]

SELECT = """
#include <opkit/kernel.h>
using namespace opkit;
void select(Tensor x, Tensor index, Tensor value) {
  const auto in = x.view<const float, 1>();
  const auto at = index.view<int64_t, 2>();
  int64_t count = 0;
  for (int64_t i = 0; i < in.size(0); ++i) {
    if (in(i) == 0) continue;
    at(count, 0) = i;
    value.data<float>()[count++] = in(i);
  }
  index.set_size(0, count);
  value.set_size(-1, count);
}
"""


@pytest.fixture(scope="module")
def select():
    """Where x is not zero, and what is there."""

    def select(x): ...

    select.__annotations__ = {"x": Tensor, "return": tuple[Tensor, Tensor]}
    op = opkit.op("t::select", shapes="n -> ?m<=n 1:int64, ?m")(select)
    op.register_kernel("cpu", opkit.cpp.kernel(SELECT))
    yield op
    opkit._registry.remove("t::select")


def picked(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.nonzero(), x[x != 0]


INPUTS = [[0, 1, 0, 2, 3], [0, 0, 0, 4, 0], [0, 0], [5], [], [1, 2, 3]]


@pytest.mark.parametrize("values", INPUTS, ids=str)
def test_outputs_have_the_size_that_the_kernel_sets(select, values):
    x = torch.tensor(values, dtype=torch.float32)
    for found, wanted in zip(select(x), picked(x), strict=True):
        assert torch.equal(found, wanted)
        assert (found.shape, found.stride(), found.storage_offset()) == (
            wanted.shape,
            torch.empty(wanted.shape).stride(),
            0,
        )
        assert found.untyped_storage().nbytes() <= 2 * wanted.numel() * wanted.itemsize


@pytest.mark.parametrize(
    ("backend", "dynamic"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)]
)
def test_compiled_code_takes_any_size_up_to_the_bound(select, backend, dynamic):
    def double(x):
        index, value = select(x * 1)
        return index[:, 0] + value, value * 2  # the same ?m: the sum needs no broadcast

    compiled = torch.compile(double, fullgraph=True, backend=backend, dynamic=dynamic)
    for values in ([0, 1, 0, 2, 3], [7, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 2, 3, 4, 5]):
        x = torch.tensor(values, dtype=torch.float32)
        index, value = picked(x)
        for found, wanted in zip(compiled(x), (index[:, 0] + value, value * 2), strict=True):
            assert torch.equal(found, wanted)


def test_exported_program_runs_the_kernel(select):
    class Module(torch.nn.Module):
        def forward(self, x):
            return select(x)[1] * 2

    x = torch.tensor([0.0, 1, 0, 2])
    for dims in (None, ({0: torch.export.Dim("n")},)):
        program = torch.export.export(Module(), (x,), dynamic_shapes=dims)
        assert program.module()(x).tolist() == [2, 4]
        assert program.module()(torch.zeros(4)).tolist() == []
    assert program.module()(torch.ones(7)).tolist() == [2] * 7


# One kernel for all forms of a shape: it numbers all elements of the bound, and sets the sizes that it is given.
FILL = """
#include <opkit/kernel.h>
using namespace opkit;
void fill(Tensor x, int64_t a, int64_t b, Tensor y) {
  for (int64_t i = 0; i < y.numel(); ++i) y.data<float>()[i] = float(i);
  if (a >= 0) y.set_size(OPEN_A, a);
  if (b >= 0) y.set_size(OPEN_B, b);
}
"""


def fill(line: str, axes: tuple[int, int]) -> opkit.Op:
    def fill(x, a, b): ...

    fill.__annotations__ = {"x": Tensor, "a": int, "b": int, "return": Tensor}
    op = opkit.op("t::fill", shapes=line)(fill)
    flags = [f"-DOPEN_A={axes[0]}", f"-DOPEN_B={axes[1]}"]
    op.register_kernel("cpu", opkit.cpp.kernel(FILL, extra_cflags=flags))
    return op


@pytest.mark.parametrize(
    ("line", "axes", "sizes", "whole"),
    [
        ("n k -> n ?m<=k", (1, 1), (2, 2), (3, 4)),
        ("n k -> n ?m<=k", (1, 1), (4, 4), (3, 4)),
        ("n k -> n ?m<=k", (1, 1), (0, 0), (3, 4)),
        ("n k -> ?i<=n ?j<=2*k", (0, 1), (2, 5), (3, 8)),
        ("n k -> ?i<=n ?j<=2*k", (0, 1), (3, 8), (3, 8)),
        ("n k -> ?i<=n 2 ?j<=k", (0, -1), (1, 3), (3, 2, 4)),
        ("*s -> *s ?m<=6 1", (2, 2), (3, 3), (3, 4, 6, 1)),
        ("n k -> 1 ?m<=n*k", (1, 1), (11, 11), (1, 12)),
        ("n k -> ?m<=n//2+1", (0, 0), (1, 1), (2,)),
    ],
)
def test_what_is_left_is_packed(line, axes, sizes, whole):
    op = fill(line, axes)
    found = op(torch.empty(3, 4), *sizes)
    wanted = torch.arange(torch.Size(whole).numel(), dtype=torch.float32).reshape(whole)
    for axis, size in zip(axes, sizes, strict=True):
        wanted = wanted.narrow(axis, 0, size)
    assert torch.equal(found, wanted)
    assert found.stride() == torch.empty(wanted.shape).stride()
    assert found.untyped_storage().nbytes() <= 2 * wanted.numel() * wanted.itemsize


def test_bound_of_zero_leaves_other_sizes_to_the_kernel():
    op = fill("n k -> ?i<=n ?j<=k", (0, 1))
    found = op(torch.empty(0, 4), 0, 2)
    assert (found.shape, found.stride()) == ((0, 2), (2, 1))


def test_size_beyond_the_bound_or_never_set_is_an_error():
    op = fill("n k -> ?i<=n ?j<=k", (0, 1))
    x = torch.empty(3, 4)
    assert op(x, 3, 4).shape == (3, 4)
    beyond = "the kernel sets the size of dimension 0 of output out to 4; expected 0 to 3, its bound in the shape line"
    with pytest.raises(RuntimeError, match=f"t::fill: {beyond}"):
        op(x, 4, 4)
    unset = r"t::fill: the kernel did not set the size of dimension 1 of output out; expected out.set_size\(1, count\)"
    with pytest.raises(RuntimeError, match=unset):
        op(x, 3, -1)


def test_size_of_a_declared_dimension_cannot_be_set():
    op = fill("n k -> n ?m<=k", (1, 0))
    with pytest.raises(RuntimeError, match="dimension 0 of out, which the shape line does not leave open"):
        op(torch.empty(3, 4), 1, 1)


def test_one_name_is_one_size():
    def two(x): ...

    two.__annotations__ = {"x": Tensor, "return": tuple[Tensor, Tensor]}
    op = opkit.op("t::two", shapes="n -> ?m<=n, 2 ?m")(two)
    op.register_kernel(
        "cpu",
        opkit.cpp.kernel(
            "#include <opkit/kernel.h>\n"
            "void two(opkit::Tensor x, opkit::Tensor y, opkit::Tensor z) { y.set_size(0, 2); z.set_size(1, 1); }"
        ),
    )
    with pytest.raises(
        RuntimeError,
        match="t::two: the kernel set m to 2 in output out0 and to 1 in output out1; expected one",
    ):
        op(torch.ones(3))


def test_size_without_a_bound_is_refused_when_it_is_built():
    def unbounded(x): ...

    unbounded.__annotations__ = {"x": Tensor, "return": Tensor}
    op = opkit.op("t::unbounded", shapes="n -> ?m")(unbounded)
    op.register_kernel("cpu", opkit.cpp.kernel("void unbounded();\n"))
    text = (
        r"building t::unbounded: the size \?m of output out depends on data and has no bound.*expected a bound such as "
        r"\?m<=2\*n. Write it in the shape line, or register a Python kernel"
    )
    with pytest.raises(opkit.BuildError, match=text) as caught:
        op(torch.ones(3))
    assert caught.value.op == "t::unbounded"


def test_negative_bound_is_an_error():
    op = fill("n k -> ?m<=n-k", (0, 0))
    with pytest.raises(
        opkit.ShapeError, match=r"calling t::fill: the size n-k of output out would be -1 \(n = 3 by"
    ):
        op(torch.empty(3, 4), 0, 0)
    assert op(torch.empty(4, 4), 0, 0).shape == (0,)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_packed_outputs_do_not_leak():
    op = fill("n k -> n ?m<=k", (1, 1))
    x = torch.empty(256, 1024)
    op(x, 100, 100)
    before = resident()
    for _ in range(200):
        op(x, 100, 100)
        with pytest.raises(RuntimeError):
            op(x, -1, -1)
    assert resident() - before < 50 * 2**20  # a tensor lost in each call would be 200 MiB
