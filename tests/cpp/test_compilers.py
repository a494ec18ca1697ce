from __future__ import annotations

import stat
from pathlib import Path

import pytest
import torch

from opkit.cpp import compilers
from opkit.errors import BuildError, ConfigError


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine without compilers."""
    for variable in ("CXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_get_cxx_without_a_compiler_says_what_was_looked_for(bare):
    assert compilers.find_cxx() is None
    with pytest.raises(BuildError, match=r"\$CXX, g\+\+, clang\+\+ and c\+\+ is on PATH.*apt install g\+\+"):
        compilers.get_cxx()


def test_get_cxx_with_a_wrong_cxx_does_not_fall_back(bare, monkeypatch):
    script(bare / "g++", "echo version")
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    assert compilers.find_cxx() is None
    with pytest.raises(
        BuildError, match="CXX is 'no-such-compiler -m64', which does not run.*correct CXX or unset"
    ):
        compilers.get_cxx()


def test_find_cxx_prefers_cxx_over_path(bare, monkeypatch):
    script(bare / "g++", "echo the one on PATH")
    other = script(bare / "other" / "mycxx", "echo mine 1.2")
    assert "the one on PATH" in compilers.get_cxx().version
    monkeypatch.setenv("CXX", str(other))
    compiler = compilers.get_cxx()
    assert compiler.path == other
    assert "mine 1.2" in compiler.version
    assert str(other) not in compiler.version  # or a cache would not be shared by machines


def test_find_cxx_takes_clang_where_there_is_no_gcc(bare):
    script(bare / "clang++", "echo clang")
    assert compilers.get_cxx().path == bare / "clang++"


def test_find_cxx_with_a_launcher_names_the_compiler_behind_it(bare, monkeypatch):
    script(bare / "ccache", "echo gcc behind ccache")
    script(bare / "g++", "echo gcc")
    monkeypatch.setenv("CXX", "ccache g++")
    compiler = compilers.get_cxx()
    assert compiler.path == bare / "g++"
    assert compiler.command == ("ccache", "g++")


def test_a_replaced_compiler_is_another_one(bare):
    script(bare / "g++", "echo one")
    before = compilers.get_cxx()
    script(bare / "g++", "echo twenty-two")
    assert before.version != compilers.get_cxx().version


def test_get_cxx_with_quotes_that_do_not_close(bare, monkeypatch):
    monkeypatch.setenv("CXX", "g++ 'x")
    with pytest.raises(BuildError, match="which does not run"):
        compilers.get_cxx()


@pytest.mark.parametrize(
    ("find", "name", "variable"), [("find_cxx", "g++", "CXX"), ("find_nvcc", "nvcc", "CUDA_HOME")]
)
def test_path_is_searched_once_until_the_environment_changes(bare, monkeypatch, find, name, variable):
    searches = []
    which = compilers._which
    monkeypatch.setattr(compilers, "_which", lambda word: searches.append(word) or which(word))
    find = getattr(compilers, find)
    script(bare / name, "echo one")
    assert find().path == bare / name
    assert find() is find()
    assert len(searches) == 1
    other = script(bare / "home" / "bin" / "nvcc", "echo other")
    monkeypatch.setenv(variable, str(other if variable == "CXX" else bare / "home"))
    assert find().path == other
    monkeypatch.delenv(variable)
    assert find().path == bare / name
    assert len(searches) == 2
    second = script(bare / "second" / name, "echo second")
    monkeypatch.setenv("PATH", str(bare / "second"))
    assert find().path == second
    second.unlink()
    monkeypatch.setattr(compilers, "_identify", lambda command: None)  # whatever /usr/local/cuda has
    assert find() is None


def test_compiler_that_was_not_there_is_looked_for_again_after_a_while(bare, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(compilers.time, "monotonic", lambda: now[0])
    assert compilers.find_cxx() is None
    script(bare / "g++", "echo one")
    assert compilers.find_cxx() is None
    now[0] += 1.1
    assert compilers.find_cxx().path == bare / "g++"


def test_get_nvcc_without_one_says_what_to_install(bare, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(bare))
    with pytest.raises(BuildError, match=r"bin/nvcc does not run.*Install the CUDA toolkit.*set CUDA_HOME"):
        compilers.get_nvcc()


def test_find_nvcc_prefers_cuda_home(bare, monkeypatch):
    mine = script(bare / "cuda" / "bin" / "nvcc", "echo my nvcc")
    script(bare / "nvcc", "echo other nvcc")
    monkeypatch.setenv("CUDA_HOME", str(bare / "cuda"))
    nvcc = compilers.get_nvcc()
    assert nvcc.path == mine
    assert compilers.cuda_home(nvcc) == bare / "cuda"


@pytest.mark.skipif(compilers.find_nvcc() is None, reason="needs nvcc")
def test_cuda_home_has_the_runtime_library():
    nvcc = compilers.get_nvcc()
    assert (compilers.cuda_home(nvcc) / "bin" / "nvcc").exists()
    assert any((folder / "libcudart_static.a").exists() for folder in compilers.cuda_library_folders(nvcc))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8.0;9.0+PTX", ("8.0", "9.0+PTX")),
        ("8.0 9.0+PTX", ("8.0", "9.0+PTX")),
        (" 9.0a ;", ("9.0a",)),
        ("Ampere", ("8.0", "8.6+PTX")),
        ("8.0;8.0", ("8.0",)),
    ],
)
def test_cuda_architectures_reads_torchs_variable(monkeypatch, text, expected):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
    assert compilers.cuda_architectures() == expected


@pytest.mark.parametrize("text", ["sm_90", "9", "8.0;banana"])
def test_cuda_architectures_refuses_what_is_none(monkeypatch, text):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
    with pytest.raises(
        ConfigError, match=r"TORCH_CUDA_ARCH_LIST: found .*TORCH_CUDA_ARCH_LIST='8.0;9.0\+PTX'"
    ):
        compilers.cuda_architectures()


def test_cuda_architectures_asks_the_devices_then_takes_the_default(monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compilers.cuda_architectures() == ("8.0", "9.0+PTX")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: [(9, 0), (8, 6), (9, 0)][i])
    assert compilers.cuda_architectures() == ("8.6", "9.0")


def test_gencode_flags_add_ptx_where_it_is_asked_for():
    assert compilers.gencode_flags(["8.0", "12.0a+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_120a,code=sm_120a",
        "-gencode=arch=compute_120a,code=compute_120a",
    ]


def test_get_ninja_without_one_says_what_to_install(bare, monkeypatch):
    monkeypatch.setattr(compilers.sys, "executable", str(bare / "python"))
    monkeypatch.setattr(compilers.sysconfig, "get_path", lambda name: str(bare))
    with pytest.raises(BuildError, match="pip install ninja"):
        compilers.get_ninja()
    script(bare / "ninja", "true")
    assert compilers.get_ninja() == bare / "ninja"
