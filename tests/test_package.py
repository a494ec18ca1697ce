"""What must hold of the package as a whole: its imports, its names, and which room knows which."""

from __future__ import annotations

import ast
import json
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import opkit

PACKAGE = Path(opkit.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = sorted(
    ".".join(("opkit", *f.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for f in FILES
)


def python(code: str, **environment: str) -> str:
    """What a fresh process prints."""
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


# ---------------------------------------------------------------- importing


def test_import_loads_neither_torch_nor_an_extra_nor_a_plugin_and_compiles_nothing(tmp_path):
    loaded = python(
        "import opkit, sys, json; print(json.dumps(sorted(sys.modules)))", OPKIT_CACHE_DIR=str(tmp_path)
    )
    heavy = {
        "torch",
        "numpy",
        "numba",
        "triton",
        "rich",
        "matplotlib",
        "pytest",
        "opkit_kernels",
        "ninja",
        "jinja2",
    }
    found = {name.split(".")[0] for name in json.loads(loaded)}
    assert not found & heavy
    assert not {name for name in found if name.startswith("opkit_")}
    assert list(tmp_path.iterdir()) == []


def test_defining_an_op_compiles_nothing_and_loads_no_plugin(tmp_path):
    loaded = python(
        """
        import json, sys, opkit
        from torch import Tensor
        @opkit.op("t::f", shapes="n -> n")
        def f(x: Tensor) -> Tensor: return x + 1
        f.register_kernel("cpu", opkit.cpp.kernel("#error never compiled\\n"))
        f.kernels
        print(json.dumps(sorted(sys.modules)))
        """,
        OPKIT_CACHE_DIR=str(tmp_path), OPKIT_AUTOLOAD="0",
    )  # fmt: skip
    assert not {"numba", "triton", "torch._inductor", "torch._dynamo.convert_frame"} & set(json.loads(loaded))
    assert list(tmp_path.rglob("*.so")) == []


@pytest.mark.parametrize("seed", range(3))
def test_public_names_are_no_modules_whatever_is_imported_first(seed):
    names = [m for m in MODULES if "__main__" not in m]
    random.Random(seed).shuffle(names)
    code = f"""
        import importlib, types, opkit
        for name in {names!r}:
            importlib.import_module(name)
        modules = {{n for n in opkit.__all__ if isinstance(getattr(opkit, n), types.ModuleType)}}
        print(sorted(modules), callable(opkit.op), isinstance(opkit.op, types.FunctionType))
    """
    public = sorted(n for n in opkit.__all__ if (PACKAGE / n).is_dir() or (PACKAGE / f"{n}.py").is_file())
    assert python(code) == f"{public} True True"


def test_all_is_what_is_reachable():
    assert opkit.__all__ == sorted(opkit.__all__)
    for name in opkit.__all__:
        assert getattr(opkit, name) is not None
    from_star = python("from opkit import *; print(sorted(n for n in dir() if n[0] != '_'))")
    assert from_star == str(opkit.__all__)
    reachable = python("import opkit; [getattr(opkit, n) for n in opkit.__all__]; print(sorted(vars(opkit)))")
    modules = {m.split(".")[1] for m in MODULES if m.count(".")}
    public = {n for n in ast.literal_eval(reachable) if not n.startswith("_")} - modules
    helpers = {"Any", "TYPE_CHECKING", "annotations", "importlib"}
    assert public - helpers <= set(opkit.__all__)
    assert set(opkit.__all__) <= set(dir(opkit))


def test_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="module 'opkit' has no attribute 'nothing'"):
        opkit.nothing  # noqa: B018


# ---------------------------------------------------------------- arrows point down

RANKS = (
    ("__main__",), ("cli",), ("testing.plugin",), ("plugins",), ("bench",), ("notebook", "stubs", "testing"),
    ("_prepare", "_tune"), ("_cases",), ("_adopt",), ("_declare",), ("_make",), ("_op",),
    ("_kernels", "_rules", "_variants"), ("_compiled", "_inline"), ("_registry",),
    ("transforms",), ("dispatch",), ("cpp",),
    ("spec",), ("_frozen",), ("_torch_library",), ("_torch", "_torch_build", "_torch_compile", "_torch_device"),
    ("_html", "_scaffold", "_sources"), ("_logs",), ("errors", "_config"),
)  # fmt: skip
RANK = {room: rank for rank, rooms in enumerate(RANKS) for room in rooms}
RANK["_config"] = RANK["errors"] - 0.5  # it raises ConfigError


def room_of(module: str) -> str:
    if f"{module}.".startswith("opkit.testing.plugin."):
        return "testing.plugin"  # it looks into plugins, of which the rest of testing knows nothing
    return module.split(".")[1] if "." in module else "opkit"


def imports_of(tree: ast.AST) -> set[str]:
    """The modules of opkit that a file imports, lazily or at once, except for type checkers only."""
    skip = {id(n) for node in ast.walk(tree) if _type_checking(node) for n in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in skip:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = node.module or ""
            found |= {f"opkit.{a.name}" for a in node.names} if module == "opkit" else {module}
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("opkit.")
        ):
            found.add(node.value)
    return {m for m in found if m.split(".")[0] == "opkit" and room_of(m) in RANK}


def _type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_point_down(path):
    own = room_of(".".join(("opkit", *path.relative_to(PACKAGE).with_suffix("").parts)))
    if own == "__init__":
        return
    assert own in RANK, f"{own} has no place in the house, which RANK draws"
    up = {m for m in imports_of(ast.parse(path.read_text())) if RANK[room_of(m)] < RANK[own]}
    assert not up
    beside = {m for m in imports_of(ast.parse(path.read_text())) if RANK[room_of(m)] == RANK[own]}
    assert {room_of(m) for m in beside} <= {own, "_torch", "_torch_build", "_torch_compile", "_torch_device"}


def private_names_of_torch(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            chain = ast.unparse(node)
            if chain.startswith(("torch.", "forward_ad.")) and any(
                p.startswith("_") for p in chain.split(".")
            ):
                found.add(chain)
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
        found |= {m for m in modules if m.split(".")[0] == "torch" and "._" in m}
    return {f for f in found if "__" not in f}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_private_names_of_torch_are_used_in_one_place(path):
    if path.name.startswith("_torch"):
        return
    assert private_names_of_torch(ast.parse(path.read_text())) == set()


def test_private_names_of_torch_would_be_found():
    text = """
import torch._guards
from torch._C import x
from torch.autograd import _functions
torch._C._y(torch.__version__)
"""
    found = private_names_of_torch(ast.parse(text))
    assert {"torch._guards", "torch._C", "torch._C.x", "torch.autograd._functions", "torch._C._y"} == found


def test_every_public_function_says_what_it_does():
    for path in FILES:
        tree = ast.parse(path.read_text())
        assert path.stat().st_size == 0 or ast.get_docstring(tree), path
