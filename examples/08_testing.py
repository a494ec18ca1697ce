"""What this teaches: how to know that an op is right.

`opkit.testing.check(op)` makes calls from the shape line: sizes 0, 1, odd and large, all dtypes, rows that are
transposed or expanded. Every backend must agree in all of them with the reference in float64, and torch's transforms
with it. The report has everything that is wrong, not the first thing. In a test-suite the fixture `opkit_backend` runs
a test once for each backend: see 08_testing/test_squares.py, which this file runs.
"""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

import opkit

# Four elements at a time. TAIL is where the rest should be.
SOURCE = """
#include <opkit/kernel.h>
void squares(opkit::Tensor x, opkit::Tensor y) {
  const opkit::Elements<float> in(x);  // of any strides
  float* out = y.data<float>();
  int64_t i = 0;
  for (; i + 4 <= x.numel(); i += 4)
    for (int64_t k = i; k < i + 4; ++k) out[k] = in[k] * in[k];
  TAIL
}
"""


@opkit.op("demo::squares", shapes="*b -> *b")
def squares(x: Tensor) -> Tensor:
    """Square every element."""
    return x * x


@squares.register_autograd(setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
def backward(ctx: object, grad: Tensor) -> Tensor:
    """Return the gradient of x: 2 x times that of y."""
    (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
    return 2 * x * grad


def register(tail: str) -> None:
    """Register the kernel, whole or not."""
    source = opkit.cpp.kernel(SOURCE.replace("TAIL", tail))
    squares.register_kernel("cpu", source, dtypes=(torch.float32,))


def main() -> None:
    """Find what is wrong with the kernel, correct it, and test it as a test-suite does."""
    register("")
    x = torch.randn(4, 8)
    torch.testing.assert_close(squares(x), x * x)
    print("by hand: a kernel without its last lines passes for a shape that somebody thought of")

    try:
        opkit.testing.check(squares, checks=["results"])  # all are checked below; these tell enough here
    except opkit.testing.CheckError as error:
        first = error.report.of("results", "cpp")
        wrong = [record for record in first if record.status == "failed"]
        print(f"check: {len(wrong)} of {len(first)} calls of the cpp kernel are wrong, the first of them")
        print(f"  {wrong[0].input}: {wrong[0].found}")
    else:
        raise AssertionError("the check must find this")

    register("for (; i < x.numel(); ++i) out[i] = in[i] * in[i];")
    report = opkit.testing.check(squares)
    assert report.ok
    print("check, once that is corrected:")
    print(report)

    # As a test-suite does it. Where opkit is installed, pytest finds the fixture by itself.
    known = [point.value for point in importlib.metadata.entry_points(group="pytest11")]
    named = [] if "opkit.testing.pytest_plugin" in known else ["-p", "opkit.testing.pytest_plugin"]
    tests = Path(__file__).parent / "08_testing"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        tests,
        *named,
        tests,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    print(*(line for line in done.stdout.splitlines() if "::test_" in line), sep="\n")


if __name__ == "__main__":
    main()
