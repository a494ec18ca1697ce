from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import os
import re
import shutil
import struct
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch
from setuptools import Distribution

import opkit
from opkit.cpp import compilers
from opkit.cpp.setuptools import Extension, kernels

pytestmark = [
    pytest.mark.usefixtures("registry"),
    pytest.mark.skipif(compilers.find_cxx() is None, reason="needs a C++ compiler"),
]

ROOT = Path(opkit.__file__).parent.parent
EXAMPLE = ROOT / "examples" / "11_prebuilt_package"
OTHER_PYTHON = os.environ.get("OPKIT_TEST_OTHER_PYTHON")
NOTHING = {"PATH": "", "CXX": "/nonexistent/g++", "CUDA_HOME": "/nonexistent"}  # no compiler is found

# ---------------------------------------------------------------- a package from wheel to call


def run(command: list[str | Path], **variables: str) -> str:
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, session_cache: Path) -> Path:
    """The wheel of the example."""
    folder = tmp_path_factory.mktemp("wheel")
    project = shutil.copytree(EXAMPLE, folder / "project")
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    # Architectures are those of users, whatever the machine that builds has; nor is bytecode in the wheel.
    variables = {
        "TORCH_CUDA_ARCH_LIST": "",
        "PYTHONDONTWRITEBYTECODE": "",
        "OPKIT_CACHE_DIR": str(session_cache),
    }
    done = subprocess.run(
        [sys.executable, "-c", build, folder],
        cwd=project,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel installed, which finds torch and opkit in this one."""
    folder = tmp_path_factory.mktemp("clean")
    run([sys.executable, "-m", "venv", "--without-pip", folder])
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    run([*pip, "install", "--quiet", "--no-index", "--no-deps", wheel])
    (site,) = folder.glob("lib/python*/site-packages")
    here = Path(torch.__file__).parent.parent
    site.joinpath("here.pth").write_text(f"import site; site.addsitedir({str(here)!r})\n{ROOT}\n")
    return python


CALL = """
import torch, opkit_scan, opkit
a, x = torch.rand(4, 9, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
with opkit.use_backend("cpp", strict=True):
    torch.testing.assert_close(opkit_scan.linear_scan(a, x), opkit_scan.linear_scan.reference(a, x))
loaded = {line.split()[-1] for line in open("/proc/self/maps") if "_opkit/" in line}
print(opkit_scan.__file__, *loaded, sep="\\n")
"""


def test_wheel_is_for_every_python_and_has_what_it_needs(wheel: Path) -> None:
    assert re.fullmatch(r"opkit_scan-1\.0-py3-none-linux_\w+\.whl", wheel.name)
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        f"opkit_scan/{name}" for name in ("__init__.py", "linear_scan.cpp", "linear_scan.cu", "step.h")
    } <= names
    built = [name for name in names if "_opkit/" in name]
    assert (
        len([name for name in built if re.fullmatch(r"opkit_scan/_opkit/scan-linear-cpp-\w{32}\.so", name)])
        == 1
    )
    assert sorted(Path(name).suffix for name in built) == sorted([".so", ".json"] * (len(built) // 2))
    assert not [name for name in names if name.endswith(".pyc")]


def test_installed_wheel_runs_where_there_is_no_compiler(clean_python: Path, tmp_path: Path) -> None:
    package, library = run([clean_python, "-c", CALL], OPKIT_CACHE_DIR=str(tmp_path), **NOTHING).split()
    assert str(clean_python.parent.parent) in package
    assert Path(library).parent == Path(package).parent / "_opkit"
    assert not (tmp_path / "lib").exists()


@pytest.mark.skipif(not OTHER_PYTHON, reason="OPKIT_TEST_OTHER_PYTHON names no Python with another torch")
def test_wheel_runs_on_another_torch(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    printed = run(
        [OTHER_PYTHON, "-c", CALL], PYTHONPATH=path, OPKIT_CACHE_DIR=str(tmp_path / "cache"), **NOTHING
    )
    assert len(printed.split()) == 2


def device_code(library: bytes) -> set[tuple[str, int]]:
    """What a library has for GPUs, from the headers that nvcc puts before each piece."""
    found, place = set(), 0
    while (place := library.find(struct.pack("<I", 0xBA55ED50), place)) >= 0:
        _, _, header, size = struct.unpack_from("<IHHQ", library, place)
        at, end = place + header, place + header + size
        while at < end:
            kind, _, header, size = struct.unpack_from("<HHIQ", library, at)
            found.add(({1: "ptx", 2: "cubin"}[kind], struct.unpack_from("<I", library, at + 28)[0]))
            at += header + size
        place = end
    return found


@pytest.mark.skipif(compilers.find_nvcc() is None, reason="needs nvcc")
def test_wheel_has_device_code_for_the_default_architectures(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = [n for n in archive.namelist() if re.search(r"scan-linear-cuda-\w+\.so$", n)]
    assert device_code(archive.read(name)) == {("cubin", 80), ("cubin", 90), ("ptx", 90)}
    told = json.loads(archive.read(name.replace(".so", ".json")))
    assert told["architectures"] == ["8.0", "9.0+PTX"]
    assert told["libraries"] == []  # CUDA's runtime is inside


# ---------------------------------------------------------------- what is built, in this process

numbers = itertools.count()
OP = """
import torch, opkit
from torch import Tensor
@opkit.op("t::f{n}", shapes="*b -> *b")
def f(x: Tensor) -> Tensor:
    return x + 1
"""
REGISTER = 'f.register_kernel("cpu", opkit.cpp.kernel("f.cpp", symbol="f"{options}), backend="cpp")\n'
LIGHT = """
#include <opkit/kernel.h>
void f(opkit::Tensor x, opkit::Tensor y) { OPKIT_CHECK(x.numel() >= 0, "less than nothing"); }
"""


class Project:
    """A package with one op, in a folder."""

    def __init__(self, folder: Path, source: str) -> None:
        self.folder, self.package = folder, f"pkg{next(numbers)}"
        self.write("f.cpp", source)
        self.init(REGISTER.format(options=""))

    def write(self, name: str, text: str) -> None:
        path = self.folder / "src" / self.package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def init(self, text: str) -> None:
        self.write("__init__.py", f"{OP.format(n=self.package)}{text}")

    def distribution(self, **options) -> Distribution:
        options.setdefault("modules", [self.package])
        return Distribution(
            {
                "name": self.package,
                "script_name": "setup.py",
                "packages": [self.package],
                "package_dir": {"": "src"},
                **kernels(**options),
            }
        )

    def build(self, *, debug: bool = False, **options) -> list[Path]:
        """What is beside the sources afterwards."""
        distribution = self.distribution(**options)
        distribution.get_command_obj("build_ext").debug = debug
        distribution.run_command("build")
        return sorted(self.folder.glob(f"build/lib*/{self.package}/_opkit/*.so"))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Returns a function that makes a package with one kernel; its modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield lambda source=LIGHT: Project(tmp_path, source)
    for name in set(sys.modules) - before:
        if re.match(r"pkg\d+", name):
            del sys.modules[name]


def readelf(*arguments: str | Path) -> str:
    return subprocess.run(
        ["readelf", "--wide", *arguments], capture_output=True, text=True, check=True
    ).stdout


def found(made: Project) -> Path:
    """Where the kernel of a package comes from, after its build has imported it."""
    (path,) = opkit.get(f"t::f{made.package}").build()
    return path


def test_library_is_found_by_the_source_that_it_was_built_from(project) -> None:
    made = project()
    (library,) = made.build()
    assert found(made) == library
    source = library.parent.parent / "f.cpp"
    source.write_text(source.read_text() + "// edited\n")
    assert library.parent not in found(made).parents


def test_library_does_not_depend_on_how_it_was_compiled(project, monkeypatch: pytest.MonkeyPatch) -> None:
    made = project()
    (library,) = made.build(mode="debug")
    for name, value in NOTHING.items():
        monkeypatch.setenv(name, value)
    op = opkit.get(f"t::f{made.package}")
    assert found(made) == library
    assert op.explain(torch.ones(2)).selected == "cpp"


def test_damaged_library_is_compiled_again(project) -> None:
    made = project()
    (library,) = made.build()
    library.write_bytes(library.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="its content is not what was installed"):
        assert library.parent not in found(made).parents


def test_library_looks_beside_itself_for_others(project) -> None:
    (library,) = project().build()
    assert "[$ORIGIN]" in readelf("--dynamic", library)


@pytest.mark.parametrize(
    ("options", "variables", "flag"),
    [
        ({}, {}, None),
        ({"mode": "debug"}, {}, "-O0"),
        ({"mode": "release-with-debug-info"}, {}, "-O3"),
        ({"debug": True}, {}, "-O0"),  # build_ext --debug
        ({}, {"DEBUG": "1"}, "-O0"),
        ({}, {"DEBUG": "0"}, None),
        ({}, {"REL_WITH_DEB_INFO": "1"}, "-O3"),
    ],
)
def test_mode_says_how_kernels_are_compiled(project, monkeypatch, options, variables, flag) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (library,) = project().build(**options)
    information = readelf("--debug-dump=info", library)
    if flag is None:
        assert "DW_AT_producer" not in information
    else:
        producer = re.search("DW_AT_producer.*", information)
        assert re.findall(r" (-O\d)", producer[0])[-1] == flag


@pytest.mark.parametrize(
    ("register", "options", "reason"),
    [
        (REGISTER.format(options=', extra_cflags=["-march=native"]'), {}, "its flags ask for the processor"),
        (
            'f.register_kernel("cpu", opkit.cpp.kernel("void f(){}\\n"), backend="cpp")',
            {},
            "its source is a text",
        ),
        (REGISTER.format(options=', tier="aten"'), {}, "it is of the aten tier, and so for one torch alone"),
        (REGISTER.format(options=", cuda=True"), {"cuda": False}, "cuda=False"),
    ],
    ids=["native", "text", "aten", "cuda"],
)
def test_kernel_that_does_not_travel_is_left_out_and_said(project, caplog, register, options, reason) -> None:
    made = project()
    made.init(register)
    with caplog.at_level(logging.INFO):
        assert made.build(**options) == []
    assert f"opkit: t::f{made.package} [cpp] is left to the machine that runs it: {reason}" in caplog.text


def test_cuda_kernels_are_left_out_without_nvcc_unless_demanded(project, caplog, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    made = project()
    made.init(REGISTER.format(options=", cuda=True"))
    with caplog.at_level(logging.INFO):
        assert made.build() == []
    assert "is left to the machine that runs it: CUDA_HOME is '/nonexistent'" in caplog.text
    demanding = project()
    demanding.init(REGISTER.format(options=", cuda=True"))
    with pytest.raises(opkit.BuildError, match="nvcc"):
        demanding.build(cuda=True)


def test_stable_kernel_is_built_for_torch_2_10(project, caplog) -> None:
    made = project(
        """
        #include <torch/csrc/stable/tensor.h>
        using torch::stable::Tensor;
        Tensor f(Tensor x) { return x; }
        """
    )
    with caplog.at_level(logging.INFO):
        assert len(made.build()) == 1
    assert re.search(rf"opkit: t::f{made.package} \[cpp\]: \d+ KiB, needs torch 2\.10, .*GLIBC", caplog.text)


def test_failing_audit_ends_the_build(project) -> None:
    made = project(
        f"namespace at {{ void relu(int); }}\n{LIGHT}\nvoid g() {{ at::relu(1); }}\nvoid (*use)() = g;"
    )
    made.write("f.cpp", (made.folder / "src" / made.package / "f.cpp").read_text().replace("less", "less"))
    with pytest.raises(
        opkit.BuildError, match=r"auditing t::f.* \[cpp\]: it calls at::relu\(int\), of torch's C\+\+"
    ):
        made.build()


def test_function_of_a_plugin_is_called(project) -> None:
    made = project()
    made.init("")
    made.write(
        "plugin.py",
        f"""
import opkit
def register(registry):
    source = opkit.cpp.kernel("f.cpp", symbol="f")
    registry.register_kernel("t::f{made.package}", "cpu", source, backend="b")
""",
    )
    (library,) = made.build(modules=[made.package, f"{made.package}.plugin:register"])
    assert library.name.startswith(f"t-f{made.package}-b-")


def test_old_libraries_are_gone_from_the_next_build(project) -> None:
    made = project()
    (first,) = made.build()
    opkit._registry.remove(f"t::f{made.package}")
    del sys.modules[made.package]
    made.write("f.cpp", f"{LIGHT}// edited\n")
    (second,) = made.build()
    assert first.name != second.name


def test_editable_install_builds_nothing(project) -> None:
    made = project()
    command = made.distribution().get_command_obj("build_ext")
    command.editable_mode = True
    command.ensure_finalized()
    command.run()
    assert not list(made.folder.rglob("*.so"))
    assert made.package not in sys.modules


def test_source_distribution_has_the_native_sources(project) -> None:
    made = project()
    made.write("include/deep.cuh", "")
    command = made.distribution().get_command_obj("build_ext")
    command.ensure_finalized()
    sources = {Path(name).as_posix() for name in command.get_source_files()}
    assert sources == {f"src/{made.package}/f.cpp", f"src/{made.package}/include/deep.cuh"}


# ---------------------------------------------------------------- extensions with torch's headers

MODULE = """
#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
"""


def test_extension_is_built_by_torch_for_this_python(project) -> None:
    made = project()
    made.write("_C.cpp", MODULE)
    made.init("")
    extension = Extension(f"{made.package}._C", [f"src/{made.package}/_C.cpp"])
    distribution = made.distribution(extensions=[extension], mode="debug")
    distribution.run_command("build")
    (library,) = made.folder.glob(f"build/lib*/{made.package}/_C.*.so")
    assert "[$ORIGIN]" in readelf("--dynamic", library)
    assert re.search("DW_AT_producer.* -O0", readelf("--debug-dump=info", library))
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    wheel = distribution.get_command_obj("bdist_wheel")
    wheel.ensure_finalized()
    assert wheel.get_tag()[:2] == (tag, tag)


def test_extension_refuses_flags_that_are_no_list() -> None:
    with pytest.raises(
        opkit.BuildError, match="naming the extension p._C: extra_cflags is '-O3'; expected a list"
    ):
        Extension("p._C", ["a.cpp"], extra_cflags="-O3")


# ---------------------------------------------------------------- errors


def test_modules_are_demanded() -> None:
    with pytest.raises(
        opkit.BuildError, match="preparing a package with kernels: modules is empty; expected those"
    ):
        kernels([])


def test_unknown_mode_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        opkit.BuildError,
        match="found mode='debugging'; expected one of release, debug, .*. Did you mean 'debug'?",
    ):
        kernels(["p"], mode="debugging")


def test_old_setuptools_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "setuptools.command.bdist_wheel", None)
    spec = importlib.util.spec_from_file_location("t_setuptools", opkit.cpp.setuptools.__file__)
    with pytest.raises(
        opkit.BuildError, match=r"setuptools is \d.*; expected 70.1 or newer, .* requires = \['setup"
    ):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_module_from_elsewhere_is_refused(project) -> None:
    made = project()
    with pytest.raises(
        opkit.BuildError, match=r"building the kernels of json: it is imported from .*json.*expected it in"
    ):
        made.build(modules=["json"])


def test_missing_torch_is_said_in_one_sentence(project, monkeypatch: pytest.MonkeyPatch) -> None:
    made = project()
    with monkeypatch.context() as patch, pytest.raises(opkit.BuildError) as caught:
        patch.setitem(sys.modules, "torch", None)
        made.build()
    text = str(caught.value)
    assert text.startswith(f"building {made.package}: torch does not import here (")
    assert "pip install --no-build-isolation . or python -m build --no-isolation." in text


def test_metadata_and_sources_need_no_torch(tmp_path: Path) -> None:
    code = """
        import sys
        import opkit.cpp.setuptools
        sys.modules["torch"] = None
        from setuptools import build_meta
        folder = sys.argv[1]  # setuptools changes it
        print(build_meta.prepare_metadata_for_build_wheel(folder), build_meta.build_sdist(folder))
    """
    project = shutil.copytree(EXAMPLE, tmp_path / "project")
    command = [sys.executable, "-c", textwrap.dedent(code), tmp_path]
    subprocess.run(command, cwd=project, check=True, capture_output=True)
    assert (tmp_path / "opkit_scan-1.0.dist-info").is_dir()
    assert (tmp_path / "opkit_scan-1.0.tar.gz").is_file()
