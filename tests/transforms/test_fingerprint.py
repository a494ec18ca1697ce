from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
import textwrap
import types

import pytest
import torch
from torch import Tensor

import opkit
from opkit.transforms import fingerprint
from opkit.transforms.fingerprint import UnseenError, of

pytestmark = pytest.mark.usefixtures("registry")


def digest(value):
    return of(value)[0]


def function(text, **scope):
    """Return the function `f` that a text defines, compiled anew."""
    exec(compile(textwrap.dedent(text), "<text>", "exec"), scope)
    return scope["f"]


# ---------------------------------------------------------------- functions


def test_same_function_on_another_line_has_the_same_fingerprint():
    assert digest(function("def f(x): return x + 1")) == digest(
        function("# comment\n\n\ndef f(x):\n    # more\n    return x + 1")
    )


@pytest.mark.parametrize(
    "text",
    [
        "def f(x): return x + 2",
        "def f(x): return x - 1",
        "def f(x, y=1): return x + 1",
        "def f(x): return abs(x) + 1",
        "def f(x): return (lambda: x + 1)()",
    ],
)
def test_another_body_has_another_fingerprint(text):
    assert digest(function("def f(x): return x + 1")) != digest(function(text))


def test_constants_in_inner_functions_count():
    text = "def f(x): return [y + {} for y in (lambda: x)()]"
    assert digest(function(text.format(1))) != digest(function(text.format(2)))


def test_defaults_count():
    assert digest(function("def f(x, *, k=1): pass")) != digest(function("def f(x, *, k=2): pass"))


def test_enclosed_values_count():
    def make(value):
        return lambda: value

    assert digest(make(1)) == digest(make(1))
    assert len({digest(make(v)) for v in (1, 1.0, True, "1", None, (1,), [1], {1: 1}, {1}, torch.int8)}) == 10
    assert digest(make({"a", "b", "c"})) == digest(make({"c", "b", "a"}))
    assert digest(make(torch.ones(3))) == digest(make(torch.ones(3)))
    assert digest(make(torch.ones(3))) != digest(make(torch.zeros(3)))
    assert digest(make(torch.ones(3).bfloat16())) != digest(make(torch.ones(3).half()))


def test_globals_that_are_named_count_and_others_do_not():
    text = "def f(x): return x * FACTOR"
    assert digest(function(text, FACTOR=2)) == digest(function(text, FACTOR=2, OTHER=1))
    assert digest(function(text, FACTOR=2)) != digest(function(text, FACTOR=3))


def test_functions_that_are_called_count():
    text = "def f(x): return helper(x)"
    one, two = (lambda x: x + 1), (lambda x: x + 2)
    assert digest(function(text, helper=one)) != digest(function(text, helper=two))
    assert digest(function(text, helper=functools.partial(one, k=1))) != digest(
        function(text, helper=functools.partial(one, k=2))
    )


def test_what_is_taken_of_a_module_counts():
    text = "def f(x): return mine.helper(x) + mine.inner.k"
    found = set()
    for k in (1, 2):
        for helper in (abs, len):
            mine, mine_inner = types.ModuleType("mine"), types.ModuleType("mine.inner")
            mine.inner, mine.helper, mine.unused = mine_inner, helper, object()
            mine_inner.k = k
            found.add(digest(function(text, mine=mine)))
    assert len(found) == 4


def test_methods_of_classes_that_are_named_count():
    text = "def f(x): return Helper(x).get()"
    found = {digest(function(text, Helper=type("Helper", (), {"get": lambda self, n=n: n}))) for n in (1, 2)}
    assert len(found) == 2


def test_attributes_of_objects_that_are_named_count():
    text = "def f(x): return x * settings.factor"
    assert digest(function(text, settings=types.SimpleNamespace(factor=1))) != digest(
        function(text, settings=types.SimpleNamespace(factor=2))
    )


def test_functions_that_call_each_other_end():
    scope: dict = {}
    exec("def f(n): return g(n)\ndef g(n): return f(n)", scope)
    assert digest(scope["f"]) != digest(scope["g"])


@pytest.mark.parametrize("imported", ["import of_mine", "from of_mine.inner import k", "from . import k"])
def test_function_that_imports_what_may_be_edited_has_no_fingerprint(imported):
    with pytest.raises(UnseenError, match="a function that imports"):
        of(function(f"def f(x):\n    {imported}\n    return k(x)"))


