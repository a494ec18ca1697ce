"""opkit::rope and its gradient: against float64 and against other people's form, under autograd, compile and export."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import opkit
from opkit_kernels import rope, rope_backward
from tests.kernels.kernel_cases import (
    DTYPES,
    INTERPRETS,
    LAYOUTS,
    assert_as_exact_as,
    assert_compiles_once,
    assert_exports,
    assert_matches_float64,
    assert_same_for_any_number_of_threads,
    compilers,
    layout_name,
    shape_name,
)

# [*b, s, h, d] of q, and the heads of k: empty, one pair, odd sizes, grouped heads, packed sequences, no k.
SHAPES = (
    ((2, 0, 2, 4), 1), ((3, 0, 4), 2), ((1, 1, 2), 1), ((2, 3, 2, 7), 1), ((2, 2, 3, 4, 16), 2), ((5, 4, 32), 0),
    ((3, 8, 64) if INTERPRETS else (30, 8, 64), 2), ((1, 2, 2, 258), 1),
)  # fmt: skip


def angles(rows: int, pairs: int, device: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return cos and sin."""
    inverse = 10_000.0 ** -(torch.arange(pairs, dtype=torch.float64) / max(pairs, 1))
    found = torch.outer(torch.arange(rows, dtype=torch.float64), inverse).to(device)
    return found.cos().to(dtype), found.sin().to(dtype)


