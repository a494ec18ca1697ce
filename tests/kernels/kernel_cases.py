"""Inputs and comparisons that the tests of all shipped ops share."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import opkit

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"

# Largest error, relative to the true value, and to the largest one (or to 1, where that is greater, as gradients may
# cancel). For the 16-bit types it is one rounding of the result; for the others what sums of 1000 numbers lose.
TOLERANCES = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (4e-6, 4e-6),
    torch.float16: (6e-4, 1e-5),
    # Triton's interpreter cuts digits off instead of rounding
    torch.bfloat16: (9e-3 if INTERPRETS else 4.5e-3, 1e-5),
}

# Nothing, one number, no rows, no columns, one column, sizes off the vector width, and enough rows to go parallel.
# Triton's interpreter takes milliseconds a row.
PARALLEL, MANY_ROWS = ((7, 200), (40, 33)) if INTERPRETS else ((300, 200), (3000, 33))
SHAPES = ((0,), (1,), (7,), (0, 5), (3, 0), (3, 1), (1, 64), (3, 7), (2, 3, 65), (2, 1, 1000), PARALLEL)


def transposed(x: Tensor) -> Tensor:
    """Return x with its first and last dimension swapped in memory."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def sliced(x: Tensor) -> Tensor:
    """Return x as every second element of a longer last dimension, after a first one to be left out."""
    memory = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan if x.is_floating_point() else -1)
    view = memory[..., 1::2]
    return view.copy_(x)


def padded(x: Tensor) -> Tensor:
    """Return x with contiguous rows that lie apart."""
    memory = x.new_full((*x.shape[:-1], x.shape[-1] + 3), torch.nan if x.is_floating_point() else -1)
    view = memory[..., 1 : x.shape[-1] + 1]
    return view.copy_(x)


def expanded(x: Tensor) -> Tensor:
    """Return the first row of x for every row, in the memory of one; x itself where it has no rows."""
    return x[:1].expand(x.shape) if x.dim() > 1 and x.shape[0] else x


def contiguous(x: Tensor) -> Tensor:
    """Return x."""
    return x


LAYOUTS: tuple[Callable[[Tensor], Tensor], ...] = (contiguous, transposed, sliced, padded, expanded)


def layout_name(layout: Callable[[Tensor], Tensor]) -> str:
    """Return the id of a layout in a test's name."""
    return layout.__name__


def shape_name(shape: Sequence[int]) -> str:
    """Return the id of a shape in a test's name."""
    return "x".join(map(str, shape))


def assert_matches_float64(op: opkit.Op[Any, Any], args: Sequence[Any], dtype: torch.dtype) -> None:
    """Compare an op with its reference, on the CPU, on the same arguments in float64, at the tolerance of `dtype`."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    wide = [_on_cpu(a) if isinstance(a, Tensor) else a for a in args]
    expected, actual = op.reference(*wide), op(*args)
    if isinstance(expected, Tensor):
        expected, actual = (expected,), (actual,)
    for name, want, got in zip(getattr(expected, "_fields", ("out",)), expected, actual, strict=True):
        assert got.shape == want.shape, name
        assert got.is_contiguous(), name
        assert got.device == tensors[0].device, name
        relative, absolute = TOLERANCES[dtype]
        if dtype == torch.float64 and got.dtype == torch.float32:
            relative = 6e-8  # an output that is float32 for every dtype
        finite = want[want.isfinite()].abs()
        scale = max(float(finite.max()), 1.0) if finite.numel() else 1.0
        torch.testing.assert_close(
            _on_cpu(got),
            _on_cpu(want),
            rtol=relative,
            atol=absolute * scale,
            equal_nan=True,
            msg=lambda text, name=name: f"{op.name}, output {name}: {text}",
        )


def assert_as_exact_as(found: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """Assert that the error of `found`, its root mean square, is no larger than that of what torch's own op gives."""
    ours, aten = ((_on_cpu(x) - _on_cpu(exact)).square().mean().sqrt() for x in (found, theirs))
    # Where both only round once, the errors differ in what lies halfway between two numbers.
    assert ours <= 1.01 * aten + 1e-9 * _on_cpu(exact).abs().max(), f"error {ours}, torch's {aten}"


def _on_cpu(x: Tensor) -> Tensor:
    """Return x on the CPU, in float64 where it is floating."""
    return x.cpu().double() if x.is_floating_point() else x.cpu()


def assert_same_for_any_number_of_threads(function: Callable[[], Any]) -> None:
    """Assert that one, two and three threads give the same bits."""
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            result = function()
            results.append(result if isinstance(result, tuple) else (result,))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


def compilers(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test of `assert_compiles_once` without gradients, with gradients, and with those in Inductor."""
    cases = [
        pytest.param("aot_eager", False, id="forward"),
        pytest.param("aot_eager", True, id="gradients"),
        pytest.param("inductor", True, id="inductor", marks=pytest.mark.slow),
    ]
    return pytest.mark.parametrize(("compiler", "gradients"), cases)(test)


def assert_compiles_once(
    function: Callable[..., Any], cases: Sequence[Sequence[Tensor]], compiler: str, gradients: bool
) -> None:
    """Assert that torch.compile makes one graph, without a break, that is right for all cases.

    With `gradients`, all floating arguments require them, and those of the compiled run are compared too.
    """
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend(compiler)
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    for args in cases:
        found = _outputs_and_gradients(compiled, args, gradients)
        expected = _outputs_and_gradients(function, args, gradients)
        torch.testing.assert_close(found, expected)
    assert counter.frame_count == 1


def _outputs_and_gradients(
    function: Callable[..., Any], args: Sequence[Tensor], gradients: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Return all outputs, and if `gradients` those of all floating arguments for different weights."""
    leaves = [a.detach().requires_grad_(gradients and a.is_floating_point()) for a in args]
    result = function(*leaves)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    if not gradients:
        assert not any(o.requires_grad for o in outputs)
        return outputs, []
    ends = [o for o in outputs if o.requires_grad]
    weights = [torch.linspace(-1, 2, o.numel(), dtype=o.dtype).view(o.shape) for o in ends]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return outputs, list(torch.autograd.grad(ends, wanted, weights))


def assert_exports(function: Callable[..., Any], args: tuple[Any, ...], op: opkit.Op[Any, Any]) -> None:
    """Assert that torch.export keeps the op as one node and gives the same result."""

    class Module(torch.nn.Module):
        def forward(self, *args: Any) -> Any:
            return function(*args)

    program = torch.export.export(Module(), args)
    assert op.overload in [node.target for node in program.graph.nodes]
    torch.testing.assert_close(program.module()(*args), function(*args))
