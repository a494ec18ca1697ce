"""The package opkit_kernels: its names, and that its CUDA sources compile."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import opkit
import opkit_kernels
from opkit.cpp import toolchain
from opkit.transforms.formula import NoFormula

SOURCES = sorted(Path(opkit_kernels.__file__).parent.glob("*/*.cu"))
OPS = sorted(name for name, value in vars(opkit_kernels).items() if isinstance(value, opkit.Op))


def test_names_are_ops_also_after_every_submodule_is_imported():
    for module in pkgutil.walk_packages(opkit_kernels.__path__, "opkit_kernels."):
        if not module.name.endswith("_triton") or importlib.util.find_spec("triton"):
            importlib.import_module(module.name)
    assert set(OPS) == {f for f in opkit_kernels.__all__ if f.islower()}
    for name in OPS:
        assert getattr(opkit_kernels, name).name == f"opkit::{name}"


def test_names_are_ops_where_a_submodule_is_imported_first():
    code = "import opkit_kernels.rms_norm.rms_norm, opkit, opkit_kernels as k; assert isinstance(k.rms_norm, opkit.Op)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_kernels_a_gradient_and_an_example(name):
    op = getattr(opkit_kernels, name)
    assert {"reference", "cpp", "cuda", "triton"} <= {candidate.backend for candidate in op.kernels}
    if name not in ("quant_fp8", "rms_norm_quant"):  # rounding has none
        assert not op.schema.results or not isinstance(op._formula, NoFormula)
    assert ">>>" in op.__doc__


def test_cuda_sources_are_found():
    assert SOURCES
    assert {path.parent.name for path in SOURCES} == {f for f in OPS if not f.endswith("_backward")}


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_cuda_source_compiles_without_a_warning(source, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no CUDA compiler: nvcc was not found")
    includes = [f"-I{Path(opkit.__file__).parent / 'cpp/include'}", f"-I{source.parents[1] / 'include'}"]
    arches = [
        "-gencode=arch=compute_80,code=[sm_80,sm_90,sm_100]"
    ]  # the sources are the same for all of them
    command = [
        nvcc,
        "-std=c++20",
        *toolchain._CUDA_FLAGS,
        *arches,
        *includes,
        "-Xcompiler=-Wall,-Wextra",
        "-Xptxas=-v",
        "-c",
        str(source),
    ]
    done = subprocess.run([*command, "-o", str(tmp_path / "kernel.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    # A kernel that spills is right and slow, which no test on a device would notice. A few bytes are what a call
    # saves that divides 64 bits, where the element of a strided tensor is looked for.
    spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert spilled
    assert max(int(count) for counts in spilled for count in counts) <= 64


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rms_norm_backward", "cross_entropy", "adamw_step"])
def test_cuda_kernel_builds_with_its_glue(name):
    if shutil.which("nvcc") is None:
        pytest.skip("no CUDA compiler: nvcc was not found")
    assert all(path.is_file() for path in getattr(opkit_kernels, name).build("cuda"))
