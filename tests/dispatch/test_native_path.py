"""The native path against its twin in Python: in every state of torch, one op gives one answer.

Each op is declared twice. `n::…` runs as this process decided (OPKIT_NATIVE); `p::…` never meets the core. What a call
gives, or raises, is compared between the two, and with the dispatcher's overload of the first.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import opkit
from opkit import _registry
from opkit.dispatch import native

needs_core = pytest.mark.skipif(native.core() is None, reason="this process runs ops by Python")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # both twins warn alike, once
    needs_core,  # where there is none, Python would be compared with itself
]


class Norm(NamedTuple):
    y: Tensor
    rstd: Tensor
    count: Tensor


# ---------------------------------------------------------------- the ops


class Case(NamedTuple):
    """An op, and a call of it with these tensors."""

    op: opkit.Op
    call: Callable[..., Any]
    tensors: Callable[[], list[Tensor]]
    truth: Callable[..., Any] | None = None
    """The same in torch's own operations."""


def values(*shape: int, start: float = 0.5) -> Tensor:
    count = int(np.prod(shape))
    return torch.linspace(start, start + 1, count).reshape(shape)


def square(ns):
    @opkit.op(f"{ns}::square", shapes="*b -> *b")
    def square(x: Tensor) -> Tensor:
        return x * x

    square.register_autograd(
        lambda ctx, g: g * 2 * ctx.saved_tensors[0],
        lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
    square.register_autocast("cpu", torch.bfloat16)
    return Case(square, lambda op, x: op(x), lambda: [values(2, 3)], lambda x: x * x)


def norm(ns):
    @opkit.op(f"{ns}::norm", shapes="*b n, n -> *b n:x, *b 1:x, 1:int64")
    def norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Norm:
        rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        return Norm(x * rstd * weight, rstd, torch.tensor([x.numel()]))

    def save(ctx, inputs, output):
        assert type(output) is Norm
        ctx.save_for_backward(inputs[0], inputs[1], output.rstd)
        ctx.numbers = [inputs[2]]

    def backward(ctx, gy, grstd, gcount):
        x, weight, rstd = ctx.saved_tensors
        n = x.shape[-1]
        through = ((gy * weight * x).sum(-1, keepdim=True) + grstd) * -(rstd**3) / n
        gx = gy * weight * rstd + through * x
        return gx, (gy * x * rstd).sum(tuple(range(x.dim() - 1))), None

    norm.register_autograd(backward, save)

    def truth(x, weight):
        rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return x * rstd * weight, rstd, torch.tensor([x.numel()])

    return Case(norm, lambda op, x, w: op(x, w, eps=1e-5), lambda: [values(2, 3), values(3)], truth)


LIGHT = """#include <opkit/kernel.h>
void scale(opkit::Tensor x, double k, opkit::Tensor y) {
  OPKIT_CHECK(x.is_contiguous(), "x is not contiguous");
  for (int64_t i = 0; i < x.numel(); ++i) y.data<float>()[i] = x.data<float>()[i] * float(k);
}
"""


def light(ns):
    """With a kernel in C++, and another op as its formula."""

    @opkit.op(f"{ns}::scale", shapes="*b -> *b")
    def scale(x: Tensor, k: float = 3.0) -> Tensor:
        raise AssertionError("the kernel takes these calls")

    @opkit.op(f"{ns}::scale_backward", shapes="*b -> *b")
    def scale_backward(g: Tensor, k: float) -> Tensor:
        return g * k

    scale.register_kernel("cpu", opkit.cpp.kernel(LIGHT, symbol="scale"), backend="cpp")
    scale.register_autograd(scale_backward, saves=("k",))
    return Case(scale, lambda op, x: op(x), lambda: [values(2, 3)], lambda x: x * 3)


def mutating(ns):
    @opkit.op(f"{ns}::add_", mutates_args=["x"], shapes="*b, *b ->")
    def add_(x: Tensor, y: Tensor, alpha: int = 2) -> None:
        x.add_(y, alpha=alpha)

    def call(op, x, y):
        x = x.clone()
        before = getattr(x, "_version", 0) if type(x) is Tensor and not x.is_inference() else 0
        assert op(x, y) is None
        return x, getattr(x, "_version", 0) - before if type(x) is Tensor and not x.is_inference() else 0

    return Case(add_, call, lambda: [values(3), values(3, start=2)], lambda x, y: x + 2 * y)


def mutating_lists(ns):
    """Whose arguments are lists, of which it writes into one, and a tuple of numbers."""

    @opkit.op(f"{ns}::blend_", mutates_args=["xs"], shapes="[*s], [*s] ->")
    def blend_(xs: list[Tensor], ys: list[Tensor], by: tuple[float, float]) -> None:
        assert type(by) is tuple
        for x, y in zip(xs, ys, strict=True):
            x.mul_(by[0]).add_(y, alpha=by[1])

    def call(op, x, y):
        x, y, first, second = x.clone(), y.clone(), x, y
        counts = type(x) is Tensor and not x.is_inference()
        before = x._version + y._version if counts else 0
        assert op([x, y], [first, second], (2.0, 3.0)) is None
        return x, y, x._version + y._version - before if counts else 0

    return Case(blend_, call, lambda: [values(3), values(2, 2, start=2)], lambda x, y: (x * 5, y * 5))


def mutating_with_result(ns):
    @opkit.op(f"{ns}::push_", mutates_args=["buffer"], shapes="n, n -> n:x")
    def push_(buffer: Tensor, x: Tensor) -> Tensor:
        buffer.copy_(x.detach() + 1)
        return x * 2

    push_.register_autograd(lambda ctx, g: (None, g * 2), non_differentiable=("buffer",))

    def call(op, x):
        buffer = torch.zeros(3)
        return op(buffer, x), buffer

    return Case(push_, call, lambda: [values(3)], lambda x: (x * 2, x.detach() + 1))


def keyword(ns):
    @opkit.op(f"{ns}::mix", shapes="*b, *b -> *b")
    def mix(x: Tensor, k: int = 2, *, y: Tensor, scale: float = 0.5, negate: bool = False) -> Tensor:
        return (x * k + y.sin() * scale) * (-1 if negate else 1)

    mix.register_autograd(opkit.from_reference)
    return Case(
        mix,
        lambda op, x, y: op(x, negate=True, y=y),
        lambda: [values(3), values(3, start=2)],
        lambda x, y: -(x * 2 + y.sin() * 0.5),
    )


def lists(ns):
    @opkit.op(f"{ns}::weigh", shapes="[*s], () -> [*s]")
    def weigh(xs: list[Tensor], by: list[float], bias: Tensor | None = None) -> list[Tensor]:
        return [x * k + (0 if bias is None else bias) for x, k in zip(xs, by, strict=True)]

    weigh.register_autograd(
        lambda ctx, gs: ([g * k for g, k in zip(gs, ctx.by, strict=True)], None, None),
        lambda ctx, inputs, output: setattr(ctx, "by", inputs[1]),
    )
    return Case(
        weigh,
        lambda op, x, y: op([x, y], [2.0, 3.0]),
        lambda: [values(3), values(2, 2)],
        lambda x, y: [x * 2, y * 3],
    )


def tuples(ns):
    """Whose arguments are tuples, also where it is differentiated."""

    @opkit.op(f"{ns}::affine", shapes="n -> n")
    def affine(
        x: Tensor,
        by: tuple[float, float],
        ints: tuple[int, int, int] | None = None,
        *,
        on: tuple[bool] = (True,),
    ) -> Tensor:
        assert (type(by), type(on)) == (tuple, tuple)
        return x * by[0] + by[1] * (1 if ints is None else ints[2]) * on[0]

    def save(ctx, inputs, output):
        ctx.by, ctx.kinds = inputs[1], [type(value) for value in inputs[1:]]

    def backward(ctx, g):
        assert ctx.kinds == [tuple, tuple, tuple]
        return g * ctx.by[0], None, None, None

    affine.register_autograd(backward, save)
    return Case(
        affine,
        lambda op, x: op(x, [2.0, 3.0], (1, 2, 4)),
        lambda: [values(3)],
        lambda x: x * 2 + 12,
    )


def optional(ns):
    """A formula that is an op in Python, and saves an argument that may be None."""

    @opkit.op(f"{ns}::shifted", shapes="*b, *b -> *b")
    def shifted(x: Tensor, by: Tensor | None = None, n: int | None = None) -> Tensor:
        return x.sin() + (0 if by is None else by) * (1 if n is None else n)

    @opkit.op(f"{ns}::shifted_backward", shapes="*b, *b, *b -> *b, *b")
    def shifted_backward(g: Tensor, x: Tensor, by: Tensor | None, n: int | None) -> tuple[Tensor, Tensor]:
        return g * x.cos(), g * (1 if n is None else n)

    shifted.register_autograd(shifted_backward, saves=("x", "by", "n"))
    return Case(
        shifted,
        lambda op, x, y: (op(x), op(x, None, 3), op(x, y), op(x, by=y, n=2)),
        lambda: [values(3), values(3, start=2)],
        lambda x, y: (x.sin(), x.sin(), x.sin() + y, x.sin() + 2 * y),
    )


def two_results(ns):
    """A formula that is an op, saves an output, and is registered for one of two outputs."""

    @opkit.op(f"{ns}::softplus", shapes="*b -> *b, *b")
    def softplus(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.log1p(x.exp()), torch.sigmoid(x)

    @opkit.op(f"{ns}::softplus_backward", shapes="*b, *b -> *b")
    def softplus_backward(g: Tensor, s: Tensor) -> Tensor:
        return g * s

    softplus.register_autograd(softplus_backward, saves=("out1",), non_differentiable=("out1",))
    return Case(
        softplus,
        lambda op, x: op(x),
        lambda: [values(2, 3)],
        lambda x: (torch.log1p(x.exp()), torch.sigmoid(x).detach()),
    )


def numbers(ns):
    @opkit.op(f"{ns}::measure")
    def measure(x: Tensor, s: str = "a") -> tuple[Tensor, int, float, bool]:
        return x * len(s), x.numel(), 0.5, True

    measure.register_fake(lambda x, s="a": (torch.empty_like(x), x.numel(), 0.5, True))
    measure.register_autograd(
        lambda ctx, g, *others: (g * ctx.n, None),
        lambda ctx, inputs, output: setattr(ctx, "n", len(inputs[1])),
    )
    return Case(measure, lambda op, x: op(x, "abc"), lambda: [values(3)], lambda x: (x * 3, 3, 0.5, True))


def contiguous(ns):
    """Given a transposed tensor, as its kernel wants another one."""

    @opkit.op(f"{ns}::row_sums", shapes="m n -> m", layout="contiguous")
    def row_sums(x: Tensor) -> Tensor:
        assert x.is_contiguous()
        return x.sum(1)

    row_sums.register_autograd(
        lambda ctx, g: g[:, None].expand(ctx.shape).contiguous(),
        lambda ctx, inputs, output: setattr(ctx, "shape", inputs[0].shape),
    )
    return Case(row_sums, lambda op, x: op(x.T), lambda: [values(3, 2)], lambda x: x.T.sum(1))


def typed(ns):
    """With a dtype and a device among its arguments, of which its formula saves one."""

    @opkit.op(f"{ns}::cast")
    def cast(x: Tensor, dtype: torch.dtype = torch.float64, *, device: torch.device | None = None) -> Tensor:
        assert type(dtype) is torch.dtype
        assert type(device) is (torch.device if device is not None else type(None))
        return x.to(dtype, copy=True) * 2

    @opkit.op(f"{ns}::cast_backward")
    def cast_backward(g: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        assert g.dtype is dtype
        return g.to(x.dtype) * 2

    cast.register_fake(lambda x, dtype=torch.float64, *, device=None: torch.empty_like(x, dtype=dtype))
    cast_backward.register_fake(lambda g, x, dtype: torch.empty_like(x))
    cast.register_autograd(cast_backward, saves=("x", "dtype"))
    return Case(
        cast,
        lambda op, x: (op(x), op(x, torch.float16), op(x, dtype=torch.float32, device=torch.device("cpu"))),
        lambda: [values(2, 3)],
        lambda x: (x.double() * 2, x.half() * 2, x * 2),
    )


def described(ns):
    """Whose results a function describes, in other strides than a shape line would."""

    @opkit.op(f"{ns}::turned")
    def turned(x: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        return x.cos().T, x.sum(0) * k

    @turned.register_fake
    def _(x, k=1):
        return torch.empty_like(x).T, x.new_empty(x.shape[1])

    turned.register_autograd(
        lambda ctx, g, h: (-g.T * ctx.saved_tensors[0].sin() + h * ctx.k, None),
        lambda ctx, inputs, output: (ctx.save_for_backward(inputs[0]), setattr(ctx, "k", inputs[1])),
    )
    return Case(turned, lambda op, x: op(x, 3), lambda: [values(2, 3)], lambda x: (x.cos().T, x.sum(0) * 3))


FILLED = """
#include <opkit/kernel.h>
void rows(opkit::Tensor x, opkit::Optional<int64_t> k, opkit::Tensor y, opkit::Tensor count) {
  OPKIT_CHECK(x.dim() == 2, "x has ", x.dim(), " dimensions");
  opkit::dispatch<float, double>(x.dtype(), [&](auto zero) {
    using T = decltype(zero);
    for (int64_t r = 0; r < y.size(0); ++r)
      for (int64_t j = 0; j < y.size(1); ++j)
        y.data<T>()[r * y.stride(0) + j * y.stride(1)] = x.data<T>()[r * x.stride(0)] * T(j + 1);
  });
  *count.data<int64_t>() = k ? *k : -1;
}
"""


def filled(ns):
    """With a kernel in C++, and a function that describes its results, in other strides than a shape line would."""

    @opkit.op(f"{ns}::rows")
    def rows(x: Tensor, k: int | None = None) -> tuple[Tensor, Tensor]:
        raise AssertionError("the kernel takes these calls")

    @rows.register_fake
    def _(x, k=None):
        if k == 0:
            raise ValueError("k is 0")
        return x.new_empty(k or 1, x.shape[0]).T, x.new_empty((), dtype=torch.int64)

    rows.register_kernel("cpu", opkit.cpp.kernel(FILLED, symbol="rows"), backend="cpp")
    rows.register_autograd(
        lambda ctx, g, _: (F.pad((g * torch.arange(1, 4)).sum(1, keepdim=True), (0, ctx.rest)), None),
        lambda ctx, inputs, output: setattr(ctx, "rest", inputs[0].shape[1] - 1),
    )
    return Case(
        rows,
        lambda op, x: op(x, 3),
        lambda: [values(2, 3)],
        lambda x: (x[:, :1] * torch.arange(1, 4), torch.tensor(3)),
    )


def picked(ns):
    """With a shape line over a list."""

    @opkit.op(f"{ns}::picked", shapes="[*s], n -> n")
    def picked(xs: list[Tensor], y: Tensor) -> Tensor:
        return xs[0].sum() * y

    picked.register_autograd(opkit.from_reference)
    return Case(
        picked,
        lambda op, x, y: op([x, x], y),
        lambda: [values(2, 2), values(3, start=2)],
        lambda x, y: x.sum() * y,
    )


def lone(ns):
    """Whose result comes in a tuple of one."""

    @opkit.op(f"{ns}::lone", shapes="n -> n")
    def lone(x: Tensor) -> tuple[Tensor]:
        return (x * 2,)

    lone.register_autograd(lambda ctx, g: g * 2)
    return Case(lone, lambda op, x: op(x), lambda: [values(3)], lambda x: (x * 2,))


def without_formula(ns):
    @opkit.op(f"{ns}::half", shapes="*b -> *b")
    def half(x: Tensor) -> Tensor:
        return x / 2

    return Case(half, lambda op, x: op(x), lambda: [values(3)])


def refusing(ns):
    @opkit.op(f"{ns}::refuse", shapes="n -> n")
    def refuse(x: Tensor) -> Tensor:
        raise ValueError("not today")

    return Case(refuse, lambda op, x: op(x), lambda: [values(3)])


MAKERS = (
    square, norm, light, mutating, mutating_lists, mutating_with_result, keyword, lists, tuples, optional,
    two_results, numbers, contiguous, typed, described, filled, picked, lone, without_formula, refusing,
)  # fmt: skip


@contextlib.contextmanager
def in_twin(ns: str):
    """Ops of the namespace `p` that are defined meanwhile never go through the core."""
    if ns != "p":
        yield
        return
    before = set(_registry._ops)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_core", None)
        yield
    for name in set(_registry._ops) - before:
        opkit.get(name)._runner.arrive = None


@pytest.fixture(scope="module")
def made():
    """Every op in both twins."""
    before = set(_registry._ops)

    @functools.cache
    def make(maker: Callable[[str], Case], ns: str) -> Case:
        with in_twin(ns):
            return maker(ns)

    yield make
    for name in set(_registry._ops) - before:
        _registry.remove(name)


@pytest.fixture
def registry():
    before = set(_registry._ops)
    yield
    for name in set(_registry._ops) - before:
        _registry.remove(name)


# ---------------------------------------------------------------- what a call gave


def same_names(text: str) -> str:
    """Return a text without what must differ: the namespace, addresses, places in files."""
    text = re.sub(r"\bp(::|\.)(?=[a-z]+_?)", r"n\1", text)
    text = re.sub(r"0x[0-9a-f]+", "0x", text)
    return re.sub(r"\b(cpu|none)\s+at.*", "", text)


def shown(value: Any) -> Any:
    """Return everything about a result that a caller could see."""
    if isinstance(value, torch.Tensor):
        seen: list[Any] = [
            type(value).__name__,
            value.dtype,
            tuple(value.shape),
            value.device.type,
            value.layout,
        ]
        if value.layout is torch.strided and not value.is_nested:
            seen += [value.stride(), value.storage_offset(), value.is_conj(), value.is_neg()]
        seen += [value.requires_grad, value.is_leaf, value.is_inference(), value.output_nr]
        seen.append(None if value.grad_fn is None else same_names(value.grad_fn.name()))
        if type(value) in (Tensor, torch.nn.Parameter, Tagged) and value.device.type != "meta":
            seen.append(plain(value))
        return tuple(seen)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value).__name__, {k: shown(v) for k, v in value._asdict().items()}
    if isinstance(value, (list, tuple)):
        return type(value), [shown(v) for v in value]
    return type(value), same_names(str(value))


def plain(tensor: Tensor) -> Any:
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return "wrapped"
    dense = tensor.detach().as_subclass(Tensor)
    dense = dense.to_dense() if dense.layout is not torch.strided else dense
    return repr(dense.resolve_conj().resolve_neg().flatten().tolist())


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in flat(v)] if isinstance(value, (list, tuple)) else []


def scalar(outputs: Any) -> Tensor:
    """Return a number that depends on each output, on each in its own way."""
    terms = [
        (o.abs() if o.is_complex() else o).sin().sum() * (i + 1)
        for i, o in enumerate(flat(outputs))
        if o.is_floating_point() or o.is_complex()
    ]
    return sum(terms, torch.zeros(()))


def derived(f: Callable[..., Any], tensors: list[Tensor]) -> Any:
    """Call a function with gradients, and differentiate it."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    outputs = f(*leaves)
    before = shown(outputs)
    total = scalar(outputs)
    grads = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else None
    return before, shown(grads)


def outcome(state: Callable[..., Any], f: Callable[..., Any], tensors: list[Tensor]) -> Any:
    """Return what a call gives, or raises, in a state."""
    try:
        return state(f, tensors)
    except Exception as error:
        return type(error), same_names(str(error))


# ---------------------------------------------------------------- states: around the call


def around(enter: Callable[[], Any]) -> Callable[..., Any]:
    """A state that is a context: once for a call without gradients, once for one with them."""

    def state(f, tensors):
        with enter():
            without = shown(f(*tensors))
        with enter():
            return without, outcome(derived, f, tensors)

    return state


def around_forward(enter: Callable[[], Any]) -> Callable[..., Any]:
    """The same, where backward runs outside."""

    def inside(f):
        def called(*tensors):
            with enter():
                return f(*tensors)

        return called

    return lambda f, tensors: (shown(inside(f)(*tensors)), outcome(derived, inside(f), tensors))


class Functions(TorchFunctionMode):
    def __init__(self, log):
        super().__init__()
        self.log = log

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.log.append(same_names(str(function)))
        return function(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    def __init__(self, log):
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.log.append(same_names(str(function)))
        return function(*args, **(kwargs or {}))


def logged(mode: Callable[[list[str]], Any]) -> Callable[..., Any]:
    def state(f, tensors):
        log: list[str] = []
        answer = around(lambda: mode(log))(f, tensors)
        assert any("n." in name for name in log) or not log, log
        return answer, [name for name in log if "n." in name]

    return state


def profiled(f, tensors):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        answer = shown(f(*tensors)), outcome(derived, f, tensors)
    names = sorted(same_names(e.name) for e in profile.events() if re.match(r"[np]::", e.name))
    assert names
    return answer, names


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def anomalous(f, tensors):
    with torch.autograd.detect_anomaly(check_nan=True):
        return outcome(derived, f, tensors)


def hooked(f, tensors):
    log = []

    def pack(tensor):
        log.append((tuple(tensor.shape), plain(tensor)))
        return tensor * 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        answer = outcome(derived, f, tensors)
    return answer, len(log)


def checkpointed(reentrant: bool) -> Callable[..., Any]:
    def state(f, tensors):
        def inner(*tensors):
            return tuple(flat(f(*tensors)))

        return derived(lambda *t: checkpoint(inner, *t, use_reentrant=reentrant), tensors)

    return state


def dual(f, tensors):
    with forward_ad.dual_level():
        outputs = f(*[forward_ad.make_dual(t, torch.ones_like(t)) for t in tensors])
        unpacked = [forward_ad.unpack_dual(o) for o in flat(outputs)]
        return [(plain(o.primal), None if o.tangent is None else plain(o.tangent)) for o in unpacked]


def below_autograd(f, tensors):
    with torch._C._AutoDispatchBelowAutograd():
        return shown(f(*[t.requires_grad_() for t in tensors]))


def compiled_autograd(f, tensors):
    from torch._dynamo import compiled_autograd

    def state():
        leaves = [t.detach().requires_grad_() for t in tensors]
        total = scalar(f(*[leaf * 1 for leaf in leaves]))
        with compiled_autograd._enable(torch.compile(backend="eager")):
            try:
                total.backward()
            except Exception as error:  # Dynamo puts it into one of its own
                return re.findall(r"\w+: it has no gradient formula", str(error))[:1]
        return shown([leaf.grad for leaf in leaves])

    first = state()
    return first, state()


def in_a_hook(f, tensors):
    """A call inside of a backward pass, with gradients of its own."""
    leaf = torch.ones(2, requires_grad=True)
    seen = []
    leaf.register_hook(lambda g: seen.append(outcome(derived, f, tensors)))
    (leaf * 2).sum().backward()
    return seen


def dispatcher_in_python(f, tensors):
    from torch._dispatch.python import enable_python_dispatcher

    with enable_python_dispatcher():
        return shown(f(*tensors)), outcome(derived, f, tensors)


AROUND: dict[str, Callable[..., Any]] = {
    "nothing": around(contextlib.nullcontext),
    "no_grad": around(torch.no_grad),
    "inference_mode": around(torch.inference_mode),
    "set_grad_enabled inside of no_grad": around_forward(lambda: torch.set_grad_enabled(True)),
    "autocast": around_forward(lambda: torch.autocast("cpu", torch.bfloat16)),
    "function mode": logged(Functions),
    "dispatch mode": logged(Dispatched),
    "no torch function": around(torch._C.DisableTorchFunction),
    "no torch function of subclasses": around(torch._C.DisableTorchFunctionSubclass),
    "profiler": profiled,
    "deterministic": around(deterministic),
    "device context": around(lambda: torch.device("cpu")),
    "device context of meta": around(lambda: torch.device("meta")),
    "use_backend": around(lambda: opkit.use_backend("reference")),
    "saved_tensors_hooks": hooked,
    "save_on_cpu": around(torch.autograd.graph.save_on_cpu),
    "disabled saved_tensors_hooks": around(lambda: torch.autograd.graph.disable_saved_tensors_hooks("no")),
    "anomaly": anomalous,
    "checkpoint": checkpointed(False),
    "reentrant checkpoint": checkpointed(True),
    "dual level": around(forward_ad.dual_level),
    "dual tensors": dual,
    "below autograd": below_autograd,
    "compiled autograd": compiled_autograd,
    "in a hook": in_a_hook,
    "python dispatcher": dispatcher_in_python,
}


# ---------------------------------------------------------------- states: of the arguments


class Tagged(Tensor):
    """A subclass with torch's default __torch_function__."""


class Wrapped(Tensor):
    """A subclass with a __torch_dispatch__."""

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def out_of(value):
            if isinstance(value, (list, tuple)):
                return type(value)(map(out_of, value))
            return value.inner if isinstance(value, Wrapped) else value

        def into(value):
            if isinstance(value, (list, tuple)):
                return type(value)(map(into, value))
            return Wrapped(value) if isinstance(value, Tensor) else value

        return into(function(*out_of(args), **{k: out_of(v) for k, v in (kwargs or {}).items()}))


def given(change: Callable[[Tensor], Tensor], *, gradients: bool = True) -> Callable[..., Any]:
    def state(f, tensors):
        tensors = [change(t) for t in tensors]
        answer = outcome(lambda f, t: shown(f(*t)), f, tensors)
        return answer, outcome(derived, f, tensors) if gradients else None

    return state


def faked(f, tensors):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in tensors]
        return shown(f(*fakes)), outcome(derived, f, fakes)


def faked_outside(f, tensors):
    from torch._subclasses import FakeTensorMode

    mode = FakeTensorMode()
    return shown(f(*[mode.from_tensor(t) for t in tensors]))


def unwrapped(f, tensors):
    return [type(o).__name__ for o in flat(f(*map(Wrapped, tensors)))], [
        plain(o.inner) for o in flat(f(*map(Wrapped, tensors))) if isinstance(o, Wrapped)
    ]


def shared_leaf(f, tensors):
    """Gradients that flow on into what the arguments were computed from."""
    leaf = torch.ones((), requires_grad=True)
    outputs = f(*[t * leaf for t in tensors])
    grads = torch.autograd.grad(scalar(outputs), leaf, create_graph=True)
    return shown(outputs), shown(torch.autograd.grad(grads, leaf, allow_unused=True))


def inference_tensors(f, tensors):
    with torch.inference_mode():
        tensors = [t.clone() for t in tensors]
    return shown(f(*tensors)), outcome(lambda f, t: shown(f(*t)), torch.inference_mode()(f), tensors)


OF_ARGUMENTS: dict[str, Callable[..., Any]] = {
    "fake": faked,
    "fake, outside of the mode": faked_outside,
    "meta": given(lambda t: t.to("meta")),
    "subclass": given(lambda t: t.as_subclass(Tagged)),
    "wrapper subclass": unwrapped,
    "Parameter": given(torch.nn.Parameter),
    "buffer": given(torch.nn.Buffer),
    "inference tensors": inference_tensors,
    "double": given(lambda t: t.double()),
    "half": given(lambda t: t.half()),
    "int": given(lambda t: (t * 4).long(), gradients=False),
    "bool": given(lambda t: t > 1, gradients=False),
    "complex": given(lambda t: torch.complex(t, t * 2)),
    "conj": given(lambda t: torch.complex(t, t * 2).conj()),
    "neg": given(lambda t: torch.complex(t, t * 2).conj().imag),
    "zero tensor": given(lambda t: torch._efficientzerotensor(t.shape)),
    "sparse": given(lambda t: t.to_sparse()),
    "csr": given(lambda t: t.reshape(1, -1).to_sparse_csr()),
    "mkldnn": given(lambda t: t.to_mkldnn(), gradients=False),
    "nested": given(lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged)),
    "no elements": given(lambda t: t[:0]),
    "rank 0": given(lambda t: t.sum()),
    "not contiguous": given(lambda t: t.repeat_interleave(2, -1)[..., ::2]),
    "transposed": given(lambda t: t.flip(0).t() if t.dim() == 2 else t),
    "expanded": given(lambda t: t.sum().expand(t.shape)),
    "views": given(lambda t: t.clone()[:]),
    "numpy array": given(lambda t: t.numpy(), gradients=False),
    "numpy scalar": given(lambda t: np.float32(2), gradients=False),
    "number": given(lambda t: 2.0, gradients=False),
    "None": given(lambda t: None, gradients=False),
    "second derivatives": shared_leaf,
}


