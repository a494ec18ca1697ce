"""`opkit new`: an op, a package of ops or a plugin, written from templates; each passes its own tests as it is."""

from __future__ import annotations

import argparse
import keyword
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from opkit.errors import OpkitError

HELP = "write a new op, package or plugin, which passes its own tests as it is"

_TEMPLATES = Path(__file__).parent / "templates"
_NAMESPACE = "mylib"
_WORD = r"[a-z][a-z0-9]*(_[a-z0-9]+)*"
# Of modules that a file or a package of that name would hide.
_MODULES = ("conftest", "jinja2", "numpy", "opkit", "opkit_kernels", "pytest", "setup", "setuptools", "torch")
# Its keywords, and what every program has.
_CPP = (
    "alignas", "alignof", "and_eq", "asm", "auto", "bitand", "bitor", "bool", "break", "case", "catch", "char",
    "char8_t", "char16_t", "char32_t", "compl", "concept", "const", "const_cast", "consteval", "constexpr",
    "constinit", "continue", "co_await", "co_return", "co_yield", "decltype", "default", "delete", "do", "double",
    "dynamic_cast", "else", "enum", "explicit", "export", "extern", "false", "float", "for", "friend", "goto", "if",
    "inline", "int", "long", "main", "mutable", "namespace", "new", "noexcept", "not_eq", "nullptr", "operator",
    "or_eq", "private", "protected", "public", "register", "reinterpret_cast", "requires", "short", "signed",
    "sizeof", "static", "static_assert", "static_cast", "std", "struct", "switch", "template", "this",
    "thread_local", "throw", "true", "typedef", "typeid", "typename", "union", "unsigned", "using", "virtual",
    "void", "volatile", "wchar_t", "xor", "xor_eq",
)  # fmt: skip
_USED = ("x", "weight", "y", "test")  # by the templates


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(metavar="KIND", required=True)

    def kind(name: str, action: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        parser = kinds.add_parser(name, help=text, description=text)
        parser.set_defaults(action=action)
        return parser

    op = kind("op", _op, "a folder with an op, a C++ kernel for it and tests of both")
    op.add_argument("name", metavar="NAME", help=f"namespace::name; without a namespace it is {_NAMESPACE}")
    package = kind("package", _package, "a package of ops, whose wheel has the kernels compiled")
    package.add_argument("name", metavar="NAME", help="of the package, such as fast_ops")
    added = kind("plugin", plugin, "an installable plugin: kernels for ops, its own or others', or a device")
    added.add_argument("name", metavar="NAME", help="of the plugin, and of its ops' namespace or its device")
    added.add_argument("--kind", default="kernel-cpp", choices=("kernel-python", "kernel-cpp", "device"))
    for one in (op, package, added):
        one.add_argument(
            "--into", metavar="FOLDER", default=".", help="where the new folder is made; default: here"
        )


def run(arguments: argparse.Namespace) -> int:
    code: int = arguments.action(arguments)
    return code


def _op(arguments: argparse.Namespace) -> int:
    from opkit import _scaffold

    namespace, _, name = arguments.name.rpartition("::")
    _check("op", name, arguments.name, [*_MODULES, *_CPP, *_USED])
    namespace = namespace or _NAMESPACE
    from opkit.spec.schema import check_name

    check_name(f"{namespace}::{name}")
    folder = Path(arguments.into, name)
    doing, values = f"writing the op {arguments.name}", {"name": name, "op": f"{namespace}::{name}"}
    return _tell(_scaffold.write(doing, [_TEMPLATES / "op"], folder, values), folder)


def _package(arguments: argparse.Namespace) -> int:
    from opkit import _scaffold

    name, project = arguments.name.replace("-", "_"), arguments.name.replace("_", "-")
    _check("package", name, arguments.name, _MODULES)
    from opkit.spec.schema import check_name

    check_name(f"{name}::scale")
    folder = Path(arguments.into, project)
    doing, values = f"writing the package {arguments.name}", {"name": name, "project": project}
    written = _scaffold.write(doing, [_TEMPLATES / "package"], folder, values)
    return _tell(written, folder, "pip install --no-build-isolation -e '.[test]'")


def plugin(arguments: argparse.Namespace) -> int:
    """Write a plugin; `opkit plugins new` does the same."""
    from opkit.plugins import scaffold

    written = scaffold.write(arguments.name, arguments.kind, Path(arguments.into))
    folder = Path(arguments.into, f"opkit-{arguments.name}")
    return _tell(written, folder, "pip install -e '.[test]'")


def _tell(written: Iterable[Path], folder: Path, *before: str) -> int:
    """Print what was written, and how to try it."""
    for path in written:
        print(path)
    commands = [f"cd {shlex.quote(str(folder))}", *before, "python -m pytest"]
    print(f"to try it: {' && '.join(commands)}")
    return 0


def _check(kind: str, name: str, given: str, taken: Iterable[str]) -> None:
    """Raise OpkitError where a name would not do for files, or for what is in them."""
    if not re.fullmatch(_WORD, name):
        found = f"the name {given!r}"
        advice = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_").lstrip("_0123456789") or "scale"
    elif keyword.iskeyword(name) or name in taken or name in sys.stdlib_module_names or _is_test(name):
        by = "Python, C++ or pytest" if kind == "op" else "Python, pytest or another package"
        found = f"the name {given!r}, which is taken by {by}"
        advice = f"my_{name}"
    else:
        return
    raise OpkitError(
        f"writing the {kind}: found {found}; expected a lower-case word of letters, digits and single underscores, for "
        f"{'files and a C++ function' if kind == 'op' else 'a package'} of that name. Write {advice}."
    )


def _is_test(name: str) -> bool:
    return name.startswith("test_") or name.endswith("_test") or name in ("test", "tests")
