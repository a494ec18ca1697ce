from __future__ import annotations

import re
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import opkit
from opkit import _config
from opkit.cpp import _manifest, _pch, _preamble, cache, compilers
from opkit.errors import BuildError

pytestmark = [
    pytest.mark.skipif(
        compilers.find_cxx() is None or not _pch.is_gcc(compilers.get_cxx()), reason="needs gcc"
    ),
    pytest.mark.usefixtures("cache_dir"),
]

# A header of the stable ABI that reads in no time stands in for those that take half a second.
HEADER = "torch/csrc/stable/version.h"
INCLUDE = f"#include <{HEADER}>\n"
BODY = "#ifndef TORCH_FEATURE_VERSION\n#error empty\n#endif\n"
KERNEL = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <optional>
#include <tuple>
#include <vector>
using torch::stable::Tensor;
std::tuple<Tensor, Tensor> both(const Tensor& x, const std::optional<Tensor>& add, const std::vector<double>& by) {
  STD_TORCH_CHECK(by.size() == 2, "by has ", by.size(), " numbers");
  auto y = torch::stable::empty_like(x), z = torch::stable::empty_like(x);
  for (int64_t i = 0; i < x.numel(); ++i) {
    const float v = x.const_data_ptr<float>()[i];
    y.mutable_data_ptr<float>()[i] = v * by[0] + (add ? add->const_data_ptr<float>()[i] : 0);
    z.mutable_data_ptr<float>()[i] = v * by[1];
  }
  return {y, z};
}
"""


def log_of(source, *, name="f", **options):
    """Build a library that is new and return what the compiler said: under -H, each file that it read."""
    flags = ["-H", *options.pop("extra_cflags", [])]
    return (opkit.cpp.build(name, source, extra_cflags=flags, **options).parent / "log.txt").read_text()


def is_used(source, **options):
    """Whether a source compiles against what is precompiled; it is built under a new name each time."""
    is_used.count += 1
    log = log_of(source + BODY, name=f"f{is_used.count}", **options)
    return "\n! ./opkit_headers/" in log


is_used.count = 0


@pytest.fixture
def prepared():
    """What begins with HEADER has it precompiled from here on."""
    assert [is_used(INCLUDE) for _ in range(3)] == [False, True, True]


def headers():
    return sorted(path.name for path in (cache.root() / "lib").glob("torch-headers-*/*"))


def test_the_second_library_prepares_the_header_and_says_so(capfd):
    assert not is_used(INCLUDE)
    assert "precompiled" not in capfd.readouterr().err
    assert is_used(INCLUDE)
    err = capfd.readouterr().err
    assert f"opkit: built {HEADER} in precompiled form, once for these flags in" in err
    assert err.index("precompiled") < err.index("opkit: built f")
    assert is_used(INCLUDE)
    assert "precompiled" not in capfd.readouterr().err
    assert len(headers()) == 1


def test_a_library_is_the_same_with_and_without(registry, tmp_path, monkeypatch):
    def declared(name: str) -> opkit.Op:
        @opkit.op(f"t::{name}", shapes="n, n -> n, n")
        def both(x: Tensor, add: Tensor | None, by: list[float]) -> tuple[Tensor, Tensor]:
            return x * by[0] + (0 if add is None else add), x * by[1]

        both.register_kernel("cpu", opkit.cpp.kernel(KERNEL, symbol="both"), backend="native")
        return both

    both, other = declared("both"), declared("other")
    (plain,) = both.build("native")
    monkeypatch.setenv("OPKIT_CACHE_DIR", str(tmp_path / "another"))
    _config.refresh()
    other.build("native")
    (used,) = both.build("native")
    commands = [(path.parent / "log.txt").read_text() for path in (plain, used)]
    assert ["opkit_headers" in command for command in commands] == [False, True]
    assert plain.read_bytes() == used.read_bytes()
    x = torch.randn(5)
    with opkit.use_backend("native", strict=True):
        for arguments in ((x, None, [2.0, 3.0]), (x, x, [0.5, 1.0])):
            torch.testing.assert_close(both(*arguments), both.reference(*arguments))


def test_what_stands_before_the_header_acts(prepared, tmp_path):
    (tmp_path / "mine.h").write_text("#pragma once\n// nothing\n#include <vector>\n")
    (tmp_path / "sets.h").write_text("#define TORCH_TARGET_VERSION 0x020b000000000000\n")
    target = "#undef TORCH_TARGET_VERSION\n#define TORCH_TARGET_VERSION 0x020b000000000000\n"
    check = "static_assert(TORCH_FEATURE_VERSION == 0x020b000000000000);\n"
    for before in (
        target,
        "#undef TORCH_TARGET_VERSION\n" + '#include "sets.h"\n',
        "#include <vector>\n" + target,
        "// text\n" + target,
    ):
        for _ in range(3):
            assert not is_used(before + INCLUDE + check, extra_include_paths=[tmp_path])
    for _ in range(3):
        log = is_used(
            INCLUDE + "#define MINE 1\nstatic_assert(TORCH_FEATURE_VERSION == 0x020a000000000000);\n"
        )
        assert log
    same = [is_used('#include "mine.h"\n' + INCLUDE, extra_include_paths=[tmp_path]) for _ in range(2)]
    assert same == [False, True]


def test_a_macro_in_the_flags_acts(prepared):
    check = "static_assert(TORCH_FEATURE_VERSION == 0x020b000000000000);\n"
    flags = ["-UTORCH_TARGET_VERSION", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    for _ in range(2):
        assert not is_used(INCLUDE + check, extra_cflags=flags)
    assert is_used(INCLUDE, extra_cflags=["-DMINE=1", "-Wall", "-Wextra", "-Werror"])


@pytest.mark.parametrize(
    "flag", ["-O1", "-std=c++17", "-march=native", "-fopenmp", "-fno-exceptions", "-Wpedantic"]
)
def test_other_flags_have_a_header_of_their_own(prepared, flag):
    assert [is_used(INCLUDE, extra_cflags=[flag]) for _ in range(2)] == [False, True]
    assert len(headers()) == 2


@pytest.mark.parametrize("flag", ["-Winvalid-pch", "-Werror=invalid-pch", "-Wsystem-headers", "-g"])
def test_flags_that_show_the_difference_do_without(prepared, flag):
    for _ in range(2):
        log = log_of(INCLUDE, name=f"g{is_used.count}", extra_cflags=[flag, "-Werror"])
        assert "opkit_headers" not in log
        is_used.count += 1


def test_nothing_is_prepared_where_another_file_comes_first(tmp_path):
    (tmp_path / "ahead.h").write_text("#define AHEAD 1\n")
    for _ in range(2):
        assert not is_used(INCLUDE, extra_cflags=["-include", str(tmp_path / "ahead.h")])
    assert not headers()


def test_a_folder_with_a_header_of_the_same_name_acts(prepared, tmp_path):
    inner = tmp_path / "own" / "torch" / "headeronly" / "version.h"  # which HEADER includes
    inner.parent.mkdir(parents=True)
    inner.write_text("#include_next <torch/headeronly/version.h>\n#define OWN 1\n")
    (tmp_path / "other" / "torch").mkdir(parents=True)
    check = "#ifndef OWN\n#error not own\n#endif\n"
    assert is_used(INCLUDE, extra_include_paths=[tmp_path / "other"])
    for _ in range(2):
        assert not is_used(INCLUDE + check, extra_include_paths=[tmp_path / "own"])
        assert not is_used(INCLUDE + check, extra_cflags=[f"-I{tmp_path / 'own'}"])


def test_a_folder_of_the_environment_is_in_no_header(tmp_path, monkeypatch):
    inner = tmp_path / "torch" / "headeronly" / "version.h"
    inner.parent.mkdir(parents=True)
    inner.write_text("#include_next <torch/headeronly/version.h>\n#define OWN 1\n")
    monkeypatch.setenv("CPATH", str(tmp_path))
    for _ in range(3):
        assert not is_used(INCLUDE + "#ifndef OWN\n#error not own\n#endif\n")
    assert headers()
    monkeypatch.delenv("CPATH")
    assert is_used(INCLUDE + "#ifdef OWN\n#error own\n#endif\n")


def test_an_edited_header_of_torch_acts(tmp_path):
    header = tmp_path / "system" / "torch" / "csrc" / "stable" / "mine.h"
    header.parent.mkdir(parents=True)
    cxx = compilers.get_cxx()
    text = "#include <torch/csrc/stable/mine.h>\nint f() { return VALUE; }\n"
    words = ["-std=c++20", "-isystem", str(tmp_path / "system")]

    def read(value: int) -> Path:
        header.write_text(f"#define VALUE {value}\n")
        found = _preamble.Preamble.of(
            text, cxx=cxx, words=words, user_words=[], user_folders=[], system_folders=[tmp_path / "system"]
        )
        found.remember()
        return found.header.known()

    first = read(1)
    assert read(1) == first
    assert read(2) != first
    assert read(1) == first


def test_names_of_torchs_files_are_those_that_the_flags_make_of_them(tmp_path):
    header = tmp_path / "project" / "system" / "torch" / "csrc" / "stable" / "mine.h"
    header.parent.mkdir(parents=True)
    header.write_text("#pragma once\ninline const char* place() { return __FILE__; }\n")
    system, cxx = tmp_path / "project" / "system", compilers.get_cxx()

    def place(folder: Path) -> str:
        """Return __FILE__ in the header, as a program has it that is compiled from `folder`."""
        words = ["-std=c++20", "-isystem", str(system), f"-fmacro-prefix-map={folder}/="]
        text = "#include <torch/csrc/stable/mine.h>\nint puts(const char*);\nint main() { puts(place()); }\n"
        begun = _preamble.Preamble.of(
            text, cxx=cxx, words=words, user_words=[], user_folders=[], system_folders=[system]
        )
        begun.remember()
        work = tmp_path / f"work{len(list(tmp_path.iterdir()))}"
        work.mkdir()
        (work / "k.cpp").write_text(text.replace("int puts", 'extern "C" int puts'))
        flags = begun.place(work, "k.cpp")
        assert flags
        subprocess.run([*cxx.command, *words, *flags, "-MD", "k.cpp", "-o", "k"], cwd=work, check=True)
        return subprocess.run([work / "k"], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()

    assert place(tmp_path / "elsewhere") == place(tmp_path / "another") == str(header)
    assert len(headers()) == 1
    assert place(tmp_path / "project") == str(header.relative_to(tmp_path / "project"))


def test_a_library_depends_on_the_same_files(tmp_path):
    source = "#include <cmath>\n" + INCLUDE
    plain, used = (opkit.cpp.build(name, source + BODY) for name in ("a", "b"))
    assert "opkit_headers" in (used.parent / "log.txt").read_text()
    names = [
        {r.path for r in _manifest.read(str(p.parent), p.parent.parent.name).depends} for p in (plain, used)
    ]
    assert names[0] == names[1]
    assert any(name.endswith("/cmath") for name in names[0])
    assert {path.suffix for path in used.parent.iterdir()} == {".so", ".cpp", ".txt", ".json"}


def test_errors_and_warnings_are_the_same(prepared):
    def said(name: str) -> str:
        with pytest.raises(BuildError) as caught:
            opkit.cpp.build(name, INCLUDE + BODY + "\n\nint f() {\n  int unused;\n  return missing;\n}\n",
                            extra_cflags=["-H", "-Wall"])  # fmt: skip
        (found,) = caught.value.diagnostics
        assert found.line == 9
        log = caught.value.log_path.read_text()
        assert "unused variable" in log
        text = str(caught.value).replace(name, "NAME") + re.sub(
            r"(?m)^(?:[.!x]+ |\$|Multiple|/).*\n", "", log
        )
        return ("\n! ./opkit_headers/" in log, re.sub(r"-[0-9a-f]{32}", "", text).replace(name, "NAME"))

    used, text = said("wrong")
    assert used
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_preamble.Preamble, "of", lambda *args, **kwargs: None)
        assert said("wrongs") == (False, text)


def test_a_source_that_does_not_compile_prepares_nothing(capfd):
    for _ in range(3):
        with pytest.raises(BuildError, match=r"torch/csrc/stable/nothing\.h: No such file"):
            opkit.cpp.build("wrong", "#include <torch/csrc/stable/nothing.h>\n")
    assert "precompiled" not in capfd.readouterr().err
    assert not headers()


def test_a_header_that_cannot_be_prepared_is_tried_once(monkeypatch, capfd):
    assert not is_used(INCLUDE)
    run = subprocess.run

    def failing(command, **kwargs):
        return run(["false"] if "c++-header" in command else command, **kwargs)

    monkeypatch.setattr(subprocess, "run", failing)
    for _ in range(3):
        assert not is_used(INCLUDE)
    assert capfd.readouterr().err.count(f"opkit: failed to build {HEADER} in precompiled form") == 1


def test_a_compiler_that_cannot_read_the_header_reads_torchs(tmp_path, monkeypatch, prepared):
    gcc = compilers.get_cxx()
    wrapper = tmp_path / "g++"
    wrapper.write_text(f"""#!{sys.executable}
