"""The kernels compile to machine code for NVIDIA's GPUs, also where there is none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

# Not in this process, where triton may be interpreting.
CODE = """
import itertools
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from opkit_triton import kernels

def signature(function, dtype):
    kinds = {"scale": "fp32", "BLOCK": "constexpr"}
    pointers = ("x", "y", "grad_x", "grad_y")
    return {n: f"*{dtype}" if n in pointers else kinds.get(n, "i32") for n in function.arg_names}

for function, dtype, capability in itertools.product(
    (kernels.softmax_rows, kernels.softmax_rows_backward), ("fp32", "bf16", "fp16"), (80, 90, 100)
):
    source = ASTSource(fn=function, signature=signature(function, dtype), constexprs={"BLOCK": 4096})
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
    assert f"sm_{capability}" in made.asm["ptx"] and made.asm["cubin"][:4] == b"\\x7fELF"
    print(function.__name__, dtype, capability)
"""


@pytest.mark.slow
def test_kernels_compile_for_each_architecture(tmp_path):
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    own = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env={**kept, **own}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 18
