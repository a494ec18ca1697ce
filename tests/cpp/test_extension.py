from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opkit import _config
from opkit.cpp import _aten, _jobs, _ninja, compilers, extension
from opkit.cpp._progress import Progress
from opkit.cpp.extension import load_inline
from opkit.errors import BuildError, ConfigError

pytestmark = pytest.mark.skipif(
    compilers.find_cxx() is None or compilers.find_ninja() is None, reason="needs a C++ compiler and ninja"
)
needs_nvcc = pytest.mark.skipif(compilers.find_nvcc() is None, reason="needs nvcc")

# Sources without torch's headers are quick to build; this file is about those that have them.
load = functools.partial(extension.load, tier="aten")
build = functools.partial(extension.build, tier="aten")

SOURCES = Path(__file__).parent / "sources"  # as others write them

# Python.h alone builds in a second; pybind11 takes five, torch/extension.h forty.
MODULE = """
#include <Python.h>
#include "value.h"
static PyObject* value(PyObject*, PyObject*) { return PyLong_FromLong(VALUE); }
static PyMethodDef methods[] = {{"value", value, METH_NOARGS, ""}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "", nullptr, -1, methods};
#define CONCAT(a, b) a##b
#define INIT(name) CONCAT(PyInit_, name)
PyMODINIT_FUNC INIT(TORCH_EXTENSION_NAME)() { return PyModule_Create(&module); }
"""


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("OPKIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("MAX_JOBS", raising=False)
    _config.refresh()
    yield tmp_path / "cache"
    _config.refresh()


@pytest.fixture
def runs(monkeypatch):
    """Every run of ninja."""
    seen = []
    run = _ninja.Build._run_ninja
    monkeypatch.setattr(
        _ninja.Build, "_run_ninja", lambda self, *args: seen.append(self.job.name) or run(self, *args)
    )
    return seen


@pytest.fixture
def source(tmp_path):
    """A module whose function gives what `value.h` beside it says."""
    path = tmp_path / "k.cpp"
    path.write_text(MODULE)
    (tmp_path / "value.h").write_text("#define VALUE 1\n")
    return path


def test_load_builds_once_and_a_hit_runs_and_prints_nothing(source, runs, capfd):
    module = load("valued", source)
    assert module.value() == 1
    assert (module.__name__, Path(module.__file__).name) == ("valued", "valued.so")
    assert "opkit: built valued [cpp] in " in capfd.readouterr().err
    assert load("valued", [str(source)]) is module
    assert capfd.readouterr() == ("", "")
    assert runs == ["valued"]


def test_two_contents_under_one_name_are_two_modules(source, runs):
    first = load("valued", source)
    (source.parent / "value.h").write_text("#define VALUE 2\n")
    second = load("valued", source)
    assert (first.value(), second.value()) == (1, 2)
    assert runs == ["valued", "valued"]


def test_two_pybind_modules_under_one_name_are_two_modules():
    # pybind11 3 keeps modules by their spec's name; torch bundles it.
    text = "#include <pybind11/pybind11.h>\nstruct S {{}};\nint f() {{ return {}; }}\n"
    options = {"functions": ["f"], "no_implicit_headers": True, "with_pytorch_error_handling": False}
    first, second = (load_inline("same", text.format(i), extra_cflags=["-O0"], **options) for i in (1, 2))
    assert (first.f(), second.f()) == (1, 2)
    assert first.f.__doc__.endswith("f\n")


def test_arguments_stay_as_they_are(source):
    lists = [["-DX=1"], ["-lpthread"], [str(source.parent)], [str(source)]]
    before = [list(values) for values in lists]
    load("valued", lists[3], extra_cflags=lists[0], extra_ldflags=lists[1], extra_include_paths=lists[2])
    assert lists == before


def test_flags_are_part_of_the_key_and_folders_are_not(source, runs, tmp_path):
    one = build("valued", source)
    assert build("valued", source, extra_cflags=["-DY=2"]) != one
    copy = tmp_path / "copy" / "k.cpp"
    copy.parent.mkdir()
    copy.write_text(source.read_text())
    (copy.parent / "value.h").write_text((source.parent / "value.h").read_text())
    assert build("valued", copy) == one
    assert len(runs) == 2


def test_the_default_is_optimized_and_the_callers_flags_win(source):
    text = "int level() {\n#if defined(__OPTIMIZE__) && defined(NDEBUG)\n return 1;\n#else\n#error plain\n#endif\n}\n"
    assert build("optimized", text).exists()
    with pytest.raises(BuildError, match="plain"):
        build("optimized", text, extra_cflags=["-O0"])


def test_computed_includes_are_part_of_the_key(tmp_path, runs):
    (tmp_path / "value.h").write_text("#define VALUE 1\n")
    source = tmp_path / "k.cpp"
    source.write_text('#define HEADER "value.h"\n#include HEADER\nint f() { return VALUE; }\n')
    first = build("computed", source)
    assert build("computed", source) == first
    (tmp_path / "value.h").write_text("#define VALUE 2\n")
    assert build("computed", source) != first


def test_a_failed_build_is_tried_again(source, runs):
    header = source.parent / "value.h"
    header.write_text("#define VALUE nothing\n")
    for _ in range(2):
        with pytest.raises(BuildError) as caught:
            load("valued", source)
        lines = str(caught.value).splitlines()
        assert lines[0].startswith(f"building valued [cpp]: 1 error, at {header}:1: ")
        assert "nothing" in lines[0]
        assert "-c " + str(source) in caught.value.command
        assert caught.value.command not in str(caught.value)
        assert caught.value.log_path.exists()
    assert len(runs) == 2
    repeated = subprocess.run(
        ["sh", str(caught.value.log_path.parent / "command.sh")], capture_output=True, text=True
    )
    assert repeated.returncode != 0
    assert "nothing" in repeated.stdout
    header.write_text("#define VALUE 3\n")
    assert load("valued", source).value() == 3


def test_an_error_in_a_text_is_on_its_own_line(cache_dir):
    with pytest.raises(BuildError) as caught:
        load_inline("inline", "\n\nint f() { return foo; }\n", no_implicit_headers=True)
    kept = next((cache_dir / "failed").iterdir())
    assert str(caught.value).startswith(f"building inline [cpp]: 1 error, at {kept / 'inline_0.cpp'}:3: ")
    assert (kept / "inline_0.cpp").read_text() == "\n\nint f() { return foo; }\n"


def test_sources_of_one_name_in_two_folders(tmp_path):
    for i, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "own.h").write_text(f"#define OWN {i}\n")
        (tmp_path / folder / "k.cpp").write_text(f'#include "own.h"\nint f_{folder}() {{ return OWN; }}\n')
    library = build("both", [tmp_path / "a" / "k.cpp", tmp_path / "b" / "k.cpp"])
    symbols = subprocess.run(["nm", "-DC", str(library)], capture_output=True, text=True).stdout
    assert "f_a()" in symbols
    assert "f_b()" in symbols


