"""Annotations that say shapes: jaxtyping's where it is installed, and others with its attributes."""

# ruff: noqa: F722, F821, UP045  (annotations are data here)
from __future__ import annotations

import re
from typing import NamedTuple, Optional

import pytest
import torch
from torch import Tensor

import opkit
from opkit.spec import arrays, plan, signature

pytestmark = pytest.mark.usefixtures("registry")

T = torch.ones
FLOATS = ("float16", "bfloat16", "float32", "float64")


def stand_in(name, dtypes):
    """What jaxtyping's classes look like from outside."""

    class Kind:
        def __class_getitem__(cls, item):
            array_type, dims = item
            members = {"array_type": array_type, "dim_str": dims, "dtypes": dtypes}
            return type(f"{name}[{array_type.__name__}, {dims!r}]", (), members)

    return Kind


class StandIn:
    Float = stand_in("Float", FLOATS)
    Float32 = stand_in("Float32", ("float32",))
    Int = stand_in("Int", ("int8", "int32", "int64"))
    Bool = stand_in("Bool", ("bool", "bool_"))
    Shaped = stand_in("Shaped", object())
    Key = stand_in("Key", ("prng_key",))
    Half = stand_in("Half", (re.compile(r"b?float16"),))


@pytest.fixture(params=["stand-in", "jaxtyping"])
def jt(request):
    return pytest.importorskip("jaxtyping") if request.param == "jaxtyping" else StandIn


def declared(hints, returns, shapes=None):
    scope = {}
    exec(f"def f({', '.join(hints)}): ...", scope)
    scope["f"].__annotations__ = {**hints, "return": returns}
    return plan.declared(signature.from_function("t::f", scope["f"]), shapes)


def line_of(hints, returns, shapes=None):
    return str(declared(hints, returns, shapes).line)


@pytest.mark.parametrize(
    ("dims", "entry"),
    [("*b n", "*b n"), ("", "()"), ("... 3 n", "... 3 n"), ("_ n", "_ n"), ("rows=3 _cols n", "3 _ n"),
     ("*_lead n", "... n"), ("n n+1 2*n", "n n+1 2*n"), ("  n   m ", "n m")],
)  # fmt: skip
def test_dimensions_are_those_of_the_annotation(jt, dims, entry):
    out = "n" if "n" in dims else "1"
    assert line_of({"x": jt.Float[Tensor, dims]}, jt.Float[Tensor, out]) == f"{entry} -> {out}"


def test_annotations_are_understood_wherever_a_tensor_may_stand(jt):
    class Out(NamedTuple):
        y: Tensor
        z: Tensor

    Out.__annotations__ = {"y": jt.Float[Tensor, "n"], "z": jt.Bool[Tensor, "*s"]}
    hints = {
        "x": jt.Float[Tensor, "n"],
        "mask": Optional[jt.Bool[Tensor, "*s"]],
        "others": list[jt.Int[Tensor, "k"]],
        "plain": Tensor,
        "plains": list[Tensor],
    }
    for returns in (Out, tuple[jt.Float[Tensor, "n"], jt.Bool[Tensor, "*s"]]):
        assert line_of(hints, returns) == "n, *s:bool, [k], ..., [...] -> n, *s:bool"


def test_dtypes_are_checked_and_declared(jt):
    op = declared({"x": jt.Float[Tensor, "n"], "i": jt.Int[Tensor, "n"]}, jt.Float32[Tensor, "n"])
    assert op.infer(T(2).double(), T(2).int())[0][0].dtype == torch.float32
    with pytest.raises(
        opkit.DtypeError,
        match=r"calling t::f: argument i has dtype torch.float32, its annotation allows .*int8.*i\.to\(torch.int64",
    ):
        op.infer(T(2), T(2))
    with pytest.raises(
        opkit.DtypeError, match="argument x has dtype torch.int64, its annotation allows .*float32"
    ):
        op.infer(T(2).long(), T(2).int())
    one = declared({"x": jt.Float32[Tensor, "n"]}, jt.Shaped[Tensor, "n"])
    with pytest.raises(opkit.DtypeError, match="argument x has dtype torch.float64, expected torch.float32"):
        one.infer(T(2).double())


