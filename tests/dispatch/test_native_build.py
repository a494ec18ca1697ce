"""How the native core is built, found, loaded and gone over to; what it does is tested elsewhere.

The processes here run a copy of opkit whose core is one small file, which compiles in a moment.
"""

from __future__ import annotations

import importlib.machinery
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch

import opkit
from opkit import _config, cli
from opkit.cpp import _audit, compilers, prebuilt
from opkit.dispatch import native
from opkit.dispatch.native import background, library

ROOT = Path(opkit.__file__).parents[1]
CORE = """\
#include <Python.h>
#include <torch/headeronly/version.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "opkit_core", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit_opkit_core() {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddStringConstant(module, "torch_version", TORCH_VERSION);
  return module;
}
"""
NOT_A_CORE = "#error this is no core\n"
# A compiler that counts what it compiles and does not end before it may.
COMPILER = """\
#!/bin/sh
case " $* " in *" -c "*)
  echo compiled >> {folder}/compiled
  {then}
  while [ ! -e {folder}/go ]; do sleep 0.05; done;;
esac
exec {cxx} "$@"
"""

needs_compiler = pytest.mark.skipif(
    compilers.find_cxx() is None or library.unsupported() is not None, reason="needs a C++ compiler"
)


# ---------------------------------------------------------------- in this process


@pytest.fixture
def switch(monkeypatch, cache_dir):
    """The switch as in a new process, with the variable set."""

    def set_to(value: str | None = None) -> None:
        if value is None:
            monkeypatch.delenv("OPKIT_NATIVE", raising=False)
        else:
            monkeypatch.setenv("OPKIT_NATIVE", value)
        _config.refresh()
        state = {"_core": None, "_looked": False, "_settled": False, "_off": False, "_reason": None}
        for name, value in {**state, "_error": None, "_watch": None, "_waiting": []}.items():
            monkeypatch.setattr(native, name, value)

    set_to()
    monkeypatch.setitem(sys.modules, "opkit.dispatch.native.opkit_core", None)
    return set_to


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A small core in place of opkit's."""
    folder = tmp_path / "core"
    folder.mkdir()
    (folder / "unit_module.cpp").write_text(CORE)
    monkeypatch.setattr(library, "SOURCES", folder)
    monkeypatch.setattr(library, "PREBUILT", tmp_path / "prebuilt")
    return folder


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent")


def test_a_wrong_value_of_the_variable_raises_with_the_legal_ones(switch):
    switch("yes")
    with pytest.raises(opkit.ConfigError) as caught:
        native.core()
    assert str(caught.value) == (
        "reading OPKIT_NATIVE: found 'yes'; expected one of auto, 0, 1. It says: whether the native core runs ops: as "
        "soon as it is built, never (0), or always (1: wait for it, or raise). Unset it or use a legal value."
    )


@needs_compiler
def test_off_leaves_a_library_that_is_there_alone(switch, sources, capfd):
    library.build()
    capfd.readouterr()
    switch("0")
    called = []
    native.when_ready(lambda: called.append(1))
    native.need()
    assert native.core() is None
    assert native.why_not() == "OPKIT_NATIVE is 0"
    assert called == []
    assert capfd.readouterr() == ("", "")


@needs_compiler
def test_a_library_that_is_there_is_loaded_without_a_compiler(
    switch, sources, no_compiler, monkeypatch, capfd
):
    monkeypatch.delenv("CXX")
    library.build()
    capfd.readouterr()
    monkeypatch.setenv("CXX", "/nonexistent")
    called = []
    native.when_ready(lambda: called.append(native.core()))
    core = native.core()
    assert core.torch_version == torch.__version__.split("+")[0]
    assert called == [core]
    assert native.why_not() is None
    native.need()
    assert sys.modules["opkit.dispatch.native.opkit_core"] is core
    assert capfd.readouterr() == ("", "")


@needs_compiler
@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (torch, "__version__", "2.13.0+other"),
        (torch.version, "git_version", "0" * 40),
        (torch, "compiled_with_cxx11_abi", lambda: False),
        (importlib.machinery, "EXTENSION_SUFFIXES", [".cpython-399-x86_64-linux-gnu.so"]),
        (platform, "machine", lambda: "aarch64-other"),
    ],
    ids=["torch", "commit", "abi", "python", "machine"],
)
def test_a_library_for_another_torch_or_python_is_not_found(switch, sources, monkeypatch, owner, name, value):
    path = library.build()
    folder = library.PREBUILT
    prebuilt.save(path, folder, library.name(), architectures=(), audit=_audit.Audit((2, 13), {}, ()))
    assert library.cached() == path
    assert library.carried().parent == folder
    monkeypatch.setattr(owner, name, value)
    monkeypatch.setattr(library, "EXTENSION_SUFFIXES", importlib.machinery.EXTENSION_SUFFIXES)
    assert library.cached() is None
    assert library.carried() is None