def test_function_that_imports_a_library_has_a_fingerprint():
    assert digest(function("def f(x):\n    import math\n    from torch import nn\n    return x"))


def test_libraries_count_by_name():
    assert digest(function("def f(x): return math.sin(x)", math=math)) != digest(
        function("def f(x): return math.cos(x)", math=math)
    )
    assert digest(function("def f(x): return torch.nn.functional.relu(x)", torch=torch))


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (open, "builtin"),
        ((i for i in range(3)), "generator object, which cannot be pickled"),
        (torch.empty(2000, 2000), r"a tensor of shape \(2000, 2000\)"),
    ],
    ids=["builtin", "generator", "large tensor"],
)
def test_value_that_cannot_be_told_from_another_has_no_fingerprint(value, what):
    f = function("def f(x): return x + value", value=value)
    if what == "builtin":
        assert digest(f)
        return
    with pytest.raises(UnseenError, match=what):
        digest(f)


def test_declaration_that_refers_to_too_much_has_no_fingerprint():
    with pytest.raises(UnseenError, match="more than 5000"):
        digest([[i] for i in range(6000)])


# ---------------------------------------------------------------- ops


def declare(k=1, **options):
    @opkit.op("t::f", shapes="n -> n", **options)
    def f(x: Tensor) -> Tensor:
        return x * k

    opkit._registry.remove("t::f")
    return f


def test_every_part_of_a_declaration_counts():
    base = declare()
    others = [declare(2), declare(inline=True), declare(tags=[torch.Tag.flexible_layout])]
    for register in (
        lambda f: f.register_fake(torch.empty_like),
        lambda f: f.register_fake(torch.zeros_like),
        lambda f: f.register_autograd(lambda ctx, grad: grad),
        lambda f: f.register_autograd(lambda ctx, grad: grad * 2),
        lambda f: f.register_autograd(opkit.from_reference),
        lambda f: f.register_vmap("sequential"),
        lambda f: f.register_kernel("cpu", lambda x: x, backend="fast", inplace=["x"]),
    ):
        others.append(declare())
        register(others[-1])
    assert digest(base) == digest(declare())
    assert len({digest(f) for f in (base, *others)}) == len(others) + 1


def test_kernels_do_not_count_as_they_are_chosen_when_called():
    f = declare()
    before = digest(f)
    f.register_kernel("cpu", lambda x: x.clone(), backend="fast")
    assert digest(f) == before


def test_the_op_that_is_the_formula_counts():
    found = set()
    for k in (1, 2):

        @opkit.op("t::f_backward", shapes="n -> n")
        def f_backward(grad: Tensor, k: int = k) -> Tensor:
            return grad * k

        f = declare()
        f.register_autograd(f_backward)
        text, ops = of(f)
        found.add(text)
        assert ops == {"t::f", "t::f_backward"}
        opkit._registry.remove("t::f_backward")
    assert len(found) == 2


def test_graph_has_the_fingerprints_of_its_ops_also_in_higher_order_calls():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    overload = opkit.get("opkit::vector_add").overload
    y = graph.call_function(torch.ops.aten.add.Tensor, (x, x))
    graph.output(graph.call_function(lambda op, x: op(x, x), (overload, y)))
    module = torch.fx.GraphModule({}, graph)
    assert [name for name, _ in fingerprint.of_graph(module, opkit.find)] == ["opkit::vector_add"]
    assert fingerprint.of_graph(module, lambda name: None) == []


# ---------------------------------------------------------------- in one process