# Here torch has words of its own, which opkit replaces by better ones.
NO_TENSORS = ("numpy array", "numpy scalar", "number", "None")


# ---------------------------------------------------------------- states: transforms of the function


def traced(mode: str) -> Callable[..., Any]:
    def state(f, tensors):
        graph = make_fx(f, tracing_mode=mode)(*tensors)
        return same_names(graph.code), shown(graph(*tensors))

    return state


def as_number(f):
    return lambda *tensors: scalar(f(*tensors))


def every(tensors):
    return tuple(range(len(tensors)))


def func_vjp(f, tensors):
    outputs, back = torch.func.vjp(lambda *t: flat(f(*t))[0], *tensors)
    return shown(outputs), shown(back(torch.ones_like(outputs)))


def func_jvp(f, tensors):
    return shown(
        torch.func.jvp(lambda *t: flat(f(*t))[0], tuple(tensors), tuple(torch.ones_like(t) for t in tensors))
    )


def in_compiled(backend: str, **options: Any) -> Callable[..., Any]:
    def state(f, tensors):
        torch._dynamo.reset()
        compiled = torch.compile(f, backend=backend, **options)
        return shown(compiled(*tensors)), outcome(derived, compiled, tensors)

    return state


def with_a_break(f, tensors):
    def broken(*tensors):
        tensors = [t * 2 for t in tensors]
        torch._dynamo.graph_break()
        return f(*tensors)

    return in_compiled("eager")(broken, tensors)


