"""Annotations that say a shape, as jaxtyping's `Float[Tensor, "*b n"]`, read as entries of a shape line.

They are known by their attributes (`array_type`, `dim_str`, `dtypes`), so that jaxtyping is not needed. Responsible
for the annotations and for their agreement with `shapes=`; what a line means is said in `plan`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from opkit.errors import ShapeError
from opkit.spec import shapes
from opkit.spec.shapes import Dim, Entry, ShapeLine

if TYPE_CHECKING:
    from opkit.spec.schema import Param, Result, Schema

_DTYPES = tuple(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))


class Array(NamedTuple):
    """What an annotation says of a tensor: its dimensions as written, and names of dtypes, none where any will do."""

    text: str
    dims: str
    dtypes: tuple[str, ...]


def of_annotation(annotation: Any) -> Array | None:
    """Return what an annotation says, or None where it is none that has a shape."""
    kind, dims = getattr(annotation, "array_type", None), getattr(annotation, "dim_str", None)
    if not (isinstance(kind, type) and issubclass(kind, torch.Tensor) and isinstance(dims, str)):
        return None
    text = getattr(annotation, "__name__", repr(annotation))
    said = getattr(annotation, "dtypes", None)
    if not isinstance(said, (list, tuple)):  # a mark that stands for any
        return Array(text, dims, ())
    names = tuple(name for name in _DTYPES if any(_matches(one, name) for one in said))
    return Array(text, dims, names or ("none of torch's",))


def _matches(said: Any, name: str) -> bool:
    return bool(said.match(name)) if isinstance(said, re.Pattern) else said == name


def read(schema: Schema) -> ShapeLine | None:
    """Return the shape line that the annotations of a signature say, or None where none says a shape.

    What is annotated as a plain Tensor may have any shape: it has the entry `...`.

    Raises:
        ShapeError: an annotation says what a shape line cannot.
    """
    inputs, results = _tensors(schema.params), _tensors(schema.results)
    if not any(one.type.array for one in (*inputs, *results)):
        return None
    left, right = ([_entry(one, schema.name) for one in side] for side in (inputs, results))
    text = f"{', '.join(left)} -> {', '.join(right)}"
    try:
        line = shapes.parse(text, op=schema.name)
    except ShapeError as err:
        told = str(err).replace("reading the shape line of", "reading the annotations of", 1)
        raise ShapeError(told, op=schema.name) from None
    return ShapeLine(_with_dtypes(inputs, line.inputs), _with_dtypes(results, line.outputs))


def agreed(line: ShapeLine, said: ShapeLine, schema: Schema) -> ShapeLine:
    """Return a shape line with the dtypes that annotations say beside it.

    Raises:
        ShapeError: the two say different things of a tensor.
    """
    sides = []
    for group, own, other in (
        (schema.params, line.inputs, said.inputs),
        (schema.results, line.outputs, said.outputs),
    ):
        tensors = _tensors(group)
        if not len(tensors) == len(own) == len(other):  # `bind` says it with names
            return line
        sides.append(tuple(_agreed(*three, schema.name) for three in zip(tensors, own, other, strict=True)))
    return ShapeLine(*sides)


def _agreed(one: Param | Result, own: Entry, said: Entry, op: str) -> Entry:
    if one.type.array is None:
        return own
    dims = own.is_list == said.is_list and _same(own.dims, said.dims)
    named = own.suffix in _DTYPES and len(said.dtypes) > 0
    if not dims or (named and own.suffix not in said.dtypes):
        raise ShapeError(
            f"reading the shape line of {op}: {one.name} has the entry '{own}' and the annotation "
            f"{one.type.array.text}; expected both to say the same, '{said}'. Change one of them, or leave shapes= "
            "out.",
            op=op,
        )
    return replace(own, suffix=own.suffix or said.suffix, dtypes=said.dtypes)


def _same(own: Sequence[Dim], said: Sequence[Dim]) -> bool:
    """Whether dimensions are alike; an annotation that says any shape, or any size, agrees with all."""
    if [d.text for d in said] == ["..."]:
        return True
    return len(own) == len(said) and all(
        a.star == b.star if b.is_any else (a.text, a.star) == (b.text, b.star)
        for a, b in zip(own, said, strict=True)
    )


def _tensors(group: Sequence[Any]) -> list[Any]:
    return [one for one in group if one.type.base == "Tensor"]


def _with_dtypes(tensors: Sequence[Any], entries: Sequence[Entry]) -> tuple[Entry, ...]:
    return tuple(
        replace(entry, dtypes=one.type.array.dtypes) if one.type.array else entry
        for one, entry in zip(tensors, entries, strict=True)
    )


def _entry(one: Param | Result, op: str) -> str:
    """Return the entry of an argument or result as text."""
    array = one.type.array
    text = " ".join(_word(w, one.name, array, op) for w in array.dims.split()) or "()" if array else "..."
    suffix = f":{array.dtypes[0]}" if array and len(array.dtypes) == 1 and array.dtypes[0] in _DTYPES else ""
    if array and array.dtypes == ("none of torch's",):
        raise ShapeError(
            f"reading the annotations of {op}: {one.name} is annotated {array.text}, which allows no dtype of torch; "
            "expected one that does, as Float, Int or Shaped. Change the annotation.",
            op=op,
        )
    return (f"[{text}]" if one.type.is_list else text) + suffix


def _word(word: str, name: str, array: Array, op: str) -> str:
    """Return a dimension of jaxtyping's in the words of a shape line."""
    sign, size = re.fullmatch(r"([#*?_]*)(.*)", word, re.DOTALL).groups()  # type: ignore[union-attr]
    for letter, means in (("#", "broadcasts"), ("?", "depends on a place in a tree")):
        if letter in sign:
            raise ShapeError(
                f"reading the annotations of {op}: {name} is annotated {array.text}, where {word!r} "
                f"{means}; expected sizes that match exactly. Write the dimension without {letter!r}.",
                op=op,
            )
    if word == "..." or ("_" in sign and "*" in sign):
        return "..."
    if "_" in sign:
        return "_"
    if size.count("=") == 1:  # a size with a word for the reader: rows=3
        size = size.split("=")[1]
    return sign + size