def compiled(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def gradient(function):
    x = torch.ones(2, requires_grad=True)
    function(x).sum().backward()
    return x.grad[0].item()


@pytest.mark.parametrize("call", ["op", "overload"])
def test_formula_registered_after_compiling_takes_effect(call):
    @opkit.op("t::f", shapes="n -> n")
    def f(x: Tensor) -> Tensor:
        return x * 2

    f.register_autograd(lambda ctx, grad: grad * 2)
    target = f if call == "op" else f.overload
    g = compiled(lambda x: target(x) + 0)
    assert gradient(g) == 2
    f.register_autograd(lambda ctx, grad: grad * 3)
    assert gradient(g) == 3


def test_formula_of_a_formula_registered_after_compiling_takes_effect():
    @opkit.op("t::f_backward", shapes="n -> n")
    def f_backward(grad: Tensor) -> Tensor:
        return grad * 2

    @opkit.op("t::f", shapes="n -> n")
    def f(x: Tensor) -> Tensor:
        return x * 2

    f.register_autograd(f_backward)
    g = compiled(lambda x: f(x) + 0)
    assert gradient(g) == 2
    assert f._compiled.codes
    f_backward.register_fake(lambda grad: grad.new_empty(grad.shape))
    assert not f._compiled.codes
    assert gradient(g) == 2


def test_meta_function_registered_after_compiling_takes_effect():
    @opkit.op("t::f")
    def f(x: Tensor) -> Tensor:
        return x + 1

    f.register_fake(lambda x: x.new_empty(x.shape))
    g = compiled(lambda x: f(x).t().contiguous())
    x = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(g(x), (x + 1).t())
    f.register_fake(lambda x: x.new_empty_strided(x.shape, (1, x.shape[0])))
    assert torch.equal(g(x), (x + 1).t())


def test_kernel_registered_after_compiling_takes_effect_without_compiling_anew():
    @opkit.op("t::f", shapes="n -> n")
    def f(x: Tensor) -> Tensor:
        return x * 2

    g = compiled(lambda x: f(x) + 0)
    assert g(torch.ones(1)).item() == 2
    f.register_kernel("cpu", lambda x: x * 3, backend="fast")
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert g(torch.ones(1)).item() == 3


def test_op_defined_again_after_compiling_takes_effect():
    def define(k):
        scope = {"opkit": opkit, "Tensor": Tensor}
        text = f'@opkit.op("t::f", shapes="n -> n")\ndef f(x: Tensor) -> Tensor:\n    return x * {k}\n'
        exec(compile(text, "cell", "exec"), scope)
        return scope["f"]

    f = define(2)
    g = compiled(lambda x: f(x) + 0)
    assert g(torch.ones(1)).item() == 2
    assert define(3) is f
    assert g(torch.ones(1)).item() == 3


def test_other_functions_are_not_compiled_anew():
    @opkit.op("t::f", shapes="n -> n")
    def f(x: Tensor) -> Tensor:
        return x * 2

    @opkit.op("t::other", shapes="n -> n")
    def other(x: Tensor) -> Tensor:
        return x * 2

    g = compiled(lambda x: other(x) + 0)
    g(torch.ones(1))
    f.register_autograd(lambda ctx, grad: grad)
    assert other._compiled.codes
    other.register_autograd(lambda ctx, grad: grad)
    assert not other._compiled.codes


# ---------------------------------------------------------------- two processes

PROGRAM = """
import json, sys
import opkit, torch
from torch import Tensor
from torch._dynamo.utils import counters

SCALE = 2.0

def helper(grad):
    return grad * SCALE

@opkit.op("edited::formula", shapes="n -> n")
def formula(x: Tensor) -> Tensor:
    return x * 2

formula.register_autograd(lambda ctx, grad: helper(grad) * 1)

@opkit.op("edited::fused", shapes="n -> n", inline=True)
def fused(x: Tensor) -> Tensor:
    return x.sin() * 2

@opkit.op("edited::meta")
def meta(x: Tensor) -> Tensor:
    return x * 2

@meta.register_fake
def _(x):
    return x.new_empty_strided(x.shape, (x.shape[1], 1))

STRIDES = []

@opkit.op("edited::tags", shapes="a b -> a b", tags=[torch.Tag.flexible_layout])
def tags(x: Tensor) -> Tensor:
    STRIDES.append(x.stride())
    return x * 2

@opkit.op("edited::mutates", shapes="n, n ->", mutates_args=["x"])
def mutates(x: Tensor, y: Tensor) -> None:
    x.add_(y)

@opkit.op("edited::overwrites", shapes="n -> n")
def overwrites(x: Tensor) -> Tensor:
    return x * 2

overwrites.register_kernel("cpu", lambda x: x.mul_(2), backend="fast", inplace=["x"])

def run(name, f, *args):
    torch._dynamo.reset()
    counters.clear()
    result = torch.compile(f, fullgraph=True)(*args)
    if result.requires_grad:
        result.sum().backward()
    found = counters["aot_autograd"], counters["inductor"]
    hit = found[0]["autograd_cache_hit"] == 1 and not found[1]["fxgraph_cache_miss"]
    return {"hit": hit, "value": [args[0].grad.tolist() if result.requires_grad else result.tolist()],
            "stride": result.stride(), "seen": [list(s) for s in STRIDES]}

def mutated(x, y):
    x, y = x.clone(), y.clone()
    mutates(x, y)
    return x * 10 + y

grid = torch.arange(6.0).reshape(2, 3)
RUNS = {
    "formula": (lambda x: formula(x) + 0, torch.ones(2, requires_grad=True)),
    "inline": (lambda x: fused(x) + 0, torch.ones(2)),
    "meta": (lambda x: meta(x), grid),
    "tags": (lambda x: tags(x.t().sin()) + 0, grid),
    "mutations": (mutated, torch.ones(2), torch.ones(2)),
    "overwrites": (lambda x: overwrites(x + 1) + 0, torch.ones(2)),
}
found = {name: run(name, *RUNS[name]) for name in sys.argv[1:] or RUNS}
print(json.dumps(found))
"""

EDITS = {
    "formula": ("helper(grad) * 1", "helper(grad) * 3"),
    "what the formula calls": ("return grad * SCALE", "return grad * SCALE * 3"),
    "what the formula reads": ("SCALE = 2.0", "SCALE = 6.0"),
    "inline": ("x.sin() * 2", "x.sin() * 3"),
    "meta": ("(x.shape[1], 1)", "(1, x.shape[0])"),
    "tags": ("torch.Tag.flexible_layout", "torch.Tag.needs_contiguous_strides"),
    "mutations": (
        'mutates_args=["x"])\ndef mutates(x: Tensor, y: Tensor) -> None:\n    x.add_(y)',
        'mutates_args=["x", "y"])\ndef mutates(x: Tensor, y: Tensor) -> None:\n    y.add_(x)',
    ),
}  # fmt: skip


def in_a_process(folder, text, *names):
    (folder / "program.py").write_text(text)
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "PYTHONWARNINGS": "ignore",
    }
    run = subprocess.run(
        [sys.executable, "program.py", *names], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder with torch's caches after one process, and what it found."""
    folder = tmp_path_factory.mktemp("compile-caches")
    return folder, in_a_process(folder, PROGRAM)


def test_unchanged_declarations_hit_the_compile_caches(shared):
    folder, first = shared
    again = in_a_process(folder, "# moved\n\n" + PROGRAM)
    assert not any(found["hit"] for found in first.values())
    assert all(found["hit"] for found in again.values())
    assert {k: v["value"] for k, v in again.items()} == {k: v["value"] for k, v in first.items()}


@pytest.mark.parametrize("edit", EDITS)
def test_pytorch_144344_187319_160472_each_edit_gives_the_new_result_and_leaves_the_others_in_the_caches(
    shared, edit
):
    folder, first = shared
    assert EDITS[edit][0] in PROGRAM
    name = edit if edit in first else "formula"
    edited = in_a_process(folder, PROGRAM.replace(*EDITS[edit]), name, "overwrites")
    assert (edited[name]["hit"], edited["overwrites"]["hit"]) == (False, True)
    before, after = first[name], edited[name]
    if name == "formula":
        assert (before["value"], after["value"]) == ([[2, 2]], [[6, 6]])
    elif name == "inline":
        assert after["value"][0][0] == pytest.approx(math.sin(1) * 3)
    elif name == "meta":
        assert (before["stride"], after["stride"]) == ([3, 1], [1, 2])
    elif name == "tags":
        assert (before["seen"], after["seen"]) == ([[1, 3]], [[2, 1]])
    else:
        assert (before["value"], after["value"]) == ([[21, 21]], [[12, 12]])


def test_declaration_without_a_fingerprint_bypasses_the_compile_caches(tmp_path):
    text = PROGRAM.replace("SCALE = 2.0", "import threading; LOCK = threading.Lock(); SCALE = 2.0")
    text = text.replace("return grad * SCALE", "with LOCK: return grad * SCALE")
    first, again = (in_a_process(tmp_path, text, "formula", "inline") for _ in range(2))
    assert (again["formula"]["hit"], again["inline"]["hit"]) == (False, True)
    assert again["formula"]["value"] == first["formula"]["value"] == [[2, 2]]
