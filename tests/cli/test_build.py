from __future__ import annotations

import json

import pytest

from opkit import cli
from opkit.cpp import compilers

pytestmark = pytest.mark.skipif(compilers.find_cxx() is None, reason="needs a C++ compiler")

MODULE = '''
import opkit
from torch import Tensor

@opkit.op("clibuild::plus", shapes="n -> n")
def plus(x: Tensor) -> Tensor:
    return x + 1

@opkit.op("clibuild::minus", shapes="n -> n")
def minus(x: Tensor) -> Tensor:
    return x - 1

plus.register_kernel("cpu", opkit.cpp.kernel("plus.cpp"), backend="cpp")
minus.register_kernel("cpu", opkit.cpp.kernel("""
#include <opkit/kernel.h>
void minus(opkit::Tensor x, opkit::Tensor y) {}
"""), backend="text")
'''
SOURCE = "#include <opkit/kernel.h>\nvoid plus(opkit::Tensor x, opkit::Tensor y) {}\n"


@pytest.fixture
def script(tmp_path, registry, monkeypatch):
    (tmp_path / "clibuild_ops.py").write_text(MODULE)
    (tmp_path / "plus.cpp").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "clibuild_ops", raising=False)
    return tmp_path / "clibuild_ops.py"


def build(*words: str) -> int:
    return cli.main(["build", *words])


@pytest.mark.parametrize("name", ["clibuild_ops.py", "clibuild_ops"])
def test_build_compiles_what_a_module_or_a_file_defines(script, capsys, name):
    assert build("--import", name) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" /")[0] for line in lines] == ["clibuild::minus [text]", "clibuild::plus [cpp]"]
    assert all(line.endswith(".so") for line in lines)


def test_build_takes_patterns_and_backends(script, capsys):
    assert build("--import", "clibuild_ops.py", "clibuild::*", "--backend", "cpp", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["op"], row["backend"], row["device"], row["reason"]) == ("clibuild::plus", "cpp", "cpu", "")


def test_build_shows_an_error_and_goes_on(script, capsys):
    (script.parent / "plus.cpp").write_text(SOURCE.replace("{}", "{ oops; }"))
    assert build("--import", "clibuild_ops.py") == 1
    shown = capsys.readouterr()
    assert "clibuild::minus [text] /" in shown.out
    assert "clibuild::plus [cpp] 1 error, at " in shown.err
    assert "Traceback" not in shown.err


def test_build_skips_what_has_no_compiler_here(script, capsys, monkeypatch):
    text = MODULE.replace('backend="text")', 'backend="text")\nminus.register_kernel("cuda", '
                          'opkit.cpp.kernel("void minus() {}", cuda=True))')  # fmt: skip
    script.write_text(text)
    monkeypatch.setattr(compilers, "find_nvcc", lambda: None)
    monkeypatch.setattr("opkit.cpp._nvrtc.find", lambda: None)
    assert build("--import", "clibuild_ops.py") == 0
    assert "clibuild::minus [cuda] skipped: " in capsys.readouterr().err


def test_compdb_is_written_for_the_users_files_and_compiles_nothing(script, capsys):
    target = script.parent / "compile_commands.json"
    target.write_text('[{"file": "/other.cpp", "directory": "/", "arguments": ["g++"]}]')
    assert build("--import", "clibuild_ops.py", "--compdb") == 0
    entries = {entry["file"]: entry for entry in json.loads(target.read_text())}
    assert set(entries) == {"/other.cpp", str(script.parent / "plus.cpp")}
    assert "-std=c++20" in entries[str(script.parent / "plus.cpp")]["arguments"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "no op is named; expected namespace::name, or --import MODULE for all that it defines"),
        (["no::op"], "building no::op: no op has that name; known are "),
        (["opkit::vector_ad"], "Did you mean 'opkit::vector_add'?"),
        (["opkit::vector_add", "--backend", "fast"], "there are no native kernels of the backend fast"),
        (["--import", "nowhere"], "importing nowhere: there is no such module or file"),
        (["--import", "nowhere.py"], "importing nowhere.py: there is no such module or file"),
        (
            ["--import", "broken.py"],
            "importing broken.py: it failed with ValueError: no. Expected it to import; run ",
        ),
    ],
)
def test_what_cannot_be_built_is_one_text(script, capsys, words, text):
    (script.parent / "broken.py").write_text('raise ValueError("no.")')
    assert build(*words) == 1
    error = capsys.readouterr().err
    assert text in error
    assert "Traceback" not in error


def test_wrong_usage_is_exit_code_2(capsys):
    assert build("--nothing") == 2
    assert "unrecognized arguments: --nothing" in capsys.readouterr().err