def q_and_k(shape, heads, dtype, device, layout=lambda x: x) -> tuple[Tensor, Tensor]:
    q, k = torch.randn(shape), torch.randn(*shape[:-2], heads, shape[-1])
    return layout(q.to(device, dtype)), layout(k.to(device, dtype))


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
@pytest.mark.parametrize(("shape", "heads"), SHAPES, ids=[f"{shape_name(s)}-{h}" for s, h in SHAPES])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope_and_its_backward_match_float64(device, dtype, shape, heads, layout):
    q, k = q_and_k(shape, heads, dtype, device, layout)
    cos, sin = (layout(t) for t in angles(shape[-3] + 2, shape[-1] // 2, device, torch.float32))
    positions = torch.randint(shape[-3] + 2, shape[:-2], device=device)
    for interleaved in (False, True):
        assert_matches_float64(rope, (q, k, cos, sin, None, interleaved), dtype)
        assert_matches_float64(rope_backward, (q, k, cos, sin, positions, interleaved), dtype)


@pytest.mark.parametrize("table", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope_takes_tables_of_another_dtype(device, dtype, table):
    q, k = q_and_k((2, 3, 4, 10), 2, dtype, device)
    assert_matches_float64(rope, (q, k, *angles(3, 5, device, table)), dtype)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_rope_copies_elements_past_the_pairs(device, interleaved):
    q, k = q_and_k((2, 3, 4, 11), 2, torch.float32, device)
    cos, sin = angles(3, 3, device)
    whole = rope(q, k, cos, sin, interleaved=interleaved)
    part = rope(q[..., :6], k[..., :6], cos, sin, interleaved=interleaved)
    for found, turned, x in zip(whole, part, (q, k), strict=True):
        assert torch.equal(found[..., :6], turned)
        assert torch.equal(found[..., 6:], x[..., 6:])
    assert torch.equal(rope(q, k, cos[:, :0], sin[:, :0]).q, q)


def test_rope_is_that_of_hugging_face(device):
    """Heads before the sequence, and a table that says each number twice."""
    q, k = torch.randn(2, 4, 5, 8, device=device), torch.randn(2, 2, 5, 8, device=device)
    cos, sin = (torch.cat((t, t), -1).float() for t in angles(5, 4, device))

    def rotate_half(x):
        return torch.cat((-x[..., 4:], x[..., :4]), -1)

    found = rope(q.transpose(1, 2), k.transpose(1, 2), cos[:, :4], sin[:, :4])
    for got, x in zip(found, (q, k), strict=True):
        torch.testing.assert_close(got.transpose(1, 2), x * cos + rotate_half(x) * sin)


def test_rope_is_that_of_complex_numbers(device):
    """As RoFormer has it, and Llama's first implementation."""
    q, k = torch.randn(2, 5, 4, 8, device=device), torch.randn(2, 5, 2, 8, device=device)
    cos, sin = angles(5, 4, device, torch.float32)
    found = rope(q, k, cos, sin, interleaved=True)
    for got, x in zip(found, (q, k), strict=True):
        turned = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.complex(cos, sin)[:, None]
        torch.testing.assert_close(got, torch.view_as_real(turned).flatten(-2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope_is_as_exact_as_its_formula_in_torch(device, dtype):
    if INTERPRETS and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts digits off instead of rounding")
    q, k = q_and_k((40, 4, 64), 1, dtype, device)
    cos, sin = angles(40, 32, device, dtype)
    first, second = q.chunk(2, -1)
    c, s = cos[:, None], sin[:, None]
    theirs = torch.cat((first * c - second * s, second * c + first * s), -1)
    exact = rope.reference(q.double(), k.double(), cos.double(), sin.double()).q
    assert_as_exact_as(rope(q, k, cos, sin).q, theirs, exact)


def test_rope_passes_on_what_is_not_finite(device):
    x = torch.tensor([[[float("nan"), 1.0, 2.0, 3.0]]], device=device)
    q = rope(x, x, *angles(1, 2, device)).q.flatten()
    assert q.isnan().tolist() == [True, False, True, False]


@pytest.mark.parametrize("bad", [-1, 4, 2**62])
def test_rope_refuses_a_position_out_of_range(backend, device, bad):
    if device == "cuda":
        pytest.skip("a device-side assertion, after which the process cannot use the device")
    q, k = q_and_k((3, 2, 4), 1, torch.float32, device)
    positions = torch.tensor([0, bad, 3], device=device)
    for op in (rope, rope_backward):
        with pytest.raises(
            (RuntimeError, AssertionError),
            match=str(bad) if backend == "cpp" else "a position is out of range",
        ):
            op(q, k, *angles(4, 2, device), positions)


def test_rope_refuses_tables_that_are_too_small_or_too_wide(device):
    q, k = q_and_k((3, 2, 4), 1, torch.float32, device)
    with pytest.raises(
        RuntimeError, match=r"the sequence has 3 elements and cos 2 rows; expected a row for each"
    ):
        rope(q, k, *angles(2, 2, device))
    with pytest.raises(
        RuntimeError, match=r"cos has 3 columns, one for each pair, and heads have 4 elements"
    ):
        rope(q, k, *angles(3, 3, device))


def test_rope_refuses_other_shapes_and_dtypes(device):
    q, k = q_and_k((3, 2, 4), 1, torch.float32, device)
    cos, sin = angles(3, 2, device)
    with pytest.raises(opkit.ShapeError, match="sin"):
        rope(q, k, cos, sin[:2])
    with pytest.raises(opkit.ShapeError, match="k"):
        rope(q, k[..., :3], cos, sin)
    with pytest.raises(opkit.ShapeError, match="positions"):
        rope(q, k, cos, sin, torch.zeros(2, dtype=torch.int64, device=device))
    with pytest.raises(opkit.DtypeError, match="positions"):
        rope(q, k, cos, sin, torch.zeros(3, dtype=torch.int32, device=device))
    with pytest.raises(opkit.DtypeError, match="k"):
        rope(q, k.double(), cos, sin)


def test_rope_is_deterministic(device):
    q, k = q_and_k((100, 8, 64), 2, torch.float32, device)
    tables = angles(100, 32, device)
    assert_same_for_any_number_of_threads(lambda: tuple(rope(q, k, *tables)))


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_rope_gradients_of_both_orders(device, interleaved):
    q, k = (x.requires_grad_() for x in q_and_k((2, 3, 2, 5), 1, torch.float64, device))
    positions = torch.randint(4, (2, 3), device=device)
    cos, sin = angles(4, 2, device)

    def call(q, k):
        return tuple(rope(q, k, cos, sin, positions, interleaved))

    assert torch.autograd.gradcheck(call, (q, k), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, (q, k), check_fwd_over_rev=True)


def test_rope_turned_back_is_what_it_was(device):
    q, k = q_and_k((7, 3, 16), 1, torch.float64, device)
    tables = angles(7, 8, device)
    back = rope_backward(*rope(q, k, *tables), *tables)
    torch.testing.assert_close(tuple(back), (q, k))


@compilers
def test_rope_compiles_once_for_all_sizes(compiler, gradients):
    cases = [
        q_and_k((7, s, h, 8), g, torch.float32, "cpu") for s, h, g in ((3, 6, 2), (5, 10, 2), (9, 12, 3))
    ]
    cos, sin = angles(11, 4, "cpu")
    assert_compiles_once(lambda q, k: rope(q * 2, k, cos, sin), cases, compiler, gradients)


def test_rope_exports():
    args = (*q_and_k((3, 4, 8), 2, torch.float32, "cpu"), *angles(3, 4, "cpu"))
    assert_exports(lambda *args: rope(*args), args, rope)
