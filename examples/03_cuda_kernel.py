"""What this teaches: a CUDA kernel.

03_cuda_kernel.cu is registered as a C++ kernel is, for the device "cuda": nvcc compiles it on first use, and
opkit.stream() is torch's current stream. The compiler needs no GPU: where nvcc is installed, this file proves
that the kernel compiles; where there is a GPU too, it runs it.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import opkit


class Normalized(NamedTuple):
    """The rows with length 1, and the lengths that they had."""

    y: Tensor
    norm: Tensor


@opkit.op("demo::l2_normalize", shapes="*b n -> *b n, *b:float32")
def l2_normalize(x: Tensor, eps: float = 1e-12) -> Normalized:
    """Divide each row by its length, or by eps where that is shorter."""
    norm = x.float().norm(dim=-1)
    return Normalized((x / norm.clamp(min=eps).unsqueeze(-1)).to(x.dtype), norm)


l2_normalize.register_autograd(opkit.from_reference)
l2_normalize.register_kernel(
    "cuda", opkit.cpp.kernel("03_cuda_kernel.cu"), dtypes=(torch.float32, torch.float16, torch.bfloat16)
)


def check(device: str) -> None:
    """Compare the op on a device with torch in float64."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.randn(33, 1000, device=device, dtype=dtype)
        for case in (x, x.T, x[:0], x[:, :1]):
            y, norm = l2_normalize(case)
            exact = torch.nn.functional.normalize(case.double(), dim=-1)
            torch.testing.assert_close(y, exact.to(dtype))
            torch.testing.assert_close(norm, case.double().norm(dim=-1).float())


def main() -> None:
    """Check the reference, compile the kernel, run it: as far as this machine goes."""
    with opkit.use_backend("reference"):  # said on purpose, so no warning that this device has no kernel
        check("cpu")
    print("cpu: the reference agrees with float64")

    kernel = next(k for k in l2_normalize.kernels if k.backend == "cuda")
    if kernel.status == "rejected":
        print(f"skipped: {kernel.reason}")
        return
    (library,) = l2_normalize.build("cuda")  # compiles now, and loads nothing
    print(f"nvcc: compiled {library.name} from {Path(kernel.source).name}")

    if not torch.cuda.is_available():
        print("skipped: torch sees no CUDA device here to run it on")
        return
    check("cuda")
    print(l2_normalize.explain(torch.ones(2, 3, device="cuda")))
    print("cuda: the kernel agrees with float64")


if __name__ == "__main__":
    main()
