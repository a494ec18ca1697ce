from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

import opkit
from opkit.cpp import _audit, compilers

pytestmark = pytest.mark.skipif(compilers.find_cxx() is None, reason="needs a C++ compiler")

LIBRARIES = Path(torch.__file__).parent / "lib"


@pytest.fixture
def library(tmp_path: Path):
    """Returns a function that links a text into a library, whatever that leaves undefined."""

    def make(text: str, *flags: str) -> Path:
        source, target = tmp_path / "a.cpp", tmp_path / "a.so"
        source.write_text(text)
        command = [*compilers.get_cxx().command, "-shared", "-fPIC", str(source), "-o", str(target), *flags]
        subprocess.run(command, check=True)
        return target

    return make


def refusal(path: Path, **kwargs) -> str:
    with pytest.raises(opkit.BuildError) as caught:
        _audit.audit(path, label="demo::f [cpp]", **kwargs)
    text = str(caught.value)
    assert text.startswith("auditing demo::f [cpp]: it ")
    assert text.endswith("Expected a library that loads on every torch from 2.10 and every Python.")
    return text


SHIM = """
#include <cmath>
#include <string>
extern "C" int aoti_torch_get_dim(void*, long*);
extern "C" int torch_list_size(void*, unsigned long*);
extern "C" long f(void* x, double y) {
  long n; unsigned long m; aoti_torch_get_dim(x, &n); torch_list_size(x, &m);
  return n + m + std::to_string(std::pow(y, y)).size();
}
"""


def test_audit_says_what_a_good_library_needs(library) -> None:
    found = _audit.audit(library(SHIM), label="demo::f [cpp]")
    assert found.torch == (2, 10)
    assert {"GLIBC", "GLIBCXX"} <= set(found.versions)
    assert all(part.isdigit() for part in found.versions["GLIBC"].split("."))
    assert found.libraries == ()
    assert str(found).startswith("torch 2.10, ")


def test_highest_version_counts_and_versions_are_compared_as_numbers(library, tmp_path: Path) -> None:
    old = [f"old{i}" for i in range(8)]  # so many that the last symbol in the table is one of them
    tmp_path.joinpath("versions").write_text(
        f"GLIBC_2.9 {{ global: {'; '.join(old)}; }};\nGLIBC_2.10 {{ global: late; }};\n"
    )
    names = [*old[:4], "late", *old[4:]]
    defined = "".join(f'extern "C" int {name}() {{ return 1; }} ' for name in names)
    other = library(defined, f"-Wl,--version-script={tmp_path / 'versions'}").rename(tmp_path / "libother.so")
    declared = "".join(f'extern "C" int {name}(); ' for name in names)
    calls = " + ".join(f"{name}()" for name in names)
    found = _audit.audit(library(f"{declared} int f() {{ return {calls}; }}", str(other)), label="f")
    assert found.versions["GLIBC"] == "2.10"
    assert found.libraries == (str(other),)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "namespace at { struct Tensor; void relu(const Tensor&); } void f(at::Tensor& x) { at::relu(x); }",
            "it calls at::relu(at::Tensor const&), of torch's C++ interface, which changes with every torch. Include",
        ),
        (
            "namespace c10 { void warn(int); } void f() { c10::warn(1); }",
            "it calls c10::warn(int), of torch's C++ interface",
        ),
        (
            'extern "C" void PyErr_Clear(); void f() { PyErr_Clear(); }',
            "it calls PyErr_Clear, of one version of Python",
        ),
        (
            'extern "C" int aoti_torch_get_dims(void*); int f() { return aoti_torch_get_dims(nullptr); }',
            "it calls aoti_torch_get_dims, which is not in the stable headers of this torch. Did you mean "
            "'aoti_torch_get_dim'? Call what",
        ),
        ("int g(float); int f() { return g(1); }", "it calls g(float), which nothing defines. Define it"),
    ],
    ids=["at", "c10", "python", "shim", "undefined"],
)
def test_audit_names_the_symbol_and_the_cause(library, text: str, reason: str) -> None:
    assert reason in refusal(library(text))


def test_function_newer_than_the_target_is_refused(library) -> None:
    newer = 'extern "C" int torch_from_blob(); int f() { return torch_from_blob(); }'
    assert "it calls torch_from_blob, which torch has since 2.11. Do without it" in refusal(library(newer))
    assert _audit.audit(library(newer), label="f", target=(2, 11)).torch == (2, 11)


def test_many_problems_are_counted(library) -> None:
    calls = "; ".join(f"g{i}()" for i in range(5))
    text = "".join(f"int g{i}(); " for i in range(5)) + f"void f() {{ {calls}; }}"
    assert "which nothing defines" in refusal(library(text))
    assert "(and 2 more)" in refusal(library(text))


def test_symbols_of_a_foreign_library_are_its_business(library, tmp_path: Path) -> None:
    other = library("int g(float) { return 1; }").rename(tmp_path / "libother.so")
    found = _audit.audit(library("int g(float); int f() { return g(1); }", str(other)), label="f")
    assert found.libraries == (str(other),)
    assert str(other) in str(found)


@pytest.mark.parametrize(
    ("soname", "reason"),
    [
        (
            "libcudart.so.13",
            "it is linked against libcudart.so.13, which is CUDA's runtime of one major version",
        ),
        ("libc10.so", "it is linked against libc10.so, which is torch's C++ library"),
        ("libpython3.11.so.1.0", "it is linked against libpython3.11.so.1.0, which is one version of Python"),
    ],
)
def test_library_bound_to_one_version_of_another_is_refused(
    library, tmp_path: Path, soname: str, reason: str
) -> None:
    other = library("", f"-Wl,-soname,{soname}").rename(tmp_path / "libother.so")
    assert reason in refusal(library("int f() { return 1; }", "-Wl,--no-as-needed", str(other)))


def test_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.so").write_text("nothing")
    with pytest.raises(
        opkit.BuildError, match=r"auditing f: readelf cannot read .*a.so \(.*\); expected a shared"
    ):
        _audit.audit(tmp_path / "a.so", label="f")


def test_missing_readelf_is_said(library, monkeypatch: pytest.MonkeyPatch) -> None:
    path = library("int f() { return 1; }")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(opkit.BuildError, match="auditing f: readelf does not run .*Install binutils"):
        _audit.audit(path, label="f")


def test_every_shim_function_of_this_torch_is_known() -> None:
    """The headers are read right: what torch exports is what they declare."""
    command = [
        "nm",
        "--dynamic",
        "--defined-only",
        "--format=just-symbols",
        str(LIBRARIES / "libtorch_cpu.so"),
    ]
    exported = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    shim = {name for name in exported if _audit._SHIM.fullmatch(name)}
    assert len(shim) > 300
    assert shim <= set(_audit._shim_functions())


def test_versions_of_headers_nest() -> None:
    text = """
    #if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_12_0
    int torch_late(int a); // torch_comment(
    #ifdef USE_CUDA
    int aoti_torch_cuda(
        int a);
    #endif
    #endif // TORCH_FEATURE_VERSION >= TORCH_VERSION_2_12_0
    int torch_old();
    """
    assert _audit._declared(text) == [
        ("torch_late", (2, 12)),
        ("aoti_torch_cuda", (2, 12)),
        ("torch_old", (2, 10)),
    ]
