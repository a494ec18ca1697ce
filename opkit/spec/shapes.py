"""The shape line: `*b n, n -> *b n:x, *b 1:float32`, read into entries.

    line       = entries "->" entries          entries = entry {"," entry} | nothing
    entry      = dims [":" suffix]             one entry per Tensor argument, per Tensor result
               | "[" dims "]" [":" suffix]     a list of tensors, the shape of each
    dims       = dim {dim}
    dim        = name | number | "*" name | "_" | "..." | "()" | expression without spaces | "?" name ["<=" bound]
    bound      = name | number | expression without spaces
    suffix     = a dtype, the name of a Tensor argument, or of a dtype argument

Responsible for the text only: what the words mean for one schema is decided in `plan`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from opkit.errors import ShapeError
from opkit.spec.sizes import LARGEST

_LONGEST = 500  # characters of an expression; how deep Python parses depends on the process
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod)


@dataclass(frozen=True)
class Dim:
    """One dimension, or with `star` any number of them. `text` is a Python expression over names.

    With `is_open` it is a name for a size that depends on data, which is at most `bound` where there is one.
    """

    text: str
    star: bool = False
    column: int = field(default=0, compare=False)
    is_open: bool = False
    bound: Dim | None = None

    @property
    def is_name(self) -> bool:
        """Whether it is a plain name, which its first appearance binds."""
        return not (self.star or self.is_open) and self.text.isidentifier() and self.text != "_"

    @property
    def is_any(self) -> bool:
        """Whether it stands for any size: `_`, or `...` where it also stands for any number."""
        return self.text in ("_", "...")

    def names(self) -> tuple[str, ...]:
        """Return the names in it, in order: those that say how large it is, or may become."""
        if self.is_open:
            return self.bound.names() if self.bound else ()
        if self.text.isidentifier():  # most are, and it is cheaper than to look for names in it
            return (self.text,) if self.text != "_" else ()
        return tuple(dict.fromkeys(re.findall(r"[A-Za-z_]\w*", self.text)))

    def __str__(self) -> str:
        if self.is_open:
            return f"?{self.text}" + (f"<={self.bound}" if self.bound else "")
        return f"*{self.text}" if self.star and self.text != "..." else self.text


@dataclass(frozen=True)
class Entry:
    """The shape of one tensor, or of each in a list, and the suffix that says its dtype.

    `dtypes` are names of those that an annotation allows, where it allows several; a line's text has none.
    """

    dims: tuple[Dim, ...]
    suffix: str | None = None
    column: int = field(default=0, compare=False)
    is_list: bool = False
    dtypes: tuple[str, ...] = ()

    @property
    def usual_dtype(self) -> str:
        """The dtype among those of an annotation that somebody most likely wants."""
        return next((d for d in ("float32", "int64", "complex64") if d in self.dtypes), self.dtypes[0])

    @property
    def star(self) -> int | None:
        """The position of the dimension that stands for any number, or None."""
        return next((i for i, dim in enumerate(self.dims) if dim.star), None)

    def __str__(self) -> str:
        shape = " ".join(map(str, self.dims)) or "()"
        shape = f"[{shape}]" if self.is_list else shape
        return shape + (f":{self.suffix}" if self.suffix else "")


@dataclass(frozen=True)
class ShapeLine:
    """A parsed shape line; `str` gives it back in its plain spelling."""

    inputs: tuple[Entry, ...]
    outputs: tuple[Entry, ...]

    def __str__(self) -> str:
        left, right = (", ".join(map(str, side)) for side in (self.inputs, self.outputs))
        return f"{left} -> {right}".strip()


_parsed: dict[str, ShapeLine] = {}


def parse(text: str, *, op: str) -> ShapeLine:
    """Read a shape line.

    Raises:
        ShapeError: the text is no shape line; a caret stands under the column.

    Example:
        >>> line = parse("*b n, n -> *b n:x, *b 1:float32", op="demo::rms_norm")
        >>> str(line.outputs[1]), line.outputs[1].suffix
        ('*b 1:float32', 'float32')
    """
    if isinstance(text, str) and text in _parsed:
        return _parsed[text]
    if not isinstance(text, str):
        raise ShapeError(
            f"reading the shape line of {op}: found {text!r}; expected text as in 'n -> n'.", op=op
        )
    if text.count("->") != 1:
        raise error(text, 0, op, f"found {text.count('->')} arrows", "one '->' between inputs and outputs")
    left, right = text.split("->")
    line = ShapeLine(_entries(text, left, 0, op), _entries(text, right, len(left) + 2, op))
    _parsed[text] = line  # ops of one library have few different ones
    return line


def error(text: str, column: int, op: str, found: str, expected: str) -> ShapeError:
    """Return the error for a place in a shape line, with a caret under it."""
    shown = "".join(c if c.isprintable() else " " for c in text)  # a line break would move what follows it
    return ShapeError(
        f"reading the shape line of {op}: {found} at column {column + 1}; expected {expected}.\n"
        f"    {shown}\n    {' ' * column}^\n"
        "Write one entry per Tensor argument, '->', and one per Tensor result, "
        "as in '*b n, n -> *b n:x, *b 1:float32'.",
        op=op,
    )


def _entries(text: str, side: str, offset: int, op: str) -> tuple[Entry, ...]:
    if not side.strip():
        return ()
    entries = []
    for part in side.split(","):
        entries.append(_entry(text, part, offset, op))
        offset += len(part) + 1
    return tuple(entries)


def _entry(text: str, part: str, offset: int, op: str) -> Entry:
    shape, colon, suffix = part.partition(":")
    start = offset + len(part) - len(part.lstrip())
    if colon and not suffix.strip().isidentifier():
        column = offset + len(shape) + 1
        raise error(text, column, op, f"the suffix {suffix.strip()!r}", "a dtype or an argument's name")
    is_list = shape.lstrip().startswith("[")
    if is_list:
        shape, offset = _elements(text, shape, offset, start, op)
    words = list(re.finditer(r"\S+", shape))
    if not words:
        found, rank0 = ("an empty list", "[()]") if is_list else ("an empty entry", "()")
        raise error(text, start, op, found, f"dimensions, or {rank0} for rank 0")
    dims = dimensions(text, words, offset, op) if [w.group() for w in words] != ["()"] else ()
    return Entry(dims, suffix.strip() or None, start, is_list)


def dimensions(text: str, words: Iterable[re.Match[str]], offset: int, op: str) -> tuple[Dim, ...]:
    """Read the dimensions of one entry, whose words begin `offset` characters into the text."""
    dims = tuple(_dim(text, word.group(), offset + word.start(), op) for word in words)
    stars = [d for d in dims if d.star]
    if len(stars) > 1:
        raise error(
            text, stars[1].column, op, f"{stars[1]} after {stars[0]}", "at most one of these in an entry"
        )
    return dims


def _elements(text: str, shape: str, offset: int, start: int, op: str) -> tuple[str, int]:
    """Return what stands in the brackets of a list, and where it begins."""
    before, closed, after = shape.partition("]")
    if not closed:
        raise error(text, start, op, "'[' without ']'", "']' after the dimensions of the list's elements")
    if after.strip():
        column = offset + len(before) + 1 + len(after) - len(after.lstrip())
        raise error(text, column, op, f"{after.strip()!r} after ']'", "a suffix or the end of the entry")
    return before[before.index("[") + 1 :], start + 1


def _dim(text: str, word: str, column: int, op: str) -> Dim:
    if word == "...":
        return Dim(word, star=True, column=column)
    if word.startswith("*") and word[1:].isidentifier() and word.isascii():
        return Dim(word[1:], star=True, column=column)
    if word[0] == "?":
        return _open(text, word, column, op)
    if word[0] == "[":
        raise error(text, column, op, f"{word!r}", "a dimension; a list is an entry by itself, as in [a b]")
    size = _size(text, word, column, op)
    if size is None:
        raise error(
            text,
            column,
            op,
            f"{word!r}",
            "a name, a number, *name, _, ..., (), ?name or an expression like 2*n",
        )
    return size


def _open(text: str, word: str, column: int, op: str) -> Dim:
    name, less, after = word[1:].partition("<=")
    if not (name.isascii() and name.isidentifier() and name != "_"):
        raise error(text, column, op, f"{word!r}", "?name or ?name<=bound for a size that depends on data")
    if not less:
        return Dim(name, column=column, is_open=True)
    at = column + len(name) + 3
    bound = _size(text, after, at, op) if after not in ("", "_") else None
    if bound is None:
        raise error(
            text, at, op, f"the bound {after!r}", "a name, a number or an expression without spaces like 2*n"
        )
    return Dim(name, column=column, is_open=True, bound=bound)


def _size(text: str, word: str, column: int, op: str) -> Dim | None:
    """Return a name, a number or an expression, or None where the word is none of them."""
    if word.isascii() and word.isdigit():
        digits = word.lstrip("0") or "0"
        if len(digits) > 19 or int(digits) > LARGEST:
            raise error(text, column, op, "a number that no size can have", "one below 2**63")
        return Dim(digits, column=column)
    if (word.isascii() and word.isidentifier()) or _is_expression(word):
        return Dim(word, column=column)
    return None


def _is_expression(word: str) -> bool:
    # A number runs up to an operator: Python would warn of 2n before refusing it.
    tokens = re.findall(r"[A-Za-z_]\w*|\d+(?!\w)|[-+*/%()]", word, flags=re.ASCII)
    if "".join(tokens) != word or len(word) > _LONGEST:
        return False
    try:
        tree = ast.parse(word, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp):
            if not isinstance(node.op, _OPERATORS):
                return False
        elif isinstance(node, ast.Constant):
            if type(node.value) is not int or node.value > LARGEST:
                return False
        elif not isinstance(node, (ast.Name, ast.Load, ast.operator)):
            return False
    return True
