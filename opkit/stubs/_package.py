"""The stubs of a package: which of its modules need one, what is in it, and where it goes."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import types
from collections.abc import Iterator
from importlib.machinery import FileFinder
from pathlib import Path
from typing import Any, NamedTuple

import torch

from opkit import _registry, _torch_library
from opkit._op import Op
from opkit.cpp import extension
from opkit.errors import OpkitError, warn
from opkit.stubs import _extensions, _signatures, _source
from opkit.stubs._names import Names

MARK = "# Written by `opkit stubs`, which writes it anew; edit the module instead."
FILE = "_opkit_ops.pyi"

_OVERLOAD = type(torch.ops.aten.add.Tensor)
_OPERATOR = type(torch.ops.aten.add)
_NAMESPACE = type(torch.ops.aten)
_HOW = """\
# The ops that no name of the package stands for. There is no module of this name: it is for type checkers.
#
#     if TYPE_CHECKING:
#         from {module} import {name}
#     else:
#         {name} = opkit.get("{op}")
"""


def write(package: str, into: Path | None = None) -> list[Path]:
    """Write the stubs of a package, and return their files, changed or not.

    Args:
        package: the name of a package or a module, which is imported, with all of its modules.
        into: a folder for the stubs of all of its modules, for `mypy_path` or pyright's `stubPath`; by default a
            stub goes beside its module, and only modules with something reached by name get one.

    Raises:
        OpkitError: a module fails when it is imported, or a stub is there that opkit did not write.
    """
    texts = stubs(package, into)
    for path in texts:
        if path.exists() and MARK not in path.read_text(encoding="utf-8"):
            raise OpkitError(
                f"writing the stubs of {package}: {path} exists, and opkit did not write it; expected none, or one "
                "that it did. Remove it, or name another folder with -o."
            )
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(texts)


def stubs(package: str, into: Path | None = None) -> dict[Path, str]:
    """Return the texts of the stubs that `write` writes, by their files.

    Raises:
        OpkitError: a module fails when it is imported.

    Example:
        >>> stubs("opkit_kernels.vector_add.vector_add")  # reaches nothing by name
        {}
        >>> (stub,) = stubs("opkit_kernels.vector_add.vector_add", Path("typings")).values()
        >>> print(*[line for line in stub.splitlines() if "vector_add(" in line])
        def vector_add(a: Tensor, b: Tensor) -> Tensor: ...
    """
    modules = list(_modules(package))
    found: dict[Path, str] = {}
    for module in modules:
        text, is_needed = _stub(module)
        if is_needed or into is not None:
            found[_place(module.name, module.source, into)] = text
    if unbound := _unbound(package, modules):
        source = modules[0].source
        name = f"{package}.__init__" if source.name == "__init__.py" else package
        place = _place(name, source, into).with_name(FILE)
        found[place] = _of_ops(
            unbound, f"{package}.{place.stem}" if source.name == "__init__.py" else place.stem
        )
    return found


class _Module(NamedTuple):
    """A module with a source in Python, and what it has; nothing where it could not be imported."""

    name: str
    source: Path
    content: dict[str, Any]


def _modules(package: str) -> Iterator[_Module]:
    """Yield a package and its modules."""
    top = _imported(package)
    yield _Module(package, Path(top.__file__ or ""), vars(top))
    for info in pkgutil.walk_packages(getattr(top, "__path__", None) or [], f"{package}."):
        if info.name.rpartition(".")[2] == "__main__" or not isinstance(info.module_finder, FileFinder):
            continue
        spec = info.module_finder.find_spec(info.name)
        if spec is None or not str(spec.origin).endswith(".py"):
            continue
        try:
            content = vars(importlib.import_module(info.name))
        except ModuleNotFoundError as error:  # what is for other machines, or an extra
            if (error.name or package).partition(".")[0] == package.partition(".")[0]:
                raise _failed(info.name, error) from error
            warn(
                f"writing stubs for {info.name}: it imports {error.name}, which is not installed here; expected it, as "
                f"what names stand for is known only then. They stay as they are; install {error.name} for more."
            )
            content = {}
        except (Exception, SystemExit) as error:
            raise _failed(info.name, error) from error
        yield _Module(info.name, Path(str(spec.origin)), content)


def _failed(name: str, error: BaseException) -> OpkitError:
    return OpkitError(
        f"writing stubs for {name}: importing it failed with {type(error).__name__}: {error}. Expected it to import, "
        "as what its names stand for is known only then. Correct it."
    )


def _imported(name: str) -> types.ModuleType:
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name in (name, name.partition(".")[0]):
            raise OpkitError(
                f"writing stubs for {name}: there is no such module; expected one that Python finds. Correct the name, "
                "or start in the folder that has it."
            ) from None
        raise _failed(name, error) from error
    if not (module.__file__ or "").endswith(".py"):
        raise OpkitError(
            f"writing stubs for {name}: it has no source in Python ({module.__file__ or 'a namespace package'}); "
            "expected a package or a module that has. Name one."
        )
    return module


def _place(name: str, source: Path, into: Path | None) -> Path:
    if into is None:
        return source.with_suffix(".pyi")
    parts = name.split(".")
    if source.name == "__init__.py" and parts[-1] != "__init__":
        parts.append("__init__")
    return into.joinpath(*parts).with_suffix(".pyi")


def _stub(module: _Module) -> tuple[str, bool]:
    """Return the stub of a module, and whether it says more than the source."""
    names = Names({name: value for name, value in module.content.items() if not name.startswith("__")})
    put = []

    def replaced(name: str) -> str | None:
        text = _by_name(name, module.content.get(name), names)
        put.extend([name] if text is not None else [])
        return text

    body = _source.stub(module.source.read_text(encoding="utf-8"), replaced, names)
    return _joined(MARK, *names.imports(), "", body), bool(put)


def _by_name(name: str, value: Any, names: Names) -> str | None:
    """Return what a name stands for that was assigned something reached by name, or None where it was not."""
    if isinstance(value, Op):
        return _signatures.op(name, value, names)
    if isinstance(value, (_OVERLOAD, _OPERATOR)):
        return _signatures.overloads(name, value, names)
    if isinstance(value, _NAMESPACE):
        found = {full.partition("::")[2] for full in _torch_library.operators(value.name)}
        return _signatures.namespace(
            name, {one: getattr(value, one) for one in found if one.isidentifier()}, names
        )
    if isinstance(value, types.ModuleType) and value in extension.loaded():
        return _extensions.module(name, value, names)
    return None


def _unbound(package: str, modules: list[_Module]) -> list[Op[..., Any]]:
    """Return the ops that the package defines, when it is imported or as a plugin, and that none of its names is."""
    bound = {id(value) for module in modules for value in module.content.values()}
    every = filter(None, map(_registry.find, _registry.list_ops()))
    return [op for op in every if f"{op.__module__}.".startswith(f"{package}.") and id(op) not in bound]


def _of_ops(ops: list[Op[..., Any]], module: str) -> str:
    names = Names({})
    written = [_signatures.op(op.schema.symbol, op, names) for op in ops]
    how = _HOW.format(module=module, name=ops[0].schema.symbol, op=ops[0].name)
    body = _source.layout(ast.parse("\n".join(written)).body)
    return _joined(MARK, how.rstrip(), "", *names.imports(), "", body)


def _joined(*parts: str) -> str:
    return inspect.cleandoc("\n".join(parts)) + "\n"