def exported(f, tensors):
    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return f(*tensors)

    program = torch.export.export(Module(), tuple(tensors))
    return same_names(program.graph_module.code), shown(program.module()(*tensors))


func = torch.func
TRANSFORMS: dict[str, Callable[..., Any]] = {
    "make_fx, real": traced("real"),
    "make_fx, fake": traced("fake"),
    "make_fx, symbolic": traced("symbolic"),
    "vmap": lambda f, t: shown(torch.vmap(f)(*[torch.stack([one, one + 1]) for one in t])),
    "grad": lambda f, t: shown(func.grad(as_number(f), argnums=every(t))(*t)),
    "vjp": func_vjp,
    "jvp": func_jvp,
    "functionalize": lambda f, t: shown(func.functionalize(f)(*t)),
    "grad of grad": lambda f, t: shown(
        func.grad(lambda *t: func.grad(as_number(f))(*t).sum(), argnums=every(t))(*t)
    ),
    "vmap of grad": lambda f, t: shown(
        torch.vmap(func.grad(as_number(f)))(*[torch.stack([o, o]) for o in t])
    ),
    "jvp of grad": lambda f, t: func_jvp(func.grad(as_number(f)), t),
    "jacrev": lambda f, t: shown(func.jacrev(lambda *t: flat(f(*t))[0])(*t)),
    "grad of a function of something else": lambda f, t: shown(
        func.grad(lambda x: x.sin().sum() + scalar(f(*t)))(torch.ones(2))
    ),
    "dynamo": in_compiled("eager", fullgraph=True),
    "aot_eager": in_compiled("aot_eager", fullgraph=True),
    "graph break": with_a_break,
    "dynamo, dynamic": in_compiled("eager", fullgraph=True, dynamic=True),
    "export": exported,
}
STATES = AROUND | OF_ARGUMENTS | TRANSFORMS


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("maker", MAKERS, ids=lambda m: m.__name__)
def test_both_twins_and_the_dispatcher_give_one_answer(made, maker, name):
    state, answers = STATES[name], {}
    for ns in ("n", "p"):
        case = made(maker, ns)
        outcome(around(contextlib.nullcontext), functools.partial(case.call, case.op), case.tensors())
        called = [("call", case.op), ("again", case.op)]
        if ns == "n" and name not in (*TRANSFORMS, *NO_TENSORS):
            called.append(("overload", functools.partial(through, case.op, case.op.overload)))
            called.append(("dispatcher", functools.partial(through, case.op, dispatched(case.op))))
        for how, op in called:
            torch.manual_seed(0)
            answers[ns, how] = outcome(state, functools.partial(case.call, op), case.tensors())
    wanted = answers["p", "call"]
    for how, answer in answers.items():
        assert answer == wanted, how


