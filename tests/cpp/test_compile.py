from __future__ import annotations

import ctypes
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from opkit import _config
from opkit.cpp import cache, compile, toolchain
from opkit.cpp.compile import shared_library
from opkit.errors import BuildError

pytestmark = pytest.mark.skipif(toolchain.find_cxx() is None, reason="needs a C++ compiler")
EXPORT = 'extern "C" __attribute__((visibility("default"))) '
needs_nvcc = pytest.mark.skipif(toolchain.find_nvcc() is None, reason="needs nvcc")


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("OPKIT_CACHE_DIR", str(tmp_path / "cache"))
    _config.refresh()
    yield tmp_path / "cache"
    _config.refresh()


@pytest.fixture
def steps(monkeypatch):
    """Every build that happens."""
    seen = []
    build = compile._Job.build
    monkeypatch.setattr(
        compile._Job, "build", lambda self, work: seen.append(self.label) or build(self, work)
    )
    return seen


def unit_of(*files: Path, tail: str = "") -> str:
    return "".join(f'#include "{path}"\n' for path in files) + tail


def answer(value: int, **kwargs) -> int:
    library = shared_library(f"{EXPORT} int answer() {{ return {value}; }}", label="f", **kwargs)
    return ctypes.CDLL(str(library)).answer()


def test_a_unit_becomes_a_library_with_torchs_name_in_it(cache_dir):
    unit = '#include <opkit/kernel.h>\nextern "C" int answer() { return 42; }'
    library = shared_library(unit, label="demo::f [cpp]")
    assert library.is_relative_to(cache_dir)
    assert library.name == "demo-f-cpp.so"
    needed = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True).stdout
    assert "libtorch_cpu.so" in needed
    assert (library.parent / "log.txt").read_text().startswith("$ ")


def test_a_hit_compiles_nothing_and_prints_nothing(steps, capfd):
    assert answer(1) == 1
    err = capfd.readouterr().err
    assert err.startswith("opkit: building f ...\nopkit: built f in ")
    assert answer(1) == 1
    assert capfd.readouterr() == ("", "")
    assert steps == ["f"]


