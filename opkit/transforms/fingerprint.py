"""What a compiled graph depends on in an op's declaration, as one text: the part of compile caches' keys.

A function counts with its bytecode, constants, defaults and enclosed values, and with the functions, classes and
values of its module that it names, theirs included. Line numbers, comments and the place of the file do not count.
Not seen: what a function reads from files, the environment or C++, and attributes that it looks up by a computed
name. Where a value cannot be told from another one, there is no fingerprint, and the caches are bypassed.
"""

from __future__ import annotations

import dis
import enum
import functools
import hashlib
import pickle
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from opkit import _torch_library

_LARGEST = 1 << 20  # elements of a tensor whose values are still looked at
_MOST = 5000  # functions, classes and values in one fingerprint
# Known by their release, which is in torch's key, or never edited: not looked into.
_KNOWN = frozenset({"torch", "numpy", "triton", "sympy", "opkit", *sys.stdlib_module_names}) - {"__main__"}
_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis))


# What stands between the name of an op and that of a relative which opkit defines for compilers. They are no
# overloads: an op with a third one cannot be defined anew in torch before 2.15, which aborts then.
OF_OPKIT = "__opkit_"


class UnseenError(Exception):
    """A declaration holds a value that has no fingerprint; the text says which."""


def of(value: Any) -> tuple[str, frozenset[str]]:
    """Return the fingerprint of a value, and the names of the ops that it depends on.

    Of an op, which is what has a method `_declared`, counts what that returns.

    Raises:
        UnseenError: it holds a value that cannot be told from another one.
    """
    walk = _Walk()
    digest = hashlib.sha256()
    for part in walk.value(value):
        digest.update(repr(part).encode())
    return digest.hexdigest(), frozenset(walk.ops)


def depends(value: Any, op: str) -> bool:
    """Whether a declaration refers to an op, or might: to its function, as a formula, or in what these call."""
    try:
        return op in of(value)[1]
    except UnseenError:
        return True


class _Walk:
    """One walk through everything that a value refers to; each object counts once."""

    def __init__(self) -> None:
        self.ops: set[str] = set()
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []  # so that no id is used twice

    def value(self, value: Any) -> Iterator[Any]:
        if type(value) in _PLAIN:
            yield type(value).__name__, value
            return
        if isinstance(
            value, (tuple, frozenset, types.CodeType)
        ):  # whether equal ones are one object may vary
            yield from self._composite(value)
            return
        if id(value) in self._seen:
            yield "again", self._seen[id(value)]
            return
        self._seen[id(value)] = len(self._seen)
        self._kept.append(value)
        if len(self._seen) > _MOST:
            raise UnseenError(f"more than {_MOST} functions and values")
        yield from self._composite(value)

    def _composite(self, value: Any) -> Iterator[Any]:
        declared = getattr(type(value), "_declared", None)
        if declared is not None:
            self.ops.add(value.name)
            yield value.name
            yield from self.value(declared(value))
        elif isinstance(value, (list, tuple)):
            yield type(value).__qualname__, len(value)
            yield from self._all(value)
        elif isinstance(value, (set, frozenset)):
            yield "set", len(value)
            yield sorted(repr(list(self._apart(v))) for v in value)
        elif isinstance(value, Mapping):
            yield type(value).__qualname__, len(value)
            yield from self._all(x for item in value.items() for x in item)
        elif isinstance(value, functools.partial):
            yield "partial"
            yield from self._all((value.func, value.args, value.keywords))
        elif isinstance(value, types.MethodType):
            yield "method"
            yield from self._all((value.__func__, value.__self__))
        elif isinstance(value, (staticmethod, classmethod)):
            yield from self.value(value.__func__)
        elif isinstance(value, property):
            yield from self._all((value.fget, value.fset))
        elif isinstance(value, types.FunctionType):
            yield from self._function(value)
        elif isinstance(value, types.CodeType):
            yield from self._code(value, {})
        elif isinstance(value, type):
            yield from self._class(value)
        elif isinstance(value, types.ModuleType):
            yield "module", value.__name__  # what is used of it, the code that names it says
        elif isinstance(value, torch.Tensor):
            yield from self._tensor(value)
        else:
            yield from self._object(value)

    def _apart(self, value: Any) -> Iterator[Any]:
        """Walk through one of values that have no order, so that none depends on those before it."""
        walk = _Walk()
        walk.ops = self.ops
        return walk.value(value)

    def _all(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            yield from self.value(value)

    def _function(self, function: types.FunctionType) -> Iterator[Any]:
        yield "function", function.__qualname__
        if _known(function):
            yield function.__module__
            return
        yield from self._all((function.__defaults__, function.__kwdefaults__))
        for cell in function.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:
                content = "empty cell"
            yield from self.value(content)
        if hasattr(function, "__wrapped__"):
            yield from self.value(function.__wrapped__)
        yield from self._code(function.__code__, function.__globals__)

    def _code(self, code: types.CodeType, scope: Mapping[str, Any]) -> Iterator[Any]:
        yield "code", code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_flags
        for const in code.co_consts:
            if isinstance(const, types.CodeType):
                yield from self._code(const, scope)
            else:
                yield from self.value(const)
        for name in _imported(code):
            if _root(name) not in _KNOWN:
                raise UnseenError(f"a function that imports {name or 'from its package'} when it is called")
        for path in _named(code):
            found = scope.get(path[0], _NOTHING)
            if found is _NOTHING:
                continue  # a builtin, or not there yet
            for name in path[1:]:
                if not isinstance(found, types.ModuleType) or _root(found.__name__) in _KNOWN:
                    break
                found = getattr(found, name, None)
            yield path
            yield from self.value(found)

    def _class(self, cls: type) -> Iterator[Any]:
        yield "class", cls.__module__, cls.__qualname__
        if _known(cls):
            return
        yield from self._all(cls.__bases__)
        for name, member in sorted(vars(cls).items()):
            plain = isinstance(member, _MEMBERS) or callable(member)
            if plain and name not in _OF_A_CLASS:
                yield name
                yield from self.value(member)

    def _tensor(self, tensor: torch.Tensor) -> Iterator[Any]:
        yield "tensor", tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), str(tensor.device)
        if tensor.numel() > _LARGEST or tensor.is_meta or tensor.layout is not torch.strided:
            raise UnseenError(
                f"a tensor of shape {tuple(tensor.shape)}, dtype {tensor.dtype}, {tensor.layout}"
            )
        flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
        yield hashlib.sha256(bytes(flat.view(torch.uint8).tolist())).digest()

    def _object(self, value: Any) -> Iterator[Any]:
        kind = type(value)
        yield kind.__module__, kind.__qualname__
        if isinstance(value, enum.Enum):
            yield value.name
            yield from self.value(value.value)
        elif kind.__module__.startswith("opkit.") and hasattr(value, "__dict__"):
            yield from self.value(dict(vars(value)))
        elif (
            _root(kind.__module__) == "torch"
            and isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Tag))
        ) or isinstance(value, (_torch_library.OpOverload, _torch_library.OpOverloadPacket)):
            yield str(value)
        elif callable(value) and hasattr(value, "__name__") and _known(value):
            yield value.__name__  # a builtin function
        else:
            try:
                yield pickle.dumps(value)
            except Exception:
                raise UnseenError(
                    f"{kind.__module__}.{kind.__qualname__} object, which cannot be pickled"
                ) from None
            yield from self.value(kind)