def through(op, function, *args, **kwargs):
    return op.schema.pack(function(*args, **kwargs))


def dispatched(op):
    """What calls torch's dispatcher and nothing else."""
    return torch._C._get_operation_overload(op.name, "")[0]


@pytest.mark.parametrize("maker", MAKERS, ids=lambda m: m.__name__)
def test_answers_and_gradients_are_right(made, maker):
    case = made(maker, "n")
    if case.truth is None:
        pytest.skip("it has no answer, or no gradient")
    derives = maker not in (mutating, mutating_lists)
    for _ in range(3):  # also when the kernel is known
        leaves = [t.requires_grad_(derives) for t in case.tensors()]
        exact = [t.detach().double().requires_grad_(derives) for t in leaves]
        found, wanted = flat(case.call(case.op, *leaves)), flat(case.truth(*exact))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one.double(), other.double())
        if not derives:
            continue
        grads = torch.autograd.grad(scalar(found), leaves, allow_unused=True)
        others = torch.autograd.grad(scalar(wanted), exact, allow_unused=True)
        for one, other in zip(grads, others, strict=True):
            torch.testing.assert_close(one, other, check_dtype=False)


# ---------------------------------------------------------------- formulas and kernels at their edges


def both(registry, declare: Callable[[str], opkit.Op], state: Callable[[opkit.Op], Any]) -> list[Any]:
    """Return what a state gives for an op in both twins, where the kernel is known already and where it is not."""
    answers = []
    for ns in ("n", "p"):
        with in_twin(ns):
            op = declare(ns)
        for _ in range(2):
            try:
                answers.append(state(op))
            except Exception as error:
                answers.append((type(error), same_names(str(error))))
    return answers


