from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import opkit
from opkit.spec import mismatch, plan, shapes, signature

T = torch.ones


def plan_of(line, *, results=1, optional=(), **others):
    """The plan of `f(a, b, …)`, one Tensor for each entry of the line, and of `others` with their annotations."""
    parsed = shapes.parse(line, op="t::f")
    tensors = "abcdefg"[: len(parsed.inputs)]
    names = [*tensors, *others]
    scope = {}
    exec(f"def f({', '.join(names)}): ...", scope)
    hints = {name: Tensor | None if name in optional else Tensor for name in tensors} | others
    returns = tuple[(Tensor,) * results] if results else None
    scope["f"].__annotations__ = {**hints, "return": returns}
    return plan.bind(parsed, signature.from_function("t::f", scope["f"]), line)


def infer(line, *values, **kwargs):
    metas, device = plan_of(line, **kwargs).infer(*values)
    return [(tuple(m.shape), str(m.dtype).removeprefix("torch.")) for m in metas], device


# ---------------------------------------------------------------- binding


@pytest.mark.parametrize(
    ("line", "kwargs", "found"),
    [
        ("n -> m", {}, "'m' is bound by no input at column 6; expected one of n"),
        ("n -> 2*m", {}, "'m' is bound by no input"),
        ("2*m -> 1", {}, "'m' is bound by no input at column 1; expected a number"),
        ("n -> *b", {}, r"\*b is bound by no input at column 6; expected a number"),
        ("*a -> *b", {}, r"\*b is bound by no input at column 7; expected one of \*a"),
        ("*n, n -> n", {}, "expected one meaning for a name"),
        ("*n -> n", {}, r"'n' and '\*n' at column 7; expected one meaning for a name"),
        ("n -> _", {}, "'_' in an output at column 6; expected a size that the inputs bind"),
        ("n -> ...", {}, r"'...' in an output"),
        ("?m -> 1", {}, r"\?m in an input at column 1; expected a name, since the size is known"),
        ("n -> ?n", {}, r"\?n and 'n' at column 6; expected one meaning for a name"),
        ("*n -> ?n", {}, r"\?n and 'n' at column 7; expected one meaning for a name"),
        ("n -> ?m m", {}, "'m' is bound by no input at column 9"),
        ("n -> ?m<=k", {}, "'k' is bound by no input at column 6; expected one of n"),
        ("n -> ?m<=n ?m<=2*n", {}, r"\?m<=2\*n after \?m<=n at column 12; expected one bound for a name"),
        ("n -> n:float33", {}, "the suffix 'float33' at column 8; expected a dtype such as float32"),
        ("n:k -> n", {"k": int}, "the suffix 'k' at column 3"),
        (
            "n -> n",
            {"results": 2},
            r"1 entry for outputs at column 3; expected 2 \(out0, out1\), one per Tensor",
        ),
        ("n -> n, n", {}, r"2 entries for outputs .*expected 1 \(out0\)"),
        ("n -> n", {"results": 0}, "1 entry for outputs .*expected none"),
        ("-> k", {"k": int, "d": torch.dtype}, "no Tensor argument and no device argument"),
        ("-> k", {"k": int, "d": torch.device}, "no Tensor argument whose dtype its outputs could take"),
    ],
    ids=lambda v: v if isinstance(v, str) and "->" in v else "",
)
def test_line_that_does_not_fit_the_signature_is_refused(line, kwargs, found):
    with pytest.raises(opkit.ShapeError, match=found) as caught:
        plan_of(line, **kwargs)
    assert caught.value.op == "t::f"


def test_too_few_entries_for_the_inputs_name_the_arguments():
    def f(x: Tensor, y: Tensor, k: int) -> Tensor: ...

    with pytest.raises(
        opkit.ShapeError, match=r"1 entry for inputs at column 1; expected 2 \(x, y\), one per Tensor"
    ):
        plan.bind(shapes.parse("n -> n", op="t::f"), signature.from_function("t::f", f), "n -> n")


# ---------------------------------------------------------------- what is inferred