def test_on_a_terminal_the_seconds_follow_on_the_same_line(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    answer(1)
    assert re.fullmatch(r"opkit: building f \.\.\. \d+\.\d s\n", terminal.getvalue())


@pytest.mark.parametrize(
    "changed",
    [{"extra_cflags": ["-DX=1"]}, {"extra_cflags": ["-O0"]}, {"extra_ldflags": ["-Wl,-O1"]}],
    ids=["define", "optimization", "linker"],
)
def test_other_flags_are_another_library(steps, changed):
    answer(1)
    answer(1, **changed)
    assert len(steps) == 2


def test_an_edited_header_anywhere_is_seen(tmp_path, steps):
    source, header, deep = tmp_path / "k.cpp", tmp_path / "inc" / "a.h", tmp_path / "inc" / "b.h"
    header.parent.mkdir()
    source.write_text(f"#include <a.h>\n{EXPORT} int answer() {{ return VALUE; }}")
    header.write_text('#include "b.h"')
    for value in (1, 2, 1):
        deep.write_text(f"#define VALUE {value}\n")
        library = shared_library(unit_of(source), label="f", include_paths=[header.parent])
        assert ctypes.CDLL(str(library)).answer() == value
    assert len(steps) == 2


def test_comments_and_the_folder_of_the_source_do_not_matter(tmp_path, steps):
    libraries = []
    for folder in ("here", "there"):
        source = tmp_path / folder / "k.cpp"
        source.parent.mkdir()
        source.write_text(f"{EXPORT} const char* file() {{ return __FILE__; }} // {folder}\n")
        libraries.append(shared_library(unit_of(source), label="f"))
    assert libraries[0] == libraries[1]
    assert len(steps) == 1
    library = ctypes.CDLL(str(libraries[0]))
    library.file.restype = ctypes.c_char_p
    assert library.file() == b"k.cpp"


def test_debug_information_keeps_places_apart(tmp_path):
    libraries = set()
    for folder in ("here", "there"):
        source = tmp_path / folder / "k.cpp"
        source.parent.mkdir()
        source.write_text('extern "C" int one() { return 1; }\n')
        libraries.add(shared_library(unit_of(source), label="f", extra_cflags=["-g"]))
    assert len(libraries) == 2


def test_the_date_does_not_make_another_library(monkeypatch):
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    unit = f'{EXPORT} const char* when() {{ return __DATE__ " " __TIME__; }}'
    library = ctypes.CDLL(str(shared_library(unit, label="f")))
    library.when.restype = ctypes.c_char_p
    assert library.when() == b"Jan  1 1970 00:00:00"


def test_a_replaced_static_library_is_seen(tmp_path):
    def link(value: int) -> int:
        (tmp_path / "v.cpp").write_text(f"int value() {{ return {value}; }}")
        subprocess.run(["g++", "-fPIC", "-c", "v.cpp", "-o", "v.o"], cwd=tmp_path, check=True)
        (tmp_path / "libv.a").unlink(missing_ok=True)
        subprocess.run(["ar", "rc", "libv.a", "v.o"], cwd=tmp_path, check=True)
        unit = f"int value(); {EXPORT} int answer() {{ return value(); }}"
        library = shared_library(unit, label="f", extra_ldflags=[f"-L{tmp_path}", "-lv"])
        return ctypes.CDLL(str(library)).answer()

    assert (link(1), link(2)) == (1, 2)


def test_an_error_is_on_the_users_line_and_the_build_is_tried_again(tmp_path, cache_dir, steps):
    source = tmp_path / "k.cpp"
    source.write_text("#include <opkit/kernel.h>\n\nint f() { return foo; }\n")
    for _ in range(2):
        with pytest.raises(BuildError) as caught:
            shared_library(unit_of(source), label="demo::f [cpp]", op="demo::f")
        error = caught.value
        lines = str(error).splitlines()
        assert lines[0].startswith(f"building demo::f [cpp]: 1 error, at {source}:3: ")
        assert "'foo' was not declared in this scope" in lines[0] or "undeclared identifier 'foo'" in lines[0]
        assert any("return foo;" in line for line in lines)
        assert any("^" in line for line in lines)
        assert (error.op, error.diagnostics[0].line) == ("demo::f", 3)
        assert error.log_path.is_relative_to(cache_dir)
        assert "foo" in error.log_path.read_text()
        assert lines[-1] == f"to repeat it: sh {error.log_path.parent / 'command.sh'}"
        assert "unit.cpp" in error.command
        assert error.command not in str(error)
    assert len(steps) == 2
    repeated = subprocess.run(
        ["sh", str(error.log_path.parent / "command.sh")], capture_output=True, text=True
    )
    assert repeated.returncode != 0
    assert "foo" in repeated.stderr
    source.write_text("#include <opkit/kernel.h>\n\nint f() { return 1; }\n")
    assert shared_library(unit_of(source), label="demo::f [cpp]").exists()


def test_an_error_in_the_unit_shows_where_the_unit_is_kept():
    with pytest.raises(BuildError) as caught:
        shared_library("int f() { return foo; }", label="f")
    assert Path(caught.value.diagnostics[0].file).read_text() == "int f() { return foo; }"


def test_a_flag_that_the_compiler_does_not_know(capfd):
    with pytest.raises(BuildError, match="outside the source: .*-fno-such-flag-here"):
        answer(1, extra_cflags=["-fno-such-flag-here", "-march=nonsense"])
    assert "opkit: failed to build f after" in capfd.readouterr().err


def test_two_processes_at_once_give_one_library(cache_dir):
    code = "from opkit.cpp.compile import shared_library; print(shared_library('int f() { return 1; }', label='f'))"
    environment = {**os.environ, "OPKIT_CACHE_DIR": str(cache_dir), "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, text=True, stdout=-1, stderr=-1)
        for _ in range(3)
    ]
    outputs = [process.communicate() for process in processes]
    assert len({out for out, _ in outputs}) == 1
    assert sum(err.count("opkit: built f ") for _, err in outputs) == 1
    assert Path(outputs[0][0].strip()).exists()


def test_include_folders_of_flags_do_not_reach_the_key(tmp_path, steps):
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.h").write_text("#define VALUE 1\n")
        unit = '#include "a.h"\nint f() { return VALUE; }'
        shared_library(unit, label="f", extra_cflags=["-I", str(tmp_path / folder)])
    assert len(steps) == 1


KERNEL = """
#include <opkit/kernel.h>
#include "factor.cuh"
__global__ void scale_kernel(float* y, int64_t n) {
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) y[i] *= FACTOR;
}
void scale(opkit::Tensor y) {
  scale_kernel<<<1, 256, 0, opkit::stream()>>>(y.data<float>(), y.numel());
  OPKIT_CUDA_CHECK(cudaGetLastError());
}
"""


@needs_nvcc
def test_a_cuda_unit_compiles_without_a_gpu_and_sees_headers_of_every_architecture(
    tmp_path, monkeypatch, steps
):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0")  # preprocessing alone sees the first
    source, header = tmp_path / "k.cu", tmp_path / "new.cuh"
    source.write_text(KERNEL)
    (tmp_path / "factor.cuh").write_text(
        '#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900\n#include "new.cuh"\n#else\n#define FACTOR 2.f\n#endif\n'
    )
    header.write_text("#define FACTOR 3.f\n")
    library = shared_library(unit_of(source), label="f [cuda]", cuda=True)
    needed = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True).stdout
    assert "libtorch_cuda.so" in needed
    assert "libcudart" not in needed
    assert shared_library(unit_of(source), label="f [cuda]", cuda=True) == library
    header.write_text("#define FACTOR 4.f\n")
    assert shared_library(unit_of(source), label="f [cuda]", cuda=True) != library
    assert len(steps) == 2


@needs_nvcc
def test_an_error_of_nvcc_is_on_the_users_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    source = tmp_path / "k.cu"
    source.write_text("__global__ void k(float* y) {\n  y[0] = bar;\n}\n")
    with pytest.raises(BuildError) as caught:
        shared_library(unit_of(source), label="f [cuda]", cuda=True)
    lines = str(caught.value).splitlines()
    assert lines[0] == f'building f [cuda]: 1 error, at {source}:2: identifier "bar" is undefined'
    assert "y[0] = bar;" in lines[2]
    assert "^" in lines[3]


def test_stub_libraries_are_built_once(cache_dir):
    cxx = toolchain.get_cxx()
    folder = compile.stub_libraries(cxx, ("libtorch_cpu.so", "libtorch_cuda.so"))
    assert sorted(path.name for path in folder.glob("*.so")) == ["libtorch_cpu.so", "libtorch_cuda.so"]
    assert compile.stub_libraries(cxx, ("libtorch_cpu.so", "libtorch_cuda.so")) == folder
    assert folder.parent == cache.root() / "lib"