def one_answer(answers: list[Any]) -> Any:
    for answer in answers[1:]:
        assert answer == answers[0]
    return answers[0]


def with_formula(backward, setup=None):
    def declare(ns):
        @opkit.op(f"{ns}::two", shapes="n, n -> n, n")
        def two(x: Tensor, y: Tensor, k: float = 2.0) -> tuple[Tensor, Tensor]:
            return x * k, x + y

        two.register_autograd(backward, setup)
        return two

    return declare


def differentiated(op):
    return derived(op, [values(3), values(3, start=1)])


RETURNED: dict[str, tuple[Callable[..., Any], str]] = {
    "too few": (lambda ctx, g, h: (g, g), "its backward returned 2 gradients; expected 3"),
    "too many": (lambda ctx, g, h: (g, g, None, None), "its backward returned 4 gradients"),
    "one alone": (lambda ctx, g, h: g, "its backward returned 1 gradients"),
    "nothing": (lambda ctx, g, h: None, "its backward returned 1 gradients"),
    "of what is no tensor": (lambda ctx, g, h: (g, g, g), "as the gradient of k; expected None"),
    "number": (lambda ctx, g, h: (1.0, g, None), "returned float 1.0 as the gradient of x"),
    "text": (lambda ctx, g, h: (g, "g", None), "returned str as the gradient of y"),
    "list": (lambda ctx, g, h: ([g], g, None), "returned list as the gradient of x"),
    "other shape": (lambda ctx, g, h: (g[:2], g, None), r"one of shape \(2,\)"),
    "complex": (lambda ctx, g, h: (g * 1j, g, None), "one of dtype torch.complex64"),
    "generator": (lambda ctx, g, h: (one for one in (g, g, None)), "its backward returned 1 gradients"),
    "raises": (lambda ctx, g, h: 1 // 0, "by zero"),
    "unhashable": (lambda ctx, g, h: {}, "its backward returned 1 gradients"),
}


@pytest.mark.parametrize("name", RETURNED)
def test_a_formula_that_returns_something_else_raises_the_same(registry, name):
    backward, text = RETURNED[name]
    answer = one_answer(both(registry, with_formula(backward), differentiated))
    assert re.search(text, answer[1]), answer


TAKEN: dict[str, Callable[..., Any]] = {
    "double": lambda ctx, g, h: (g.double(), h, None),
    "broadcast": lambda ctx, g, h: (torch.stack([g, g]), h, None),
    "rank 0 of another dtype": lambda ctx, g, h: (g, None, None),
    "list of all": lambda ctx, g, h: [g, h, None],
    "None": lambda ctx, g, h: (None, None, None),
    "expanded": lambda ctx, g, h: (g.sum().expand(3), h, None),
    "the same twice": lambda ctx, g, h: (g, g, None),
    "subclass": lambda ctx, g, h: (g.as_subclass(Tagged), h, None),
    "int": lambda ctx, g, h: (g.long(), h, None),
    "requires grad": lambda ctx, g, h: (g.clone().requires_grad_(), h, None),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_torch_takes_as_a_gradient_is_taken(registry, name):
    answer = one_answer(both(registry, with_formula(TAKEN[name]), differentiated))
    assert answer[1] is not None


def set_aside(**attributes):
    def setup(ctx, inputs, output):
        for name, value in attributes.items():
            setattr(ctx, name, value)

    return setup


def saves_an_int(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], 3)


def saves_none(ctx, inputs, output):
    ctx.save_for_backward(None, inputs[1], None)


def saves_outputs(ctx, inputs, output):
    ctx.save_for_backward(*output, inputs[0], output[0])


def saves_twice(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])
    ctx.save_for_backward(inputs[1])


def saves_a_list(ctx, inputs, output):
    ctx.save_for_backward([inputs[0]])


def saves_what_it_computes(ctx, inputs, output):
    ctx.save_for_backward(inputs[0] * 2)
    ctx.other = [output[1] + 1]


def marks(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])


def marks_all(ctx, inputs, output):
    ctx.mark_non_differentiable(*output)


def marks_an_argument(ctx, inputs, output):
    ctx.mark_non_differentiable(inputs[0])


def marks_an_int(ctx, inputs, output):
    ctx.mark_non_differentiable(3)


def leaves_them_out(ctx, inputs, output):
    ctx.set_materialize_grads(False)


def reads_needs(ctx, inputs, output):
    ctx.seen = ctx.needs_input_grad


def raises(ctx, inputs, output):
    raise KeyError("in setup_context")


def deletes(ctx, inputs, output):
    ctx.k = 1
    del ctx.k


def reads_saved(ctx, inputs, output):
    before = ctx.saved_tensors
    ctx.save_for_backward(*inputs[:2])
    ctx.seen = before, ctx.saved_tensors


def saves_for_forward(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])
    ctx.save_for_forward(inputs[1], None)
    ctx.k = [one is inputs[1] for one in ctx.saved_tensors]


SETUPS = (
    saves_an_int, saves_none, saves_outputs, saves_twice, saves_a_list, saves_what_it_computes, marks, marks_all,
    marks_an_argument, marks_an_int, leaves_them_out, reads_needs, raises, deletes, set_aside(k=3, shape=(1, 2)),
    reads_saved, saves_for_forward,
)  # fmt: skip