FITS = [
    ("n -> n", [(3,)], [(3,)]),
    ("*b n, n -> *b n", [(2, 3, 4), (4,)], [(2, 3, 4)]),
    ("*b n -> *b", [(4,)], [()]),
    ("n *b -> *b n", [(2, 3, 4)], [(3, 4, 2)]),
    ("i *b j -> *b, j i", [(2, 3, 4, 5)], [(3, 4), (5, 2)]),
    ("*b, *b -> *b", [(), ()], [()]),
    ("n -> ()", [(5,)], [()]),
    ("() -> 1", [()], [(1,)]),
    ("_ n -> n", [(7, 3)], [(3,)]),
    ("... n -> n", [(7, 6, 3)], [(3,)]),
    ("n ... -> n", [(3,)], [(3,)]),
    ("2 n -> n 2", [(2, 3)], [(3, 2)]),
    ("n -> 2*n (n+1)//2 n%2 n-1", [(5,)], [(10, 3, 1, 4)]),
    ("n, 2*n -> n", [(3,), (6,)], [(3,)]),
    ("2*n, n -> n", [(6,), (3,)], [(3,)]),
    ("n n -> n", [(3, 3)], [(3,)]),
    ("n m -> n*m", [(0, 1)], [(0,)]),
    ("if -> 2", [(4,)], [(2,)]),
    ("a, b -> b a", [(2,), (3,)], [(3, 2)]),
]


@pytest.mark.parametrize(("line", "given_", "wanted"), FITS, ids=[f[0] for f in FITS])
def test_output_shapes_follow_the_line(line, given_, wanted):
    metas, device = infer(line, *(T(s) for s in given_), results=len(wanted))
    assert [m[0] for m in metas] == wanted
    assert device == torch.device("cpu")


def test_int_arguments_are_sizes():
    assert infer("n, n//k -> k n+j", T(6), T(3), 2, 10, k=int, j=int)[0] == [((2, 16), "float32")]


def test_int_argument_and_dimension_of_one_name_must_agree():
    assert infer("n -> n", T(3), 3, n=int)[0] == [((3,), "float32")]
    with pytest.raises(
        opkit.ShapeError, match=r"dimension 0 of a \(n\) is 3, but the argument n bound n to 4"
    ):
        infer("n -> n", T(3), 4, n=int)


def test_int_argument_that_may_be_none_is_a_size_where_it_is_given():
    k = int | None
    assert infer("n k -> k n", T(6, 2), None, k=k)[0] == [((2, 6), "float32")]
    assert infer("n k -> k n", T(6, 2), 2, k=k)[0] == [((2, 6), "float32")]
    assert infer("n -> n k", T(6), 3, k=k)[0] == [((6, 3), "float32")]
    with pytest.raises(
        opkit.ShapeError, match=r"dimension 1 of a \(k\) is 2, but the argument k bound k to 3"
    ):
        infer("n k -> k n", T(6, 2), 3, k=k)
    with pytest.raises(
        opkit.ShapeError, match="the size k of output out0 is bound only by arguments that are None"
    ):
        infer("n -> n k", T(6), None, k=k)
    with pytest.raises(opkit.ShapeError, match="the size k of output out0 would be -3"):
        infer("n -> n k", T(6), -3, k=k)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("n, n -> n", "bfloat16"), ("n, n -> n:float64", "float64"), ("n, n -> n:b", "int8"),
        ("n, n -> n:dtype", "complex64"),
        ("n, n:int8 -> n:a", "bfloat16"), ("n:bfloat16, n -> n:bool", "bool"),
    ],
    ids=lambda v: v,
)  # fmt: skip
def test_output_dtype_is_that_of_the_first_tensor_or_of_the_suffix(line, wanted):
    x, y = T(2, dtype=torch.bfloat16), T(2, dtype=torch.int8)
    assert infer(line, x, y, torch.complex64, dtype=torch.dtype)[0] == [((2,), wanted)]


def test_dtype_argument_that_may_be_none_leaves_the_dtype_to_the_first_tensor():
    x, y = T(2, dtype=torch.bfloat16), T(2, dtype=torch.int8)
    d = torch.dtype | None
    assert infer("n, n -> n:d", x, y, torch.complex64, d=d)[0] == [((2,), "complex64")]
    assert infer("n, n -> n:d", x, y, None, d=d)[0] == [((2,), "bfloat16")]
    assert infer("n, n:d -> n", x, y, None, d=d)[0] == [((2,), "bfloat16")]
    assert infer("n, n:d -> n", x, y, torch.int8, d=d)[0] == [((2,), "bfloat16")]
    with pytest.raises(
        opkit.DtypeError, match="argument b has dtype torch.int8, expected torch.int32, the value of d"
    ):
        infer("n, n:d -> n", x, y, torch.int32, d=d)
    with pytest.raises(opkit.ShapeError, match="no Tensor argument whose dtype its outputs could take"):
        plan_of("-> k:d", k=int, device=torch.device, d=d)


