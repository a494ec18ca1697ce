from __future__ import annotations

import re
import warnings

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

import opkit
from opkit.spec import shapes


def parse(text):
    return shapes.parse(text, op="t::f")


def test_entries_keep_names_numbers_stars_and_suffixes():
    line = parse("*b n, 3 _ ...:int8 ->  b 2*n:x ,():float32")
    first, second = line.inputs
    assert [str(d) for d in first.dims] == ["*b", "n"]
    assert first.star == 0
    assert [d.is_name for d in first.dims] == [False, True]
    assert [d.is_any for d in second.dims] == [False, True, True]
    assert (second.star, second.suffix) == (2, "int8")
    assert [(str(e), e.suffix) for e in line.outputs] == [("b 2*n:x", "x"), ("():float32", "float32")]
    assert line.outputs[0].dims[1].names() == ("n",)
    assert line.outputs[1].dims == ()


def test_list_keeps_the_shape_of_its_elements():
    one, many, rank0 = parse("[n], [*s 2*n]:x -> [()]").inputs + parse("-> [()]").outputs
    assert (one.is_list, one.star, str(one)) == (True, None, "[n]")
    assert (many.star, many.suffix, str(many), many.column) == (0, "x", "[*s 2*n]:x", 5)
    assert [d.column for d in many.dims] == [6, 9]
    assert (rank0.dims, rank0.is_list) == ((), True)
    assert not parse("n -> n").inputs[0].is_list


def test_data_dependent_size_keeps_its_name_and_bound():
    free, bounded = parse("n -> ?m ?k<=n//2").outputs[0].dims
    assert [(d.text, d.is_open, d.is_name, d.is_any, d.star) for d in (free, bounded)] == [
        ("m", True, False, False, False),
        ("k", True, False, False, False),
    ]
    assert (free.bound, free.names(), bounded.names()) == (None, (), ("n",))
    assert (bounded.bound.text, bounded.bound.column) == ("n//2", 12)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("n->n", "n -> n"), ("  *b   n ,m->*b n", "*b n, m -> *b n"), ("->", "->"), ("n ->", "n ->"),
        ("-> 3:int8", "-> 3:int8"),
        ("007 -> 0", "7 -> 0"), ("() -> ()", "() -> ()"), ("n : x -> n", "n:x -> n"), ("... n -> n", "... n -> n"),
        ("if -> if", "if -> if"), ("n -> (n+1)//2%3", "n -> (n+1)//2%3"),
        ("9223372036854775807 ->", "9223372036854775807 ->"),
        (" [ *s  n ] : x->[()],[...]", "[*s n]:x -> [()], [...]"),
    ("n -> ?m ?k<=007:x", "n -> ?m ?k<=7:x"), ("n->2 ?m<=2*n", "n -> 2 ?m<=2*n"),
    ],
)  # fmt: skip
def test_line_prints_in_its_plain_spelling(text, plain):
    assert str(parse(text)) == plain


WRONG = [
    ("n", "found 0 arrows at column 1; expected one '->'", 0),
    ("n -> n -> n", "found 2 arrows", 0),
    ("n, , m -> n", "an empty entry at column 4", 3),
    ("n -> n,", "an empty entry at column 8", 7),
    ("*a n *b -> n", r"\*b after \*a at column 6; expected at most one", 5),
    ("... *b -> n", r"\*b after \.\.\.", 4),
    ("n -> n:", "the suffix '' at column 8; expected a dtype or an argument's name", 7),
    ("n -> n:a:b", "the suffix 'a:b' at column 8", 7),
    ("n -> n:3", "the suffix '3'", 7),
    ("n -> n-", "'n-' at column 6; expected a name, a number", 5),
    ("n -> -n", "'-n'", 5),
    ("n -> 2n", "'2n'", 5),
    ("n -> n**2", r"'n\*\*2'", 5),
    ("n -> n/2", "'n/2'", 5),
    ("n -> f(n)", r"'f\(n\)'", 5),
    ("n -> n.m", "'n.m'", 5),
    ("n -> 2*if", r"'2\*if'", 5),
    ("n -> None+n", r"'None\+n'", 5),
    ("n -> 1.5*n", r"'1.5\*n'", 5),
    ("n -> n,*", r"'\*'", 7),
    ("n -> **b", r"'\*\*b'", 5),
    ("n -> () n", r"'\(\)' at column 6", 5),
    ("ñ -> 3", "'ñ'", 0),
    ("٣ -> 3", "'٣'", 0),
    ("² -> 3", "'²'", 0),
    (
        "n -> [n",
        r"'\[' without '\]' at column 6; expected '\]' after the dimensions of the list's elements",
        5,
    ),
    ("n -> [n] m", r"'m' after '\]' at column 10; expected a suffix or the end of the entry", 9),
    ("n -> [n]]", r"'\]' after '\]' at column 9", 8),
    (
        "n -> a [n]",
        r"'\[n\]' at column 8; expected a dimension; a list is an entry by itself, as in \[a b\]",
        7,
    ),
    ("n -> [[n]", r"'\[n' at column 7; expected a dimension", 6),
    ("n -> []", r"an empty list at column 6; expected dimensions, or \[\(\)\] for rank 0", 5),
    ("n -> n]", r"'n\]' at column 6; expected a name", 5),
    ("[*a *b] -> n", r"\*b after \*a at column 5; expected at most one", 4),
    ("[n]:3 -> n", "the suffix '3' at column 5", 4),
    ("n -> ?", r"'\?' at column 6; expected \?name or \?name<=bound for a size that depends on data", 5),
    ("n -> ?_", r"'\?_' at column 6", 5),
    ("n -> ?2", r"'\?2'", 5),
    ("n -> ?m<n", r"'\?m<n'", 5),
    ("n -> 2*?m", r"'2\*\?m' at column 6; expected a name, a number, .*\?name", 5),
    ("n -> ?m<=", "the bound '' at column 10; expected a name, a number or an expression without spaces", 9),
    ("n -> ?m<= n", "the bound '' at column 10", 9),
    ("n -> ?mm<=*b", r"the bound '\*b' at column 11", 10),
    ("n -> ?m<=_", "the bound '_'", 9),
    ("n -> ?m<=?k", r"the bound '\?k'", 9),
    ("n -> ?m<=9223372036854775808", "a number that no size can have at column 10", 9),
    ("n -> 9223372036854775808", "a number that no size can have", 5),
    ("n -> " + "9" * 5000, "a number that no size can have", 5),
    ("n -> n*9223372036854775808", "expected a name, a number", 5),
    ("n -> " + "(" * 300 + "n" + ")" * 300, "expected a name, a number", 5),
    ("n -> " + "+".join("n" * 5000), "expected a name, a number", 5),
]