@pytest.mark.parametrize("setup", SETUPS, ids=lambda f: f.__name__)
def test_context_is_that_of_torch(registry, setup):
    log: list[Any] = []

    def backward(ctx, g, h):
        saved = [None if t is None else (plain(t), t.requires_grad) for t in ctx.saved_tensors]
        log.append(
            (saved, ctx.needs_input_grad, getattr(ctx, "seen", None), getattr(ctx, "k", None), shown([g, h]))
        )
        return g, h, None

    def state(op):
        log.clear()
        x, y = values(3).requires_grad_(), values(3, start=1)
        first, second = op(x, y)
        before = shown([first, second])
        if not (first.requires_grad or second.requires_grad):
            return before
        for one in (first, second):
            if one.requires_grad:
                grads = torch.autograd.grad(one.sum(), x, retain_graph=True)
        return before, shown(grads), list(log)

    answers = both(registry, with_formula(backward, setup), state)
    if setup is marks_an_int:  # torch does not say what it got
        answers = [(kind, text.removesuffix("int")) for kind, text in answers]
    one_answer(answers)


def graph_of(op):
    x = values(3).requires_grad_()
    return x, op(x)


def use_twice(op):
    x, y = graph_of(op)
    y.sum().backward(retain_graph=True)
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    return shown(x.grad)


def use_freed(op):
    x, y = graph_of(op)
    y.sum().backward()
    y.sum().backward()


def read_freed(op):
    x, y = graph_of(op)
    y.sum().backward()
    return shown(y)


def write_into_saved(op):
    leaf = values(3).requires_grad_()
    x = leaf * 1
    y = op(x)
    x.mul_(2)
    y.sum().backward()


def write_into_result(op):
    x, y = graph_of(op)
    y.mul_(2)
    y.sum().backward()
    return shown(x.grad), shown(y)


def write_into_view_of_result(op):
    x, y = graph_of(op)
    y[:1].mul_(2)
    y.sum().backward()
    return shown(x.grad), shown(y)


def derive_twice(op):
    x, y = graph_of(op)
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return shown(g), shown(torch.autograd.grad(g.sum(), x, allow_unused=True))


def hooks(op):
    x, y = graph_of(op)
    log = []
    y.register_hook(lambda g: log.append(plain(g)) or g * 3)
    y.grad_fn.register_hook(lambda gi, go: log.append(shown([gi, go])))
    y.grad_fn.register_prehook(lambda go: log.append(shown(go)))
    y.sum().backward()
    return log, shown(x.grad)


def change_hook_result(op):
    x, y = graph_of(op)
    y.grad_fn.register_hook(lambda gi, go: tuple(g * 2 for g in gi))
    y.sum().backward()
    return shown(x.grad)


def retain_grad(op):
    x, y = graph_of(op)
    y.retain_grad()
    (y * 2).sum().backward()
    return shown([x.grad, y.grad])


def look_at_the_graph(op):
    x, y = graph_of(op)
    node = y.grad_fn
    edges = [(None if n is None else n.name(), i) for n, i in node.next_functions]
    return (
        node.name(),
        edges,
        dict(node.metadata),
        type(node._input_metadata) is list and len(node._input_metadata),
    )


def no_gradient_arrives(op):
    x, y = graph_of(op)
    return shown(torch.autograd.grad(y.detach().requires_grad_().sum() + 0 * x.sum(), x))


def gradcheck(op):
    x = values(3).double().requires_grad_()
    return torch.autograd.gradcheck(op, x), torch.autograd.gradgradcheck(op, x)


def backward_of_inputs(op):
    x, y = graph_of(op)
    y.sum().backward(inputs=[x])
    return shown(x.grad)


def gradient_of_another_dtype(op):
    x, y = graph_of(op)
    y.backward(torch.ones(3, dtype=torch.float64))
    return shown(x.grad)


def double_then_float(op):
    x = values(3).double().requires_grad_()
    op(x).float().sum().backward()
    return shown(x.grad)


def in_place_leaf(op):
    x, y = graph_of(op)
    with torch.no_grad():
        x.add_(1)
    y.sum().backward()


def is_grads_batched(op):
    x, y = graph_of(op)
    return shown(torch.autograd.grad(y, x, torch.eye(3), is_grads_batched=True))


def deepcopied(op):
    import copy

    return copy.deepcopy(op) is op, shown(graph_of(copy.deepcopy(op))[1])


def detached_in_place(op):
    x, y = graph_of(op)
    return shown(y.detach_())


GRAPHS = (
    use_twice, use_freed, read_freed, write_into_saved, write_into_result, write_into_view_of_result, derive_twice,
    hooks, change_hook_result, retain_grad, look_at_the_graph, no_gradient_arrives, gradcheck, backward_of_inputs,
    gradient_of_another_dtype, double_then_float, in_place_leaf, is_grads_batched, detached_in_place,
)  # fmt: skip
FORMS = ("function", "op", "op that saves the output", "op in C++", "from_reference", "none")


def cubed(form):
    def declare(ns):
        @opkit.op(f"{ns}::cube", shapes="*b -> *b")
        def cube(x: Tensor) -> Tensor:
            return x * x * x

        def save(ctx, inputs, output):
            ctx.save_for_backward(inputs[0], output)
            ctx.three = 3

        if form == "function":
            cube.register_autograd(lambda ctx, g: g * ctx.three * ctx.saved_tensors[0] ** 2, save)
        elif form.startswith("op"):

            @opkit.op(f"{ns}::cube_backward", shapes="*b, *b -> *b")
            def cube_backward(g: Tensor, x: Tensor, three: float = 3.0) -> Tensor:
                return g * x**2 * three if form != "op that saves the output" else g * 3 * x ** (2 / 3)

            cube_backward.register_autograd(opkit.from_reference)
            if form == "op in C++":
                source = """#include <opkit/kernel.h>
                void cube_backward(opkit::Tensor g, opkit::Tensor x, double three, opkit::Tensor out) {
                  OPKIT_CHECK(g.dtype() == opkit::DType::float64 || g.dtype() == opkit::DType::float32, "dtype");
                  for (int64_t i = 0; i < x.numel(); ++i) {
                    if (g.dtype() == opkit::DType::float64) {
                      out.data<double>()[i] = (g.dim() && g.stride(0) ? g.data<double>()[i] : *g.data<double>()) *
                          x.data<double>()[i] * x.data<double>()[i] * three;
                    } else {
                      out.data<float>()[i] = (g.dim() && g.stride(0) ? g.data<float>()[i] : *g.data<float>()) *
                          x.data<float>()[i] * x.data<float>()[i] * float(three);
                    }
                  }
                }"""
                cube_backward.register_kernel(
                    "cpu", opkit.cpp.kernel(source, symbol="cube_backward"), backend="cpp"
                )
            cube.register_autograd(
                cube_backward, saves=("out" if form == "op that saves the output" else "x",)
            )
        elif form == "from_reference":
            cube.register_autograd(opkit.from_reference)
        return cube

    return declare


def quartered(ns):
    @opkit.op(f"{ns}::quarter", shapes="n -> n")
    def quarter(x: Tensor, k: float = 0.25) -> Tensor:
        return x * k

    @opkit.op(f"{ns}::quarter_backward", shapes="n -> n")
    def quarter_backward(g: Tensor, k: float) -> Tensor:
        return g * k

    quarter.register_autograd(quarter_backward, saves=("k",))
    return quarter


def remove_formula(op):
    _registry.remove(f"{op.name}_backward")