def test_argument_names_win_over_dtype_names():
    def f(float32: Tensor, y: Tensor) -> Tensor: ...

    line = "n, n -> n:float32"
    bound = plan.bind(shapes.parse(line, op="t::f"), signature.from_function("t::f", f), line)
    assert bound.infer(T(2, dtype=torch.int8), T(2))[0][0].dtype == torch.int8


def test_none_is_skipped_and_the_next_tensor_binds():
    assert infer("n, n -> n", None, T(3, dtype=torch.int8), optional="a")[0] == [((3,), "int8")]
    assert infer("n, n -> n", T(3), None, optional="ab")[0] == [((3,), "float32")]
    assert infer("n, 2*n -> 4", T(3), None, optional="ab")[0] == [((4,), "float32")]
    with pytest.raises(
        opkit.ShapeError, match=r"dimension 0 of b \(n\) is 4, but dimension 0 of a bound n to 3"
    ):
        infer("n, n -> n", T(3), T(4), optional="ab")


def test_ops_without_tensors_take_dtype_and_device_from_their_arguments():
    metas, device = infer("-> k 2:float16", 3, torch.device("meta"), k=int, d=torch.device)
    assert (metas, device) == ([((3, 2), "float16")], torch.device("meta"))


def test_sizes_that_depend_on_data_are_open():
    line = "n, k -> ?m 2, ?m<=n+j ?i"
    (first, second), _ = plan_of(line, results=2, j=int).infer(T(3), T(4), 10)
    assert (first.shape, second.shape) == ((("m", 13), 2), (("m", 13), ("i", None)))
    assert str(first.shape + second.shape) == "(?m<=13, 2, ?m<=13, ?i)"
    assert str(plan_of(line, results=2, j=int).line) == line


def test_bound_that_divides_by_zero_names_it():
    with pytest.raises(
        opkit.ShapeError, match=r"the size n//k divides by zero \(n = 3 by dimension 0 of a, k = 0 by"
    ):
        infer("n -> ?m<=n//k", T(3), 0, k=int)


@pytest.mark.parametrize(
    ("line", "values", "text"),
    [
        (
            "n -> n-4",
            [T(3)],
            r"the size n-4 of output out0 would be -1 \(n = 3 by dimension 0 of a\)\. Expected",
        ),
        ("n -> ?m<=n-4", [T(3)], r"the size n-4 of output out0 would be -1"),
        (
            "n -> n k",
            [T(3), -2],
            r"the size k of output out0 would be -2\. Expected 'n -> n k', got a \(3\)\. Pass",
        ),
        (
            "n -> n*k",
            [T(3), 2**62],
            r"the size n\*k of output out0 would be 13835058055282163712, beyond 64 bits \(n = 3",
        ),
        (
            "n -> n%k",
            [T(3), 0],
            r"the size n%k divides by zero \(n = 3 by dimension 0 of a, k = 0 by the argument k\)",
        ),
        ("n -> n%k", [T(3), -2], r"the size n%k of output out0 would be -1"),
    ],
)
def test_size_that_no_tensor_has_is_refused_with_its_names(line, values, text):
    with pytest.raises(opkit.ShapeError, match="calling t::f: " + text):
        plan_of(line, **({"k": int} if len(values) == 2 else {})).infer(*values)


# ---------------------------------------------------------------- the fast check and its slow explanation agree

LINES = [
    "*b n, n -> *b n", "n m, m k -> n k", "n *b, *b n -> n", "n, 2*n, n//2 -> n%3", "i j, _ i, ... -> i j",
    "n, m, n+m -> m",
    "*b 1, 2 *b, n -> *b n", "(), n, n n -> n", "n:int8, n:a, n:float32 -> n", "*b, *c, n -> *c n",
    "n, n%m, m -> n//m", "n, m, n -> ?k<=n//m",
]  # fmt: skip
sizes = st.lists(st.integers(0, 3), max_size=3)
tensors = st.tuples(sizes, st.sampled_from([torch.float32, torch.int8])).map(lambda t: T(t[0], dtype=t[1]))


