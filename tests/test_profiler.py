"""What a profile shows of an op: its name, and inside of it which kernel ran; in NVTX's ranges, too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import opkit
from opkit.dispatch import native

KERNEL = """
#include <opkit/kernel.h>
void twice(opkit::Tensor x, opkit::Tensor y) {
  for (int64_t i = 0; i < x.numel(); ++i) y.data<float>()[i] = 2 * x.data<float>()[i];
}
"""
# The calls of NVTX that torch makes, counted where no CUDA is: torch's CUDA library registers such an object.
FAKE_NVTX = """
#include <torch/csrc/profiler/stubs/base.h>
#include <string>
#include <vector>
using namespace torch::profiler::impl;
static std::vector<std::string> ranges;
static int depth = 0;
struct Fake : ProfilerStubs {
  void record(c10::DeviceIndex*, ProfilerVoidEventStub*, int64_t*) const override {}
  float elapsed(const ProfilerVoidEventStub*, const ProfilerVoidEventStub*) const override { return 0; }
  void mark(const char*) const override {}
  void rangePush(const char* name) const override { ranges.push_back(std::string(depth++, ' ') + name); }
  void rangePop() const override { --depth; }
  bool enabled() const override { return true; }
  void onEachDevice(std::function<void(int)>) const override {}
  void synchronize() const override {}
};
static Fake fake;
extern "C" void fake_nvtx() { registerCUDAMethods(&fake); }
extern "C" const char* next_range() {
  static std::string last;
  if (ranges.empty()) return nullptr;
  last = ranges.front();
  ranges.erase(ranges.begin());
  return last.c_str();
}
"""


@pytest.fixture
def twice(registry):
    @opkit.op("t::twice", shapes="*b -> *b")
    def twice(x: Tensor) -> Tensor:
        return 2 * x

    twice.register_autograd(lambda ctx, grad: twice(grad))
    twice.register_kernel("cpu", opkit.cpp.kernel(KERNEL), dtypes=(torch.float32,))
    twice.register_kernel("cpu", lambda x: x + x, backend="sum", priority=-1)
    return twice


def shown(call):
    """The names in a profile of a call, each with the names around it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    paths = []
    for event in profile.events():
        path, parent = [event.name], event.cpu_parent
        while parent is not None:
            path, parent = [parent.name, *path], parent.cpu_parent
        paths.append(path)
    return paths


def kernels(paths):
    """The kernels that ran, with the op that each ran in."""
    found = []
    for path in paths:
        if "@" in path[-1]:
            found.append((next(n for n in reversed(path[:-1]) if n == "t::twice"), path[-1]))
    return found


def test_a_profile_shows_the_kernel_inside_of_its_op(twice):
    x = torch.ones(3)
    twice(x)
    assert kernels(shown(lambda: twice(x))) == [("t::twice", "t::twice@cpp")]

    def others():
        with opkit.use_backend("sum"):
            twice(x)
        with opkit.use_backend("reference"):
            twice(x)

    assert [name for _, name in kernels(shown(others))] == ["t::twice@sum", "t::twice@reference"]


def test_what_a_kernel_calls_is_inside_of_it(twice):
    with opkit.use_backend("sum"):
        paths = shown(lambda: twice(torch.ones(3)))
    assert ["t::twice", "t::twice@sum", "aten::add"] in paths


def test_a_profile_shows_the_kernels_of_forward_and_backward(twice):
    x = torch.ones(3, requires_grad=True)

    def train():
        twice(x).sum().backward()

    train()
    assert [name for _, name in kernels(shown(train))] == ["t::twice@cpp", "t::twice@cpp"]


def test_a_profile_shows_the_kernel_in_compiled_code(twice):
    x = torch.ones(3)
    compiled = torch.compile(lambda x: twice(x) + 1, fullgraph=True, backend="aot_eager")
    compiled(x)
    assert [name for _, name in kernels(shown(lambda: compiled(x)))] == ["t::twice@cpp"]


def test_a_kernel_whose_choice_depends_on_the_call_is_shown_too(registry):
    @opkit.op("t::pick", shapes="n -> n")
    def pick(x: Tensor) -> Tensor:
        return x + 0

    pick.register_kernel("cpu", lambda x: x * 1, backend="long", when=lambda x: x.shape[0] > 2)
    pick.register_kernel("cpu", lambda x: x * 1, backend="short", priority=-1)
    paths = shown(lambda: (pick(torch.ones(1)), pick(torch.ones(3))))
    assert [path[-1] for path in paths if "@" in path[-1]] == ["t::pick@short", "t::pick@long"]


def test_the_core_takes_the_range_itself(twice):
    if native.core() is None:
        pytest.skip("Python runs the ops: with OPKIT_NATIVE=1 the core does")
    x = torch.ones(3)
    paths = shown(lambda: twice(x))
    assert ["t::twice", "t::twice@cpp"] in paths
    assert not any(
        "_opkit_native" in name for path in paths for name in path
    )  # the twin in Python calls that


def test_without_a_profile_nothing_is_recorded(twice, monkeypatch):
    from opkit.dispatch import run

    monkeypatch.setattr(run, "in_profile", None)  # any use of it raises
    assert twice(torch.ones(3)).tolist() == [2, 2, 2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this torch has the true NVTX, which tells nothing")
def test_nvtx_gets_a_range_with_op_and_backend(twice, monkeypatch, tmp_path):
    import ctypes

    (source := tmp_path / "fake_nvtx.cpp").write_text(FAKE_NVTX)
    nvtx = ctypes.CDLL(str(opkit.cpp.build("fake_nvtx", source)))
    nvtx.next_range.restype = ctypes.c_char_p
    nvtx.fake_nvtx()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    twice(torch.ones(3))
    with torch.autograd.profiler.emit_nvtx():
        twice(torch.ones(3))
        with opkit.use_backend("sum"):
            twice(torch.ones(3))
    ranges = [name.decode().split(",")[0] for name in iter(nvtx.next_range, None)]
    assert " t::twice@cpp" in ranges, ranges
    assert ranges.index("t::twice") + 1 == ranges.index(" t::twice@cpp")
    assert ranges[-3:] == ["t::twice", " t::twice@sum", "  aten::add"], ranges
