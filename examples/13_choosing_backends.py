"""What this teaches: several kernels of one op, and who decides which of them runs.

A kernel says what it can take (dtypes=, when=) and how good it is (priority=). The caller may prefer a backend,
with use_backend or OPKIT_BACKEND. explain answers for a call which kernel it would run, and why not the others.
Where none fits, the reference runs, and says so once.

The op is the matrix of squared distances. One kernel is slow and exact, one is fast where rows are long.
"""

import os
import subprocess
import sys
import warnings

import torch
from torch import Tensor

import opkit


@opkit.op("demo::distances", shapes="m d, n d -> m n")
def distances(x: Tensor, y: Tensor) -> Tensor:
    """Return the squared distances between the rows of x and those of y."""
    return (x.unsqueeze(1) - y).square().sum(-1)


@distances.register_kernel(
    "cpu",
    backend="matmul",
    dtypes=(torch.float32, torch.float64),
    when=lambda x, y: x.shape[1] >= 16 or f"rows of {x.shape[1]} are too short to gain from it",
    priority=10,
)
def by_matmul(x: Tensor, y: Tensor) -> Tensor:
    """Multiply out: (x - y)^2 = x^2 + y^2 - 2 x y. Fast, and inexact where x is close to y."""
    squares = x.square().sum(1, keepdim=True) + y.square().sum(1)
    return torch.addmm(squares, x, y.T, alpha=-2).clamp_(min=0)


@distances.register_kernel("cpu", backend="rows", dtypes=(torch.float32, torch.float64))
def by_rows(x: Tensor, y: Tensor) -> Tensor:
    """Take one row of x at a time: as exact as the reference, in little memory."""
    result = x.new_empty(len(x), len(y))
    for row, distances_of_row in zip(x, result, strict=True):
        torch.sum((row - y).square(), -1, out=distances_of_row)
    return result


def selected(d: int) -> str | None:
    """Return which backend a call with rows of length d runs."""
    return distances.explain(torch.ones(4, d), torch.ones(5, d)).selected


def main() -> None:
    """Let the op choose, then choose."""
    torch.manual_seed(0)
    x, y = torch.randn(40, 64), torch.randn(50, 64)
    exact = (x.double().unsqueeze(1) - y.double()).square().sum(-1)
    torch.testing.assert_close(distances(x, y).double(), exact, rtol=1e-4, atol=1e-4)

    print("Long rows, then short ones:")
    print(distances.explain(x, y))
    print(distances.explain(x[:, :3], y[:, :3]))
    assert (selected(64), selected(3)) == ("matmul", "rows")

    with opkit.use_backend("rows"):  # a wish: the others remain for what rows cannot take
        assert selected(64) == "rows"
        torch.testing.assert_close(distances(x, y).double(), exact, rtol=1e-6, atol=1e-5)
    with opkit.use_backend("matmul", strict=True):  # a condition
        try:
            distances(x[:, :3], y[:, :3])
        except opkit.NoKernelError as error:
            print(f"\nuse_backend('matmul', strict=True) with short rows:\n{error}")
        else:
            raise AssertionError("matmul does not take short rows")

    # For a whole process it is a variable. Another process, as this one has read it already.
    environment = {**os.environ, "OPKIT_BACKEND": "rows,reference"}
    child = [sys.executable, __file__, "selected"]
    answer = subprocess.run(child, env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "rows"
    print(f"\nOPKIT_BACKEND=rows,reference: {answer.stdout.strip()}")

    # No kernel takes float16. The reference does, and warns once for the op.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        half = distances(x.half(), y.half())
    torch.testing.assert_close(half.double(), exact, rtol=2e-2, atol=0.0)
    print(f"\nfloat16: {caught[0].message}")

    # The choice is made when the op runs: changing it recompiles nothing.
    compiled = torch.compile(distances, fullgraph=True)
    compiled(x, y)
    with torch.compiler.set_stance("fail_on_recompile"), opkit.use_backend("rows"):
        assert torch.equal(compiled(x, y), by_rows(x, y))
    print("\ncompiled: another backend, the same graph")


if __name__ == "__main__":
    if sys.argv[1:] == ["selected"]:
        print(selected(64))
    else:
        main()
