"""The ops that call.py and grow.py measure, each in every way of writing it.

Every peer is in the cheapest form that does what its row asks for: without gradients where none are taken.
The bodies of `fourteen` and `rich` are those of pytorch#177109 and #176592.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import opkit

PLAIN, OPKIT, CUSTOM_OP, LIBRARY, FUNCTION, CPP = (
    "plain function", "opkit", "custom_op", "Library.impl", "autograd.Function", "C++ op",
)  # fmt: skip
Peers = dict[str, Callable[..., Any]]

_library = torch.library.Library("opkit_bench_library", "FRAGMENT")
opkit.cpp.load("opkit_bench_cpp", [Path(__file__).with_name("_peers.cpp")], is_python_module=False)
_cpp = torch.ops.opkit_bench_cpp


class Three(NamedTuple):
    sine: Tensor
    cosine: Tensor
    negative: Tensor


def sine(x: Tensor) -> Tensor:
    return x.sin()


def sine_backward(grad: Tensor, x: Tensor) -> Tensor:
    return grad * x.cos()


# fmt: off
def fourteen(
    a: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor, f: Tensor, g: Tensor,
    h: Tensor, i: Tensor, j: Tensor, k: Tensor, l: Tensor, m: Tensor, n: Tensor,
) -> Tensor:
    return b.clone()


def rich(
    x: Tensor, y: Tensor, z: Tensor, w: Tensor,
    ints: list[int], floats: list[float], ints2: list[int], floats2: list[float],
    ints3: list[int], floats3: list[float], flag: bool, mode: str,
) -> Tensor:
    return x + 1


def ten(
    out: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor,
    f: Tensor, g: Tensor, h: Tensor, i: Tensor, j: Tensor,
) -> None:
    out.copy_(b)
# fmt: on


def cast(xs: list[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    return xs[0].to(dtype, copy=True)


def _cast_fake(xs, dtype, device):
    return torch.empty_like(xs[0], dtype=dtype)


def three(x: Tensor) -> Three:
    return Three(x.sin(), x.cos(), x.neg())


def _save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


def _sine_gradient(ctx, grad):
    (x,) = ctx.saved_tensors
    return grad * x.cos()


def _save_nothing(ctx, inputs, output):
    pass


def _rich_gradient(ctx, grad):
    return grad, *(None,) * 11


class SineFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    backward = staticmethod(_sine_gradient)


class FourteenFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, c, d, e, f, g, h, i, j, k, l, m, n):
        return b.clone()


class RichFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, z, w, ints, floats, ints2, floats2, ints3, floats3, flag, mode):
        return x + 1

    backward = staticmethod(_rich_gradient)


class CastFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, xs, dtype, device):
        return xs[0].to(dtype, copy=True)


class TenFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, b, c, d, e, f, g, h, i, j):
        ctx.mark_dirty(out)
        out.copy_(b)
        return out


class ThreeFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return Three(x.sin(), x.cos(), x.neg())


def _in_python(
    name: str,
    function: Callable[..., Any],
    *,
    mutates: tuple[str, ...] = (),
    fake: Callable[..., Any] | None = None,
    gradient: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
) -> Peers:
    """Return the op as torch.library's two ways have it; the schema is that of the op in C++."""
    schema = str(getattr(_cpp, function.__name__).default._schema).split("(", 1)[1]
    custom = torch.library.custom_op(
        f"opkit_bench_custom::{name}", function, mutates_args=mutates, schema=f"({schema}"
    )
    _library.define(f"{name}({schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, function, "CPU")
    library = getattr(torch.ops.opkit_bench_library, name).default
    if fake is not None:
        custom.register_fake(fake)
        torch.library.register_fake(f"opkit_bench_library::{name}", fake, lib=_library)
    if gradient is not None:
        custom.register_autograd(gradient[0], setup_context=gradient[1])
        torch.library.register_autograd(
            f"opkit_bench_library::{name}", gradient[0], setup_context=gradient[1], lib=_library
        )
    return {CUSTOM_OP: custom, LIBRARY: library}


def _ours(
    name: str, function: Callable[..., Any], shapes: str | None, *, mutates: tuple[str, ...] = ()
) -> opkit.Op[..., Any]:
    return opkit.op(f"opkit_bench::{name}", shapes=shapes, mutates_args=mutates)(function)


def _native(name: str, function: Callable[..., Any], shapes: str, symbol: str) -> opkit.Op[..., Any]:
    op = _ours(name, function, shapes)
    op.register_kernel("cpu", opkit.cpp.kernel("_sine.cpp", symbol=symbol), backend="cpp")
    return op


python_sine = _ours("sine", sine, "*b -> *b")
python_sine.register_autograd(_sine_gradient, setup_context=_save)
native_sine_backward = _native("sine_backward", sine_backward, "*b, *b -> *b", "sine_backward")
native_sine = _native("native_sine", sine, "*b -> *b", "sine")
native_sine.register_autograd(native_sine_backward, saves=("x",))
torch.library.register_fake("opkit_bench_cpp::sine", torch.empty_like)

_fourteen = _ours("fourteen", fourteen, ", ".join(["*b"] * 14) + " -> *b")
_rich = _ours("rich", rich, "*b, *b, *b, *b -> *b")
_rich_with_grad = _ours("rich_with_grad", rich, "*b, *b, *b, *b -> *b")
_rich_with_grad.register_autograd(_rich_gradient, setup_context=_save_nothing)
_ten = _ours("ten", ten, ", ".join(["*b"] * 10) + " -> ", mutates=("out",))
_described = _ours("described", sine, None)
_described.register_fake(torch.empty_like)
_cast = _ours("cast", cast, None)
_cast.register_fake(_cast_fake)
_three = _ours("three", three, "*b -> *b, *b, *b")

_sines = {
    **_in_python("sine", sine, fake=torch.empty_like),
    FUNCTION: SineFunction.apply,
    CPP: _cpp.sine.default,
}
_sines_with_grad = {
    **_in_python("sine_with_grad", sine, fake=torch.empty_like, gradient=(_sine_gradient, _save)),
    FUNCTION: SineFunction.apply,
    CPP: _cpp.sine_with_grad.default,
}
SINE: Peers = {PLAIN: sine, OPKIT: python_sine, **_sines}
NATIVE_SINE: Peers = {PLAIN: sine, OPKIT: native_sine, **_sines}
DESCRIBED: Peers = {PLAIN: sine, OPKIT: _described, **_sines}
SINE_WITH_GRAD: Peers = {PLAIN: sine, OPKIT: python_sine, **_sines_with_grad}
NATIVE_SINE_WITH_GRAD: Peers = {PLAIN: sine, OPKIT: native_sine, **_sines_with_grad}
FOURTEEN: Peers = {
    PLAIN: fourteen,
    OPKIT: _fourteen,
    **_in_python("fourteen", fourteen),
    FUNCTION: FourteenFunction.apply,
    CPP: _cpp.fourteen.default,
}
FOURTEEN_BY_KEYWORD: Peers = {name: peer for name, peer in FOURTEEN.items() if name != FUNCTION}
RICH: Peers = {
    PLAIN: rich,
    OPKIT: _rich,
    **_in_python("rich", rich),
    FUNCTION: RichFunction.apply,
    CPP: _cpp.rich.default,
}
RICH_WITH_GRAD: Peers = {
    PLAIN: rich,
    OPKIT: _rich_with_grad,
    **_in_python("rich_with_grad", rich, gradient=(_rich_gradient, _save_nothing)),
    FUNCTION: RichFunction.apply,
}
TEN: Peers = {
    PLAIN: ten,
    OPKIT: _ten,
    **_in_python("ten", ten, mutates=("out",)),
    FUNCTION: TenFunction.apply,
    CPP: _cpp.ten.default,
}
CAST: Peers = {
    PLAIN: cast,
    OPKIT: _cast,
    **_in_python("cast", cast, fake=_cast_fake),
    FUNCTION: CastFunction.apply,
    CPP: _cpp.cast.default,
}
THREE: Peers = {
    PLAIN: three,
    OPKIT: _three,
    **_in_python("three", three),
    FUNCTION: ThreeFunction.apply,
    CPP: _cpp.three.default,
}