@needs_compiler
def test_a_library_of_other_sources_is_not_found(switch, sources):
    library.build()
    (sources / "more.h").write_text("// more\n")
    assert library.cached() is None
    assert library.build() == library.cached()


@needs_compiler
def test_a_library_with_the_headers_of_another_torch_is_refused(switch, sources):
    text = CORE.replace("TORCH_VERSION)", '"2.1.0")')
    (sources / "unit_module.cpp").write_text(text)
    path = library.build()
    assert native.core() is None
    assert native.why_not() == (
        f"loading opkit's native core from {path}: it was compiled with the headers of torch 2.1.0; expected those of "
        f"{torch.__version__.split('+')[0]}. Look for headers of another torch in CPATH and CPLUS_INCLUDE_PATH, remove "
        "the library, and build it again with `opkit build --native`."
    )


@needs_compiler
def test_a_library_that_does_not_load_is_refused(switch, sources):
    (sources / "unit_module.cpp").write_text('extern "C" int nothing;\n')
    library.build()
    assert native.core() is None
    assert re.fullmatch(
        r"loading opkit's native core from .*opkit_core\.so: .*PyInit_opkit_core.*; expected a library for torch "
        r"2\..* and Python 3\..*\. Remove it, and build it again with `opkit build --native`\.",
        native.why_not(),
    )


@needs_compiler
def test_what_the_wheel_carries_comes_first_and_a_damaged_one_is_not_loaded(switch, sources, monkeypatch):
    path = library.build()
    audit = _audit.Audit((2, 13), {}, ())
    saved = prebuilt.save(path, library.PREBUILT, library.name(), architectures=(), audit=audit)
    assert native.core().__file__ == str(saved)
    with saved.open("ab") as stream:
        stream.write(b"more")
    switch()
    with pytest.warns(UserWarning, match="its content is not what was installed"):
        assert native.core().__file__ == str(path)


@needs_compiler
def test_1_builds_at_the_first_need_and_not_before(switch, sources, capfd):
    switch("1")
    assert native.core() is None
    assert native.why_not() == "no op was called so far that it would be built for"
    called = []
    native.when_ready(lambda: called.append(native.core()))
    assert called == []
    native.need()
    assert called == [native.core()]
    assert native.core() is not None
    assert re.search(r"opkit: built opkit's native core in \d+\.\d s", capfd.readouterr().err)


@needs_compiler
def test_1_raises_what_the_compiler_says_each_time_and_compiles_once(switch, sources, capfd):
    (sources / "unit_module.cpp").write_text(NOT_A_CORE)
    switch("1")
    for _ in range(2):
        with pytest.raises(opkit.BuildError, match="this is no core") as caught:
            native.need()
    assert caught.value.log_path.exists()
    assert capfd.readouterr().err.count("failed to build") == 1


def test_1_raises_where_there_is_no_compiler(switch, sources, no_compiler):
    switch("1")
    with pytest.raises(opkit.BuildError, match="looking for a C\\+\\+ compiler: CXX is '/nonexistent'"):
        native.need()


def test_auto_is_quiet_where_there_is_no_compiler(switch, sources, no_compiler, capfd, cache_dir):
    native.need()
    native._watch._thread.join()
    assert native.core() is None
    assert native.why_not() == (
        "it is not built yet, and CXX is '/nonexistent', which does not run (correct CXX or unset it)"
    )
    assert capfd.readouterr() == ("", "")
    assert not cache_dir.exists()


