from __future__ import annotations

from pathlib import Path

from opkit.cpp import diagnostics

GCC = """\
In file included from unit.cpp:1:
/w/k.cpp: In function 'void f(int)':
/w/k.cpp:3:11: error: 'foo' was not declared in this scope
    3 |   int y = foo(x);
      |           ^~~
/w/k.cpp:5:1: warning: unused variable 'y' [-Wunused-variable]
    5 | y
      | ^
/w/k.cpp:9:1: error: expected ';'
/w/k.cpp:2:1: note: to match this '{'
    2 | {
      | ^
"""

INSTANTIATED = """\
In file included from /w/k.cpp:1:
/lib/kernel.h: In instantiation of 'T* Tensor::data() const [with T = int*]':
/w/k.cpp:4:15:   required from here
/lib/kernel.h:247:31: error: incomplete type 'DTypeOf<int*>'
  247 |     if (dtype_ != DTypeOf<T>::value)
      |                               ^~~~~
/lib/kernel.h:249:36: error: incomplete type again
"""

NVCC = """\
/w/k.cu(2): warning #177-D: variable "z" was declared but never referenced
/w/k.cu(3): error: identifier "bar" is undefined
      p[0] = bar;
             ^

/lib/a.h(7): error #20014-D: static assertion failed
      static_assert(sizeof(T) == 4);
      ^
          detected during instantiation of "void g<T>() [with T=double]" at line 12 of /w/k.cu

2 errors detected in the compilation of "unit.cu".
"""


def test_gcc_errors_come_with_excerpt_caret_and_notes():
    error = diagnostics.failure(
        GCC,
        label="demo::f [cpp]",
        op="demo::f",
        log_path=Path("/c/log.txt"),
        command="g++ x",
        command_path=Path("/c/x.sh"),
    )
    assert str(error) == (
        "building demo::f [cpp]: 2 errors, the first at /w/k.cpp:3: 'foo' was not declared in this scope\n"
        "/w/k.cpp:3:11: error: 'foo' was not declared in this scope\n"
        "    3 |   int y = foo(x);\n"
        "      |           ^~~\n"
        "/w/k.cpp:9:1: error: expected ';'\n"
        "/w/k.cpp:2:1: note: to match this '{'\n"
        "    2 | {\n"
        "      | ^\n"
        "full log: /c/log.txt\n"
        "to repeat it: sh /c/x.sh"
    )
    assert (error.op, error.command, error.log_path) == ("demo::f", "g++ x", Path("/c/log.txt"))
    assert [(d.file, d.line, d.column) for d in error.diagnostics] == [
        ("/w/k.cpp", 3, 11),
        ("/w/k.cpp", 9, 1),
    ]


def test_an_error_in_a_header_is_shown_at_the_users_line():
    error = diagnostics.failure(INSTANTIATED, label="f", sources=[Path("/w/k.cpp")])
    first = str(error).splitlines()[0]
    assert first == (
        "building f: 2 errors, the first at /w/k.cpp:4: incomplete type 'DTypeOf<int*>' (in /lib/kernel.h:247)"
    )
    assert [d.line for d in error.diagnostics] == [4, 4]
    assert "247 |     if (dtype_" in str(error)


def test_the_users_errors_come_before_those_of_headers():
    output = "/lib/a.h:1:1: error: first\n/w/k.cpp:2:1: error: second\n"
    error = diagnostics.failure(output, label="f", sources=[Path("/w/k.cpp")])
    assert [d.message for d in error.diagnostics] == ["second", "first"]


def test_nvcc_errors():
    error = diagnostics.failure(NVCC, label="f [cuda]", sources=[Path("/w/k.cu")])
    assert str(error).startswith(
        'building f [cuda]: 2 errors, the first at /w/k.cu:3: identifier "bar" is undefined\n'
    )
    assert "      p[0] = bar;\n             ^\n" in str(error)
    assert error.diagnostics[1].line == 12
    assert error.diagnostics[1].message == "static assertion failed (in /lib/a.h:7)"
    assert "warning" not in str(error)


def test_errors_of_the_tools_themselves():
    for line, message in (
        (
            "g++: error: unrecognized command-line option '-ffoo'",
            "g++: unrecognized command-line option '-ffoo'",
        ),
        ("cc1plus: error: bad value 'x' for '-march=' switch", "cc1plus: bad value 'x' for '-march=' switch"),
        ("/usr/bin/ld: cannot find -lfoo: No such file", "ld: cannot find -lfoo: No such file"),
        ("nvcc fatal   : Unsupported gpu architecture 'sm_1'", "nvcc: Unsupported gpu architecture 'sm_1'"),
        ("ptxas fatal   : Ptx assembly aborted", "ptxas: Ptx assembly aborted"),
        ("clang++-18: error: unsupported option '-x'", "clang++-18: unsupported option '-x'"),
    ):
        error = diagnostics.failure(f"{line}\ncollect2: error: ld returned 1 exit status\n", label="f")
        assert str(error).splitlines()[:2] == [f"building f: 1 error, outside the source: {message}", line]


