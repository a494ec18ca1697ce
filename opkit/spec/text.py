"""From the text of a torch schema to a `Schema`: for `schema=`, for `declare`, and for ops of others.

The text is parsed by torch, and then read for what opkit has to know of it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from opkit import _torch_library
from opkit.errors import SchemaError
from opkit.spec import results as forms
from opkit.spec import types
from opkit.spec.results import Result
from opkit.spec.schema import REQUIRED, Param, Schema, check_name, describe
from opkit.spec.signature import refuse_mode
from opkit.spec.types import ValueType

_TYPE = re.compile(r"(\w+)(?:\(([^)]*)\))?(\?)?(?:\[(\d*)\](\?)?)?")


def from_text(text: str, doing: str) -> Schema:
    """Return the schema that `namespace::name(arguments) -> results` says.

    Args:
        text: the whole schema.
        doing: begins the error texts: "declaring an op".

    Raises:
        SchemaError: torch does not parse it, or an op cannot be so.
    """
    parsed = parse(text, doing)
    if parsed.overload_name:
        raise SchemaError(
            f"{doing} {text!r}: it has the overload name {parsed.overload_name!r}; expected one overload, the default "
            "one. Give it a name of its own.",
            op=parsed.name,
        )
    check_name(parsed.name)
    return of_parsed(parsed, doing)


def parse(text: str, doing: str) -> Any:
    """Return torch's own parsed schema.

    Raises:
        SchemaError: torch does not parse it.
    """
    try:
        parsed = _torch_library.parse_schema(text)
    except (RuntimeError, IndexError) as err:
        said = " ".join(line.strip() for line in str(err).splitlines()[:2] if line.strip())
        raise SchemaError(
            f"{doing} {text!r}: torch cannot parse it: {said} Expected a schema such as "
            "'demo::f(Tensor x, float eps=1e-6) -> Tensor'. Correct it."
        ) from None
    return parsed


def of_parsed(parsed: Any, doing: str) -> Schema:
    """Return the schema of one that torch has parsed.

    Raises:
        SchemaError: a result aliases an argument, or is of a type that no op can return.
    """
    name = parsed.name
    arguments, returned = _sides(str(parsed))
    params = []
    for argument, written in zip(parsed.arguments, arguments, strict=True):
        value_type, alias = _type(written)
        mutated = alias.endswith("!")
        if mutated and (value_type.optional or value_type.optional_elements):
            raise SchemaError(
                f"{doing} {name}: its argument {argument.name} is {written}; only a Tensor or Tensor[] that is always "
                "given can be mutated. Declare two ops, one with and one without it.",
                op=name,
            )
        has = argument.has_default_value()
        default = _default(argument.default_value, value_type) if has else REQUIRED
        params.append(Param(argument.name, value_type, default, argument.kwarg_only, mutated))
    results = []
    for index, (result, written) in enumerate(zip(parsed.returns, returned, strict=True)):
        value_type, alias = _type(written)
        where = result.name or ("out" if len(returned) == 1 else f"out{index}")
        if alias:
            raise SchemaError(
                f"{doing} {name}: its result {where} is {written}, which shares storage with an argument; expected "
                "fresh results, since compiled code may overwrite either. Return a copy, or nothing where an argument "
                "is mutated.",
                op=name,
            )
        if not forms.can_be_returned(value_type):
            raise SchemaError(
                f"{doing} {name}: its result {where} is {written}; expected {forms.ACCEPTED}. Return one of these.",
                op=name,
            )
        results.append(Result(where, value_type))
    refuse_mode(params, f"{doing} {name}", name)
    return Schema(name, tuple(params), tuple(results), tuple if len(results) > 1 else None)


def for_function(
    name: str, text: str, function: Callable[..., Any], mutates: Sequence[str], scope: Mapping[str, Any]
) -> Schema:
    """Return the schema that `schema=` says for `function`.

    Names, order and defaults must be the function's. Of its annotations only the return annotation counts, where
    it is a NamedTuple or dataclass. A default that only the function has is filled in by the Op.

    Raises:
        SchemaError: torch does not parse it, or it does not fit the function.
    """
    check_name(name)
    where = f"declaring {name} from {describe(function)}"

    def error(found: str, advice: str) -> SchemaError:
        return SchemaError(f"{where}: {found}. {advice}", op=name)

    head, _, rest = text.partition("(")
    if head.strip() not in ("", name, name.split("::")[1]):
        raise error(f"schema= is for {head.strip()!r}; expected {name}", "Leave the name out of the text.")
    schema = of_parsed(parse(f"{name}({rest}", f"{where}: reading schema="), where)
    parameters = list(inspect.signature(function).parameters.values())
    kinds = [(p.name, p.kind is p.KEYWORD_ONLY) for p in parameters]
    if kinds != [(p.name, p.keyword_only) for p in schema.params]:
        raise error(
            f"schema= has the arguments ({_listed((p.name, p.keyword_only) for p in schema.params)}); expected those "
            f"of the function, ({_listed(kinds)})",
            "Make them the same.",
        )
    written = [p.name for p in schema.params if p.mutated]
    if mutates and sorted(mutates) != sorted(written):
        raise error(
            f"mutates_args names {', '.join(mutates)}, schema= marks {', '.join(written) or 'none'} as written to",
            "Leave mutates_args out.",
        )
    params = []
    for param, parameter in zip(schema.params, parameters, strict=True):
        default = parameter.default
        if isinstance(default, tuple) and param.type.is_list:
            default = list(default)
        if default is REQUIRED:
            params.append(param)
            continue
        if not types.is_value(default, param.type) or param.default not in (REQUIRED, default):
            said = "" if param.default is REQUIRED else f", in schema= it is {param.default!r}"
            raise error(
                f"parameter {param.name!r} has the default {parameter.default!r}; expected one of the type "
                f"{param.type}{said}",
                "Make them the same.",
            )
        params.append(replace(param, default=default, filled=param.default is REQUIRED))
    schema = replace(schema, params=tuple(params))
    container = _container(function, scope)
    if container is None:
        return schema
    fields = forms.names(container)
    if len(fields) != len(schema.results):
        raise error(
            f"schema= has {len(schema.results)} results, {container.__name__} has {len(fields)} fields; expected as "
            "many",
            "Make them the same.",
        )
    results = tuple(replace(r, name=n) for r, n in zip(schema.results, fields, strict=True))
    return replace(schema, results=results, container=container)


def _container(function: Callable[..., Any], scope: Mapping[str, Any]) -> Any:
    """Return the NamedTuple or dataclass that a function returns, or None."""
    annotation = getattr(function, "__annotations__", {}).get("return")
    if isinstance(annotation, str):
        try:
            annotation = eval(annotation, getattr(function, "__globals__", {}), dict(scope))
        except Exception:  # schema= is the way out for what opkit cannot read
            return None
    return annotation if forms.is_container(annotation) else None


def _listed(kinds: Iterable[tuple[str, bool]]) -> str:
    return ", ".join(f"*, {name}" if keyword_only else name for name, keyword_only in kinds)


def _sides(text: str) -> tuple[list[str], list[str]]:
    """Return the arguments and the results of a schema as torch prints it, each as its type and name."""
    start = text.index("(")
    arguments, end = _split(text, start + 1)
    returned = text[text.index("->", end) + 2 :].strip()
    if not returned.startswith("("):
        returned = f"({returned})"
    return [a for a in arguments if a != "*"], _split(returned, 1)[0]


def _split(text: str, start: int) -> tuple[list[str], int]:
    """Split at the commas of one level, from `start` to the parenthesis that closes it."""
    parts, depth, quote, begin = [], 0, "", start
    place = start
    while place < len(text):
        sign = text[place]
        if quote:
            if sign == "\\":
                place += 1
            elif sign == quote:
                quote = ""
        elif sign in "\"'":
            quote = sign
        elif sign in "([":
            depth += 1
        elif sign in ")]" and depth:
            depth -= 1
        elif not depth and sign in ",)":
            parts.append(text[begin:place].strip())
            begin = place + 1
            if sign == ")":
                break
        place += 1
    return [p for p in parts if p], place


def _type(written: str) -> tuple[ValueType, str]:
    """Return the type of an argument or result as torch prints it, and its alias: `a!`, or nothing."""
    found = _TYPE.match(written)
    assert found is not None, written
    base, alias, mark, count, after = found.groups()
    rest = written[found.end() :]
    if base in ("Dict", "Union", "Future") or rest.startswith(("[", "(")):  # what only schema= can name
        return ValueType(written.rsplit("=", 1)[0].rsplit(" ", 1)[0]), ""
    if count is None:
        return ValueType(base, optional=bool(mark)), alias or ""
    return ValueType(base, True, bool(after), bool(mark), int(count) if count else None), alias or ""


def _default(value: Any, value_type: ValueType) -> Any:
    """Return a default as Python code gets it; torch has numbers for dtypes and layouts."""
    if value_type.is_list or not isinstance(value, int):
        return value
    if value_type.base == "ScalarType":
        return _torch_library.dtype_of(value)
    return {"Layout": torch.strided, "MemoryFormat": torch.contiguous_format}.get(value_type.base, value)