@pytest.mark.parametrize("missing", ["ninja", "setuptools", "python"])
def test_auto_is_quiet_where_something_else_is_missing(switch, sources, monkeypatch, capfd, missing):
    monkeypatch.setattr(compilers, "find_cxx", lambda: compilers.Compiler(Path("g++"), "g++ 12", ("g++",)))
    if missing == "ninja":
        monkeypatch.setattr(compilers, "find_ninja", lambda: None)
    elif missing == "setuptools":
        monkeypatch.setattr(background.importlib.util, "find_spec", lambda name: None)
    else:
        monkeypatch.setattr(sys, "executable", "")
    native.need()
    native._watch._thread.join()
    assert (
        native.why_not()
        == {
            "ninja": "it is not built yet, and ninja was not found (pip install ninja)",
            "setuptools": "it is not built yet, and setuptools, which torch's build files take, was not found "
            "(pip install setuptools)",
            "python": "it is not built yet, and this program has no Python that would build it",
        }[missing]
    )
    assert capfd.readouterr() == ("", "")


def test_a_frozen_process_builds_nothing_until_it_no_longer_is(switch, sources, no_compiler, monkeypatch):
    with opkit.freeze():
        native.need()
        assert native._watch is None
        assert native.why_not() == (
            "opkit.freeze() is in force, and nothing is built then; build it before with `opkit build --native`"
        )
    native.need()
    assert native._watch is not None
    monkeypatch.setenv("OPKIT_FROZEN", "1")
    switch("1")
    with pytest.raises(opkit.FrozenError, match="building opkit_core: OPKIT_FROZEN is set"):
        native.need()


@pytest.mark.parametrize("kind", ["threads", "system", "machine", "python"])
def test_a_python_that_cannot_have_it_is_told_so(switch, sources, monkeypatch, kind):
    if kind == "threads":
        monkeypatch.setattr(sysconfig, "get_config_var", lambda name: {"Py_GIL_DISABLED": 1}.get(name))
        reason = "this Python is built without the GIL (free threading), on which opkit's native core counts"
    elif kind == "python":
        monkeypatch.setattr(sys.implementation, "name", "pypy")
        reason = "opkit's native core is an extension of CPython, and this is pypy"
    else:
        system, machine = ("darwin", "arm64") if kind == "system" else ("linux", "riscv64")
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setattr(platform, "machine", lambda: machine)
        reason = f"opkit's native core is for Linux on x86_64 and aarch64, and this is {system} on {machine}"
    native.need()
    assert native.core() is None
    assert native.why_not() == reason
    switch("1")
    with pytest.raises(opkit.BuildError) as caught:
        native.need()
    assert str(caught.value) == (
        f"loading opkit's native core, which OPKIT_NATIVE=1 asks for: {reason}; expected a process that can have it. "
        "Unset OPKIT_NATIVE, and Python runs the ops."
    )
    with pytest.raises(opkit.BuildError, match="^building opkit's native core: "):
        native.build()


def test_a_cache_that_others_may_write_is_the_reason(switch, sources, cache_dir):
    cache_dir.mkdir()
    cache_dir.chmod(0o777)
    native.need()
    native._watch._thread.join()
    assert native.core() is None
    assert "may be written by others" in native.why_not()


@needs_compiler
def test_the_command_builds_it_and_a_failure_is_forgotten(switch, sources, capsys):
    library.remember_failure(opkit.BuildError("it was not built", log_path=Path("log.txt")))
    assert library.find_failure().message == "it was not built"
    assert cli.main(["build", "--native"]) == 0
    assert capsys.readouterr().out == f"native core: {library.cached()}\n"
    assert library.find_failure() is None
    assert cli.main(["build", "--native"]) == 0
    (sources / "unit_module.cpp").write_text(NOT_A_CORE)
    switch()
    assert cli.main(["build", "--native"]) == 1
    assert "this is no core" in capsys.readouterr().err


def test_the_core_includes_no_header_that_its_key_leaves_out():
    for path in library.SOURCES.glob("*"):
        included = re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text(), re.MULTILINE)
        assert all((library.SOURCES / name).exists() for name in included), path
        assert not re.search(r"#\s*include\s*<opkit/", path.read_text()), path


# ---------------------------------------------------------------- processes


