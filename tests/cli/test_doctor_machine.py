"""`opkit doctor`: what it says of torch, the GPU, compilers, the cache folder and the native core."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest
import torch

from opkit.cli import _health
from opkit.cpp import _nvrtc, compilers
from opkit.dispatch import native
from opkit.dispatch.native import library


@pytest.fixture
def of_cuda(monkeypatch):
    """torch as if it were built for CUDA, on a machine without a GPU."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)


def test_no_torch_is_a_failure_and_the_rest_is_looked_at(doctor, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert doctor("torch") == [("failure", "it is not installed", "Install it: pip install torch.")]
    assert doctor("ninja")
    assert doctor("nvcc") == doctor("native core") == []


def test_a_torch_that_does_not_import_is_a_failure(doctor, monkeypatch):
    def fail(name):
        raise OSError("libcudart.so.12: cannot open shared object file\nmore")

    monkeypatch.setattr(
        _health,
        "importlib",
        types.SimpleNamespace(import_module=fail, util=importlib.util),
    )
    ((status, found, remedy),) = doctor("torch")
    assert (status, found) == (
        "failure",
        "importing it failed with OSError: libcudart.so.12: cannot open shared object file",
    )
    assert remedy == (
        "Try python -c 'import torch', and with TORCH_DEVICE_BACKEND_AUTOLOAD=0, which keeps other packages out."
    )


def test_an_old_torch_is_a_failure(doctor, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert doctor("torch") == [
        ("failure", "2.9.1+cpu; opkit needs 2.11 or newer", "Install a newer one: pip install 'torch>=2.11'.")
    ]
    project = Path(__file__).parents[2] / "pyproject.toml"
    assert f'"torch>={_health.OLDEST_TORCH}"' in project.read_text()


def test_a_gpu_that_torch_cannot_use_is_a_warning(doctor, monkeypatch, of_cuda, tmp_path):
    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old\nmore")

    monkeypatch.setattr(_health, "_DRIVER", tmp_path)
    monkeypatch.setattr(torch.cuda, "init", init)
    assert doctor("GPU") == [
        (
            "warning",
            "there is a driver of NVIDIA, and torch cannot use it: The NVIDIA driver on your system is too old",
            "Look at nvidia-smi and CUDA_VISIBLE_DEVICES; update an old driver, or install a torch for its CUDA.",
        )
    ]
    monkeypatch.setattr(torch.version, "cuda", None)
    assert doctor("GPU") == [
        (
            "warning",
            "there is a driver of NVIDIA, and this torch is not built for CUDA",
            "Install a torch for CUDA: https://pytorch.org/get-started/locally.",
        )
    ]


def test_gpus_are_named_once_each(doctor, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: ("H200", "H200", "A100")[i])
    assert doctor("GPU") == [("ok", "H200, A100", "")]


def test_no_compiler_is_a_failure(doctor, monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor("C++ compiler") == [
        (
            "failure",
            "looking for a C++ compiler: none of $CXX, g++, clang++ and c++ is on PATH.",
            "Install one (apt install g++, dnf install gcc-c++, conda install gxx) or set CXX.",
        )
    ]


def test_a_wrong_cxx_is_a_failure(doctor, monkeypatch):
    monkeypatch.setenv("CXX", "g+++")
    ((status, found, remedy),) = doctor("C++ compiler")
    assert (status, found) == ("failure", "looking for a C++ compiler: CXX is 'g+++', which does not run.")
    assert remedy.endswith("correct CXX or unset it.")


def test_a_compiler_that_compiles_nothing_is_a_failure(doctor, monkeypatch, tmp_path):
    script = tmp_path / "g++"
    script.write_text(
        '#!/bin/sh\nif [ "$1" = --version ]; then echo old g++ 4; exit 0; fi\n'
        "echo unit.cpp: note; echo 'unit.cpp:2:10: fatal error: span: No such file'; exit 1\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    assert doctor("C++ compiler") == [
        (
            "failure",
            f"old g++ 4 ({script}) does not compile a small program: unit.cpp:2:10: fatal error: span: No such file",
            "Install a compiler for C++20 with its standard library (apt install g++), or set CXX to one.",
        )
    ]


@pytest.mark.skipif(compilers.find_cxx() is None, reason="needs a C++ compiler")
def test_the_compiler_here_is_ok(doctor):
    ((status, found, _),) = doctor("C++ compiler")
    assert status == "ok"
    assert found.endswith(f"({compilers.get_cxx().path})")


def test_nvcc_of_another_cuda_is_a_failure(doctor, monkeypatch, of_cuda):
    nvcc = compilers.Compiler(Path("/cuda/bin/nvcc"), "tools, release 12.4, V12.4.99", ("nvcc",))
    monkeypatch.setattr(compilers, "find_nvcc", lambda: nvcc)
    assert doctor("nvcc") == [
        (
            "failure",
            f"building CUDA kernels: nvcc is of CUDA 12.4 (/cuda/bin/nvcc) and torch {torch.__version__} of CUDA 13.0; "
            "expected one major version.",
            "Set CUDA_HOME to a toolkit of CUDA 13, or install a torch for CUDA 12.",
        )
    ]
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert doctor("nvcc") == [("ok", "CUDA 12.4 (/cuda/bin/nvcc)", "")]
    monkeypatch.setattr(torch.version, "cuda", None)
    assert doctor("nvcc") == [("ok", "CUDA 12.4 (/cuda/bin/nvcc); torch does not need it", "")]


def test_no_nvcc_is_as_bad_as_what_it_is_needed_for(doctor, monkeypatch, of_cuda):
    monkeypatch.setattr(compilers, "find_nvcc", lambda: None)
    monkeypatch.setattr(_nvrtc, "find", lambda: None)
    monkeypatch.setattr(_nvrtc, "why_none", lambda: "NVRTC was not found (pip install it)")
    expected = (
        "not found, and NVRTC was not found (pip install it): no CUDA kernel can be compiled",
        "Install the toolkit of CUDA 13 and set CUDA_HOME to it.",
    )
    assert doctor("nvcc") == [("warning", *expected)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert doctor("nvcc") == [("failure", *expected)]
    monkeypatch.setattr(_nvrtc, "find", lambda: types.SimpleNamespace(major=13, minor=1))
    assert doctor("nvcc") == [
        (
            "warning",
            "not found; NVRTC 13.1 compiles light kernels, and no others",
            "Install the toolkit of CUDA 13 and set CUDA_HOME to it, if there are others.",
        )
    ]
    monkeypatch.setattr(torch.version, "cuda", None)
    assert doctor("nvcc") == [("ok", "not found, and not needed: torch is built for the CPU alone", "")]


def test_a_wrong_cuda_home_is_named(doctor, monkeypatch, of_cuda):
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    said = "CUDA_HOME is '/nowhere', whose bin/nvcc does not run", "Correct CUDA_HOME or unset it."
    assert doctor("nvcc") == [("failure", *said)]
    monkeypatch.setattr(torch.version, "cuda", None)
    assert doctor("nvcc") == [("warning", *said)]


def test_rocm_is_a_warning(doctor, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert doctor("nvcc") == [
        (
            "warning",
            "not needed: torch is built for ROCm 6.4, and opkit compiles CUDA for NVIDIA alone",
            "Write kernels for this GPU in Python or Triton.",
        )
    ]


def test_no_ninja_is_a_failure(doctor, monkeypatch):
    monkeypatch.setattr(compilers, "find_ninja", lambda: None)
    ((status, found, remedy),) = doctor("ninja")
    assert (status, remedy) == ("failure", "Install it: pip install ninja.")
    assert found.startswith(
        "looking for ninja, which builds extensions with torch's headers: it is neither on PATH"
    )


def test_no_setuptools_is_a_failure(doctor, without):
    without("setuptools")
    assert doctor("ninja") == [
        (
            "failure",
            f"{compilers.get_ninja()}; but setuptools, which torch's build files take, is not installed",
            "Install it: pip install setuptools.",
        )
    ]


def test_a_cache_folder_that_cannot_be_made_is_a_failure(doctor, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("OPKIT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert doctor("cache folder") == [
        (
            "failure",
            f"looking at the cache: the cache folder {tmp_path}/file/cache cannot be written (Not a directory); "
            "expected a folder that this user may write and that has room.",
            "Set OPKIT_CACHE_DIR to one.",
        )
    ]


def test_a_read_only_cache_folder_is_a_failure(doctor, monkeypatch, cache_dir):
    @contextlib.contextmanager
    def refuse(dir):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        yield

    monkeypatch.setattr(_health.tempfile, "TemporaryFile", refuse)
    ((status, found, remedy),) = doctor("cache folder")
    assert (status, remedy) == ("failure", "Set OPKIT_CACHE_DIR to one.")
    assert f"{cache_dir} cannot be written (Read-only file system)" in found


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_folder_without_permission_is_a_failure(doctor, cache_dir):
    cache_dir.mkdir(mode=0o500)
    ((status, found, _),) = doctor("cache folder")
    assert status == "failure"
    assert "cannot be written (Permission denied)" in found


def test_a_cache_folder_that_others_write_is_a_failure(doctor, cache_dir):
    cache_dir.mkdir()
    cache_dir.chmod(0o777)
    ((status, found, remedy),) = doctor("cache folder")
    assert status == "failure"
    assert f"the cache folder {cache_dir} may be written by others" in found
    assert remedy == f"Run chmod go-w {cache_dir}, or name another folder in OPKIT_CACHE_DIR."


def test_a_cache_folder_that_libraries_are_not_loaded_from_is_a_failure(doctor, monkeypatch, cache_dir):
    monkeypatch.setattr(os, "statvfs", lambda path: types.SimpleNamespace(f_flag=os.ST_NOEXEC))
    assert doctor("cache folder") == [
        (
            "failure",
            f"{cache_dir} is on a file system from which no library can be loaded (noexec)",
            "Set OPKIT_CACHE_DIR to a folder on another one.",
        )
    ]


def test_little_room_in_the_cache_folder_is_a_warning(doctor, monkeypatch, cache_dir):
    monkeypatch.setattr(_health.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=3 * 2**20))
    assert doctor("cache folder") == [
        (
            "warning",
            f"{cache_dir} has only 3 MiB of room left",
            "Run opkit cache clean, or make room on the disk.",
        )
    ]


@pytest.fixture
def no_core(monkeypatch):
    monkeypatch.setattr(native, "core", lambda: None)
    monkeypatch.setattr(library, "unsupported", lambda: None)
    monkeypatch.setattr(library, "find_failure", lambda: None)
    monkeypatch.setenv("OPKIT_NATIVE", "auto")


SLOW = "calls go through Python, which is slower:"


def test_the_core_off_is_a_warning(doctor, monkeypatch, no_core):
    monkeypatch.setenv("OPKIT_NATIVE", "0")
    assert doctor("native core") == [("warning", f"{SLOW} OPKIT_NATIVE is 0", "Unset OPKIT_NATIVE.")]


def test_a_core_that_is_not_built_is_a_warning(doctor, no_core):
    remedy = "Run opkit build --native; or wait, as it is built in the background when an op is first called."
    assert doctor("native core") == [("warning", f"{SLOW} it is not built yet", remedy)]


def test_a_core_that_did_not_build_is_a_warning_or_what_was_asked_for(doctor, monkeypatch, no_core):
    failure = library.Failure("building opkit's native core: 1 error\nmore", "/log", None)
    monkeypatch.setattr(library, "find_failure", lambda: failure)
    remedy = "Run opkit build --native, which tries again and shows more. The log is /log."
    assert doctor("native core") == [("warning", f"{SLOW} building opkit's native core: 1 error", remedy)]
    monkeypatch.setenv("OPKIT_NATIVE", "1")
    found = "OPKIT_NATIVE=1 asks for it, and building opkit's native core: 1 error"
    assert doctor("native core") == [("failure", found, remedy)]


def test_a_python_without_a_core_is_a_warning_or_what_was_asked_for(doctor, monkeypatch, no_core):
    monkeypatch.setattr(library, "unsupported", lambda: "this Python is built without the GIL")
    found = "this Python is built without the GIL"
    assert doctor("native core") == [("warning", f"{SLOW} {found}", "Nothing; what ops compute is the same.")]
    monkeypatch.setenv("OPKIT_NATIVE", "1")
    assert doctor("native core") == [
        ("failure", f"OPKIT_NATIVE=1 asks for it, and {found}", "Unset OPKIT_NATIVE.")
    ]


def test_a_core_that_is_loaded_is_ok(doctor, monkeypatch):
    monkeypatch.setattr(native, "core", lambda: types.SimpleNamespace(__file__="/cache/opkit_core.so"))
    assert doctor("native core") == [("ok", "/cache/opkit_core.so", "")]
