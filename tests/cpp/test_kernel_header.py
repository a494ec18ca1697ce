"""The types of opkit/kernel.h: numbers against torch's own conversions, typed views, vectors, exceptions."""

from __future__ import annotations

import re
import shutil
import subprocess
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

INCLUDE = Path(opkit.__file__).parent / "cpp" / "include"
FLOATS = (
    torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
)  # fmt: skip


def compiled(name: str, shapes: str, signature: str, body: str, **options) -> opkit.Op:
    """An op `t::<name>` with the given Python signature and a light kernel."""
    scope: dict = {"Tensor": Tensor, "torch": torch}
    exec(f"def {name}{signature}: ...", scope)
    op = opkit.op(f"t::{name}", shapes=shapes)(scope[name])
    op.register_kernel(
        "cpu", opkit.cpp.kernel(f"#include <opkit/kernel.h>\nusing namespace opkit;\n{body}\n", **options)
    )
    return op


# ---------------------------------------------------------------- numbers

CONVERT = """
template <class T, class Bits> void run(Tensor bits, Tensor x, Tensor wide, Tensor narrow) {
  const Bits* in = bits.data<const Bits>();
  for (int64_t i = 0; i < bits.numel(); ++i) {
    T value;
    value.bits = in[i];
    wide.data<float>()[i] = float(value);
  }
  for (int64_t i = 0; i < x.numel(); ++i) narrow.data<Bits>()[i] = T(x.data<const float>()[i]).bits;
}
void convert(Tensor bits, Tensor x, DType dtype, Tensor wide, Tensor narrow) {
  dispatch<Half, BFloat16, Float8_e4m3fn, Float8_e5m2, Float8_e4m3fnuz, Float8_e5m2fnuz, Float8_e8m0fnu>(
      dtype, [&](auto zero) {
        using T = decltype(zero);
        if constexpr (sizeof(T) == 1) run<T, uint8_t>(bits, x, wide, narrow);
        else run<T, uint16_t>(bits, x, wide, narrow);
      });
}
"""


@pytest.fixture(scope="module")
def convert():
    """Bits of a type to float, and floats to bits of it, as C++ does."""
    op = compiled(
        "convert",
        "n, m:float32 -> n:float32, m:bits",
        "(bits: Tensor, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]",
        CONVERT,
    )
    yield op
    opkit._registry.remove("t::convert")


def every_number(dtype: torch.dtype) -> Tensor:
    """All bit patterns of a type."""
    if dtype.itemsize == 1:
        return torch.arange(256, dtype=torch.uint8)
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.uint16)


