"""Entries of lists in a shape line: what they bind, what they check, and how long an output list is."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import opkit
from opkit.spec import mismatch, plan, shapes, signature

T = torch.ones
MANY = list[Tensor]
MAYBE = list[Tensor | None]


def plan_of(line, returns=Tensor, **hints):
    scope = {}
    exec(f"def f({', '.join(hints)}): ...", scope)
    scope["f"].__annotations__ = {**hints, "return": returns}
    return plan.bind(shapes.parse(line, op="t::f"), signature.from_function("t::f", scope["f"]), line)


def told(meta):
    """Metadata as (shape, dtype), lists as lists."""
    if isinstance(meta, list):
        return [told(m) for m in meta]
    return None if meta is None else (tuple(meta.shape), str(meta.dtype).removeprefix("torch."))


def infer(line, *values, returns=Tensor, **hints):
    metas, device = plan_of(line, returns, **hints).infer(*values)
    return [told(m) for m in metas], device


# ---------------------------------------------------------------- binding


@pytest.mark.parametrize(
    ("line", "returns", "hints", "found"),
    [
        ("n -> n", Tensor, {"xs": MANY}, "'n' for xs, a list of tensors, at column 1; expected the shape of its "
                                         "elements in brackets"),
        ("[n] -> n", Tensor, {"x": Tensor}, r"'\[n\]' for x, a single tensor, at column 1; expected an entry without"),
        ("n -> n", MANY, {"x": Tensor}, "'n' for out, a list of tensors, at column 6"),
        ("n -> [n]", Tensor, {"x": Tensor}, r"'\[n\]' for out, a single tensor, at column 6"),
        ("[*s] -> *s", Tensor, {"xs": MANY}, r"\*s, which differs in the elements of a list at column 9; expected a "
                                             r"list such as \[\*s\]"),
        ("[*s] -> [*t]", MANY, {"xs": MANY}, r"\*t is bound by no input at column 10; expected one of \*s"),
        ("[...] -> [*t]", MANY, {"xs": MANY}, r"\*t is bound by no input at column 11; expected a number"),
        ("[n], n:xs -> n", Tensor, {"xs": MANY, "y": Tensor}, "the suffix 'xs', a list, at column 8; expected the name "
                                                              "of a single tensor, or a dtype"),
        ("[a n], [n] -> [n]", MANY, {"xs": MANY, "ys": MANY},
         r"'\[n\]', which may be as long as xs or ys, at column 15; expected one of these in its suffix, as in :xs"),
        ("[*s], [n] -> [*s]:ys", MANY, {"xs": MANY, "ys": MANY},
         r"'\[\*s\]:ys', which is as long as ys, with \*s at column 14; expected a name or one of xs in the suffix"),
    ],
    ids=lambda v: v if isinstance(v, str) and "->" in v else "",
)  # fmt: skip
def test_line_that_does_not_fit_the_signature_is_refused(line, returns, hints, found):
    with pytest.raises(opkit.ShapeError, match=found) as caught:
        plan_of(line, returns, **hints)
    assert caught.value.op == "t::f"


@pytest.mark.parametrize(
    ("line", "returns", "hints", "missing"),
    [
        ("n -> [n]", MANY, {"x": Tensor}, "nothing says how long the list out is"),
        ("[n] -> [3]", MANY, {"xs": MANY}, "nothing says how long the list out is"),
        ("n -> n", tuple[Tensor, int], {"x": Tensor}, r"its result out1 is no tensor (SymInt)"),
        ("n -> n, n", tuple[Tensor | None, Tensor], {"x": Tensor}, "its result out0 may be None"),
        ("[n] -> [n]", MANY, {"xs": MANY}, None),
    ],
)
def test_what_a_line_cannot_say_of_the_results_is_missing(line, returns, hints, missing):
    assert plan_of(line, returns, **hints).missing == missing


# ---------------------------------------------------------------- what is inferred


@pytest.mark.parametrize(
    ("line", "values", "wanted"),
    [
        ("[n] -> [n]", [[T(2), T(2)]], [((2,), "float32")] * 2),
        ("[n] -> [n]", [[]], []),
        (
            "[*s] -> [*s]",
            [[T(2), T(3, 1).int(), T(())]],
            [((2,), "float32"), ((3, 1), "int32"), ((), "float32")],
        ),
        ("[*s n] -> [n *s 2*n]", [[T(2, 3), T(3)]], [((3, 2, 6), "float32"), ((3, 6), "float32")]),
        ("[*s] -> [*s]:int8", [[T(2), T(())]], [((2,), "int8"), ((), "int8")]),
        ("[_] -> [3]:xs", [[T(2), T(1).int()]], [((3,), "float32"), ((3,), "int32")]),
        ("[n m] -> [m ?k<=n]", [[T(2, 3)]], [((3, ("k", 2)), "float32")]),
        ("[()] -> [1]:xs", [[T(())]], [((1,), "float32")]),
    ],
)
def test_output_list_follows_the_list_that_it_names(line, values, wanted):
    found, device = infer(line, *values, xs=MANY, returns=MANY)
    assert found == [wanted]
    assert device == (torch.device("cpu") if values[0] else None)


def test_names_are_shared_between_tensors_and_lists():
    hints = {"x": Tensor, "ws": MANY, "k": int}
    assert infer("*b n, [*b n*k] -> *b", T(2, 3), [T(2, 6)] * 2, 2, **hints)[0] == [((2,), "float32")]
    assert infer("n -> n", T(2), xs=Tensor)[0] == [((2,), "float32")]
    assert infer("[m n], n -> m", [T(2, 3)], T(3), ws=MANY, x=Tensor)[0] == [((2,), "float32")]
    assert infer("[m n], n -> [m]:x", [T(2, 3)], T(3).int(), returns=MANY, ws=MANY, x=Tensor)[0] == [
        [((2,), "int32")]
    ]


def test_results_that_no_entry_describes_have_no_metadata():
    returns = tuple[int, Tensor, list[Tensor], float]
    assert infer("n -> n, [2]", T(3), returns=returns, x=Tensor)[0] == [None, ((3,), "float32"), None, None]


def test_elements_that_are_none_are_skipped():
    assert infer("[n] -> n", [None, T(3)], xs=MAYBE)[0] == [((3,), "float32")]
    found, device = infer(
        "[*s], [*s] -> [*s]:int8", [None, T(3)], [T(2), None], returns=MANY, xs=MAYBE, ys=MAYBE
    )
    assert (found, device) == ([[((2,), "int8"), ((3,), "int8")]], torch.device("cpu"))


# ---------------------------------------------------------------- what is refused

TWO = {"xs": MANY, "ys": MANY}


@pytest.mark.parametrize(
    ("line", "values", "hints", "text"),
    [
        ("[n] -> n", [[T(2), T(3)]], {"xs": MANY},
         r"dimension 0 of xs\[1\] \(n\) is 3, but dimension 0 of xs\[0\] bound n to 2\. Expected '\[n\] -> n', got xs "
         r"\[\(2\), \(3\)\]\. Make the two equal"),
        ("[*s], [*s] -> ()", [[T(2)], [T(2), T(2)]], TWO,
         r"ys has 2 tensors, xs has 1; \*s stands in both\. .* Pass lists of one length"),
        ("[*s], [*s] -> ()", [[T(2), T(2)], [T(2), T(3)]], TWO,
         r"the dimensions of ys\[1\] that \*s stands for are .*3.*, but the dimensions of xs\[1\] bound \*s to .*2"),
        ("[n m] -> n", [[T(2)]], {"xs": MANY}, r"argument xs\[0\] has 1 dimensions, its entry '\[n m\]' has 2"),
        ("[n n-1] -> n", [[T(2, 1), T(2, 2)]], {"xs": MANY},
         r"dimension 1 of xs\[1\] is 2, expected 1 \(n-1: n = 2 by dimension 0 of xs\[0\]\)"),
        ("[n] -> n", [[]], {"xs": MANY}, r"the size n of output out is bound only by arguments that are None or "
                                         r"empty\. Expected '\[n\] -> n', got xs \[\]"),
        ("[n] -> 3", [[]], {"xs": MANY}, "all of xs are None or empty, so nothing says where its outputs live"),
        ("[n] -> 3", [[None]], {"xs": MAYBE}, "all of xs are None or empty"),
    ],
    ids=lambda v: v if isinstance(v, str) and "->" in v else "",
)  # fmt: skip
def test_mismatch_names_the_element(line, values, hints, text):
    with pytest.raises(opkit.ShapeError, match="calling t::f: " + text):
        plan_of(line, **hints).infer(*values)


@pytest.mark.parametrize(
    ("line", "values", "hints", "text"),
    [
        ("[n] -> [n]", [None], {"xs": MANY | None}, "output out is as long as xs, which is None. .* Pass a list"),
        ("[n] -> [n]", [[T(2), None]], {"xs": MAYBE}, r"element 1 of output out is like xs\[1\], which is None"),
        ("[*s] -> [*s]:int8", [[None]], {"xs": MAYBE}, r"element 0 of output out is like xs\[0\], which is None"),
        ("[n] -> [n-3]", [[T(2)]], {"xs": MANY},
         r"the size n-3 of output out would be -1 \(n = 2 by dimension 0 of xs\[0\]\)"),
    ],
)  # fmt: skip
def test_output_list_that_has_nothing_to_be_like_is_refused(line, values, hints, text):
    with pytest.raises(opkit.ShapeError, match="calling t::f: " + text):
        plan_of(line, MANY, **hints).infer(*values)


@pytest.mark.parametrize(
    ("line", "values", "text"),
    [
        ("[n]:int8 -> n", [[T(2).to(torch.int8), T(2)]], r"argument xs\[1\] has dtype torch.float32, expected "
                                                         r"torch.int8, as the shape line says. Convert it: xs\[1\].to"),
        ("[n], [n]:xs -> n", [[T(2)], [T(2).int()]],
         r"argument ys\[0\] has dtype torch.int32, expected torch.float32, the dtype of xs\[0\]"),
        ("n, [n]:x -> n", [T(2), [T(2).int()]], r"argument ys\[0\] has dtype torch.int32, .* the dtype of x\."),
    ],
)  # fmt: skip
def test_dtype_mismatch_names_the_element(line, values, text):
    hints = {"xs": MANY, "ys": MANY} if len(values) == 2 else {"xs": MANY}
    if line.startswith("n"):
        hints = {"x": Tensor, "ys": MANY}
    with pytest.raises(opkit.DtypeError, match=text):
        plan_of(line, **hints).infer(*values)


def test_lists_that_give_dtypes_have_one_length():
    with pytest.raises(opkit.ShapeError, match="ys has 1 tensors, xs has 2; its dtypes are those of xs"):
        plan_of("[n], [n]:xs -> n", **TWO).infer([T(2), T(2)], [T(2)])


def test_tensors_on_two_devices_are_refused():
    with pytest.raises(
        opkit.DeviceError, match=r"argument xs\[1\] is on meta and xs\[0\] on cpu; .*xs\[1\]\.to"
    ):
        plan_of("[n] -> n", xs=MANY).infer([T(2), T(2, device="meta")])


# ---------------------------------------------------------------- the fast check and its slow explanation agree

LINES = [
    ("[*s], [*s n], n -> [*s]", MANY), ("[n], [m], n -> n", Tensor), ("[*b n], [*c], *b -> *b", Tensor),
    ("[n]:int8, [n]:a, n -> [n-1]:a", MANY), ("[*s 1], [n//m m n], m -> [m]:b", MANY),
    ("[n], [n]:a, m -> ?k<=n-m", Tensor),
]  # fmt: skip
sizes = st.lists(st.integers(0, 2), max_size=2)
tensors = st.tuples(sizes, st.sampled_from([torch.float32, torch.int8])).map(lambda t: T(t[0], dtype=t[1]))


def outcome(check, *values):
    try:
        check(*values)
    except (opkit.ShapeError, opkit.DtypeError) as error:
        return type(error), str(error)
    return None


@pytest.mark.parametrize(
    "hints", [[MANY, MANY, Tensor], [MAYBE | None, MAYBE, Tensor | None]], ids=["given", "maybe"]
)
@pytest.mark.parametrize(("line", "returns"), LINES)
@settings(max_examples=80)
@given(data=st.data())
def test_infer_and_explanation_agree(line, returns, hints, data):
    bound = plan_of(line, returns, **dict(zip("abc", hints, strict=True)))
    values = []
    for tensor in bound.inputs:
        shape = [st.integers(1, 2) for d in tensor.entry.dims if not d.star]
        one = st.one_of(st.tuples(*shape).map(lambda s: T(s)), tensors)
        if tensor.entry.is_list:
            one = st.lists(st.one_of(one, st.none()) if tensor.optional_elements else one, max_size=3)
        values.append(data.draw(st.one_of(one, st.none()) if tensor.optional else one))
    assert outcome(bound.infer, *values) == outcome(mismatch.Mismatch(bound, values).run)


# ---------------------------------------------------------------- the derived meta is what references return

REFERENCES = {
    "[*s] -> [*s]": lambda xs: [x + 1 for x in xs],
    "[*s n] -> [n *s]": lambda xs: [x.movedim(-1, 0) * 1 for x in xs],
    "[n m] -> [n*m 2]:bool": lambda xs: [torch.stack([x.flatten()] * 2, 1) > 0 for x in xs],
    "[*s] -> [()]:xs": lambda xs: [x.sum() for x in xs],
}


@pytest.mark.parametrize("line", REFERENCES)
@settings(max_examples=40)
@given(data=st.data())
def test_derived_meta_is_what_the_reference_returns(line, data):
    bound = plan_of(line, MANY, xs=MANY)
    known = {}
    values = []
    for _ in range(data.draw(st.integers(0, 3))):
        shape = []
        for dim in bound.line.inputs[0].dims:
            drawn = data.draw(sizes) if dim.star else known.setdefault(dim.text, data.draw(st.integers(0, 3)))
            shape += drawn if dim.star else [drawn]
        x = torch.randn([s * 2 for s in shape])
        for axis in range(x.dim()):
            x = x[(slice(None),) * axis + (slice(None, None, 2),)]
        values.append(
            x.transpose(0, -1).contiguous().transpose(0, -1) if data.draw(st.booleans()) and x.dim() else x
        )
    (metas,), _ = bound.infer(values)
    found = REFERENCES[line](values)
    assert [(tuple(m.shape), m.dtype) for m in metas] == [(tuple(f.shape), f.dtype) for f in found]
