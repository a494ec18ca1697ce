"""A module's source as a stub: what type checkers read of it, with statements replaced by what names stand for.

Bodies of functions are left out, everything that a type checker infers something from stays as it is written.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable

from opkit.stubs._names import Names

Replaced = Callable[[str], "str | None"]

_LEFT_OUT = re.compile(r":\n +\.\.\.$", re.MULTILINE)
_BLOCKS = ("body", "orelse", "finalbody")


def stub(source: str, replaced: Replaced, names: Names) -> str:
    """Return the text of a stub, without the imports that `names` asks for.

    Args:
        source: of the module.
        replaced: returns the text that stands for an assignment to a name, or None where it stays.
        names: what the stub uses.
    """
    return layout(_block(ast.parse(source).body, replaced, names))


def layout(nodes: list[ast.stmt]) -> str:
    """Return statements as text, with bodies that are left out on the line of their head."""
    lines = []
    for node in nodes:
        text = _LEFT_OUT.sub(": ...", ast.unparse(node))
        is_apart = isinstance(node, (ast.ClassDef, ast.If, ast.Try)) or text.startswith("@")
        lines += ["", text] if is_apart else [text]
    return "\n".join(lines).strip("\n")


def _block(nodes: list[ast.stmt], replaced: Replaced, names: Names) -> list[ast.stmt]:
    return [found for node in nodes for found in _statement(node, replaced, names)]


def _statement(node: ast.stmt, replaced: Replaced, names: Names) -> list[ast.stmt]:
    """Return what stands for a statement of a module."""
    if isinstance(node, ast.ImportFrom) and node.module == "__future__":  # stubs have it all
        return []
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        for alias in node.names:  # without an `as`, what a stub imports is not the module's
            if alias.name != "*" and "." not in alias.name:
                alias.asname = alias.asname or alias.name
        return [node]
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return [_function(node)]
    if isinstance(node, ast.ClassDef):
        return [_class(node, names)]
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        given = [target.id for target in targets if isinstance(target, ast.Name)]
        if len(given) == len(targets) and (
            texts := [t for name in given if (t := replaced(name)) is not None]
        ):
            return ast.parse("\n".join(texts)).body
        if isinstance(node.value, ast.Constant) and "\n" in str(node.value.value):
            node.value.value = ""  # the whole source of a kernel, perhaps
        return [node]
    if isinstance(node, (ast.If, ast.Try, ast.With)):
        if isinstance(node, ast.If) and _is_main(node.test):
            return []
        for part in _BLOCKS:
            if inner := getattr(node, part, None):
                setattr(node, part, _block(inner, replaced, names) or [ast.Pass()])
        for handler in getattr(node, "handlers", ()):
            handler.body = _block(handler.body, replaced, names) or [ast.Pass()]
        return [node]
    if isinstance(node, (ast.For, ast.While)):
        bound = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        return [_declaration(name, None, None, names) for name in sorted(bound)]
    if isinstance(node, (ast.Expr, ast.Assert)):
        return []
    return [node]


def _is_main(test: ast.expr) -> bool:
    return ast.unparse(test).startswith("__name__ ==")


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.stmt:
    node.body = [ast.Expr(ast.Constant(...))]
    return node


def _class(node: ast.ClassDef, names: Names) -> ast.stmt:
    body: list[ast.stmt] = []
    for inner in node.body:
        if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body += _attributes(inner, set(map(_bound, body)), names)
            body.append(_function(inner))
        elif isinstance(inner, ast.ClassDef):
            body.append(_class(inner, names))
        elif not isinstance(inner, (ast.Expr, ast.For, ast.While)):
            body.append(inner)
    node.body = body or [ast.Expr(ast.Constant(...))]
    return node


def _bound(node: ast.stmt) -> str:
    """Return the name that a statement of a class binds, or nothing."""
    if isinstance(node, ast.AnnAssign):
        return ast.unparse(node.target)
    return ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else ""


def _attributes(
    method: ast.FunctionDef | ast.AsyncFunctionDef, known: set[str], names: Names
) -> list[ast.stmt]:
    """Return declarations of the attributes that a method gives to its object."""
    if not method.args.args:
        return []
    own = method.args.args[0].arg
    annotations = {a.arg: a.annotation for a in (*method.args.args, *method.args.kwonlyargs) if a.annotation}
    found: list[ast.stmt] = []
    for node in ast.walk(method):
        pairs: list[tuple[ast.expr, ast.expr | None, ast.expr | None]] = []
        if isinstance(node, ast.Assign):
            for target in node.targets:
                parts = target.elts if isinstance(target, ast.Tuple) else None
                pairs += [(one, None, None) for one in parts] if parts else [(target, None, node.value)]
        elif isinstance(node, ast.AnnAssign):
            pairs = [(node.target, node.annotation, node.value)]
        for target, annotation, value in pairs:
            if (
                not (isinstance(target, ast.Attribute) and ast.unparse(target.value) == own)
                or target.attr in known
            ):
                continue
            known.add(target.attr)
            if annotation is None and isinstance(value, ast.Name):
                annotation = annotations.get(value.id)
            found.append(_declaration(target.attr, annotation, value, names))
    return found


def _declaration(name: str, annotation: ast.expr | None, value: ast.expr | None, names: Names) -> ast.stmt:
    if annotation is None and isinstance(value, ast.Constant) and value.value is not None:
        annotation = ast.Name(type(value.value).__name__)
    if annotation is None:
        annotation = ast.Name(names.use("typing", "Any"))
    return ast.AnnAssign(ast.Name(name), annotation, None, 1)