def test_clang_requested_here_leads_to_the_users_line():
    output = (
        "/lib/a.h:7:3: error: static assertion failed\n    7 |   x\n      |   ^\n"
        "/w/k.cpp:5:1: note: in instantiation of function template specialization 'g<int>' requested here\n"
    )
    error = diagnostics.failure(output, label="f", sources=[Path("/w/k.cpp")])
    assert error.diagnostics[0].line == 5


def test_many_errors_are_counted_not_shown():
    output = "".join(f"/w/k.cpp:{i}:1: error: number {i}\n" for i in range(1, 31))
    error = diagnostics.failure(output, label="f")
    assert "30 errors" in str(error).splitlines()[0]
    assert "25 more errors are in the log" in str(error)
    assert len(error.diagnostics) == 30


def test_a_compiler_without_error_lines_shows_its_last_lines():
    error = diagnostics.failure("something odd\n", label="f")
    assert (
        str(error)
        == "building f: the compiler failed without naming an error; its last lines follow\nsomething odd"
    )


def test_a_killed_compiler_suggests_memory():
    error = diagnostics.failure("g++: fatal error: Killed signal terminated program cc1plus\n", label="f")
    assert "killed, most likely for lack of memory; set MAX_JOBS=1" in str(error).splitlines()[0]


def test_commands_and_status_lines_of_ninja_are_no_errors():
    output = (
        "[1/2] c++ -DX=error -c /w/k.cpp\nFAILED: k.o\nc++ -Wfatal -c /w/k.cpp -o k.o\nninja: build stopped\n"
    )
    assert diagnostics.parse(output) == []


def test_a_missing_header_names_the_option_that_adds_its_folder():
    for line, advice in (
        (
            "/w/k.cpp:1:10: fatal error: nope.h: No such file or directory",
            "Name the folder that has nope.h in",
        ),
        (
            "/w/k.cpp:1:10: fatal error: 'nope.h' file not found",
            "Name the folder that has nope.h in extra_include_p",
        ),
        (
            '/w/k.cu(1): catastrophic error: cannot open source file "a/nope.h"',
            "Name the folder that has a/nope.h in extra_include_paths, or correct the #include.",
        ),
        (
            "/t/CUDAMacros.h:8:10: fatal error: c10/cuda/impl/cuda_cmake_macros.h: No such file or directory",
            "torch w",
        ),
        ("/w/k.cpp:1:10: fatal error: Python.h: No such file or directory", "apt install python3-dev"),
    ):
        error = diagnostics.failure(f"{line}\n    1 | #include\n", label="f", log_path=Path("/c/log.txt"))
        said, log = str(error).splitlines()[-2:]
        assert advice in said
        assert log == "full log: /c/log.txt"
        assert len(error.diagnostics) == 1


def test_an_unsupported_architecture_says_where_it_is_set():
    for line, name in (
        ("nvcc fatal   : Unsupported gpu architecture 'compute_20'", "compute_20"),
        ("ptxas fatal   : Value 'sm_20' is not defined for option 'gpu-name'", "sm_20"),
    ):
        error = diagnostics.failure(line, label="f [cuda]")
        assert (
            str(error)
            .splitlines()[-1]
            .startswith(
                f"This nvcc does not know {name}. Set TORCH_CUDA_ARCH_LIST to architectures that it knows"
            )
        )


def test_a_missing_library_names_the_option_that_adds_its_folder():
    error = diagnostics.failure("/usr/bin/ld: cannot find -lfoo: No such file or directory", label="f")
    assert str(error).splitlines()[-1] == "Name the folder of libfoo.so in extra_ldflags: -L<folder>."


def test_an_undefined_symbol_is_demangled_with_its_likely_cause():
    for symbol, name, cause in (
        (
            "_ZN4demo3addEfi",
            "demo::add(float, int)",
            "Add the source that defines it to the sources, or name",
        ),
        (
            "_ZN2at4_ops9future_op4callERKNS_6TensorE",
            "at::_ops::future_op::call(at::Tensor const&)",
            "torch's, and",
        ),
        (
            "aoti_torch_future",
            "aoti_torch_future",
            "does not export it: the library was compiled for another torch",
        ),
        ("cudaMalloc", "cudaMalloc", "with_cuda=True"),
        ("cublasSgemm_v2", "cublasSgemm_v2", "extra_ldflags, such as -lcublas"),
        ("PyFuture_New", "PyFuture_New", "another Python"),
    ):
        error = diagnostics.unloadable(
            OSError(f"/c/k.so: undefined symbol: {symbol}"), label="k [cpp]", op="a::k"
        )
        assert str(error).startswith(
            f"loading k [cpp]: it needs {name}, which no library of this process defines;"
        )
        assert cause in str(error)
        assert error.op == "a::k"
    assert (
        str(diagnostics.unloadable(OSError("/c/k.so: too short"), label="k"))
        == "loading k: /c/k.so: too short."
    )
    assert diagnostics.demangled("main") == "main"