def test_processes_with_one_name_and_different_sources_run_their_own_code(source, cache_dir):
    code = "import sys; from opkit.cpp import load; print(load('valued', sys.argv[1], tier='aten').value())"
    environment = {**os.environ, "OPKIT_CACHE_DIR": str(cache_dir), "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = []
    for value in (1, 2, 2):
        mine = cache_dir.parent / f"v{value}.cpp"
        mine.write_text(source.read_text().replace("VALUE);", f"{value});"))
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", code, str(mine)], env=environment, text=True, stdout=-1, stderr=-1
            )
        )
    outputs = [process.communicate() for process in processes]
    assert [out for out, _ in outputs] == ["1\n", "2\n", "2\n"]
    assert sum(err.count("opkit: built") for _, err in outputs) == 2


def test_a_library_of_ops_is_loaded_into_torch_and_its_path_returned():
    text = """
    #include <torch/library.h>
    int64_t twice(int64_t n) { return 2 * n; }
    TORCH_LIBRARY(opkit_extension_test, m) { m.def("twice(int n) -> int", &twice); }
    """
    options = {"is_python_module": False, "extra_cflags": ["-O0"]}
    path = load("ops", text, **options)
    assert isinstance(path, str)
    assert torch.ops.opkit_extension_test.twice(21) == 42
    assert load("ops", text, **options) == path
    with pytest.raises(
        BuildError, match=r"TORCH_LIBRARY\(opkit_extension_test,.* is already loaded.*Restart"
    ):
        extension._open(*_other_content(text), False)


def _other_content(text):
    return _job("ops", text + "//"), Path("elsewhere.so")


def _job(name, sources, **flags):
    options = ("extra_cflags", "extra_cuda_cflags", "extra_ldflags", "extra_include_paths", "with_cuda")
    return _aten.Job.of(name, sources, *map(flags.get, options), False, is_module=False)


def test_a_module_without_its_entry_point_says_what_to_write(source):
    with pytest.raises(
        BuildError,
        match=r"loading plain \[cpp\].*PYBIND11_MODULE\(TORCH_.*is_python_module",
    ):
        load("plain", "int f() {\n return 1; }\n")