def outcome(check, *values):
    """The error of a check, or None where everything fits."""
    try:
        check(*values)
    except (opkit.ShapeError, opkit.DtypeError) as error:
        return type(error), str(error)
    return None


@given(
    line=st.sampled_from(["{}+k", "(n-k)*{}", "n//({}+1)", "n%({}-k)", "({}+n)//k"]).flatmap(
        lambda form: st.sampled_from(["n", "m", "3", "n*m", "(m-2*n)", "m//2"]).map(form.format)
    ),
    n=st.integers(0, 5),
    m=st.integers(0, 5),
    k=st.integers(-3, 5),
)
def test_expressions_are_those_of_python(line, n, m, k):
    try:
        wanted = eval(line, {}, {"n": n, "m": m, "k": k})
    except ZeroDivisionError:
        wanted = "divides by zero"
    if not isinstance(wanted, int) or wanted < 0:
        with pytest.raises(opkit.ShapeError, match="divides by zero|would be -"):
            infer(f"n, m -> {line}", T(n), T(m), k, k=int)
    else:
        assert infer(f"n, m -> {line}", T(n), T(m), k, k=int)[0][0][0] == (wanted,)
        infer(f"n, m, {line} -> n", T(n), T(m), T(wanted), k, k=int)
        with pytest.raises(opkit.ShapeError, match=f"dimension 0 of c is {wanted + 1}, expected {wanted}"):
            infer(f"n, m, {line} -> n", T(n), T(m), T(wanted + 1), k, k=int)


@pytest.mark.parametrize("optional", ["", "a", "bc", "abc"])
@pytest.mark.parametrize("line", LINES)
@settings(max_examples=60)
@given(data=st.data())
def test_infer_and_explanation_agree(line, optional, data):
    bound = plan_of(line, optional=optional)
    values = []
    for tensor in bound.inputs:
        shape = [st.integers(0, 3) for d in tensor.entry.dims if not d.star]
        fitting = st.tuples(*shape).map(lambda s: T(s))
        option = st.none() if tensor.optional else st.nothing()
        values.append(data.draw(st.one_of(fitting, tensors, option)))
    assert outcome(bound.infer, *values) == outcome(mismatch.Mismatch(bound, values).run)


# ---------------------------------------------------------------- the derived meta is what references return

REFERENCES = {
    "*b n -> *b n": (lambda x: x * 2, 1),
    "*b n -> *b": (lambda x: x.sum(-1), 1),
    "m n, n k -> m k": (lambda x, y: x @ y, 2),
    "*b n -> *b 2*n": (lambda x: torch.cat([x, x], -1), 1),
    "m n -> n m": (lambda x: x.t().clone(memory_format=torch.preserve_format), 1),
    "i *b j -> j *b i": (lambda x: x.transpose(0, -1) + 1, 1),
    "n m -> n*m:bool": (lambda x: x.flatten() > 0, 1),
}


def tensor_of(data, entry, known):
    """A tensor for an entry, in a random memory layout; `known` holds the sizes drawn so far."""
    shape = []
    for dim in entry.dims:
        drawn = known.setdefault(str(dim), data.draw(sizes if dim.star else st.integers(0, 3)))
        shape += drawn if dim.star else [drawn]
    order = data.draw(st.permutations(range(len(shape))))
    base = torch.randn([shape[i] * 2 for i in order])
    for axis in range(len(shape)):
        start, step = data.draw(st.sampled_from([(None, 2), (base.shape[axis] // 2, 1)]))
        base = base[(slice(None),) * axis + (slice(start, None, step),)]
    inverse = [list(order).index(i) for i in range(len(shape))]
    return base.permute(inverse)


@pytest.mark.parametrize("line", REFERENCES)
@settings(max_examples=40)
@given(data=st.data())
def test_derived_meta_is_what_the_reference_returns(line, data):
    reference, count = REFERENCES[line]
    bound = plan_of(line)
    known = {}
    values = [tensor_of(data, entry, known) for entry in bound.line.inputs]
    assert len(values) == count
    found = reference(*values)
    metas, device = bound.infer(*values)
    assert (tuple(metas[0].shape), metas[0].dtype, device) == (tuple(found.shape), found.dtype, found.device)