def floats_around(dtype: torch.dtype) -> Tensor:
    """All numbers of a type, all halves between two of them, their neighbours, and floats of every magnitude."""
    exact = every_number(dtype).view(dtype).float()
    exact = exact[exact.isfinite()].unique().double()
    half = ((exact[1:] + exact[:-1]) / 2).float()
    base = torch.cat([exact.float(), half, -half, torch.tensor([float("inf"), -float("inf"), -0.0])])
    neighbours = [base.nextafter(torch.tensor(direction)) for direction in (float("inf"), -float("inf"))]
    spread = torch.arange(-(2**31), 2**31, 65_521 // 8).to(torch.int32).view(torch.float32)
    return torch.cat([base, *neighbours, spread])


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
def test_conversions_are_those_of_torch(convert, dtype):
    bits, x = every_number(dtype), floats_around(dtype)
    wide, narrow = convert(bits, x, dtype)
    torch.testing.assert_close(wide, bits.view(dtype).float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(wide.signbit()[~wide.isnan()], bits.view(dtype).float().signbit()[~wide.isnan()])
    wanted = x.to(dtype)
    if dtype == torch.float8_e4m3fn and torch.tensor(1e9).to(dtype).float().isnan():
        keep = x.abs() < 464  # torch before 2.13 does not saturate
        x, narrow, wanted = x[keep], narrow[keep], wanted[keep]
    numbers = ~wanted.float().isnan()
    assert torch.equal(narrow[numbers], wanted.view(narrow.dtype)[numbers])
    assert narrow[~numbers].view(dtype).float().isnan().all()
    assert numbers.sum() > 100_000


def test_packed_float4_is_two_numbers_in_a_byte():
    op = compiled(
        "pack",
        "n 2:float32 -> n:float4_e2m1fn_x2, n 2:float32",
        "(x: Tensor) -> tuple[Tensor, Tensor]",
        """void pack(Tensor x, Tensor packed, Tensor back) {
          const auto in = x.view<const float, 2>();
          const auto out = back.view<float, 2>();
          for (int64_t i = 0; i < in.size(0); ++i) {
            const Float4_e2m1fn_x2 pair(in(i, 0), in(i, 1));
            packed.data<Float4_e2m1fn_x2>()[i] = pair;
            out(i, 0) = pair.low();
            out(i, 1) = pair.high();
          }
        }""",
    )
    inf = float("inf")
    cases = [  # halves go to the even one
        (0, 0), (0.25, 0), (0.26, 0.5), (0.75, 1), (1.25, 1), (1.75, 2), (2.5, 2), (3.5, 4), (5, 4), (5.01, 6), (7, 6),
        (1e9, 6), (-0.5, -0.5), (-2.5, -2), (-inf, -6), (3, 3), (1.5, 1.5), (inf, 6),
    ]  # fmt: skip
    x, wanted = torch.tensor(cases).float().t()
    packed, back = op(torch.stack([x, x.flip(0)], 1))
    assert torch.equal(back, torch.stack([wanted, wanted.flip(0)], 1))
    assert (packed.dtype, packed.element_size()) == (torch.float4_e2m1fn_x2, 1)
    codes = packed.view(torch.uint8)
    assert (codes[0] & 15, codes[12] & 15, codes[9] & 15) == (0, 9, 7)
    assert torch.equal(codes >> 4, codes.flip(0) & 15)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_computes_as_torch(dtype):
    op = compiled(
        "arithmetic",
        "n, n:a -> 4 n",
        "(a: Tensor, b: Tensor) -> Tensor",
        """void arithmetic(Tensor a, Tensor b, Tensor y) {
          dispatch<Complex<float>, Complex<double>>(a.dtype(), [&](auto zero) {
            using C = decltype(zero);
            const C *p = a.data<const C>(), *q = b.data<const C>();
            const auto out = y.view<C, 2>();
            for (int64_t i = 0; i < a.numel(); ++i) {
              out(0, i) = p[i] + conj(q[i]);
              out(1, i) = p[i] - q[i];
              out(2, i) = p[i] * q[i];
              out(3, i) = p[i] / q[i];
            }
          });
        }""",
    )
    a, b = torch.randn(2, 100, dtype=dtype)
    b[0] *= 1e30
    torch.testing.assert_close(op(a, b), torch.stack([a + b.conj(), a - b, a * b, a / b]))


@pytest.mark.skipif(compilers.find_nvcc() is None, reason="needs nvcc")
def test_header_compiles_for_cuda(tmp_path):
    """Every type in device code, views and vectors as arguments of a kernel."""
    source = tmp_path / "all.cu"
    source.write_text("""#include <opkit/kernel.h>
using namespace opkit;
template <class T> __global__ void move(View<const T, 2> in, Elements<T> order, T* out) {
  using V = Vec<T, 16 / sizeof(T)>;
  const V v = V::load(in.row(threadIdx.x));
  (v.template to<float>() * 2.0f + Vec<float, V::size>(float(order[threadIdx.x]))).template to<T>().store(out);
  V::load_unaligned(&in(threadIdx.x, 1)).store_unaligned(out + 1);
}
__global__ void pack(const float* x, Float4_e2m1fn_x2* y, Complex<float>* z) {
  *y = Float4_e2m1fn_x2(x[0], x[1]);
  *z = Complex<float>(y->low(), y->high()) * *z / conj(*z);
}
void all(Tensor x, Tensor y) {
  dispatch<float, Half, BFloat16, Float8_e4m3fn, Float8_e5m2, Float8_e4m3fnuz, Float8_e5m2fnuz, Float8_e8m0fnu>(
      x.dtype(), [&](auto zero) {
        using T = decltype(zero);
        move<T><<<1, 32, 0, stream()>>>(x.view<const T, 2>(), Elements<T>(x), y.data<T>());
      });
  y.set_size(0, 1);
}
""")
    nvcc = compilers.get_nvcc()
    command = [*nvcc.command, "-std=c++20", "--expt-relaxed-constexpr", "-arch=sm_90", f"-I{INCLUDE}", "-ptx"]
    run = subprocess.run(
        [*command, str(source), "-o", str(tmp_path / "all.ptx")], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert re.search(r"ld\.global(\.nc)?(\.L1::no_allocate)?\.v4", (tmp_path / "all.ptx").read_text())


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_header_compiles_without_a_warning(tmp_path, compiler):
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    source = tmp_path / "all.cpp"
    source.write_text(
        "#include <opkit/kernel.h>\n#include <opkit/glue.h>\n#include <exception>\n#include <stdexcept>\n"
    )
    for standard in ("c++17", "c++20"):
        command = [
            compiler,
            f"-std={standard}",
            "-Wall",
            "-Wextra",
            "-Werror",
            f"-I{INCLUDE}",
            "-fsyntax-only",
        ]
        for file in ([str(source)], ["-DOPKIT_LINKED", str(source)], [str(INCLUDE / "opkit" / "glue.cpp")]):
            run = subprocess.run([*command, *file], capture_output=True, text=True, check=False)
            assert run.returncode == 0, run.stderr


# ---------------------------------------------------------------- views


def test_view_reads_and_writes_whatever_the_strides():
    op = compiled(
        "swap",
        "n m k -> k m n",
        "(x: Tensor) -> Tensor",
        """void swap(Tensor x, Tensor y) {
          const auto in = x.view<const float, 3>();
          const auto out = y.view<float, 3>();
          OPKIT_CHECK(out.has_rows() && out.row(1, 1) == out.data() + out.stride(0) + out.stride(1), "rows");
          OPKIT_CHECK(!in.has_rows(), "x has rows");
          for (int64_t i = 0; i < in.size(0); ++i)
            for (int64_t j = 0; j < in.size(1); ++j)
              for (int64_t k = 0; k < in.size(2); ++k) out(k, j, i) = in(i, j, k);
        }""",
    )
    x = torch.randn(8, 6, 4)[::2, :, ::2].transpose(0, 2)
    assert torch.equal(op(x), x.permute(2, 1, 0))
    with pytest.raises(RuntimeError, match="t::swap: x has rows"):
        op(torch.randn(2, 2, 2))


@pytest.mark.parametrize(
    ("view", "text"),
    [
        ("x.view<double, 2>()", "argument x is float32, the kernel reads it as float64"),
        ("x.view<float, 3>()", "argument x has 2 dimensions, the kernel views it with 3"),
        ("Tensor().view<float, 2>()", "is None, the kernel reads it"),
        ("y.set_size(0, 1)", "sets the size of dimension 0 of out, which the shape line does not leave open"),
    ],
)
def test_view_of_another_form_is_refused(view, text):
    op = compiled(
        "wrong", "n m -> n m", "(x: Tensor) -> Tensor", f"void wrong(Tensor x, Tensor y) {{ {view}; }}"
    )
    with pytest.raises(RuntimeError, match=f"t::wrong: .*{re.escape(text)}"):
        op(torch.ones(2, 2))


def test_vectors_load_compute_and_store():
    op = compiled(
        "vectors",
        "n, n -> n:float32, n:bfloat16",
        "(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]",
        """void vectors(Tensor x, Tensor h, Tensor y, Tensor z) {
          using F = Vec<float, 8>;
          using B = Vec<BFloat16, 8>;
          static_assert(alignof(F) == 32 && alignof(B) == 16 && sizeof(B) == 16);
          const float* in = x.data<const float>();
          const BFloat16* halves = h.data<const BFloat16>();
          OPKIT_CHECK(F::is_aligned(y.data<float>()) && !F::is_aligned(y.data<float>() + 1), "alignment");
          for (int64_t i = 0; i + 8 <= x.numel(); i += 8) {
            const F wide = B::load_unaligned(halves + i).to<float>();
            const F a = F::load_unaligned(in + i);
            F sums = (a * wide - 1.0f) / 2.0f + a;
            sums[7] = sums.sum();
            sums.store(y.data<float>() + i);
            sums.map([](float v) { return v > 0 ? v : 0; }).to<BFloat16>().store_unaligned(z.data<BFloat16>() + i);
          }
        }""",
    )
    x = torch.randn(65)[1:]
    h = torch.randn(65).bfloat16()[1:]
    y, z = op(x, h)
    wanted = ((x * h.float() - 1) / 2 + x).reshape(-1, 8)
    wanted[:, 7] = wanted.sum(1)
    torch.testing.assert_close(y.reshape(-1, 8), wanted)
    assert torch.equal(z, y.relu().bfloat16())


# ---------------------------------------------------------------- exceptions

# Without flags of the kernel's own, the bodies of the headers are linked; with flags they are compiled with it.
with_and_without_flags = pytest.mark.parametrize("flags", [(), ("-O2",)], ids=["linked", "compiled"])


@with_and_without_flags
def test_exceptions_name_the_op_wherever_they_are_thrown(flags):
    op = compiled(
        "throws",
        "n -> n",
        "(x: Tensor, how: int) -> Tensor",
        """#include <stdexcept>
        struct Mine : std::runtime_error { using std::runtime_error::runtime_error; };
        void raise_one(int64_t how) {
          if (how == 1) throw 7;
          if (how == 2) throw std::out_of_range("std");
          if (how == 3) throw Mine("mine");
          OPKIT_CHECK(how != 4, "checked ", how);
        }
        void throws(Tensor x, int64_t how, Tensor y) {
          if (how < 10) return raise_one(how);
          parallel_for(0, 1 << 20, 1 << 10, [&](int64_t begin, int64_t) { if (begin >= 0) raise_one(how - 10); });
          parallel_for(0, 10, 100, [&](int64_t, int64_t) { raise_one(how - 20); });
        }""",
        extra_cflags=flags,
    )
    foreign = "the kernel threw something that is no std::exception; throw one, or use OPKIT_CHECK"
    texts = {1: foreign, 2: "std", 3: "mine", 4: "checked 4"}
    for place in (0, 10, 20):
        for how, text in texts.items():
            with pytest.raises(RuntimeError) as caught:
                op(torch.ones(1), place + how)
            assert str(caught.value).splitlines()[0] == f"t::throws: {text}"


def test_kernel_may_have_names_of_its_own():
    op = compiled(
        "named",
        "n -> ?m<=n",
        "(x: Tensor) -> Tensor",
        """struct Sizes { int n; };
        struct Open {}; struct Strides {}; struct TensorArg {}; struct Array {};
        int handled() { return 1; }
        int raise(int n) { return n; }
        int stack = 0, h_out0 = 0, t_x = 0;
        void named(opkit::Tensor x, opkit::Tensor y) { y.data<float>()[0] = 5; y.set_size(0, ::raise(1)); }""",
    )
    assert op(torch.ones(3)).tolist() == [5]


@with_and_without_flags
def test_glue_is_the_same_linked_or_compiled(flags):
    op = compiled(
        "every",
        None,
        "(xs: list[Tensor | None], y: Tensor | None, text: str, ints: list[int] | None, by: float | None) -> Tensor",
        """void every(Span<Tensor> xs, Tensor y, StringView text, Optional<Span<int64_t>> ints, Optional<double> by,
                   Tensor out) {
          double sum = by.value_or(0.5) + text.size();
          for (const Tensor& x : xs) if (x) sum += x.size(-1) * x.data<double>()[0];
          if (y) sum += y.data<double>()[0];
          if (ints) for (int64_t i : *ints) sum += i;
          out.data<double>()[0] = sum;
        }""",
        extra_cflags=flags,
    )
    op.register_fake(lambda xs, y, text, ints, by: torch.empty(1, dtype=torch.float64))
    (library,) = op.build()
    linked = "glue.o" in (library.parent / "log.txt").read_text()
    assert linked == (not flags)
    one = torch.full((3,), 2.0, dtype=torch.float64)
    assert op([one, None, one], one, "abc", [10, 20], 0.25).item() == 0.25 + 3 + 12 + 2 + 30
    assert op([], None, "", None, None).item() == 0.5
    with pytest.raises(
        RuntimeError, match=r"t::every: argument xs is float32, the kernel reads it as float64"
    ):
        op([one.float()], None, "", None, None)
