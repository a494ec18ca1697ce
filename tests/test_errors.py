from __future__ import annotations

import pickle
from pathlib import Path

import pytest

import opkit
from opkit import errors

TREE = {
    "SchemaError": TypeError, "ArgumentError": ValueError,
    "ShapeError": ValueError, "DtypeError": TypeError, "OutputError": RuntimeError,
    "DuplicateOpError": ValueError, "OpNotFoundError": KeyError, "RegistrationError": ValueError,
    "BackendError": LookupError,
    "NoKernelError": NotImplementedError, "GradientError": RuntimeError, "BuildError": RuntimeError,
    "FrozenError": RuntimeError, "DeviceError": RuntimeError, "ConfigError": ValueError, "VmapError": RuntimeError,
    "PluginError": RuntimeError,
}  # fmt: skip


@pytest.mark.parametrize(("name", "builtin"), TREE.items())
def test_error_is_also_the_builtin_that_a_caller_would_catch(name, builtin):
    kind = getattr(opkit, name)
    error = kind("what happened", op="a::b")
    assert isinstance(error, opkit.OpkitError)
    assert isinstance(error, builtin)
    assert (str(error), error.op) == ("what happened", "a::b")
    assert f"{kind.__module__}.{kind.__name__}" == f"opkit.{name}"
    assert kind.__doc__.startswith(("You ", "Your "))


def test_tree_in_the_docstring_is_the_tree():
    assert set(TREE) | {"OpkitError"} == {
        n for n, v in vars(errors).items() if isinstance(v, type) and n.endswith("Error")
    }
    for name, builtin in TREE.items():
        assert f"── {name}({builtin.__name__})" in errors.__doc__


def test_op_is_none_where_no_op_is_concerned():
    assert opkit.ConfigError("text").op is None


def test_build_error_has_what_tools_need():
    where = errors.Diagnostic("f.cpp", 3, 5, "no such thing")
    error = opkit.BuildError(
        "text", op="a::b", diagnostics=[where], log_path=Path("/log"), command="g++ f.cpp"
    )
    assert (error.diagnostics, error.log_path, error.command) == ((where,), Path("/log"), "g++ f.cpp")
    assert opkit.BuildError("text").diagnostics == ()


@pytest.mark.parametrize("name", TREE)
def test_errors_survive_pickling(name):
    error = pickle.loads(pickle.dumps(getattr(opkit, name)("text", op="a::b")))
    assert (type(error).__name__, str(error), error.op) == (name, "text", "a::b")


@pytest.mark.parametrize(
    ("name", "hint"), [("tow", " Did you mean 'two'?"), ("xyz", ""), ("two", " Did you mean 'two'?")]
)
def test_near_names_are_suggested(name, hint):
    assert errors.did_you_mean(name, ["one", "two"]) == hint