import os, sys
if any(os.path.exists(word + ".gch") for word in sys.argv) and "c++-header" not in sys.argv:
    sys.exit("cc1plus: fatal error: had to relocate PCH\\ncompilation terminated.")
os.execv({str(gcc.path)!r}, [{str(gcc.path)!r}, *sys.argv[1:]])
""")
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(wrapper))
    for _ in range(3):
        assert not is_used(INCLUDE)
    assert headers()


def test_many_libraries_at_once_prepare_one_header(capfd):
    assert not is_used(INCLUDE)
    capfd.readouterr()
    with ThreadPoolExecutor(8) as pool:
        logs = list(pool.map(lambda i: log_of(INCLUDE + BODY, name=f"many{i}"), range(8)))
    assert all("\n! ./opkit_headers/" in log for log in logs)
    assert capfd.readouterr().err.count("in precompiled form, once for these flags in") == 1
    assert len(headers()) == 1


def test_units_of_one_library_share_a_header(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.cpp").write_text(f"// a comment\n{INCLUDE}{BODY}int {name}() {{ return 1; }}\n")
    files = [tmp_path / "a.cpp", tmp_path / "b.cpp"]
    assert "opkit_headers" not in log_of(files, name="first")
    assert log_of(files, name="second").count("\n! ./opkit_headers/") == 2
    assert len(headers()) == 1


def test_other_compilers_do_without():
    gcc = compilers.get_cxx()

    def begins(cxx):
        return _preamble.Preamble.of(
            INCLUDE, cxx=cxx, words=[], user_words=[], user_folders=[], system_folders=[]
        )

    assert begins(gcc)
    assert not begins(compilers.Compiler(gcc.path, gcc.version, ("ccache", "g++")))
    assert not begins(compilers.Compiler(gcc.path, "clang version 18.1.3", ("clang++",)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#include <torch/csrc/stable/a.h>\n", ["a.h"]),
        ("#include <vector>\n#include <torch/csrc/stable/a.h>\n#include <b>\n", ["vector", "a.h"]),
        ('#define OPKIT_OP "t::f"\n#line 3 "k.py"\n\n  # include "torch/csrc/stable/a.h"', ["a.h"]),
        ("// text\n/* more\n text */ #include <torch/csrc/stable/a.h>", ["a.h"]),
        ("#pragma once\n#include <torch/csrc/stable/a.h>\n#include <torch/csrc/stable/b.h>\n", ["a.h"]),
        ("#include <vector>\n", []),
        ("", []),
        ("int x;\n#include <torch/csrc/stable/a.h>\n", []),
        ("#define X\n#include <torch/csrc/stable/a.h>\n", []),
        ("#undef X\n#include <torch/csrc/stable/a.h>\n", []),
        ("#pragma GCC optimize 1\n#include <torch/csrc/stable/a.h>\n", []),
        ("#if 0\n#include <torch/csrc/stable/a.h>\n#endif\n", []),
        ("#include MACRO\n#include <torch/csrc/stable/a.h>\n", []),
        ("/* #include <torch/csrc/stable/a.h> */\n", []),
        ("// on \\\n#include <torch/csrc/stable/a.h>\n", []),
        ("// on \\ \n#include <torch/csrc/stable/a.h>\n", []),
        ("// on ??/\n#include <torch/csrc/stable/a.h>\n", []),
        ("#include <vector> int x;\n#include <torch/csrc/stable/a.h>\n", []),
        ("/* open\n#include <torch/csrc/stable/a.h>\n", []),
        ('#include "plain.h"\n#include <torch/csrc/stable/a.h>\n', ["vector", "a.h"]),
        ('#include "torchs.h"\n#include <torch/csrc/stable/b.h>\n', ["vector", "a.h"]),
        ("#include <sets.h>\n#include <torch/csrc/stable/a.h>\n", []),
        ('#include "itself.h"\n#include <torch/csrc/stable/a.h>\n', []),
        (
            "#include <stdint.h>\n#include <torch/headeronly/x.h>\n#include <torch/csrc/stable/a.h>\n",
            ["stdint.h", "torch/headeronly/x.h", "a.h"],
        ),
        ("#include <other/unguarded.h>\n#include <torch/csrc/stable/a.h>\n", []),
        ('#include "/no/such.h"\n#include <torch/csrc/stable/a.h>\n', []),
        ("#include <list>\n#include <torch/csrc/stable/a.h>\n", []),
    ],
)
def test_the_first_headers_of_a_unit(tmp_path, text, expected):
    (tmp_path / "plain.h").write_text("#pragma once\n#include <vector> // text\n")
    (tmp_path / "torchs.h").write_text('#include "plain.h"\n#include <torch/csrc/stable/a.h>\nint y;\n')
    (tmp_path / "sets.h").write_text("#define X\n")
    (tmp_path / "itself.h").write_text('#include "itself.h"\n')
    (tmp_path / "list").write_text("int the_users_own;\n")
    found = [name.removeprefix("torch/csrc/stable/") for name in _preamble.first_headers(text, [tmp_path])]
    assert found == expected
