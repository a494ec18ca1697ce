"""A module that `opkit.cpp.load` made, as a class in a stub: its functions by the first line of their docstrings.

There opkit's own binding and pybind11 write the signature, in Python's types where they know one.
"""

from __future__ import annotations

import ast
import importlib
import operator
import re
import types
from collections.abc import Mapping
from typing import Any

from opkit.stubs._names import Names
from opkit.stubs._signatures import indented

_CPP = re.compile(r"\w+(?:::\w+)+(?:<[^()]*?>)?")  # a C++ type that Python has no name for
_VALUE = re.compile(r"= <[^<>]*>")
_OVERLOAD = re.compile(r"^\d+\. (.+)$", re.MULTILINE)
_BUILTIN = (
    "int", "float", "bool", "str", "bytes", "bytearray", "complex", "list", "tuple", "dict", "set", "object",
)  # fmt: skip
_MODULES = ("collections.abc", "numpy", "numpy.typing", "os", "torch", "types", "typing")


def module(name: str, found: types.ModuleType, names: Names) -> str:
    """Return a module under a name: a class with what is in it, and the name as an instance."""
    body = _Writing(found, f"_{name}", names).members(vars(found))
    own = "__name__: str\n__file__: str\n"  # and not a ModuleType, which to type checkers has every name
    return f"class _{name}:\n{indented(own + body)}\n\n{name}: _{name}"


class _Writing:
    """The writing of one module, whose class is called `path` in the stub."""

    def __init__(self, module: types.ModuleType, path: str, names: Names) -> None:
        self.module = module
        self.path = path
        self.names = names

    def members(self, found: Mapping[str, Any], owner: type | None = None) -> str:
        """Return what is in the module, or in a class of it."""
        blocks = [
            self._member(name, value, owner)
            for name, value in sorted(found.items())
            if name.isidentifier() and (name == "__init__" if name.startswith("_") else True)
        ]
        return "\n".join(blocks) or "pass"

    def _member(self, name: str, value: Any, owner: type | None) -> str:
        if isinstance(value, type):
            return f"class {name}:\n{indented(self.members(vars(value), value))}"
        if isinstance(value, property):
            return self._property(name, value)
        if callable(value) or isinstance(value, staticmethod):
            return self._function(name, value, owner)
        if owner is not None and type(value) is owner:  # of an enumeration
            return f"{name}: {self._own(owner.__qualname__)}"
        kind = type(value).__name__
        return f"{name}: {kind if kind in _BUILTIN else self._any()}"

    def _property(self, name: str, value: property) -> str:
        doc = _doc(value.fget).partition("\n")[0]
        returned = self._signature(name, f"{name}{doc[doc.find('(') :] if '(' in doc else ''}")[1]
        written = f"@property\ndef {name}(self) -> {returned}: ..."
        if value.fset is not None:
            written += f"\n@{name}.setter\ndef {name}(self, value: {returned}) -> None: ..."
        return written

    def _function(self, name: str, value: Any, owner: type | None) -> str:
        doc = _doc(value.__func__ if isinstance(value, staticmethod) else value)
        signatures = _OVERLOAD.findall(doc) if doc.startswith(f"{name}(*args, **kwargs)\n") else []
        lines = []
        for written in signatures or [doc.partition("\n")[0]]:
            parameters, returned = self._signature(name, written)
            is_method = owner is not None and not isinstance(value, staticmethod)
            if is_method and not parameters.startswith("self"):
                parameters = f"self, {parameters}"
            lines += [f"@{self.names.use('typing', 'overload')}"] if len(signatures) > 1 else []
            lines += [] if is_method else ["@staticmethod"]
            lines += [f"def {name}({parameters}) -> {returned}: ..."]
        return "\n".join(lines)

    def _signature(self, name: str, written: str) -> tuple[str, str]:
        """Return parameters and result as a stub has them; where they cannot be read, those of any function."""
        text = _VALUE.sub("= ...", _CPP.sub("object.Unknown", written))
        try:
            parsed: ast.stmt | None = ast.parse(f"def {text}: ...").body[0]
        except SyntaxError:
            parsed = None
        if not isinstance(parsed, ast.FunctionDef) or parsed.name != name:
            return f"*args: {self._any()}, **kwargs: {self._any()}", self._any()
        taken = parsed.args
        for argument in (*taken.posonlyargs, *taken.args, *taken.kwonlyargs):
            annotation, argument.annotation = argument.annotation, None
            if annotation is not None and argument.arg != "self":
                argument.annotation = self._known(annotation)
        if all(re.fullmatch(r"arg\d+|self", a.arg) for a in taken.args):  # nobody can pass them by name
            taken.posonlyargs, taken.args = [*taken.posonlyargs, *taken.args], []
        returned = self._any() if parsed.returns is None else ast.unparse(self._known(parsed.returns))
        return ast.unparse(taken), returned

    def _known(self, annotation: ast.expr) -> ast.expr:
        """Return an annotation with names that the stub has, and Any for those that nobody knows."""
        if isinstance(annotation, (ast.Name, ast.Attribute)):
            return ast.Name(self._named(ast.unparse(annotation)))
        if isinstance(annotation, ast.BinOp):
            annotation.left, annotation.right = self._known(annotation.left), self._known(annotation.right)
        elif isinstance(annotation, ast.Subscript):
            annotation.value = self._known(annotation.value)
            if ast.unparse(annotation.value) == self._any():
                return annotation.value
            annotation.slice = self._known(annotation.slice)
        elif isinstance(annotation, (ast.Tuple, ast.List)):
            annotation.elts = [self._known(one) for one in annotation.elts]
        elif not isinstance(annotation, ast.Constant):
            return ast.Name(self._any())
        return annotation

    def _named(self, text: str) -> str:
        if text in _BUILTIN:
            return text
        top, _, last = text.rpartition(".")
        if text.startswith(f"{self.module.__name__}."):
            return self._own(text.partition(".")[2])
        if top in _MODULES and hasattr(importlib.import_module(top), last):
            return self.names.use(top, last)
        return self._any()

    def _own(self, name: str) -> str:
        """Return what a class of the module is called in the stub."""
        try:
            operator.attrgetter(name)(self.module)
        except AttributeError:
            return self._any()
        return f"{self.path}.{name}"

    def _any(self) -> str:
        return self.names.use("typing", "Any")


def _doc(function: Any) -> str:
    return (getattr(function, "__doc__", None) or "").strip()