class Copy:
    """A copy of opkit with a small core, a cache and a compiler of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(
            ROOT / "opkit", folder / "opkit", ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )
        self.core = folder / "opkit" / "dispatch" / "native" / "core"
        shutil.rmtree(self.core)
        self.core.mkdir()
        (self.core / "unit_module.cpp").write_text(CORE)
        self.compiler = folder / "g++"
        self.write_compiler()
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("OPKIT_")},
            "PYTHONPATH": str(folder),
            "OPKIT_CACHE_DIR": str(folder / "cache"),
            "CXX": str(self.compiler),
        }

    def write_compiler(self, then: str = "") -> None:
        text = COMPILER.format(folder=self.folder, cxx=shutil.which("g++") or "c++", then=then)
        self.compiler.write_text(text)
        self.compiler.chmod(0o755)

    def go(self) -> None:
        """Let compilers end."""
        (self.folder / "go").touch()

    def stop(self) -> None:
        (self.folder / "go").unlink()

    def compiled(self) -> int:
        """How often something was compiled."""
        try:
            return len((self.folder / "compiled").read_text().split())
        except FileNotFoundError:
            return 0

    def start(self, code: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", PRELUDE + code],
            cwd=self.folder, env=self.environment, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, code: str) -> tuple[str, str]:
        """What a process that ends well prints on stdout and stderr."""
        process = self.start(code)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        return out, err

    def libraries(self) -> list[Path]:
        return sorted((self.folder / "cache" / "lib").glob("opkit_core-*/*/opkit_core.so"))


PRELUDE = """
import sys, time
from opkit.dispatch import native
def wait(until, what="it"):
    limit = time.monotonic() + 90
    while not until():
        assert time.monotonic() < limit, what + ": " + str(native.why_not())
        time.sleep(0.01)
"""
SWITCHES = """
called = []
native.when_ready(lambda: called.append(native.core()))
assert native.core() is None and called == []
native.need()
native.need()
assert native.why_not() == "it is being built in the background", native.why_not()
print("needed", flush=True)
wait(lambda: native.core())
assert native.why_not() is None and called == [native.core()]
native.when_ready(lambda: called.append("at once"))
assert called[1:] == ["at once"]
print(native.core().torch_version)
"""
RELEASE = torch.__version__.split("+")[0]
SAID = (
    f"opkit: building the native core for torch {torch.__version__} in the background, once; until it is there Python "
    "runs the ops (OPKIT_NATIVE=0 leaves it at that)\n"
)


@pytest.fixture
def copy(tmp_path):
    return Copy(tmp_path)


def eventually(condition) -> None:
    limit = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


@needs_compiler
def test_a_running_process_goes_over_when_the_core_is_built(copy):
    process = copy.start(SWITCHES)
    assert process.stdout.readline() == "needed\n"  # it goes on while the compiler has not ended
    eventually(copy.compiled)
    copy.go()
    out, err = process.communicate(timeout=120)
    assert (out, err, process.returncode) == (f"{RELEASE}\n", SAID, 0)
    out, err = copy.run("assert native.core() is not None; native.need(); print(native.why_not())")
    assert (out, err) == ("None\n", "")
    assert copy.compiled() == 1


@needs_compiler
def test_one_process_builds_for_all(copy):
    processes = [copy.start(SWITCHES) for _ in range(4)]
    for process in processes:
        assert process.stdout.readline() == "needed\n"
    eventually(copy.compiled)
    copy.go()
    said = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert (out, process.returncode) == (f"{RELEASE}\n", 0), err
        said.append(err)
    assert sorted(said) == ["", "", "", SAID]
    assert copy.compiled() == 1


@needs_compiler
def test_a_process_that_ends_first_leaves_the_builder_its_work(copy):
    # Its pipes are closed when it ends, or this would wait for the compiler, which waits for what comes next.
    out, err = copy.run("import os; native.need(); wait(lambda: os.path.exists('compiled')); print('over')")
    assert (out, err) == ("over\n", SAID)
    assert copy.libraries() == []
    process = copy.start(SWITCHES)  # waits for the same builder
    assert process.stdout.readline() == "needed\n"
    copy.go()
    out, err = process.communicate(timeout=120)
    assert (out, err, process.returncode) == (f"{RELEASE}\n", "", 0)
    assert copy.compiled() == 1


@needs_compiler
def test_a_builder_that_is_killed_leaves_nothing_and_its_turn_to_others(copy):
    killed = copy.folder / "killed"
    copy.write_compiler(f'[ -e {killed} ] || {{ touch {killed}; kill -9 -$(ps -o sid= -p $$ | tr -d " "); }}')
    first = copy.start("native.need(); wait(lambda: 'ended' in native.why_not()); print(native.why_not())")
    out, err = first.communicate(timeout=120)
    why = "building it ended with exit code -9; `opkit build --native` shows more"
    assert (out, first.returncode) == (f"{why}\n", 0), err
    assert err == f"{SAID}opkit: the native core was not built, and Python runs the ops: {why}\n"
    assert copy.libraries() == []
    copy.go()
    out, err = copy.run(SWITCHES)
    assert (out, err) == (f"needed\n{RELEASE}\n", SAID)


@pytest.mark.slow
@needs_compiler
def test_a_failure_is_told_once_and_not_tried_again_before_something_changes(copy):
    copy.go()
    (copy.core / "unit_module.cpp").write_text(NOT_A_CORE)
    fails = (
        "native.need(); wait(lambda: 'no core' in native.why_not()); print(native.why_not().splitlines()[0])"
    )
    out, err = copy.run(fails)
    line = r"building opkit's native core: .*"
    assert re.fullmatch(line, out.strip())
    told = re.fullmatch(
        re.escape(SAID)
        + rf"opkit: the native core was not built, and Python runs the ops: {line} The log is "
        r"(/.*/log\.txt)\. It is tried again for another torch or compiler, or by `opkit build --native`\.\n",
        err,
    )
    assert told, err
    assert "this is no core" in Path(told[1]).read_text()
    before = copy.compiled()
    assert copy.run(fails) == (out, "")
    assert copy.compiled() == before
    copy.write_compiler("true")  # another compiler
    assert copy.run(fails)[1] != ""
    assert copy.compiled() > before
    (copy.core / "unit_module.cpp").write_text(CORE)
    assert copy.run(SWITCHES) == (f"needed\n{RELEASE}\n", SAID)


@needs_compiler
def test_only_the_first_rank_of_a_job_speaks(copy):
    copy.go()
    copy.environment["RANK"] = "1"
    assert copy.run(SWITCHES) == (f"needed\n{RELEASE}\n", "")


@needs_compiler
def test_a_forked_child_waits_for_itself(copy):
    process = copy.start("""
