"""Lists of tensors in light kernels: the glue checks their entries, and allocates those that an op returns."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import opkit
from opkit.cpp import compilers

pytestmark = [
    pytest.mark.usefixtures("registry"),
    pytest.mark.skipif(compilers.find_cxx() is None, reason="needs a C++ compiler"),
]

T = torch.ones
MANY = list[Tensor]


def kernel(body):
    return opkit.cpp.kernel(f"#include <opkit/kernel.h>\nusing namespace opkit;\n{body}\n")


SCALE = """
void scale(Span<Tensor> xs, double by, Span<Tensor> ys) {
  OPKIT_CHECK(xs.size() == ys.size(), "lengths");
  for (int64_t k = 0; k < xs.size(); ++k)
    for (int64_t i = 0; i < xs[k].numel(); ++i) ys[k].data<float>()[i] = xs[k].data<float>()[i] * by;
}
"""


def scale_op(shapes):
    @opkit.op("t::scale", shapes=shapes)
    def scale(xs: list[Tensor], by: float) -> list[Tensor]:
        return [x * by for x in xs]

    scale.register_kernel("cpu", kernel(SCALE))
    return scale


XS = [T(2, 3), T(()), T(0, 4), T(5)]


@pytest.mark.parametrize("shapes", ["[*s] -> [*s]", None], ids=["shape line", "meta function"])
def test_list_is_returned(shapes):
    scale = scale_op(shapes)
    if shapes is None:
        scale.register_fake(lambda xs, by: [torch.empty_like(x) for x in xs])
    for xs in (XS, XS[:1], []):
        assert scale.explain(xs, 3.0).selected == "cpp"
        found = scale(xs, 3.0)
        assert isinstance(found, list)
        assert [f.tolist() for f in found] == [(x * 3).tolist() for x in xs]
    compiled = torch.compile(lambda xs: [y + 1 for y in scale(xs, 2.0)], fullgraph=True, backend="aot_eager")
    assert [f.tolist() for f in compiled(XS)] == [(x * 2 + 1).tolist() for x in XS]


def test_list_beside_other_results():
    @opkit.op("t::split", shapes="n, [*s n] -> n, [*s n 2]:x, ()")
    def split(x: Tensor, ys: list[Tensor]) -> tuple[Tensor, list[Tensor], Tensor]: ...

    split.register_kernel("cpu", kernel("""
      void split(Tensor x, Span<Tensor> ys, Tensor a, Span<Tensor> bs, Tensor c) {
        a.data<float>()[0] = 7;
        for (const Tensor& b : bs) b.data<float>()[b.numel() - 1] = float(b.dim());
        c.data<float>()[0] = float(bs.size());
      }"""))  # fmt: skip
    a, bs, c = split(T(1), [T(1).int(), T(4, 1)])
    assert (a.item(), c.item()) == (7, 2)
    assert [(tuple(b.shape), b.dtype, b.flatten()[-1].item()) for b in bs] == [
        ((1, 2), torch.float32, 2), ((4, 1, 2), torch.float32, 3)
    ]  # fmt: skip


def test_data_dependent_size_in_a_list_is_refused():
    @opkit.op("t::f", shapes="[n] -> [?m<=n]")
    def f(xs: list[Tensor]) -> list[Tensor]: ...

    f.register_kernel("cpu", kernel("void f(Span<Tensor>, Span<Tensor>) {}"))
    with pytest.raises(
        opkit.BuildError,
        match=r"the size \?m<=n of the tensors in output out depends on data, and a light kernel cannot set it in a "
        "list; expected it in an output of its own. Return a tuple, or register a Python kernel",
    ):
        f([T(1)])


@pytest.mark.parametrize("returns", [int, Tensor | None], ids=["int", "optional"])
def test_result_that_is_no_tensor_is_refused(returns):
    def f(x): ...

    f.__annotations__ = {"x": Tensor, "return": tuple[Tensor, returns]}
    op = opkit.op("t::f")(f)
    op.register_kernel("cpu", kernel("void f(Tensor, Tensor) {}"))
    with pytest.raises(
        opkit.BuildError, match="its result out1 is .*, which a light kernel cannot return; expected"
    ):
        op(T(1))


def test_mismatch_in_a_list_is_named():
    scale = scale_op("[n *s] -> [*s]")
    with pytest.raises(
        opkit.ShapeError, match=r"dimension 0 of xs\[1\] \(n\) is 3, but dimension 0 of xs\[0\]"
    ):
        scale([T(2), T(3)], 1.0)


# ---------------------------------------------------------------- the glue and the plan agree

LINES = {
    "given": ("[*s n], [*s k], m, [n//k m]:a, [*b] -> [*s n k]:d, [*b n-k], m",
              (MANY, MANY, Tensor, MANY, MANY)),
    "maybe": ("[*s n], [*s n-1], n, [m]:a, [n m]:int8 -> [*s m]:d, [m]:int8, n",
              (list[Tensor | None] | None, list[Tensor | None], Tensor | None, MANY, MANY)),
}  # fmt: skip


@pytest.fixture(scope="module", params=LINES)
def every_check(request):
    line, hints = LINES[request.param]
    line = line.replace(":a", ":xs").replace(":d", ":zs")
    name = f"lists_{request.param}"
    scope = {}
    exec(f"def {name}(xs, ys, x, ws, zs, k): ...", scope)
    f = scope[name]
    f.__annotations__ = dict(zip(("xs", "ys", "x", "ws", "zs"), hints, strict=True)) | {"k": int}
    f.__annotations__["return"] = tuple[MANY, MANY, Tensor]
    line = line.replace("[*s n k]:zs", "[*s n k]").replace("[*s m]:zs", "[*s m]")
    line = line.replace("[m]:int8,", "[m]:ws,")
    op = opkit.op(f"t::{name}", shapes=line)(f)
    from opkit.cpp._glue import signature

    source = kernel(signature(name, op.schema).rstrip(";") + " {}")
    yield op._runner.native_plan, source.bind(op.schema, op._runner.native_plan, "cpu", None, "cpp")
    opkit._registry.remove(f"t::{name}")


sizes = st.lists(st.integers(0, 2), max_size=2)


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_glue_agrees_with_the_plan(every_check, data):
    plan, bound = every_check
    count = data.draw(st.integers(0, 2))
    known = {"k": data.draw(st.integers(1, 2)), "n": 2, "m": 1}
    stars = [data.draw(sizes) for _ in range(count)]
    values = []
    for tensors in plan.inputs:

        def one(index):
            shape = []
            for dim in tensors.entry.dims:
                if dim.star:
                    shape += stars[index] if index is not None else [1]
                else:
                    shape.append(eval(dim.text, {}, known))
            wrong = data.draw(st.sampled_from([None] * 12 + ["rank", "size", "size"]))
            if wrong == "rank":
                shape = data.draw(sizes)
            elif wrong == "size" and shape:
                shape[data.draw(st.integers(0, len(shape) - 1))] += 1
            dtype = torch.int8 if tensors.entry.suffix == "int8" else torch.float32
            return T(shape, dtype=torch.float64 if data.draw(st.integers(0, 15)) == 0 else dtype)

        if tensors.optional and data.draw(st.integers(0, 4)) == 0:
            values.append(None)
        elif tensors.entry.is_list:
            missing = tensors.optional_elements
            value = [None if missing and data.draw(st.integers(0, 4)) == 0 else one(i) for i in range(count)]
            values.append(value[: data.draw(st.sampled_from([count, count, count, 0]))])
        else:
            values.append(one(None))
    values.append(known["k"])
    try:
        metas, device = plan.infer(*values)
    except opkit.OpkitError:
        with pytest.raises(RuntimeError, match="t::lists_"):
            bound.call(*values)
        return
    if "maybe" in plan.schema.name and any(v is None for v in values[0] or ()):
        return  # an element whose sizes only another list has: refused by the glue
    found = bound.call(*values)
    flat = [t for f in found for t in (f if isinstance(f, (list, tuple)) else [f])]
    wanted = [m for meta in metas for m in (meta if isinstance(meta, list) else [meta])]
    assert [(tuple(t.shape), t.dtype, t.device) for t in flat] == [(m.shape, m.dtype, device) for m in wanted]
    assert all(t.is_contiguous() for t in flat)