def test_a_missing_symbol_says_which(source):
    text = (
        source.read_text()
        .replace("VALUE);", "elsewhere());")
        .replace("static PyObject*", "int elsewhere();\nstatic PyObject*", 1)
    )
    with pytest.raises(BuildError, match=r"loading lacking \[cpp\].*elsewhere.*extra_ldflags"):
        load("lacking", text, extra_include_paths=[source.parent])


def test_arguments_that_cannot_be(tmp_path):
    with pytest.raises(BuildError, match="its name is 'my-ops'; expected a Python name"):
        load("my-ops", "int x;\n")
    with pytest.raises(
        BuildError,
        match="source 'nowhere.cpp' is no file in .*text, which has a newline",
    ):
        load("f", "nowhere.cpp")
    with pytest.raises(BuildError, match="building f: it has no sources"):
        load("f", [])
    (tmp_path / "k.cu").write_text("")
    with pytest.raises(BuildError, match="CUDA sources and with_cuda=False.*Leave with_cuda out"):
        build("f", tmp_path / "k.cu", with_cuda=False)


def test_sources_that_cannot_be(tmp_path):
    (tmp_path / "k.txt").write_text("int x;\n")
    with pytest.raises(BuildError, match=r"k.txt' has the suffix '.txt'; expected one of .cpp, .*Name the C"):
        build("f", tmp_path / "k.txt")
    with pytest.raises(
        BuildError, match="its name is 3; expected a Python name, such as 'fast_ops'. Rename it"
    ):
        load(3, "int x;\n")
    with pytest.raises(BuildError, match="its name is 3; expected a Python name"):
        load_inline(3, "int x;\n")
    for sources in (b"int x;\n", [b"int x;\n"], 3, None):
        with pytest.raises(
            BuildError,
            match="building f: it has the source .*, of type .*; expected a path or a source text.*as a str",
        ):
            load("f", sources)
    with pytest.raises(
        BuildError, match=r"cpp_sources is 3; expected a list of source texts. Write cpp_sources=\["
    ):
        load_inline("f", 3)
    with pytest.raises(
        BuildError, match="cuda_sources has the entry b'', of type bytes; expected a list of source"
    ):
        load_inline("f", "int x;", cuda_sources=[b""])
    with pytest.raises(BuildError, match="functions has the entry 3, of type int; expected"):
        load_inline("f", "int x;", functions=[3])


@pytest.mark.parametrize("function", [extension.load, load_inline, extension.build])
@pytest.mark.parametrize(
    "name", ["extra_cflags", "extra_cuda_cflags", "extra_ldflags", "extra_include_paths"]
)
def test_a_text_for_a_list_is_refused(function, name):
    with pytest.raises(
        BuildError, match=rf"^building f: {name} is '-O1'; expected a list of .*Write {name}=\['-O1'\]\.$"
    ):
        function("f", "int x;\n", **{name: "-O1"})


def test_a_function_to_export_that_is_not_there_is_named():
    text = "#include <pybind11/pybind11.h>\nint f() { return 1; }\n"
    options = {"no_implicit_headers": True, "with_pytorch_error_handling": False, "extra_cflags": ["-O0"]}
    with pytest.raises(BuildError) as caught:
        load_inline("exporting", text, functions=["f", "missing"], **options)
    assert str(caught.value).startswith(
        "building exporting [cpp]: 1 error, at functions= of load_inline:2: 'missing' was not declared"
    )
    assert str(caught.value).endswith(
        "\nfunctions= names 'missing'; expected functions that cpp_sources declare or define, those of "
        "cuda_sources too. Correct the name, or declare the function in cpp_sources."
    )
    assert caught.value.log_path.exists()
    assert caught.value.command


def test_max_jobs_must_be_a_number(monkeypatch, source):
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(ConfigError, match="MAX_JOBS: found 'many'.*MAX_JOBS=2"):
        load("valued", source)


def test_cuda_of_another_major_version_than_torchs_is_refused(monkeypatch, tmp_path):
    (tmp_path / "k.cu").write_text("")
    nvcc = compilers.Compiler(tmp_path / "nvcc", "Cuda compilation tools, release 12.8, V12.8.61", ("nvcc",))
    monkeypatch.setattr(compilers, "get_nvcc", lambda: nvcc)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(
        BuildError,
        match=r"building f: nvcc is of CUDA 12.8 .* of CUDA 13.0; expected one major .*Set CUDA_HOME",
    ):
        build("f", tmp_path / "k.cu")
    for version in ("12.4", None):  # another minor version, a torch for the CPU
        monkeypatch.setattr(torch.version, "cuda", version)
        assert _job("f", tmp_path / "k.cu").nvcc == nvcc


