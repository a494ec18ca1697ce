from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from opkit.cpp import _link, cache, compilers, toolchain
from opkit.cpp._unit import Unit
from opkit.cpp.compile import Job
from opkit.errors import BuildError

pytestmark = [
    pytest.mark.usefixtures("cache_dir"),
    pytest.mark.skipif(compilers.find_cxx() is None, reason="needs a C++ compiler"),
]
EXPORT = 'extern "C" __attribute__((visibility("default"))) '
needs_nvcc = pytest.mark.skipif(compilers.find_nvcc() is None, reason="needs nvcc")


@pytest.fixture
def steps(monkeypatch):
    """Every build that happens."""
    seen = []
    build = Job.build
    monkeypatch.setattr(Job, "build", lambda self, work: seen.append(self.label) or build(self, work))
    return seen


def shared_library(unit: str, *, cuda: bool = False, **kwargs) -> Path:
    used = toolchain.CUDA if cuda else toolchain.CPP
    return Job(units=(Unit(f"unit{used.suffixes[0]}", unit, used),), **kwargs).library()


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
    assert re.fullmatch(r"opkit: built f in \d\.\d s\n", err)
    assert answer(1) == 1
    assert capfd.readouterr() == ("", "")
    assert steps == ["f"]


@pytest.mark.parametrize(
    "changed",
    [{"cflags": ("-DX=1",)}, {"cflags": ("-O0",)}, {"ldflags": ("-Wl,-O1",)}],
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
        library = shared_library(unit_of(source), label="f", include_paths=(header.parent,))
        assert ctypes.CDLL(str(library)).answer() == value
    assert len(steps) == 2


def test_the_folder_of_the_source_does_not_matter(tmp_path, steps):
    libraries = []
    for folder in ("here", "there"):
        source = tmp_path / folder / "k.cpp"
        source.parent.mkdir()
        source.write_text(f"{EXPORT} const char* file() {{ return __FILE__; }}\n")
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
        libraries.add(shared_library(unit_of(source), label="f", cflags=("-g",)))
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
        library = shared_library(
            unit,
            label="f",
            ldflags=(
                f"-L{tmp_path}",
                "-lv",
            ),
        )
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
        answer(
            1,
            cflags=(
                "-fno-such-flag-here",
                "-march=nonsense",
            ),
        )
    assert "opkit: failed to build f after" in capfd.readouterr().err


def test_two_processes_at_once_give_one_library(cache_dir):
    code = (
        "from opkit.cpp import _unit, compile, toolchain\n"
        "unit = _unit.Unit('unit.cpp', 'int f() { return 1; }', toolchain.CPP)\n"
        "print(compile.Job(label='f', units=(unit,)).library())"
    )
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
        shared_library(
            unit,
            label="f",
            cflags=(
                "-I",
                str(tmp_path / folder),
            ),
        )
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
    cxx = compilers.get_cxx()
    folder = _link.stub_libraries(cxx, ("libtorch_cpu.so", "libtorch_cuda.so"))
    assert sorted(path.name for path in folder.glob("*.so")) == ["libtorch_cpu.so", "libtorch_cuda.so"]
    assert _link.stub_libraries(cxx, ("libtorch_cpu.so", "libtorch_cuda.so")) == folder
    assert folder.is_relative_to(cache.root() / "lib")


def test_a_header_that_only_the_compiler_finds_is_a_dependency(tmp_path, monkeypatch, steps):
    header = tmp_path / "value.h"
    unit = f"#define WHICH <value.h>\n#include WHICH\n{EXPORT} int answer() {{ return VALUE; }}"
    for value in (1, 22, 1):
        header.write_text(f"#define VALUE {value}\n")
        library = shared_library(unit, label="f", cflags=(f"-I{tmp_path}",))
        assert ctypes.CDLL(str(library)).answer() == value
    assert len(steps) == 2


def test_a_header_found_first_in_another_folder_is_seen(tmp_path, steps):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    (second / "value.h").write_text("#define VALUE 1\n")
    unit = f"#include <value.h>\n{EXPORT} int answer() {{ return VALUE; }}"

    def built() -> int:
        library = shared_library(unit, label="f", include_paths=(first, second))
        return ctypes.CDLL(str(library)).answer()

    assert built() == 1
    (first / "value.h").write_text("#define VALUE 2\n")
    assert built() == 2


@pytest.mark.parametrize("name", ["with space.cpp", "größe.cpp", "a'b$c.cpp"])
def test_names_with_spaces_and_other_letters(tmp_path, name, steps):
    folder = tmp_path / "mein Ordner é"
    folder.mkdir()
    source, header = folder / name, folder / "ein wert.h"
    source.write_text(f'#include "ein wert.h"\n{EXPORT} int answer() {{ return VALUE; }}')
    for value in (1, 2):
        header.write_text(f"#define VALUE {value}\n")
        library = shared_library(unit_of(source), label="größe é", include_paths=(folder,))
        assert ctypes.CDLL(str(library)).answer() == value
    source.write_text("int f() { return foo; }\n")
    with pytest.raises(BuildError, match="foo") as caught:
        shared_library(unit_of(source), label="größe é")
    assert caught.value.diagnostics[0].line == 1


def test_a_source_that_is_a_dangling_link_is_an_error(tmp_path):
    (tmp_path / "k.cpp").symlink_to(tmp_path / "gone.cpp")
    with pytest.raises(BuildError, match=r"k\.cpp: No such file"):
        shared_library(unit_of(tmp_path / "k.cpp"), label="f")


def test_a_compiler_that_crashes_is_an_error(tmp_path, monkeypatch):
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "g++ 99" && exit 0\nkill -SEGV $$\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(BuildError, match=r"building (f|stubs|a stub.*): the compiler (failed|crashed)"):
        answer(1)


def test_several_units_are_one_library_and_each_error_is_found(tmp_path):
    units = [
        Unit("one.cpp", "int one() { return 1; }", toolchain.CPP),
        Unit("two.cpp", f"int one(); {EXPORT} int answer() {{ return one() + 1; }}", toolchain.CPP),
    ]
    library = Job(label="f", units=tuple(units)).library()
    assert ctypes.CDLL(str(library)).answer() == 2
    assert sorted(path.suffix for path in library.parent.iterdir() if path.suffix in (".o", ".d")) == []
    with pytest.raises(BuildError, match=r"two\.cpp:1: .*'foo'"):
        Job(label="f", units=(units[0], Unit("two.cpp", "int f() { return foo; }", toolchain.CPP))).library()


def test_what_a_compiler_throws_away_is_in_the_builds_own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    assert answer(3) == 3


def test_native_code_is_keyed_by_the_processor(monkeypatch):
    unit = Unit("unit.cpp", "int f() { return 1; }", toolchain.CPP)
    job = Job(label="f", units=(unit,), cflags=("-march=native",))
    here = job.key()
    assert job.key() == here
    compilers._processor.cache_clear()
    monkeypatch.setattr(compilers, "_processor", lambda: "another one")
    monkeypatch.setattr(compilers, "_output", lambda command: "#define __OTHER__ 1")
    assert job.key() != here


def test_the_users_home_and_the_compilers_folder_are_in_no_key(tmp_path, monkeypatch):
    unit = Unit("unit.cpp", "int f() { return 1; }", toolchain.CPP)
    before = Job(label="f", units=(unit,)).key()
    real = compilers.get_cxx().path.resolve()
    (tmp_path / "g++").symlink_to(real)
    monkeypatch.setenv("CXX", str(tmp_path / "g++"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Job(label="f", units=(unit,)).key() == before


def test_compile_commands_are_those_of_the_users_files(tmp_path):
    source = tmp_path / "k.cpp"
    source.write_text("#include <opkit/kernel.h>\nint f() { return 1; }\n")
    unit = Unit("unit.cpp", unit_of(source), toolchain.CPP)
    (entry,) = Job(label="f", units=(unit,), cflags=("-DX=1",)).compile_commands()
    assert entry["file"] == str(source)
    assert "-DX=1" in entry["arguments"]
    done = subprocess.run([*entry["arguments"], "-fsyntax-only"], cwd=entry["directory"])
    assert done.returncode == 0


def test_verbose_shows_what_is_run(capfd):
    answer(4, verbose=True)
    assert "$ " in capfd.readouterr().err


def key_of(text: str = "int f() { return 1; }", **kwargs) -> str:
    return Job(label="f", units=(Unit("unit.cpp", text, toolchain.CPP),), **kwargs).key()


def test_flags_of_the_compilers_variable_are_part_of_the_key(monkeypatch):
    monkeypatch.setenv("CXX", "g++ -DK=1")
    before = key_of()
    monkeypatch.setenv("CXX", "g++ -DK=2")
    assert key_of() != before
    monkeypatch.setenv("CXX", "g++ -DK=1")
    assert key_of() == before


def test_a_wrapper_that_starts_another_compiler_is_another_one(tmp_path, monkeypatch):
    wrapper, real = tmp_path / "g++", tmp_path / "real"
    wrapper.write_text(f'#!/bin/sh\nexec {real} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    keys = []
    for version in (1, 2):
        real.write_text(f"#!/bin/sh\necho g++ {version}\n")
        real.chmod(0o755)
        compilers._probe.cache_clear()  # as in another process
        compilers._memory.clear()
        compilers._answers.clear()
        keys.append(key_of())
    assert keys[0] != keys[1]


@pytest.mark.parametrize("flag", ["@{}", "-Wl,--version-script={}", "-include{}"])
def test_a_file_that_a_flag_names_is_part_of_the_key(tmp_path, flag):
    file = tmp_path / "named.txt"
    keys = set()
    for text in ("-DK=1\n", "-DK=2\n"):
        file.write_text(text)
        keys.add(key_of(cflags=(flag.format(file),)))
    assert len(keys) == 2


@pytest.mark.parametrize(
    "flag", ["-march=native", "-Xcompiler=-march=native", "--compiler-options=-fPIC,-march=native"]
)
def test_native_code_is_seen_wherever_the_flag_stands(flag):
    assert compilers.native_macros(compilers.get_cxx(), [flag])


def test_a_folder_with_a_backslash_or_parentheses(tmp_path, steps):
    for name in ("b\\s", "Project (1)"):
        folder = tmp_path / name
        folder.mkdir()
        source = folder / "k.cpp"
        source.write_text(f"{EXPORT} int answer() {{ return 7; }}\n")
        library = shared_library(unit_of(source), label="f", cflags=(f"-DX{len(name)}",))
        assert ctypes.CDLL(str(library)).answer() == 7
        source.write_text("int f() { return foo; }\n")
        with pytest.raises(BuildError, match="foo") as caught:
            shared_library(unit_of(source), label="f")
        assert caught.value.diagnostics[0].file == str(source)