def test_dtype_of_an_output_that_its_annotation_does_not_allow_is_an_error(jt):
    op = declared({"x": jt.Shaped[Tensor, "n"]}, jt.Float[Tensor, "n"])
    assert op.infer(T(2).half())[0][0].dtype == torch.float16
    with pytest.raises(
        opkit.DtypeError,
        match="calling t::f: output out would have dtype torch.int32, the dtype of x; its annotation allows .* Convert "
        "the argument, or give the output a dtype in shapes=",
    ):
        op.infer(T(2).int())
    many = declared({"xs": list[jt.Shaped[Tensor, "*s"]]}, list[jt.Float[Tensor, "*s"]])
    with pytest.raises(
        opkit.DtypeError, match=r"output out would have dtype torch.int32, the dtype of xs\[1\]"
    ):
        many.infer([T(1), T(1).int()])


def test_meaning_of_a_plan_has_the_dtypes_that_annotations_allow(jt):
    meanings = [
        declared({"x": k[Tensor, "n"]}, Tensor).meaning for k in (jt.Float, jt.Int, jt.Shaped, jt.Float32)
    ]
    assert meanings[0].startswith("n -> ... (x in ")
    assert "bfloat16" in meanings[0]
    assert meanings[2:] == ["n -> ...", "n:float32 -> ... (x in float32)"]
    assert len(set(meanings)) == 4


def test_native_kernel_is_held_to_its_annotations(jt):
    def twice(x): ...

    twice.__annotations__ = {"x": jt.Float[Tensor, "*b n"], "return": jt.Float[Tensor, "*b n"]}
    op = opkit.op("t::twice")(twice)
    op.register_kernel("cpu", opkit.cpp.kernel("#include <opkit/kernel.h>\nvoid twice(opkit::Tensor x, opkit::Tensor y)"
                                               "{ y.data<float>()[0] = 2 * x.data<float>()[0]; }"))  # fmt: skip
    assert op(T(1, 1)).tolist() == [[2]]
    for _ in range(2):  # before the kernel is built, and by its glue
        with pytest.raises(opkit.DtypeError, match="argument x has dtype torch.int32, its annotation allows"):
            op(T(1, 1).int())


def test_dtype_that_an_output_can_never_have_is_refused_at_once(jt):
    with pytest.raises(
        opkit.ShapeError,
        match=r"reading the annotations of t::f: out is annotated with the dtypes int8, .*, and would have that of x, "
        r"which is annotated with .*float32.*; expected an annotation of one dtype, as Int64. Change it, or give the "
        r"output a dtype in shapes=, as in 'n:int64'",
    ):
        declared({"x": jt.Float[Tensor, "n"]}, jt.Int[Tensor, "n"])
    op = declared({"x": jt.Float[Tensor, "n"]}, jt.Int[Tensor, "n"], "n -> n:int64")
    assert op.infer(T(2))[0][0].dtype == torch.int64


def test_dtypes_may_be_patterns():
    op = declared({"x": StandIn.Half[Tensor, "n"]}, StandIn.Half[Tensor, "n"])
    assert op.infer(T(1).bfloat16())[0][0].dtype == torch.bfloat16
    with pytest.raises(opkit.DtypeError, match="allows .*bfloat16"):
        op.infer(T(1))


def test_signature_without_such_annotations_has_no_plan():
    assert declared({"x": Tensor, "y": list[Tensor]}, Tensor) is None


def test_result_without_a_shape_needs_a_meta_function(jt):
    op = declared({"x": jt.Float[Tensor, "n n"]}, tuple[Tensor, jt.Float[Tensor, "n"]])
    assert op.missing == "its result out0 has no shape in its annotation"
    assert op.infer(T(2, 2))[0] == (None, ((2,), torch.float32, None, None))
    with pytest.raises(opkit.ShapeError, match="dimension 1 of x"):
        op.infer(T(2, 3))


@pytest.mark.parametrize(
    ("dims", "text"),
    [
        ("#n", r"reading the annotations of t::f: x is annotated Float\[Tensor, '#n'\], where '#n' broadcasts; "
               "expected sizes that match exactly. Write the dimension without '#'"),
        ("?n", r"'\?n' depends on a place in a tree; expected"),
        ("n/2", r"reading the annotations of t::f: 'n/2' at column 1; expected a name"),
        ("{k}", r"reading the annotations of t::f: '\{k\}'"),
    ],
)  # fmt: skip
def test_annotation_that_a_shape_line_cannot_say_is_refused(jt, dims, text):
    with pytest.raises(opkit.ShapeError, match=text) as caught:
        declared({"x": jt.Float[Tensor, dims]}, Tensor)
    assert caught.value.op == "t::f"


