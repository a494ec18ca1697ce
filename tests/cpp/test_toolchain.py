from __future__ import annotations

import dataclasses
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import opkit
from opkit.cpp import compilers, toolchain
from opkit.errors import BuildError, ConfigError

pytestmark = pytest.mark.skipif(compilers.find_cxx() is None, reason="needs a C++ compiler")

KERNEL = """
#include <opkit/kernel.h>
void shifted(opkit::Tensor x, opkit::Tensor y, opkit::Tensor seen) {
  for (int64_t i = 0; i < x.numel(); ++i) y.data<float>()[i] = x.data<float>()[i] + SHIFT;
  seen.data<int64_t>()[0] = shift_lang::current_stream();
  seen.data<int64_t>()[1] = shift_lang::guarded;
}
"""
HEADER = """
#pragma once
namespace shift_lang {
inline int guarded = 0;
inline int current_stream() { return 7; }
struct Guard {
  explicit Guard(const opkit::Tensor& x) { guarded = 1 + x.device().type; }
  ~Guard() { guarded = 0; }
};
}
"""


class Shifted(NamedTuple):
    y: Tensor
    seen: Tensor


def made_up(folder, **changes) -> toolchain.Toolchain:
    """A language of files in `.shift`: C++ with a device of its own."""
    (folder / "shift_lang.h").write_text(HEADER)
    made = toolchain.Toolchain(
        name="shift",
        suffixes=(".shift",),
        find=compilers.find_cxx,
        why_none=lambda: "the shift compiler was not found (install shift)",
        command=lambda o: [
            *o.compiler.command,
            "-x",
            "c++",
            "-std=c++20",
            "-fPIC",
            *o.folders,
            f"-I{folder}",
            *o.cflags,
        ],
        flags=("-fPIC",),
        abi="shift-1",
        prelude='#include <opkit/kernel.h>\n#include "shift_lang.h"',
        guard="shift_lang::Guard guard({tensor});",
    )
    return dataclasses.replace(made, **changes)


@pytest.fixture
def shift(tmp_path):
    made = made_up(tmp_path)
    toolchain.register(made)
    yield made
    toolchain.unregister("shift")


@pytest.fixture
def shifted(registry):
    @opkit.op("t::shifted", shapes="n -> n, 2:int64")
    def shifted(x: Tensor) -> Shifted:
        return Shifted(x + 1, torch.tensor([0, 0]))

    return shifted


def test_a_third_toolchain_compiles_kernels_with_its_guard_and_stream(shift, shifted, tmp_path):
    source = tmp_path / "k.shift"
    source.write_text(KERNEL)
    shifted.register_kernel("cpu", opkit.cpp.kernel(source, extra_cflags=["-DSHIFT=3"]))
    assert shifted.explain(torch.ones(2)).selected == "shift"
    y, seen = shifted(torch.ones(2))
    assert (y.tolist(), seen.tolist()) == ([4.0, 4.0], [7, 1])


def test_source_text_names_its_toolchain(shift, shifted):
    kernel = opkit.cpp.kernel(KERNEL, toolchain="shift", extra_cflags=["-DSHIFT=5"])
    shifted.register_kernel("cpu", kernel)
    assert shifted(torch.ones(1)).y.item() == 6.0


def test_a_plugin_registers_a_toolchain(monkeypatch, shifted, tmp_path):
    from opkit.plugins.registry import Registry

    source = tmp_path / "k.shift"
    source.write_text(KERNEL)
    with pytest.raises(BuildError, match=r"has the suffix '.shift'; expected one of .cpp, .*\.cu\. Name"):
        opkit.cpp.kernel(source)

    def ask():
        Registry("opkit-shift 1.0").register_toolchain(made_up(tmp_path))

    monkeypatch.setattr(toolchain._sources, "_kernels", [ask])
    monkeypatch.setattr(toolchain._sources, "_ops", [])
    try:
        assert opkit.cpp.kernel(source).backend == "shift"
    finally:
        toolchain.unregister("shift")


def test_a_plugin_that_fails_takes_its_toolchain_with_it(tmp_path):
    from opkit.plugins.registry import Registry

    registry = Registry("opkit-shift 1.0")
    registry.register_toolchain(made_up(tmp_path))
    registry.take_back()
    assert "shift" not in toolchain.names()


def test_the_abi_and_the_flags_are_part_of_the_key(shift, shifted, tmp_path):
    def key(**changes):
        toolchain.register(made_up(tmp_path, **changes))
        source = opkit.cpp.kernel(KERNEL, toolchain="shift")
        return source.job(shifted.schema, shifted._runner.native_plan, "shift").key()

    keys = {key(), key(abi="shift-2"), key(flags=("-fPIC", "-O1")), key(architectures=lambda: ("gen9",))}
    assert len(keys) == 4
    assert key() in keys


def test_a_toolchain_without_its_compiler_says_so(shifted, tmp_path):
    toolchain.register(made_up(tmp_path, find=lambda: None))
    try:
        shifted.register_kernel("cpu", opkit.cpp.kernel(KERNEL, toolchain="shift"))
        candidate = shifted.explain(torch.ones(1)).candidates[0]
        assert (candidate.status, candidate.reason) == (
            "rejected", "the shift compiler was not found (install shift)",
        )  # fmt: skip
        with pytest.raises(BuildError, match=(
            r"building t::shifted \[shift\]: the toolchain shift has no compiler here: the shift compiler was not "
            r"found \(install shift\)\. Expected one that compiles \.shift\. Install it, or register another kernel"
        )):  # fmt: skip
            shifted.build("shift")
    finally:
        toolchain.unregister("shift")


def test_an_unknown_toolchain_lists_the_known_ones():
    with pytest.raises(
        BuildError, match=r"found toolchain='cdua'; expected one of cpp, cuda\. Did you mean 'cuda'\?"
    ):
        opkit.cpp.kernel("void f();\n", toolchain="cdua")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"name": "no name"}, "its name is 'no name'; expected letters"),
        ({"suffixes": ".cpp"}, r"has the suffixes '\.cpp'; expected a tuple of texts that begin with a dot"),
        ({"suffixes": ("cpp",)}, r"has the suffixes \('cpp',\); expected a tuple"),
        ({"suffixes": (".cu",)}, r"wants the suffix '\.cu', which cuda has; expected suffixes that no other"),
    ],
)
def test_a_toolchain_that_does_not_fit_is_refused(tmp_path, changes, text):
    with pytest.raises(ConfigError, match=f"registering a toolchain: .*{text}"):
        toolchain.register(made_up(tmp_path, **changes))


def test_what_is_no_toolchain_is_refused():
    with pytest.raises(
        ConfigError, match=r"registering a toolchain: found 'gcc'; expected an opkit\.cpp\.Toolchain"
    ):
        opkit.cpp.register_toolchain("gcc")
