"""`opkit stubs`: where it writes, what it leaves alone, how it reads modules. In tests/typing is what checkers see."""

from __future__ import annotations

import enum
import sys
import types

import pytest

from opkit import cli
from opkit.stubs import MARK, _extensions, _source
from opkit.stubs._names import Names

pytestmark = pytest.mark.usefixtures("registry")

OPS = """
import opkit
from torch import Tensor

def define():
    @opkit.op("stubbed::plus")
    def plus(x: Tensor, by: float = 1.0) -> Tensor: return x + by

define()
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `stubbed` in the working folder; it is forgotten after the test."""
    folder = tmp_path / "stubbed"
    folder.mkdir()
    (folder / "__init__.py").write_text("from stubbed.names import plus\n")
    (folder / "ops.py").write_text(OPS)
    (folder / "names.py").write_text("import opkit\nimport stubbed.ops\nplus = opkit.get('stubbed::plus')\n")
    (folder / "__main__.py").write_text("raise SystemExit('never imported')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] in ("stubbed", "script")]:
        del sys.modules[name]


def test_modules_with_something_reached_by_name_get_a_stub_beside_them(package, capsys):
    assert cli.main(["stubs", "stubbed"]) == 0
    assert capsys.readouterr().out == f"{package / 'names.pyi'}\n"
    assert sorted(path.name for path in package.glob("*.pyi")) == ["names.pyi"]
    text = (package / "names.pyi").read_text()
    assert text.startswith(f"{MARK}\n")
    assert "@opkit.op('stubbed::plus')\ndef plus(x: Tensor, by: float=1.0) -> Tensor: ...\n" in text
    assert cli.main(["stubs", "stubbed"]) == 0  # its own it writes anew
    assert (package / "names.pyi").read_text() == text


def test_a_folder_gets_the_stubs_of_all_modules(package, tmp_path, capsys):
    assert cli.main(["stubs", "stubbed", "-o", "typings"]) == 0
    names = [f"typings/stubbed/{name}.pyi" for name in ("__init__", "names", "ops")]
    assert capsys.readouterr().out.splitlines() == names
    assert "from stubbed.names import plus as plus" in (tmp_path / names[0]).read_text()
    assert not list(package.glob("*.pyi"))


def test_ops_without_a_name_get_a_stub_of_their_own(package, capsys):
    (package / "names.py").unlink()
    (package / "__init__.py").write_text("import stubbed.ops\n")
    assert cli.main(["stubs", "stubbed"]) == 0
    assert capsys.readouterr().out == f"{package / '_opkit_ops.pyi'}\n"
    text = (package / "_opkit_ops.pyi").read_text()
    assert "#         from stubbed._opkit_ops import plus\n" in text
    assert '#         plus = opkit.get("stubbed::plus")\n' in text
    assert "def plus(x: Tensor, by: float=1.0) -> Tensor: ..." in text


def test_a_script_gets_one_too(package, tmp_path, capsys):
    (tmp_path / "script.py").write_text(f"{OPS}\nbound = opkit.get('stubbed::plus')\n")
    assert cli.main(["stubs", "script.py"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "script.pyi")
    assert "def bound(x: Tensor, by: float=1.0) -> Tensor: ..." in (tmp_path / "script.pyi").read_text()


def test_check_says_what_is_to_be_written(package, capsys):
    stub = package / "names.pyi"
    assert cli.main(["stubs", "stubbed", "--check"]) == 1
    assert capsys.readouterr().out == f"{stub}: missing; write it with opkit stubs\n"
    assert not stub.exists()
    assert cli.main(["stubs", "stubbed"]) == 0
    capsys.readouterr()
    assert cli.main(["stubs", "stubbed", "--check"]) == 0
    assert capsys.readouterr().out == ""
    stub.write_text(f"{stub.read_text()}\nmore: int\n")
    assert cli.main(["stubs", "stubbed", "--check"]) == 1
    assert capsys.readouterr().out == f"{stub}: not up to date; write it with opkit stubs\n"


def test_a_module_that_reaches_nothing_by_name(tmp_path, monkeypatch, capsys):
    (tmp_path / "script.py").write_text("three = 3\n")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["stubs", "script.py"]) == 0
    assert (
        capsys.readouterr().out
        == "script reaches nothing by name: type checkers see all there is in its source\n"
    )


# ---------------------------------------------------------------- what is refused


def test_a_stub_of_somebody_else_is_left_alone(package, capsys):
    (package / "names.pyi").write_text("plus: int\n")
    assert cli.main(["stubs", "stubbed"]) == 1
    assert capsys.readouterr().err == (
        f"opkit: writing the stubs of stubbed: {package / 'names.pyi'} exists, and opkit did not write it; expected "
        "none, or one that it did. Remove it, or name another folder with -o.\n"
    )
    assert (package / "names.pyi").read_text() == "plus: int\n"


def test_a_package_that_does_not_exist(capsys):
    assert cli.main(["stubs", "no_such_package"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(
        "opkit: importing no_such_package: there is no such module or file; expected a module"
    )


def test_a_module_that_fails(package, capsys):
    (package / "broken.py").write_text("raise ValueError('out of tensors')\n")
    assert cli.main(["stubs", "stubbed"]) == 1
    assert capsys.readouterr().err == (
        "opkit: writing stubs for stubbed.broken: importing it failed with ValueError: out of tensors. Expected it to "
        "import, as what its names stand for is known only then. Correct it.\n"
    )
    assert not list(package.glob("*.pyi"))


def test_a_module_that_imports_what_is_not_installed_stays_as_it_is(package, tmp_path, capsys):
    (package / "extra.py").write_text("import no_such_extra\nplus = no_such_extra.plus\n")
    with pytest.warns(UserWarning, match="no_such_extra") as warned:
        assert cli.main(["stubs", "stubbed", "-o", "typings"]) == 0
    assert str(warned[0].message) == (
        "writing stubs for stubbed.extra: it imports no_such_extra, which is not installed here; expected it, as what "
        "names stand for is known only then. They stay as they are; install no_such_extra for more."
    )
    assert "plus = no_such_extra.plus" in (tmp_path / "typings" / "stubbed" / "extra.pyi").read_text()
    assert "def plus" in (tmp_path / "typings" / "stubbed" / "names.pyi").read_text()


def test_a_module_without_a_source(capsys):
    assert cli.main(["stubs", "math"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("opkit: writing stubs for math: it has no source in Python (")
    assert said.endswith("); expected a package or a module that has. Name one.\n")


# ---------------------------------------------------------------- how sources and modules are read


def stub(source: str) -> str:
    names = Names({})
    return _source.stub(source, lambda name: None, names)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("from __future__ import annotations\nimport os.path\nfrom .a import b, c as d, _e", "import os.path\n"
         "from .a import b as b, c as d, _e as _e"),
        ("from a import *", "from a import *"),
        ('"""Says what it is."""\nprint(1)\nassert True', ""),
        ("for i in range(3):\n    last = i", "i: Any\nlast: Any"),
        ("if __name__ == '__main__':\n    import a", ""),
        ("if a:\n    def f(x): return x\nelse:\n    print(2)", "if a:\n\n    def f(x): ...\nelse:\n    pass"),
        ("with a as b:\n    c = b.read()", "with a as b:\n    c = b.read()"),
        ("TEXT = '''one\ntwo'''\nMODE: Literal['a'] = 'a'", "TEXT = ''\nMODE: Literal['a'] = 'a'"),
        ("async def f(x: int = 3) -> int:\n    'Doc.'\n    return x", "async def f(x: int=3) -> int: ..."),
        ("class A:\n    'Doc.'", "class A: ..."),
        ("class A:\n    x = 1\n    def f(self, y: int, z) -> None:\n        self.x = self.y = y\n"
         "        self.z, other.w = z, z\n"
         "        self.u = z\n        self.v: list[int] = []",
         "class A:\n    x = 1\n"
         "    y: int\n    z: Any\n    u: Any\n    v: list[int]\n\n    def f(self, y: int, z) -> None: ..."),
    ],
)  # fmt: skip
def test_a_source_keeps_what_type_checkers_infer_from(source, text):
    assert stub(source) == text


def documented(doc):
    def function():
        raise NotImplementedError

    function.__doc__ = doc
    return function


def test_a_module_of_pybind11_with_classes():
    """The docstrings are those that pybind11 3.1 writes."""

    class Mode(enum.Enum):
        A = 1

    class Counter:
        __init__ = documented("__init__(self: fast.Counter, n: typing.SupportsInt = 3) -> None")
        add = documented("add(self: fast.Counter, arg0: torch.Tensor, arg1: float) -> torch.Tensor")
        count = property(documented("(self: fast.Counter) -> int"))
        n = property(
            documented("(self: fast.Counter) -> int"), documented("(self: fast.Counter, arg0: int) -> None")
        )
        make = staticmethod(documented("make() -> fast.Counter"))

    module = types.ModuleType("fast")
    Mode.__qualname__, Counter.__qualname__ = "Mode", "Counter"
    module.Mode, module.Counter, module.Gone = Mode, Counter, None
    module.pick = documented(
        "pick(mode: fast.Mode = <Mode.A: 0>, x: fast.Nothing | None = None) -> std::pair<int, int>"
    )
    module.name = documented("other(x: int) -> int")
    text = _extensions.module("mod", module, Names({}))
    for line in (
        "class _mod:", "class Counter:", "def __init__(self, n: SupportsInt=3) -> None: ...",
        "def add(self, arg0: Tensor, arg1: float, /) -> Tensor: ...", "def count(self) -> int: ...",
        "@n.setter", "def n(self, value: int) -> None: ...", "def make() -> _mod.Counter: ...",
        "A: _mod.Mode", "def pick(mode: _mod.Mode=..., x: Any | None=None) -> Any: ...",
        "def name(*args: Any, **kwargs: Any) -> Any: ...", "Gone: Any", "mod: _mod",
    ):  # fmt: skip
        assert line in [one.strip() for one in text.splitlines()], text
    compile(text, "stub", "exec", dont_inherit=True)


def test_a_name_that_the_module_uses_for_something_else_gets_another():
    names = Names({"Tensor": int, "Any": __import__("typing").Any})
    assert [names.use("torch", "Tensor"), names.use("typing", "Any"), names.use("torch")] == [
        "_Tensor",
        "Any",
        "torch",
    ]
    assert names.imports() == ["import torch", "from torch import Tensor as _Tensor"]