def test_annotation_without_a_dtype_of_torch_is_refused(jt):
    with pytest.raises(
        opkit.ShapeError, match=r"x is annotated Key\[Tensor, 'n'\], which allows no dtype of torch; exp"
    ):
        declared({"x": jt.Key[Tensor, "n"]}, Tensor)


# ---------------------------------------------------------------- with shapes=


@pytest.mark.parametrize(
    ("shapes", "wanted"),
    [
        ("*b n, k -> *b n", "*b n, k -> *b n:float32"),
        ("*b n, k -> *b n:float32", "*b n, k -> *b n:float32"),
        ("*b n, ... -> *b n:x", "*b n, ... -> *b n:x"),
        ("*b n, a b -> ...", None), ("*b m, k -> *b m", None), ("n, k -> n", None), ("b n, k -> b n", None),
        ("*b n, k -> *b n:float64", None), ("*b n:int8, k -> *b n", None),
    ],
)  # fmt: skip
def test_shape_line_must_agree(jt, shapes, wanted):
    hints = {"x": jt.Float[Tensor, "*b n"], "y": jt.Shaped[Tensor, "..."]}
    returns = jt.Float32[Tensor, "*b n"]
    if wanted is not None:
        assert line_of(hints, returns, shapes) == wanted
        return
    with pytest.raises(
        opkit.ShapeError,
        match=r"reading the shape line of t::f: (x|out) has the entry '.*' and the annotation Float(32)?\[Tensor, "
        r"'\*b n'\]; expected both to say the same, '\*b n(:float32)?'. Change one of them, or leave shapes= out",
    ):
        line_of(hints, returns, shapes)


def test_size_that_depends_on_data_is_a_name_in_an_annotation(jt):
    assert line_of({"x": jt.Float[Tensor, "n"]}, jt.Float[Tensor, "m"], "n -> ?m<=n") == "n -> ?m<=n"
    with pytest.raises(opkit.ShapeError, match="'m' is bound by no input at column 6"):
        line_of({"x": jt.Float[Tensor, "n"]}, jt.Float[Tensor, "m"])


def test_shape_line_of_another_length_is_told_by_its_names(jt):
    with pytest.raises(opkit.ShapeError, match=r"1 entry for inputs .* expected 2 \(x, y\)"):
        line_of({"x": jt.Float[Tensor, "n"], "y": Tensor}, Tensor, "n -> n")


# ---------------------------------------------------------------- an op


def test_op_takes_its_shapes_from_annotations(jt):
    def scale(x, factor):
        return x * factor

    scale.__annotations__ = {
        "x": jt.Float[Tensor, "*b n"], "factor": jt.Float[Tensor, "n"], "return": jt.Float[Tensor, "*b n"]
    }  # fmt: skip
    op = opkit.op("t::scale")(scale)
    assert op(T(2, 3), T(3)).shape == (2, 3)
    assert torch.compile(lambda x, f: op(x, f) + 1, fullgraph=True, backend="aot_eager")(
        T(2, 3), T(3)
    ).shape == (2, 3)
    assert op(T(2, 3, device="meta"), T(3, device="meta")).shape == (2, 3)
    with pytest.raises(
        opkit.ShapeError, match=r"dimension 0 of factor \(n\) is 4, but dimension 1 of x bound n to 3"
    ):
        op(T(2, 3), T(4))
    torch.library.opcheck(op.overload, (T(2, 3), T(3)))


def test_result_without_a_shape_is_traced_by_a_meta_function(jt):
    def pick(x):
        return x[0] * 1

    pick.__annotations__ = {"x": jt.Float[Tensor, "n n"], "return": Tensor}
    op = opkit.op("t::pick")(pick)
    assert op(T(2, 2)).shape == (2,)
    with pytest.raises(
        opkit.RegistrationError,
        match="tracing t::pick: its shape line 'n n -> ...' does not describe all results: its result out has no shape "
        "in its annotation; expected a meta function that does. Register one with register_fake",
    ):
        op(T(2, 2, device="meta"))
    op.register_fake(lambda x: x.new_empty(x.shape[0]))
    assert op(T(2, 2, device="meta")).shape == (2,)
    with pytest.raises(opkit.ShapeError, match="dimension 1 of x"):
        op(T(2, 3))


def test_of_annotation_is_none_for_what_has_no_shape():
    for annotation in (Tensor, int, list[Tensor], None, "n", StandIn.Float[int, "n"]):
        assert arrays.of_annotation(annotation) is None
