"""CUDA source as two programs, one for a C++ compiler and one for NVRTC, which has no host side.

Works on preprocessed text, so macros and headers are no concern of it; it runs no compiler. Lines keep their numbers.
It knows of C++ what it takes to tell functions from other declarations, and no more: text that it does not
understand passes unchanged, and the compilers say what is wrong with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

_TOKEN = re.compile(
    r"""
    (?P<skip> \s+ | //[^\n]* | /\*.*?\*/ )
  | (?P<directive> ^[ \t]*\#(?:[^\n\\]|\\.)* )
  | (?P<raw> (?:u8|u|U|L)?R"(?P<mark>[^()\\\s]{0,16})\(.*?\)(?P=mark)" )
  | (?P<text> (?:u8|u|U|L)?"(?:[^"\\\n]|\\.)*" | (?:u8|u|U|L)?'(?:[^'\\\n]|\\.)+' )
  | (?P<number> \.?\d(?:[eEpP][+-]|'?[\w.])* )
  | (?P<word> [^\W\d]\w* )
  | (?P<sign> <<<|>>>|<<=|>>=|<=>|::|->|<<|>>|<=|>=|==|!=|\.\.\.|. )
    """,
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_LINE_MARKER = re.compile(r'^# (\d+) "((?:[^"\\]|\\.)*)"([ \d]*)$', re.MULTILINE)
_OURS, _CUDA, _SYSTEM = "ours", "cuda", "system"
_CLOSING = {"(": ")", "[": "]", "{": "}"}
# Words that a parenthesis may follow in a declaration without being its list of parameters.
_WITH_PARENTHESES = _words(
    "alignas decltype noexcept explicit requires throw __attribute__ __attribute __align__ "
    "__builtin_align__ __launch_bounds__ __cluster_dims__ __block_size__ __maxnreg__ __declspec "
    "__asm__ asm __typeof__ typeof"
)
_BOUNDS = _words("__launch_bounds__ __cluster_dims__ __block_size__ __maxnreg__")
_SPACES = _words("__global__ __device__ __host__ __shared__ __constant__ __managed__ __grid_constant__")
_KEPT_ON_DEVICE = (_SPACES - {"__host__"}) | _words(
    "const constexpr consteval constinit using typedef template class struct union enum namespace "
    "static_assert concept friend"
)
KERNEL = "opkit_kernel"
"""The variable that every kernel has on the host; `launch.h` has its type."""
_STUB = '__attribute__((noinline, used, visibility("hidden")))'
_SPACE = re.compile(r"\b__(?:global|device|host|shared|constant|managed|grid_constant)__\b")
_TYPE_WORDS = _words(
    "void bool char short int long float double signed unsigned auto wchar_t char8_t char16_t char32_t"
)
_QUALIFIERS = _words("const volatile typename struct class enum union __restrict__ __restrict")


class Token(NamedTuple):
    """A token with the place in the text where it begins and ends."""

    text: str
    start: int
    end: int
    is_word: bool


class Declaration(NamedTuple):
    """A declaration or definition outside of functions, as indices of tokens."""

    first: int
    last: int
    opening: int | None  # the parenthesis before the parameters, of a function
    cut: int | None  # where the body of a function begins, or the initialisers of members before it
    words: frozenset[str]  # those outside of brackets
    in_class: bool

    @property
    def is_kernel(self) -> bool:
        return self.opening is not None and "__global__" in self.words

    @property
    def is_device_only(self) -> bool:
        return "__device__" in self.words and "__host__" not in self.words

    @property
    def is_absent_on_device(self) -> bool:
        if self.opening is not None and self.cut is not None:
            return self.words.isdisjoint(("__device__", "__global__", "constexpr", "consteval"))
        # A member takes part in the layout of its class.
        return not self.in_class and self.words.isdisjoint(_KEPT_ON_DEVICE)


def host(text: str, cuda: Sequence[Path]) -> str:
    """Return the program for the C++ compiler, in which calling a kernel launches it.

    Args:
        text: CUDA source after the preprocessor.
        cuda: the folders of CUDA's headers, which are C++ but for the words that say where functions run.
    """
    program = _Program(text, cuda)
    for declaration in program.declarations():
        if declaration.is_kernel:
            _make_stub(program, declaration)
        elif declaration.is_device_only and declaration.opening is not None and declaration.cut is not None:
            program.blank(declaration.cut, declaration.last, ";")
    _rewrite_launches(program)
    for index, token in enumerate(program.tokens):
        if token.text in _BOUNDS and index + 1 in program.partner:
            program.edit(index, program.partner[index + 1], "")
        elif token.text in _SPACES:
            program.edit(index, index, "")
    return program.result({_SYSTEM: lambda text: text, _CUDA: lambda text: _SPACE.sub("", text)})


def device(text: str, cuda: Sequence[Path]) -> str:
    """Return the program for NVRTC: without what only the host has, and without the system's headers.

    Args:
        text: CUDA source after the preprocessor, with NVRTC's macros.
        cuda: the folders of CUDA's headers, which NVRTC takes as they are.
    """
    program = _Program(text, cuda)
    for declaration in program.declarations():
        if declaration.is_absent_on_device:
            program.blank(declaration.first, declaration.last)
    return program.result({_SYSTEM: lambda _: "", _CUDA: lambda text: text})


class _Program:
    """Source text with its tokens, and the edits that are to be made to it."""

    def __init__(self, text: str, cuda: Sequence[Path]) -> None:
        self.text = text
        self.regions = list(_regions(text, cuda))
        self.tokens = [
            Token(found[0], *found.span(), found.lastgroup == "word")
            for start, end, origin in self.regions
            if origin == _OURS
            for found in _TOKEN.finditer(text, start, end)
            if found.lastgroup not in ("skip", "directive")
        ]
        self.partner = _partners(self.tokens)
        self._edits: dict[tuple[int, int], str] = {}

    def edit(self, first: int, last: int, replacement: str) -> None:
        """Replace the tokens from `first` to `last`; the first edit of a place counts, and the widest."""
        self._edits.setdefault((self.tokens[first].start, self.tokens[last].end), replacement)

    def blank(self, first: int, last: int, replacement: str = "") -> None:
        """Replace tokens, keeping the numbers of the lines that follow."""
        within = self.text[self.tokens[first].start : self.tokens[last].end]
        lines = [line if _LINE_MARKER.match(line) else "" for line in within.split("\n")]
        self.edit(first, last, replacement + "\n".join(lines))

    def result(self, foreign: dict[str, Callable[[str], str]]) -> str:
        """Return the text after the edits; `foreign` says what becomes of text by where it is from."""
        parts: list[str] = []
        # What comes first is last, to be popped.
        edits = sorted(self._edits.items(), key=lambda edit: (-edit[0][0], edit[0][1]))
        at = 0
        for start, end, origin in self.regions:
            at = max(at, start)  # an edit may reach over an included file
            if origin == _OURS:
                while edits and edits[-1][0][0] < end:
                    (begin, until), replacement = edits.pop()
                    if begin >= at:
                        parts += (self.text[at:begin], replacement)
                        at = until
                parts.append(self.text[at:end])
            else:
                parts.append(foreign[origin](self.text[at:end]))
            at = max(at, end)
        return "".join(parts)

    def declarations(self) -> Iterator[Declaration]:
        """Yield what is declared in namespaces and classes; nothing where brackets do not match."""
        if self.partner:
            yield from self._scope(0, len(self.tokens), in_class=False)

    def _scope(self, at: int, end: int, *, in_class: bool) -> Iterator[Declaration]:
        while at < end:
            at = yield from self._declaration(at, end, in_class=in_class)

    def _declaration(self, first: int, end: int, *, in_class: bool) -> Generator[Declaration, None, int]:
        """Yield the declaration that begins at `first`, and those in it; return where the next begins."""
        words: set[str] = set()
        opening = cut = None
        has_value = has_bases = False
        at = first

        def found(last: int) -> Declaration:
            return Declaration(first, last, opening, cut, frozenset(words), in_class)

        while at < end:
            token, before = self.tokens[at], self.tokens[at - 1] if at > first else None
            if token.text == ";":
                yield found(at)
                return at + 1
            if token.text == "<" and opening is None and not has_value and before and before.is_word:
                at = self.after_angles(at) or at + 1
                continue
            if token.text == "operator":
                at += 3 if self._is(at + 1, "(") else 1  # operator() (...)
                while at < end and self.tokens[at].text not in ("(", ";"):
                    at += 1
                if opening is None and not has_value and self._is(at, "("):
                    opening = at
                continue
            if token.text in ("(", "["):
                if opening is None and not has_value and not has_bases and self._opens_parameters(at, first):
                    opening = at
                at = self.partner[at] + 1
                continue
            if token.text == "{":
                closing = self.partner[at]
                if "namespace" in words or (at == first + 2 and self._is(first, "extern")):
                    yield from self._scope(at + 1, closing, in_class=False)
                    return closing + 1
                if opening is None:
                    if (
                        not has_value
                        and not words.isdisjoint(("class", "struct", "union"))
                        and "enum" not in words
                    ):
                        yield from self._scope(at + 1, closing, in_class=True)
                    has_value = True  # a list of values, or all that follows are names of variables
                elif not has_value and not (
                    cut is not None and before and (before.is_word or before.text == ">")
                ):
                    cut = at if cut is None else cut
                    yield found(closing)
                    return closing + 1
                at = closing + 1
                continue
            if token.text == "=":
                has_value = True
            elif token.text == ":":
                if opening is not None and not has_value and cut is None:
                    cut = at
                elif at == first + 1 and self.tokens[first].text in ("public", "private", "protected"):
                    return at + 1
                has_bases = True
            elif token.is_word:
                words.add(token.text)
            at += 1
        return end

    def _is(self, at: int, text: str) -> bool:
        return at < len(self.tokens) and self.tokens[at].text == text

    def _opens_parameters(self, at: int, first: int) -> bool:
        before, after = self.tokens[at - 1], self.tokens[at + 1]
        if at == first or self.tokens[at].text != "(" or after.text in ("*", "&", "&&", "^"):
            return False
        if before.is_word:
            return before.text not in _WITH_PARENTHESES and before.text not in _TYPE_WORDS
        return before.text in (">", ">>", ">>>")

    def after_angles(self, at: int) -> int | None:
        """Return what follows the template arguments that begin at `at`; None where they do not end."""
        depth = 0
        while at < len(self.tokens):
            text = self.tokens[at].text
            if text == "<":
                depth += 1
            elif text in (">", ">>", ">>>"):
                depth -= len(text)
                if depth <= 0:
                    return at + 1
            elif text in _CLOSING:
                at = self.partner[at]
            elif text in (")", "]", "}", ";"):
                return None
            at += 1
        return None


def _regions(text: str, cuda: Sequence[Path]) -> Iterator[tuple[int, int, str]]:
    """Yield the parts of preprocessed text by where they are from: start, end, origin."""
    folders = tuple(f"{folder}/" for folder in cuda)
    start, origin, ours = 0, _OURS, set()
    for marker in _LINE_MARKER.finditer(text):
        file, is_system = marker[2], "3" in marker[3].split()
        if not is_system:
            ours.add(file)
        # Where one of the system's macros is expanded, gcc calls the user's own lines the system's.
        now = _CUDA if file.startswith(folders) else _OURS if file in ours else _SYSTEM
        if now != origin:
            yield start, marker.start(), origin
            start, origin = marker.start(), now
    yield start, len(text), origin


def _partners(tokens: list[Token]) -> dict[int, int]:
    """Return the closing bracket of every opening one, or nothing where some do not match."""
    partner, open_ = {}, []
    for index, token in enumerate(tokens):
        if token.text in _CLOSING:
            open_.append(index)
        elif token.text in (")", "]", "}"):
            if not open_ or _CLOSING[tokens[open_[-1]].text] != token.text:
                return {}
            partner[open_.pop()] = index
    return {} if open_ else partner


def _make_stub(program: _Program, kernel: Declaration) -> None:
    """Give a kernel one more parameter, the shape of the launch, and a body that launches it."""
    assert kernel.opening is not None
    for index in range(kernel.first, kernel.opening):
        if program.tokens[index].text == "__global__":
            program.edit(index, index, _STUB)
    names = []
    parameters = _parameters(program, kernel.opening)
    for number, (first, last) in enumerate(parameters):
        tokens = program.tokens[first : last + 1]
        name = _name(tokens)
        if name is None:
            name = f"opkit_{number}"
            program.edit(last, last, f"{tokens[-1].text} {name}")
        pack = "..." if any(token.text == "..." for token in tokens) else ""
        names.append(f"(void*)__builtin_addressof({name}){pack}")
    separator = ", " if parameters else ""
    program.edit(kernel.opening, kernel.opening, f"(::opkit::rtc::Config opkit_config{separator}")
    if kernel.cut is not None:
        arguments = ", ".join([*names, "nullptr"])
        program.blank(
            kernel.cut,
            kernel.last,
            f"{{ static ::opkit::rtc::Kernel {KERNEL}; void* opkit_arguments[] = {{{arguments}}}; "
            f"::opkit::rtc::launch({KERNEL}, opkit_config, opkit_arguments); }}",
        )


def _parameters(program: _Program, opening: int) -> list[tuple[int, int]]:
    """Return the tokens of every parameter, without its default value."""
    closing = program.partner[opening]
    if closing == opening + 2 and program.tokens[opening + 1].text == "void":
        program.edit(opening + 1, opening + 1, "")
        return []
    found = []
    first = at = opening + 1
    end: int | None = None  # before the default value
    while at < closing:
        text = program.tokens[at].text
        after = at + 1
        if text in _CLOSING:
            after = program.partner[at] + 1
        elif text == "<":
            after = min(program.after_angles(at) or closing + 1, closing + 1)
            after = after if after <= closing else at + 1
        elif text == "=" and end is None:
            end = at - 1
        if text == "," or after == closing:
            last = at - 1 if text == "," else after - 1
            found.append((first, last if end is None else end))
            first, end = at + 1, None
        at = after
    return found


def _name(parameter: list[Token]) -> str | None:
    """Return the name that a parameter has, or None where it has only a type."""
    tokens = [token.text for token in parameter]
    while tokens and tokens[-1] == "]":
        del tokens[len(tokens) - 1 - tokens[::-1].index("[") :]
    if len(tokens) < 2 or not parameter[len(tokens) - 1].is_word or tokens[-2] == "::":
        return None
    is_type = tokens[-1] in _TYPE_WORDS or tokens[-1] in _QUALIFIERS
    return None if is_type or _QUALIFIERS.issuperset(tokens[:-1]) else tokens[-1]


def _rewrite_launches(program: _Program) -> None:
    """Turn `f<<<grid, block>>>(x)` into `f(Config(grid, block), x)`."""
    if not program.partner:
        return
    for index, token in enumerate(program.tokens):
        if token.text != "<<<" or (index and program.tokens[index - 1].text == "operator"):
            continue
        at = index + 1
        while at < len(program.tokens) and program.tokens[at].text not in (")", "]", "}", ";"):
            if program.tokens[at].text == ">>>" and at + 1 in program.partner:
                has_arguments = program.partner[at + 1] != at + 2
                program.edit(index, index, "(::opkit::rtc::Config(")
                program.edit(at, at + 1, ")," if has_arguments else ")")
                break
            at = program.partner.get(at, at) + 1