_NOTHING = object()
_MEMBERS = (*_PLAIN, list, tuple, dict, property, staticmethod, classmethod)
# What a class has beside what is written in it; annotations count in the schema.
_OF_A_CLASS = frozenset(
    {
        "__module__",
        "__dict__",
        "__annotations__",
        "__annotate__",
        "__annotate_func__",
        "__weakref__",
        "__doc__",
    }
    | {"__firstlineno__", "__slots__", "__static_attributes__", "__annotations_cache__", "__parameters__"}
    | {"__orig_bases__", "_abc_impl"}
)


def _root(module: str | None) -> str:
    return (module or "").partition(".")[0]


def _known(value: Any) -> bool:
    """Whether a function or class is of a library that is not edited between two runs."""
    return _root(getattr(value, "__module__", None)) in _KNOWN


def _named(code: types.CodeType) -> list[tuple[str, ...]]:
    """Return the globals that code reads, each with the attributes that are taken of it at once: `math.tau`."""
    found: dict[tuple[str, ...], None] = {}
    path: list[str] = []
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            path = [instruction.argval]
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and path:
            found.pop(tuple(path), None) if len(path) > 1 else None
            path = [*path, instruction.argval]
        else:
            path = []
            continue
        found[tuple(path)] = None
    return list(found)


def _imported(code: types.CodeType) -> list[str]:
    return [i.argval for i in dis.get_instructions(code) if i.opname == "IMPORT_NAME"]


def of_graph(graph_module: Any, find: Callable[[str], Any]) -> list[tuple[str, str]]:
    """Return the fingerprints of the ops that a graph calls, by name; `find` gives the op of a name, or None.

    Raises:
        UnseenError: an op has none.
    """
    names: set[str] = set()
    for module in graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                if node.op == "call_function":
                    names.update(_called((node.target, *node.args, *node.kwargs.values())))
    pairs = []
    for name in sorted(names):
        op = find(name)
        if op is not None:
            try:
                pairs.append((name, of(op)[0]))
            except UnseenError as err:
                raise UnseenError(f"the declaration of {name} holds {err}") from None
    return pairs


def _called(values: Iterable[Any]) -> Iterator[str]:
    """Yield the names of the ops among a node's target and arguments; a higher-order op has them in the latter."""
    for value in values:
        if isinstance(value, _torch_library.OpOverload):
            yield value._schema.name.partition(OF_OPKIT)[0]
        elif isinstance(value, _torch_library.OpOverloadPacket):
            yield value._qualified_op_name.partition(OF_OPKIT)[0]
        elif isinstance(value, (list, tuple)):
            yield from _called(value)