import os
native.need()
wait(lambda: os.path.exists("compiled"))
if (child := os.fork()) == 0:
    native.need()
    print("needed", flush=True)
    wait(lambda: native.core())
    print("child", flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
wait(lambda: native.core())
print("parent")
""")
    assert process.stdout.readline() == "needed\n"
    copy.go()
    out, err = process.communicate(timeout=120)
    assert (out, err, process.returncode) == ("child\nparent\n", SAID, 0)
    assert copy.compiled() == 1


@needs_compiler
def test_a_process_that_ends_while_the_core_arrives_ends_well(copy):
    copy.go()
    for seconds in ("0", "0.2"):
        out, err = copy.run(f"""
native.when_ready(lambda: time.sleep({seconds}))
native.need()
wait(lambda: list(__import__("pathlib").Path("cache/lib").glob("opkit_core-*/*/opkit_core.so")))
print("over")
""")
        assert (out, err.replace(SAID, "")) == ("over\n", "")
        shutil.rmtree(copy.folder / "cache")


@needs_compiler
def test_importing_and_asking_build_nothing(copy):
    assert copy.run("import opkit; native.core(); native.when_ready(print); print(native.why_not())") == (
        "no op was called so far that it would be built for\n",
        "",
    )
    assert {path.name for path in (copy.folder / "cache").glob("*")} <= {"plugins"}  # torch asked for devices


# ---------------------------------------------------------------- wheels


@pytest.mark.slow
@needs_compiler
def test_a_wheel_with_the_core_needs_no_compiler(copy, tmp_path):
    copy.go()
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    shutil.copytree(copy.folder / "opkit", source / "opkit")
    shutil.copytree(ROOT / "kernels", source / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    prebuilt_folder = source / "opkit" / "dispatch" / "native" / "prebuilt"
    run = subprocess.run(
        [sys.executable, "-m", "opkit.dispatch.native", str(prebuilt_folder)],
        cwd="/", env={**copy.environment, "PYTHONPATH": str(source)}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    options = ["--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "wheel", *options, "--wheel-dir", tmp_path, source], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("torch_opkit-*.whl")
    assert wheel.name.endswith(f"-py3-none-{sysconfig.get_platform().replace('-', '_')}.whl")
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--target", target, wheel], check=True)
    run = subprocess.run(
        [sys.executable, "-c", "from opkit.dispatch import native; native.need(); print(native.core().__file__)"],
        cwd="/", capture_output=True, text=True,
        env={"PATH": "/nonexistent", "CXX": "/nonexistent", "PYTHONPATH": str(target), "HOME": str(tmp_path)},
    )  # fmt: skip
    assert run.stdout.strip() == str(
        target / "opkit/dispatch/native/prebuilt" / Path(run.stdout.strip()).name
    )
    assert run.stderr == ""