def test_a_missing_header_says_where_folders_are_named(tmp_path):
    with pytest.raises(
        BuildError, match=r"(?s)1 error, at .*:1: nowhere.h.*Name the folder that has nowhere.h in"
    ):
        build("f", '#include "nowhere.h"\n')


def test_build_directory_gets_a_copy_and_the_cached_one_is_loaded(source, tmp_path):
    first = load("valued", source, build_directory=tmp_path / "out")
    assert (tmp_path / "out" / "valued.so").read_bytes() == Path(first.__file__).read_bytes()
    (source.parent / "value.h").write_text("#define VALUE 2\n")
    second = load("valued", source, build_directory=str(tmp_path / "out"))
    assert (first.value(), second.value()) == (1, 2)
    assert (tmp_path / "out" / "valued.so").read_bytes() == Path(second.__file__).read_bytes()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["valued.so"]
    (tmp_path / "file").write_text("")
    with pytest.raises(
        BuildError, match=r"building valued \[cpp\]: its library cannot be put into build_directory"
    ):
        load("valued", source, build_directory=tmp_path / "file")


def test_compile_commands_name_each_source_once(source, tmp_path):
    other = tmp_path / "more" / "k.cpp"  # of the same name: a stand-in is compiled
    other.parent.mkdir()
    other.write_text("int other;\n")
    job = _job("f", [source, other, "int text;\n"], extra_cflags=["-DMINE=1"])
    first, second = job.compile_commands()
    assert [first["file"], second["file"]] == [str(source), str(other)]
    for entry in (first, second):
        assert entry["arguments"][0] == compilers.get_cxx().command[0]
        assert {"-DMINE=1", entry["file"]} <= set(entry["arguments"])
        assert [
            flag for flag in entry["arguments"] if flag.startswith("-std=c++")
        ]  # which one is torch's choice
        command = [*entry["arguments"], "-fsyntax-only"]
        assert subprocess.run(command, cwd=entry["directory"]).returncode == 0
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "k.cpp",
        "k.cpp",
        "value.h",
    ]


def test_jobs_are_bounded_by_cores_and_memory(monkeypatch, source):
    asked = []
    monkeypatch.setattr(_ninja._jobs, "limit", lambda memory_each: asked.append(memory_each) or 3)
    commands = []
    run = _ninja.Build._run_ninja
    monkeypatch.setattr(
        _ninja.Build,
        "_run_ninja",
        lambda self, command, *args: commands.append(command) or run(self, command, *args),
    )
    build("valued", source)
    assert asked == [_jobs.CXX_MEMORY]
    assert commands[0][-2:] == ["-j", "3"]


def test_the_steps_of_ninja_are_shown(source, monkeypatch):
    steps = []
    monkeypatch.setattr(Progress, "step", lambda self, done, of=None: steps.append((done, of)))
    build("valued", source)
    assert steps == [(1, 2), (2, 2)]


def test_rocm_is_refused_in_one_sentence(monkeypatch, tmp_path):
    (tmp_path / "k.cu").write_text("")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(BuildError, match="this torch is for ROCm.*Use torch.utils.cpp_extension.load"):
        build("f", tmp_path / "k.cu")


def test_cuda_without_nvcc_says_what_to_install(monkeypatch, tmp_path):
    (tmp_path / "k.cu").write_text("")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(BuildError, match="nvcc.*Install the CUDA toolkit"):
        build("f", tmp_path / "k.cu")


def test_a_torch_without_setuptools_says_what_to_install(monkeypatch, source):
    monkeypatch.setitem(sys.modules, "torch.utils.cpp_extension", None)
    monkeypatch.delattr(torch.utils, "cpp_extension", raising=False)
    with pytest.raises(BuildError, match="pip install setuptools"):
        build("valued", source)


def test_verbose_shows_what_ninja_runs(source, capfd):
    load("valued", source, verbose=True)
    assert "k.cpp -o k.o" in capfd.readouterr().err