def replace_formula(op):
    @opkit.op(f"{op.name}_backward", shapes="n, n -> n, n")
    def quarter_backward(g: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return g * 1, h * 2


@pytest.mark.parametrize("when", ["before the first call", "before backward"])
@pytest.mark.parametrize("change", [[remove_formula], [remove_formula, replace_formula]], ids=["", "another"])
def test_formula_that_was_removed_is_refused_by_both(registry, when, change):
    def state(op):
        x = values(3).requires_grad_()
        y = op(x) if when == "before backward" else None
        for one in change:
            one(op)
        y = op(x) if y is None else y
        return torch.autograd.grad(y.sum(), x)

    kind, text = one_answer(both(registry, quartered, state))
    assert kind is opkit.OpNotFoundError
    assert "calling n::quarter_backward: found an op that was removed; expected one that is defined" in text


@pytest.mark.parametrize("state", GRAPHS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("form", FORMS)
def test_graph_is_that_of_the_twin(registry, form, state):
    one_answer(both(registry, cubed(form), state))


# ---------------------------------------------------------------- kernels


def returns(function):
    def declare(ns):
        @opkit.op(f"{ns}::odd", shapes="n, n -> n, n")
        def odd(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return function(x, y)

        odd.register_autograd(lambda ctx, g, h: (g, h))
        return odd

    return declare


KERNELS: dict[str, Callable[..., Any]] = {
    "argument": lambda x, y: (x, y + 1),
    "view of an argument": lambda x, y: (x + 1, y[:]),
    "one tensor twice": lambda x, y: (x + 1,) * 2,
    "views of one tensor": lambda x, y: tuple(torch.stack([x, y])),
    "leaf": lambda x, y: ((x + 1).requires_grad_(), y + 1),
    "with history": lambda x, y: (torch.enable_grad()(lambda: x.detach().requires_grad_() * 2)(), y + 1),
    "parameter": lambda x, y: (torch.nn.Parameter(x + 1), y + 1),
    "subclass": lambda x, y: ((x + 1).as_subclass(Tagged), y + 1),
    "list": lambda x, y: [x + 1, y + 1],
    "too many": lambda x, y: (x + 1, y + 1, x + 2),
    "too few": lambda x, y: (x + 1,),
    "lone": lambda x, y: x + 1,
    "None": lambda x, y: None,
    "None for one": lambda x, y: (x + 1, None),
    "number": lambda x, y: (x + 1, 2.0),
    "other dtype": lambda x, y: (x.double(), y + 1),
    "other shape": lambda x, y: (x[:2] + 1, y + 1),
    "other device": lambda x, y: ((x + 1).to("meta"), y + 1),
    "not contiguous": lambda x, y: (torch.stack([x + 1, y], -1)[:, 0], y + 1),
    "expanded": lambda x, y: (x.sum().expand(3), y + 1),
    "sparse": lambda x, y: ((x + 1).to_sparse(), y + 1),
    "conj": lambda x, y: (torch.complex(x, y).conj().imag, y + 1),
    "named tuple": lambda x, y: torch.return_types.max((x + 1, y + 1)),
    "raises": lambda x, y: 1 // 0,
    "generator": lambda x, y: (t + 1 for t in (x, y)),
    "grad mode": lambda x, y: (x + torch.is_grad_enabled(), y + 1),
    "requires_grad of arguments": lambda x, y: (x + x.requires_grad, y + y.requires_grad),
    "writes": lambda x, y: (x.add_(1) * 2, y + 1),
}


@pytest.mark.parametrize("said", ["by a line", "by a function"])
@pytest.mark.parametrize("name", KERNELS)
def test_what_a_kernel_returns_is_held_to_the_declaration_by_both(registry, name, said):
    def state(op):
        if said == "by a function":
            op.register_fake(lambda x, y: (torch.empty_like(x), torch.empty_like(y)))
        without = [outcome(lambda f, t: shown(f(*t)), op, [values(3), values(3, start=1)]) for _ in range(2)]
        return without, outcome(derived, op, [values(3), values(3, start=1)])

    one_answer(both(registry, returns(KERNELS[name]), state))


def shaped(ns):
    """An op whose result depends on every argument, and a list of what its meta function was asked."""
    asked: list[Any] = []

    @opkit.op(f"{ns}::shaped")
    def shaped(
        x: Tensor, n: int, f: float, b: bool, s: str, ks: list[int], ts: list[Tensor], dtype: torch.dtype,
        o: int | None = None,
    ) -> Tensor:  # fmt: skip
        return torch.zeros(size(x, n, f, b, s, ks, ts, o), dtype=dtype)

    def size(x, n, f, b, s, ks, ts, o):
        return n + int(f * 2) + b + len(s) + sum(ks) + sum(t.stride(0) for t in ts) + (o or 0) + x.stride(0)

    @shaped.register_fake
    def _(x, n, f, b, s, ks, ts, dtype, o=None):
        asked.append(s)
        return x.new_empty(size(x, n, f, b, s, ks, ts, o), dtype=dtype)

    shaped.asked = asked
    return shaped


def test_a_meta_function_is_asked_once_for_each_kind_of_call(registry):
    op = shaped("n")
    least = {
        "x": values(2, 3),
        "n": 1,
        "f": 0.5,
        "b": False,
        "s": "",
        "ks": [],
        "ts": [],
        "dtype": torch.int8,
    }
    changes = [
        {}, {"x": values(2, 4)}, {"x": values(3, 2).T}, {"x": values(2, 3).double()}, {"n": 2}, {"f": 1.5}, {"b": True},
        {"s": "seven"}, {"s": "twelve"}, {"s": "longer than eight"}, {"s": "longer than nine?"}, {"ks": [1]},
        {"ks": [1, 0]}, {"ts": [values(2, 2)]}, {"ts": [values(2, 5)]}, {"ts": [values(2, 2), values(1)]},
        {"dtype": torch.int64}, {"o": 0}, {"o": 3},
    ]  # fmt: skip
    for _ in range(3):
        for change in changes:
            found = op(**{**least, **change})
            assert found.dtype == (change.get("dtype") or torch.int8)
    assert len(op.asked) == len(changes)
    for n in range(5000):  # more than are remembered
        op(**{**least, "n": n})
    op.register_fake(lambda x, *args, **kwargs: x.new_empty(7))
    with pytest.raises(opkit.OutputError, match=r"shape \(5,\); expected \(7,\) by the meta function"):
        op(**least)


def test_a_meta_function_that_calls_the_op_is_no_trouble(registry):
    @opkit.op("n::nested")
    def nested(x: Tensor, depth: int) -> Tensor:
        return x + depth

    @nested.register_fake
    def _(x, depth):
        return nested(torch.zeros(depth), depth - 1).new_empty(x.shape) if depth else torch.empty_like(x)

    assert nested(torch.ones(2), 5).tolist() == [6, 6]
    assert nested(torch.ones(2), 5).tolist() == [6, 6]


# ---------------------------------------------------------------- arguments


def wide(ns):
    @opkit.op(f"{ns}::wide")
    def wide(
        x: Tensor, i: int, f: float = 0.5, b: bool = False, s: str = "s", ints: list[int] = (1, 2),
        floats: list[float] | None = None, *, t: Tensor | None = None, o: int | None = None, k: float | None = None,
        dtype: torch.dtype = torch.float32, device: torch.device | None = None,
    ) -> Tensor:  # fmt: skip
        told = (i, f, b, s, list(ints), floats, o, k, dtype, device)
        told_types = [type(v).__name__ for v in told]
        assert type(ints) is list
        seen.append((told, told_types, [type(v).__name__ for v in (*ints, *(floats or ()))]))
        return x.clone()

    seen: list[Any] = []
    wide.register_fake(lambda x, *args, **kwargs: torch.empty_like(x))
    wide.seen = seen
    return wide


class Index:
    def __index__(self):
        return 7


class Int(int):
    pass


X = values(3)
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "least": ((X, 1), {}),
    "all": ((X, 1, 2.0, True, "x", [3], [1.5]), {"t": X, "o": 4, "k": 1.0}),
    "keywords": ((X,), {"b": True, "i": 1, "k": 2.0, "f": 1.5}),
    "keywords backwards": ((), {"k": 1.0, "o": 2, "t": None, "s": "q", "b": True, "f": 0.25, "i": 1, "x": X}),
    "tuples": ((X, 1, 0.5, False, "s", (1, 2, 3), (0.5,)), {}),
    "empty lists": ((X, 1, 0.5, False, "s", [], []), {}),
    "int for float": ((X, 1, 2), {}),
    "bool for int": ((X, True), {}),
    "bool for float": ((X, 1, True), {}),
    "int for bool": ((X, 1, 0.5, 1), {}),
    "float for int": ((X, 1.5), {}),
    "whole float for int": ((X, 2.0), {}),
    "numpy int": ((X, np.int64(3)), {}),
    "numpy float": ((X, 1, np.float64(3)), {}),
    "numpy float32": ((X, 1, np.float32(3)), {}),
    "numpy bool": ((X, 1, 0.5, np.bool_(True)), {}),
    "numpy in a list": ((X, 1, 0.5, False, "s", [np.int32(3)]), {}),
    "tensor for int": ((X, torch.tensor(3)), {}),
    "tensor for float": ((X, 1, torch.tensor(0.5)), {}),
    "tensor in a list": ((X, 1, 0.5, False, "s", [torch.tensor(3)]), {}),
    "index": ((X, Index()), {}),
    "subclass of int": ((X, Int(3)), {}),
    "largest int": ((X, 2**63 - 1), {}),
    "smallest int": ((X, -(2**63)), {}),
    "too large": ((X, 2**63), {}),
    "too small": ((X, -(2**63) - 1), {}),
    "too large in a list": ((X, 1, 0.5, False, "s", [2**63]), {}),
    "huge": ((X, 2**200), {}),
    "huge for float": ((X, 1, 2**2000), {}),
    "nan and inf": ((X, 1, float("inf")), {}),
    "size": ((X, X.size(0)), {}),
    "torch.Size": ((X, 1, 0.5, False, "s", X.shape), {}),
    "range": ((X, 1, 0.5, False, "s", range(3)), {}),
    "bytes": ((X, 1, 0.5, False, b"s"), {}),
    "lone surrogate": ((X, 1, 0.5, False, "\ud800"), {}),
    "nul": ((X, 1, 0.5, False, "a\0b"), {}),
    "int for a list": ((X, 1, 0.5, False, "s", 3), {}),
    "text for a list": ((X, 1, 0.5, False, "s", "12"), {}),
    "None for a required int": ((X, None), {}),
    "None for a float": ((X, 1, None), {}),
    "None for a list": ((X, 1, 0.5, False, "s", None), {}),
    "None in a list": ((X, 1, 0.5, False, "s", [None]), {}),
    "no tensor": ((1, 1), {}),
    "missing": ((X,), {}),
    "nothing": ((), {}),
    "unknown keyword": ((X, 1), {"zz": 1}),
    "given twice": ((X, 1), {"i": 2}),
    "too many": ((X, 1, 0.5, False, "s", [1], [0.5], X), {}),
    "self": ((X, 1), {"self": 1}),
    "tensor for keyword": ((X, 1), {"t": 3}),
    "dtype": ((X, 1), {"dtype": torch.int8}),
    "numpy for a dtype": ((X, 1), {"dtype": np.float64}),
    "type for a dtype": ((X, 1), {"dtype": float}),
    "text for a dtype": ((X, 1), {"dtype": "int8"}),
    "int for a dtype": ((X, 1), {"dtype": 6}),
    "None for a dtype": ((X, 1), {"dtype": None}),
    "device": ((X, 1), {"device": torch.device("cuda", 3)}),
    "text for a device": ((X, 1), {"device": "cpu"}),
    "int for a device": ((X, 1), {"device": 1}),
    "dtype for a device": ((X, 1), {"device": torch.int8}),
}


@pytest.mark.parametrize("name", CALLS)
def test_arguments_are_taken_or_refused_alike(registry, name):
    args, kwargs = CALLS[name]

    def state(op):
        op(X, 1)  # the kernel is known
        op.seen.clear()
        try:
            answer = shown(op(*args, **kwargs))
        except Exception as error:
            answer = type(error), same_names(str(error))
        return answer, repr(op.seen)

    one_answer(both(registry, wide, state))


def test_names_of_arguments_need_not_be_interned(registry):
    op = wide("n")
    for _ in range(3):
        assert torch.equal(op(**{"".join(["x"]): X, "".join(["i"]): 1, "".join(["f", ""]): 2.0}), X)


# ---------------------------------------------------------------- the fast path is taken


OF_TENSOR = (
    "_handle_torch_function_and_wrap_type_error_to_not_implemented"  # of torch, around x.pow and its like
)


def python_frames(call: Callable[[], Any]) -> list[str]:
    """Return the names of the functions in Python that a call runs."""
    names: list[str] = []
    gc.collect()  # what other tests left would go meanwhile
    sys.setprofile(lambda frame, event, arg: names.append(frame.f_code.co_name) if event == "call" else None)
    try:
        call()
    finally:
        sys.setprofile(None)
    return names[1:]


@needs_core
@pytest.mark.parametrize(
    ("maker", "gradients"),
    [
        *(
            (m, False)
            for m in (
                square,
                norm,
                light,
                mutating,
                mutating_lists,
                tuples,
                keyword,
                optional,
                two_results,
                typed,
                described,
                filled,
                picked,
                without_formula,
            )
        ),  # fmt: skip
        *((m, True) for m in (square, light, optional, typed, mutating_with_result)),
    ],
)
def test_nothing_of_opkit_in_python_runs_where_nothing_is_special(made, maker, gradients):
    case = made(maker, "n")
    tensors = [t.requires_grad_(gradients) for t in case.tensors()]
    for _ in range(3):  # in the first one the core arrives, in the second one the kernel is chosen
        case.call(case.op, *tensors)
    found = python_frames(lambda: case.call(case.op, *tensors))
    kernel = case.op.schema.opname
    assert set(found) <= {kernel, "<lambda>", "call", "wrapped", OF_TENSOR}, found
    assert (kernel in found) == (maker not in (light, filled))


@pytest.mark.parametrize("cut", [slice(None), slice(2)], ids=["all", "part"])
def test_lists_that_share_memory_are_read_as_they_were(made, cut):
    op = made(mutating_lists, "n").op
    for _ in range(2):
        xs = [values(2), values(2, 2)]
        ys = [x[cut] for x in xs]
        wanted = [x * 2 + y * 3 for x, y in zip(xs, ys, strict=True)]
        op(xs, ys, (2.0, 3.0))
        for x, want in zip(xs, wanted, strict=True):
            torch.testing.assert_close(x, want)


def test_lists_that_require_grad_are_written_where_gradients_are_off(made):
    op = made(mutating_lists, "n").op
    for _ in range(3):
        x = values(3).requires_grad_()
        saved = x * x
        with torch.no_grad():
            found = python_frames(lambda x=x, y=values(3): op([x], [y], by=[2.0, 3.0]))
        torch.testing.assert_close(x.detach(), values(3) * 5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            saved.sum().backward()
        with pytest.raises(opkit.GradientError, match="requires grad and is overwritten"):
            op([x], [values(3)], (2.0, 3.0))
    assert found == ["blend_"]


@pytest.mark.parametrize("by", [(1.0,), [1.0, 2.0, 3.0], 1.0, None, (1, "a")])
def test_a_tuple_of_another_length_is_refused_by_both(registry, by):
    def declare(ns):
        @opkit.op(f"{ns}::fixed", shapes="*b -> *b")
        def fixed(x: Tensor, by: tuple[float, float]) -> Tensor:
            return x * by[0] + by[1]

        return fixed

    def state(op):
        torch.testing.assert_close(op(X, (2.0, 1.0)), X * 2 + 1)
        return through(op, op, X, by)

    one_answer(both(registry, declare, state))


@needs_core
def test_backward_by_an_op_in_cpp_runs_no_python(registry):
    op = cubed("op in C++")("n")
    for _ in range(2):
        x, y = graph_of(op)
        found = python_frames(lambda y=y, x=x: torch.autograd.grad(y, x, torch.ones(3)))
    assert not set(found) & {"__call__", "run", "kernel", "backward", "gradients"}, found


@needs_core
def test_the_twin_of_this_file_is_in_python(made):
    case = made(square, "p")
    assert "__call__" in python_frames(lambda: case.op(X))


@needs_core
def test_context_says_what_it_is_not_for(registry):
    kept = []

    def dirty(ctx, inputs, output):
        ctx.mark_dirty(inputs[0])

    op = with_formula(lambda ctx, g, h: (g, h, None), lambda ctx, inputs, output: kept.append(ctx))("n")
    x, y = values(3), values(3)
    op(x, y), op(x, y)
    x.requires_grad_()
    results = op(x, y)
    text = "reading ctx.saved_tensors: no backward is running for this ctx; expected it inside of the formula"
    with pytest.raises(RuntimeError, match=text):
        kept[0].saved_tensors  # noqa: B018
    del results
    op.register_autograd(lambda ctx, g, h: (g, h, None), dirty)
    text = "saving for backward: found ctx.mark_dirty; expected an op that says what it writes into"
    with pytest.raises(RuntimeError, match=text):
        op(x, y)