@pytest.mark.parametrize(("text", "found", "column"), WRONG, ids=[w[0][:20] for w in WRONG])
def test_wrong_line_raises_with_a_caret(text, found, column):
    with pytest.raises(opkit.ShapeError, match=found) as caught:
        parse(text)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("reading the shape line of t::f: ")
    assert lines[1] == "    " + text
    assert lines[2] == " " * (4 + column) + "^"
    assert "Write one entry per Tensor argument" in lines[3]
    assert caught.value.op == "t::f"


def test_caret_stands_under_its_column_where_the_line_is_broken():
    with pytest.raises(opkit.ShapeError, match="at column 14") as caught:
        parse("n,\n n m\t-> n n(")
    _, shown, caret, _ = str(caught.value).split("\n")
    assert shown == "    n,  n m -> n n("
    assert shown[caret.index("^") :] == "n("


def test_line_that_is_no_text_raises():
    with pytest.raises(opkit.ShapeError, match=r"found \('n', 'n'\); expected text"):
        parse(("n", "n"))


# ---------------------------------------------------------------- generated lines

names = st.from_regex(r"[a-z][a-z0-9_]{0,3}", fullmatch=True)
numbers = st.integers(0, 2**63 - 1).map(str)
keywords = (
    "if",
    "is",
    "in",
    "or",
    "and",
    "as",
    "not",
    "for",
    "def",
    "del",
    "try",
    "pass",
    "else",
    "elif",
    "from",
)
atoms = st.one_of(names.filter(lambda n: n not in keywords), numbers)
expressions = st.recursive(
    st.tuples(atoms, st.sampled_from(["+", "-", "*", "//", "%"]), atoms).map("".join),
    lambda inner: st.tuples(inner.map("({})".format), st.sampled_from("+-*%"), atoms).map("".join),
    max_leaves=4,
)
bounds = st.one_of(names, numbers, expressions)
opened = st.one_of(names.map("?{}".format), st.tuples(names, bounds).map(lambda t: "?{}<={}".format(*t)))
plain_dims = st.one_of(names, numbers, st.just("_"), expressions, opened)


@st.composite
def entries(draw):
    dims = draw(st.lists(plain_dims, max_size=4))
    if draw(st.booleans()):
        dims.insert(draw(st.integers(0, len(dims))), draw(st.one_of(st.just("..."), names.map("*{}".format))))
    suffix = draw(st.one_of(st.just(""), names.map(":{}".format)))
    brackets = draw(st.sampled_from(["{}", "[{}]", " [ {} ] "]))
    return brackets.format(" ".join(dims) or "()") + suffix


lines = st.tuples(st.lists(entries(), max_size=3), st.lists(entries(), max_size=3)).map(
    lambda sides: f"{', '.join(sides[0])} -> {', '.join(sides[1])}"
)


@given(lines)
def test_parse_print_parse_is_stable(text):
    line = parse(text)
    assert parse(str(line)) == line
    assert str(parse(str(line))) == str(line)


@given(st.one_of(st.text(), st.text("n2 *_->.,:()+-/%[]?<=\t\n\x00²٣if", max_size=30).map("n -> {}".format)))
@example("\x00 -> \x00")
@example("n -> n\n+\nn")
@example("n -> 0or1")
@example("n -> 1_000*n")
@example("n -> n:ﬁ")
@example("n -> n(n)(2)")
@example("n -> \ud800")
def test_any_text_parses_or_raises_shape_error(text):
    try:
        line = parse(text)
    except opkit.ShapeError as error:
        found, shown, caret = str(error).split("\n")[:3]
        assert len(shown) == 4 + len(text)
        assert [c for c in shown[4:] if c != " "] == [c for c in text if c.isprintable() and c != " "]
        assert caret == " " * (3 + int(re.search(r"at column (\d+)", found)[1])) + "^"
        assert 4 <= caret.index("^") <= len(shown)
        return
    assert parse(str(line)) == line


@pytest.mark.parametrize("size", ["2n", "0x1", "1e5", "n" * 5000 + "!", "1" * 4000 + "n"])
def test_size_that_is_no_expression_is_refused_at_once(size):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Python's parser would warn of 2n
        with pytest.raises(opkit.ShapeError, match="expected a name, a number"):
            shapes.parse(f"{size} -> n", op="t::f")