@needs_nvcc
def test_build_compiles_and_links_cuda_without_a_gpu(tmp_path, monkeypatch, runs):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    from torch.utils import cpp_extension

    before = cpp_extension.CUDA_HOME
    header, source = tmp_path / "value.cuh", tmp_path / "k.cu"
    source.write_text('#include "value.cuh"\n__global__ void k(float* y) { y[0] = VALUE; }\n')
    header.write_text("#define VALUE 1.f\n")
    first = build("cuda_only", [source])
    assert build("cuda_only", [source]) == first
    header.write_text("#define VALUE 2.f\n")
    assert build("cuda_only", [source]) != first
    assert len(runs) == 2
    assert before == cpp_extension.CUDA_HOME
    if not (Path(torch.__file__).parent / "lib" / "libtorch_cuda.so").exists():
        needed = subprocess.run(["readelf", "-d", str(first)], capture_output=True, text=True).stdout
        assert "libtorch_cuda.so" in needed


def test_an_extension_in_the_style_of_extension_cpp_runs():
    module = load("_C", SOURCES / "muladd" / "muladd.cpp", extra_cflags=["-O0"])
    assert module.__name__ == "_C"
    a, b = torch.randn(5), torch.randn(5)
    assert torch.equal(torch.ops.extension_muladd.mymuladd(a, b, 2.0), a * b + 2)
    out = torch.empty(5)
    torch.ops.extension_muladd.myadd_out(a, b, out)
    assert torch.equal(out, a + b)
    with pytest.raises(RuntimeError):
        torch.ops.extension_muladd.mymuladd(a, b.double(), 2.0)


@needs_nvcc
def test_an_architecture_that_nvcc_does_not_know_says_where_it_is_set(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "2.0")
    (tmp_path / "k.cu").write_text("__global__ void k() {}\n")
    with pytest.raises(
        BuildError, match=r"(?s)Unsupported gpu architecture.*Set TORCH_CUDA_ARCH_LIST to arch"
    ):
        build("old", tmp_path / "k.cu")


@needs_nvcc
@pytest.mark.slow
def test_an_extension_of_several_files_in_c_and_cuda_builds(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    folder = SOURCES / "muladd"
    library = build("_C", [folder / "muladd.cpp", folder / "cuda" / "muladd.cu"], extra_cflags=["-O0"])
    symbols = subprocess.run(["nm", "-DC", str(library)], capture_output=True, text=True).stdout
    assert "extension_muladd::mymuladd_cpu" in symbols
    assert "extension_muladd::mymuladd_cuda" in symbols


@needs_nvcc
@pytest.mark.slow
def test_the_vector_add_of_tutorials_builds_and_runs_on_a_gpu(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    library = build("vector_add", SOURCES / "vector_add.cu")
    symbols = subprocess.run(["nm", "-D", str(library)], capture_output=True, text=True).stdout
    assert "PyInit_vector_add" in symbols
    if not torch.cuda.is_available():
        pytest.skip("it was built; running it needs a GPU")
    a, b = torch.randn(2, 1000, device="cuda", dtype=torch.float64)
    assert torch.equal(load("vector_add", SOURCES / "vector_add.cu").vector_add(a, b), a + b)


@needs_nvcc
def test_an_error_in_a_cu_source_is_on_its_line(tmp_path):
    source = tmp_path / "k.cu"
    source.write_text("__global__ void k(float* y) {\n  y[0] = bar;\n}\n")
    with pytest.raises(BuildError) as caught:
        build("cuda_wrong", source)
    assert str(caught.value).splitlines()[0] == (
        f'building cuda_wrong [cuda]: 1 error, at {source}:2: identifier "bar" is undefined'
    )


@pytest.mark.slow
def test_load_inline_with_tensors():
    sources = [
        'at::Tensor twice(at::Tensor x) {\n  TORCH_CHECK(x.dim() == 1, "one dimension");\n  return x * 2;\n}'
    ]
    module = load_inline("doubling", sources, functions={"twice": 'Twice "x".'}, extra_cflags=["-O0"])
    assert len(sources) == 1
    assert torch.equal(module.twice(torch.ones(3)), torch.full((3,), 2.0))
    assert 'Twice "x".' in module.twice.__doc__
    with pytest.raises(RuntimeError, match="one dimension"):
        module.twice(torch.ones(3, 3))


def test_importing_the_package_compiles_nothing_and_looks_for_no_compiler(cache_dir):
    code = "import subprocess, torch; subprocess.Popen = None"  # newer torch runs ldconfig as it is imported
    code += "; import opkit.cpp; print(sorted(opkit.cpp.__all__))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "['Toolchain', 'build', 'kernel', 'load', 'load_inline', 'register_toolchain']\n", (
        done.stderr
    )
    assert {path.name for path in cache_dir.glob("*")} <= {
        "plugins"
    }  # torch has asked for devices of plugins
