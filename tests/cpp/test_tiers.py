from __future__ import annotations

import subprocess
import sys
import sysconfig
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import opkit
from opkit.cpp import compilers, tier
from opkit.errors import BuildError, OutputError

pytestmark = pytest.mark.skipif(compilers.find_cxx() is None, reason="needs a C++ compiler")

STABLE = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <optional>
#include <string>
#include <tuple>
#include <vector>
using torch::stable::Tensor;
std::tuple<Tensor, Tensor> mixed(
    const Tensor& x, const std::optional<Tensor>& add, const std::vector<int64_t>& sizes, double by,
    const std::string& how, bool twice) {
  STD_TORCH_CHECK(how == "scale", "how is ", how, ", expected scale");
  auto y = torch::stable::empty_like(x);
  for (int64_t i = 0; i < x.numel(); ++i) {
    float v = x.const_data_ptr<float>()[i] * float(by);
    if (add.has_value()) v += add->const_data_ptr<float>()[i];
    y.mutable_data_ptr<float>()[i] = twice ? 2 * v : v;
  }
  auto total = torch::stable::new_empty(x, {1});
  total.mutable_data_ptr<float>()[0] = float(sizes.size());
  return {y, total};
}
"""
ATEN = """
#include <ATen/core/Tensor.h>
#include <ATen/ops/add.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mul.h>
#include <tuple>
std::tuple<at::Tensor, at::Tensor> mixed(
    const at::Tensor& x, const std::optional<at::Tensor>& add, at::IntArrayRef sizes, double by,
    c10::string_view how, bool twice) {
  TORCH_CHECK(how == "scale", "how is ", how, ", expected scale");
  auto y = at::mul(x, by);
  if (add.has_value()) y = at::add(y, *add);
  return {twice ? at::mul(y, 2) : y, at::full({1}, double(sizes.size()))};
}
"""


class Mixed(NamedTuple):
    y: Tensor
    total: Tensor


@pytest.fixture
def mixed(registry):
    @opkit.op("t::mixed", shapes="*b, *b -> *b, 1")
    def mixed(
        x: Tensor, add: Tensor | None, sizes: list[int], by: float, how: str = "scale", twice: bool = False
    ) -> Mixed:
        y = x * by + (0 if add is None else add)
        return Mixed(y * (2 if twice else 1), torch.tensor([float(len(sizes))]))

    return mixed


@pytest.mark.parametrize(
    ("includes", "expected"),
    [
        ([], "light"),
        (["opkit/kernel.h", "vector"], "light"),
        (["torch/headeronly/util/BFloat16.h"], "light"),
        (["pybind11/pybind11.h"], "light"),
        (["torch/csrc/stable/tensor.h", "opkit/kernel.h"], "stable"),
        (["torch/csrc/inductor/aoti_torch/c/shim.h"], "stable"),
        (["torch/csrc/inductor/aoti_torch/utils.h"], "aten"),
        (["torch/csrc/stable/tensor.h", "ATen/ATen.h"], "aten"),
        (["torch/extension.h"], "aten"),
        (["c10/util/Half.h"], "aten"),
    ],
)
def test_the_tier_is_told_by_the_includes(includes, expected):
    assert tier.infer(includes) == expected


@pytest.mark.parametrize(
    "source", [STABLE, pytest.param(ATEN, marks=pytest.mark.slow)], ids=["stable", "aten"]
)
def test_a_function_over_torchs_tensors_is_a_kernel(mixed, source):
    mixed.register_kernel("cpu", opkit.cpp.kernel(source), backend="native")
    x, add = torch.randn(2, 3), torch.randn(2, 3)
    for arguments in ((x, None, [], 2.0), (x, add, [4, 5], 0.5, "scale", True)):
        with opkit.use_backend("native", strict=True):
            found = mixed(*arguments)
        expected = mixed.reference(*arguments)
        torch.testing.assert_close(found.y, expected.y)
        assert found.total.item() == len(arguments[2])
    with pytest.raises(RuntimeError, match="how is halve, expected scale"):
        mixed(x, None, [], 1.0, "halve")
    compiled = torch.compile(lambda a: mixed(a, None, [1], 3.0).y, fullgraph=True)
    torch.testing.assert_close(compiled(x), x * 3)


def test_errors_of_a_stable_kernel_name_the_op(mixed):
    mixed.register_kernel("cpu", opkit.cpp.kernel(STABLE), backend="native")
    with pytest.raises(RuntimeError, match="t::mixed: .*how is halve"):
        mixed(torch.ones(1), None, [], 1.0, "halve")


def test_a_stable_kernel_of_another_form_raises_with_the_expected_declaration(mixed):
    source = STABLE.replace("double by", "float by")
    mixed.register_kernel("cpu", opkit.cpp.kernel(source), backend="native")
    with pytest.raises(BuildError) as caught:
        mixed.build("native")
    assert "other arguments" in str(caught.value)
    assert str(caught.value).endswith(
        "The kernel must be a function of this form:\n"
        "    std::tuple<torch::stable::Tensor, torch::stable::Tensor> mixed(const torch::stable::Tensor& x, "
        "const std::optional<torch::stable::Tensor>& add, const std::vector<int64_t>& sizes, double by, "
        "const std::string& how, bool twice);"
    )


@pytest.mark.slow
def test_an_aten_kernel_of_another_form_says_what_torch_expected(mixed):
    source = ATEN.replace("c10::string_view how, bool", "bool").replace('how == "scale"', "true").replace(
        '"how is ", how, ', "")  # fmt: skip
    mixed.register_kernel("cpu", opkit.cpp.kernel(source), backend="native")
    with pytest.raises(BuildError, match=r"(?s)loading the kernel of t::mixed from .*: torch refused its function "
                       r"for the device cpu:.*Expected a function of the op's schema t::mixed\(Tensor x"):  # fmt: skip
        mixed(torch.ones(1), None, [], 1.0)


def test_outputs_of_a_stable_kernel_are_held_to_the_declaration(registry):
    @opkit.op("t::same", shapes="n -> n")
    def same(x: Tensor) -> Tensor:
        return x.clone()

    text = "#include <torch/csrc/stable/library.h>\n#include <torch/csrc/stable/ops.h>\n{}"
    body = "torch::stable::Tensor same(const torch::stable::Tensor& x) {{ return {}; }}"
    for returned, problem in (
        ("x", "storage"),
        ("torch::stable::new_empty(x, {x.size(0) + 1})", "shape"),
    ):
        source = text.format(body.format(returned))
        same.register_kernel("cpu", opkit.cpp.kernel(source), backend=f"wrong_{problem}")
        with opkit.use_backend(f"wrong_{problem}"), pytest.raises(OutputError, match=problem):
            same(torch.ones(3))


@pytest.mark.parametrize("block", ["STABLE_TORCH_LIBRARY(t, m) {}", "TORCH_LIBRARY_IMPL(t, CPU, m) {}"])
def test_a_library_block_in_a_kernel_is_refused(mixed, block):
    mixed.register_kernel("cpu", opkit.cpp.kernel(f"{STABLE}\n{block}\n"), backend="native")
    with pytest.raises(BuildError, match=(
        rf"building t::mixed: line {STABLE.count(chr(10)) + 2} of its source is a {block.split('(')[0]} block; "
        r"expected a function alone, which opkit registers\. Remove the block, or load the source with"
    )):  # fmt: skip
        mixed.build("native")


CUDA = """
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
__global__ void fill(float* y, const float* x, float by, int64_t n) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i < n) y[i] = x[i] * by;
}
torch::stable::Tensor scaled(const torch::stable::Tensor& x, double by) {
  auto y = torch::stable::empty_like(x);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  fill<<<(x.numel() + 255) / 256, 256, 0, static_cast<cudaStream_t>(stream)>>>(
      y.mutable_data_ptr<float>(), x.const_data_ptr<float>(), float(by), x.numel());
  return y;
}
"""


@pytest.mark.skipif(compilers.find_nvcc() is None, reason="needs nvcc")
def test_a_stable_cuda_kernel_compiles_and_links_without_a_gpu(registry, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")

    @opkit.op("t::scaled", shapes="n -> n")
    def scaled(x: Tensor, by: float) -> Tensor:
        return x * by

    scaled.register_kernel("cuda", opkit.cpp.kernel(CUDA, cuda=True))
    (path,) = scaled.build("cuda")
    needed = subprocess.run(["readelf", "-d", path], capture_output=True, text=True).stdout
    assert "libtorch_cuda.so" in needed
    assert "libcudart" not in needed
    undefined = subprocess.run(["nm", "-D", "--undefined-only", path], capture_output=True, text=True).stdout
    assert "aoti_torch_get_current_cuda_stream" in undefined
    assert "c10" not in undefined
    if torch.cuda.is_available():
        x = torch.randn(1000, device="cuda")
        torch.testing.assert_close(scaled(x, 3.0), x * 3)


def test_a_tier_that_is_none_is_refused():
    with pytest.raises(
        BuildError, match=r"naming a kernel: found tier='full'; expected one of light, stable, aten\."
    ):
        opkit.cpp.kernel("void f();\n", tier="full")
    with pytest.raises(BuildError, match=r"building f: found tier='full'"):
        opkit.cpp.load("f", "int f();\n", tier="full")


def test_a_stable_library_is_the_same_for_every_torch(mixed, monkeypatch):
    kernel = opkit.cpp.kernel(STABLE)
    before = kernel.job(mixed.schema, mixed._runner.native_plan, "native").key()
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert kernel.job(mixed.schema, mixed._runner.native_plan, "native").key() == before


def test_a_library_of_ops_is_the_same_for_every_python(monkeypatch):
    from opkit.cpp._unit import Unit
    from opkit.cpp.compile import Job
    from opkit.cpp.toolchain import CPP

    def key(text: str) -> str:
        return Job(label="f", units=(Unit("f.cpp", text, CPP),), module="f").key()

    ops, module = "#include <torch/csrc/stable/library.h>\n", "#include <Python.h>\n"
    before = key(ops), key(module)
    config = sysconfig.get_config_var
    monkeypatch.setattr(
        sysconfig, "get_config_var", lambda name: ".other" if name == "EXT_SUFFIX" else config(name)
    )
    assert key(ops) == before[0]
    assert key(module) != before[1]


PYBIND = """
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <vector>
std::vector<int> twice(std::vector<int> values) {
  for (int& v : values) v *= 2;
  return values;
}
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("twice", &twice, "Double each."); }
"""


def test_a_module_without_a_header_of_torch_is_built_with_pypis_pybind11():
    pybind11 = pytest.importorskip("pybind11")
    path = opkit.cpp.build("doubling", PYBIND)
    assert pybind11.get_include() in (path.parent / "log.txt").read_text()
    needed = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True).stdout
    assert "torch" not in needed
    module = opkit.cpp.load("doubling", PYBIND)
    assert module.twice([1, 2]) == [2, 4]
    assert module.__name__ == "doubling"


def test_a_module_with_pybind11_and_no_pybind11_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pybind11", None)
    with pytest.raises(
        BuildError, match=r"it is not installed\. Install it: pip install 'torch-opkit\[pybind\]'"
    ):
        opkit.cpp.load("tripling", PYBIND.replace("2", "3"))


def test_several_files_of_the_stable_tier_are_one_library(tmp_path):
    (tmp_path / "ops.h").write_text("torch::stable::Tensor doubled(const torch::stable::Tensor& x);\n")
    (tmp_path / "ops.cpp").write_text(
        '#include <torch/csrc/stable/library.h>\n#include <torch/csrc/stable/tensor.h>\n#include "ops.h"\n'
        'STABLE_TORCH_LIBRARY(t_several, m) { m.def("doubled(Tensor x) -> Tensor"); }\n'
        'STABLE_TORCH_LIBRARY_IMPL(t_several, CPU, m) { m.impl("doubled", TORCH_BOX(&doubled)); }\n'
    )
    (tmp_path / "doubled.cpp").write_text(
        "#include <torch/csrc/stable/ops.h>\n#include <torch/csrc/stable/tensor.h>\n"
        '#include "ops.h"\n'
        "torch::stable::Tensor doubled(const torch::stable::Tensor& x) {\n"
        "  auto y = torch::stable::empty_like(x);\n"
        "  for (int64_t i = 0; i < x.numel(); ++i)\n"
        "    y.mutable_data_ptr<float>()[i] = 2 * x.const_data_ptr<float>()[i];\n"
        "  return y;\n}\n"
    )
    path = opkit.cpp.load("several", [tmp_path / "ops.cpp", tmp_path / "doubled.cpp"], is_python_module=False)
    assert torch.ops.t_several.doubled(torch.ones(2)).tolist() == [2.0, 2.0]
    undefined = subprocess.run(["nm", "-D", "--undefined-only", path], capture_output=True, text=True).stdout
    assert "c10" not in undefined
