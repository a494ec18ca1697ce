from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

import opkit
from opkit import _torch

pytestmark = pytest.mark.usefixtures("registry")

X, W = torch.randn(2, 3), torch.randn(3)
BF16 = torch.bfloat16


@pytest.fixture
def seen():
    """What the kernel of `scale` got: tensors, and whether autocast was on."""
    return []


@pytest.fixture
def scale(seen):
    @opkit.op("t::scale")
    def scale(
        x: Tensor, items: list[Tensor], k: float = 2.0, *, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        seen.append((x, *items, weight, bias, torch.is_autocast_enabled("cpu")))
        y = x * weight * k + sum(items)
        return (y if bias is None else y + bias).to(x.dtype)

    scale.register_fake(lambda x, items, k, *, weight, bias: torch.empty_like(x))
    scale.register_autocast("cpu", BF16)
    return scale


def dtypes(call):
    return [v.dtype if isinstance(v, Tensor) else v for v in call]


def test_arguments_are_cast_lists_and_keywords_too(scale, seen):
    with torch.autocast("cpu"):
        assert scale(X, [X, X.double()], weight=W, bias=W.half()).dtype == BF16
        assert scale(X, [X], weight=W).dtype == BF16
        assert torch.is_autocast_enabled("cpu")
    assert dtypes(seen[0]) == [BF16, BF16, torch.float64, BF16, BF16, False]
    assert dtypes(seen[1]) == [BF16, BF16, BF16, None, False]
    assert scale(X, [X], weight=W).dtype == torch.float32


def test_integers_stay(scale, seen):
    with torch.autocast("cpu"):
        scale(X, [torch.ones(2, 3, dtype=torch.int32)], weight=torch.tensor([True, False, True]))
    assert dtypes(seen[0]) == [BF16, torch.int32, torch.bool, None, False]


def test_region_of_another_device_or_switched_off_casts_nothing(scale, seen):
    with torch.autocast("cpu"), torch.autocast("cpu", enabled=False):
        assert scale(X, [X], weight=W).dtype == torch.float32
    with torch.autocast("cuda", dtype=BF16, enabled=torch.cuda.is_available()):
        assert scale(X, [X], weight=W).dtype == torch.float32


def test_dtype_registered_later_replaces(scale):
    scale.register_autocast("cpu", torch.float32)
    with torch.autocast("cpu"):
        assert scale(X.to(BF16), [X.to(BF16)], weight=W.to(BF16)).dtype == torch.float32


def test_gradients_have_the_dtype_of_the_arguments(scale):
    scale.register_autograd(opkit.from_reference)
    x, item, weight = (t.clone().requires_grad_() for t in (X, X, W))
    with torch.autocast("cpu"):
        y = scale(x, [item], weight=weight)
    y.sum().backward()
    assert (x.grad.dtype, item.grad.dtype, weight.grad.dtype) == (torch.float32,) * 3
    torch.testing.assert_close(x.grad, 2 * W.to(BF16).float().expand(2, 3))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_autocast_in_and_around_a_compiled_function(scale, backend):
    scale.register_autograd(opkit.from_reference)

    def inside(x, w):
        with torch.autocast("cpu"):
            return scale(x, [x], weight=w) + 1

    expected = inside(X, W)
    assert expected.dtype == BF16
    torch.testing.assert_close(torch.compile(inside, fullgraph=True, backend=backend)(X, W), expected)
    around = torch.compile(lambda x, w: scale(x, [x], weight=w) + 1, fullgraph=True, backend=backend)
    with torch.autocast("cpu"):
        torch.testing.assert_close(around(X, W), expected)
        w = W.clone().requires_grad_()
        around(X, w).sum().backward()
    assert w.grad.dtype == torch.float32
    assert around(X, W).dtype == torch.float32


def test_vmap_under_autocast(scale):
    scale.register_vmap("sequential")
    with torch.autocast("cpu"):
        found = torch.vmap(lambda x: scale(x, [x], weight=W))(X)
        torch.testing.assert_close(found, scale(X, [X], weight=W))


def test_preferred_backend_in_a_compiled_function_is_cast_too(scale, seen):
    scale.register_kernel(
        "cpu",
        lambda x, items, k, *, weight, bias: scale.reference(x, items, k, weight=weight) * 3,
        backend="b",
    )

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x, w):
        with opkit.use_backend("b"):
            return scale(x, [x], weight=w)

    with torch.autocast("cpu"):
        torch.testing.assert_close(
            run(X, W), scale.reference(X.to(BF16), [X.to(BF16)], weight=W.to(BF16)) * 3
        )


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_call_that_gives_its_argument_away_is_cast_too(compiled):
    @opkit.op("t::negative", shapes="*b -> *b")
    def negative(x: Tensor) -> Tensor:
        return -x

    negative.register_kernel("cpu", lambda x: x.neg_(), backend="fast", inplace=["x"])
    negative.register_autocast("cpu", BF16)
    run = negative.maybe_inplace
    if compiled:
        run = torch.compile(lambda x: negative.maybe_inplace(x), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu"):
        assert run(torch.ones(2)).dtype == BF16
    assert run(torch.ones(2)).dtype == torch.float32


# ---------------------------------------------------------------- what is left alone


def test_dtype_that_the_shape_line_fixes_stays():
    @opkit.op("t::f", shapes="n, n:float32, n:scales, n -> n:scales")
    def f(x: Tensor, scales: Tensor, shifts: Tensor, y: Tensor) -> Tensor:
        assert (x.dtype, y.dtype) == (BF16, BF16)
        return x * scales + shifts + y

    f.register_autocast("cpu", BF16)
    with torch.autocast("cpu"):
        assert f(W, W, W, W).dtype == torch.float32


def test_argument_that_is_mutated_is_written_itself():
    @opkit.op("t::add_", mutates_args=("x",))
    def add_(x: Tensor, y: Tensor) -> None:
        assert (x.dtype, y.dtype) == (torch.float32, BF16)
        x.add_(y)

    add_.register_autocast("cpu", BF16)
    x = torch.zeros(3)
    with torch.autocast("cpu"):
        add_(x, torch.ones(3))
    assert x.tolist() == [1, 1, 1]


# ---------------------------------------------------------------- casts of weights


def same(one, other):
    return _torch.is_alias_of(one, other)


def test_cast_of_a_weight_is_kept_until_the_region_ends(scale, seen):
    scale.register_autograd(opkit.from_reference)
    weight = torch.nn.Parameter(W)
    with torch.autocast("cpu"):
        scale(X, [X], weight=weight)
        with torch.autocast("cpu"):
            scale(X, [X], weight=weight)
        scale(X, [X], weight=weight)
        with torch.no_grad():
            scale(X, [X], weight=weight)
    with torch.autocast("cpu"):
        scale(X, [X], weight=weight)
    weights = [call[2] for call in seen]
    assert same(weights[0], weights[1])
    assert same(weights[0], weights[2])
    assert not same(weights[0], weights[3])  # it has no history that backward could follow
    assert not same(weights[0], weights[4])
    assert not any(same(seen[0][0], call[0]) for call in seen[1:])  # x is no weight


@pytest.mark.parametrize("change", ["in place", "data", "cleared"])
def test_weight_that_changed_is_cast_anew(scale, seen, change):
    weight = torch.nn.Parameter(torch.ones(3))
    with torch.autocast("cpu"):
        scale(X, [X], weight=weight)
        if change == "in place":
            with torch.no_grad():
                weight.mul_(2)
        elif change == "cleared":
            weight.data.mul_(2)
            torch.clear_autocast_cache()
        else:
            weight.data = torch.full((3,), 2.0)
        scale(X, [X], weight=weight)
    assert seen[1][2].tolist() == [2, 2, 2]


def test_weights_are_not_kept_when_torch_does_not(scale, seen):
    weight = torch.nn.Parameter(W)
    with torch.autocast("cpu", cache_enabled=False):
        scale(X, [X], weight=weight)
        scale(X, [X], weight=weight)
    assert not same(seen[0][2], seen[1][2])
    with torch.autocast("cpu", dtype=torch.float16):  # another dtype than the region's
        scale(X, [X], weight=weight)
        scale(X, [X], weight=weight)
    assert not same(seen[2][2], seen[3][2])


def test_region_ends_for_opkit_when_it_ends_for_torch():
    with torch.autocast("cpu"):
        region = _torch.autocast_region()
        gc.collect()
        assert region() is not None
        with torch.autocast("cpu"), torch.inference_mode():
            assert region() is not None
        assert region() is not None
    assert region() is None
    assert _torch.autocast_region()() is None  # there is none now


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("device", ["gpu", "cuda:0", "meta", 3])
def test_device_without_autocast_is_refused(scale, device):
    with pytest.raises(
        opkit.RegistrationError,
        match=r"registering an autocast rule of t::scale: found the device .*'cpu' or 'cuda'",
    ):
        scale.register_autocast(device, BF16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, "bfloat16"])
def test_dtype_to_cast_to_is_checked(scale, dtype):
    with pytest.raises(opkit.RegistrationError, match="found the dtype .*; expected one of torch.float32"):
        scale.register_autocast("cpu", dtype)
