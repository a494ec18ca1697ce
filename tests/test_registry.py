from __future__ import annotations

import gc
import importlib
import pickle
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._inductor import decomposition
from torch.utils import flop_counter

import opkit
from opkit import _registry

pytestmark = pytest.mark.usefixtures("registry")

T = torch.ones(2)


def define(k=1):
    """Define `t::f` the way a notebook does whose cell is edited and run again."""
    scope = {"opkit": opkit, "Tensor": Tensor}
    cell = f"@opkit.op('t::f', shapes='n -> n')\ndef f(x: Tensor) -> Tensor:\n    return x + {k}\n"
    exec(compile(cell, __file__, "exec"), scope)
    return scope["f"]


def test_op_is_found_by_name():
    f = define()
    assert opkit.get("t::f") is f
    assert opkit.find("t::f") is f
    assert "t::f" in opkit.list_ops()
    assert opkit.find("t::nothing") is None


def test_list_of_ops_is_sorted_and_has_the_built_in_ones():
    names = opkit.list_ops()
    assert names == sorted(names)
    assert "opkit::rms_norm" in names


def test_unknown_op_raises_with_the_list_and_a_hint():
    define()
    with pytest.raises(
        opkit.OpNotFoundError, match=r"looking up t::ff: no op has that name; .* Did you mean 't::f'"
    ) as caught:
        opkit.get("t::ff")
    assert caught.value.op == "t::ff"
    assert isinstance(caught.value, KeyError)
    assert str(caught.value).startswith("looking up")


@pytest.mark.parametrize("look", [opkit.get, opkit.find])
def test_name_without_a_namespace_is_refused(look):
    with pytest.raises(opkit.SchemaError, match="expected namespace::name"):
        look("f")


def test_duplicate_from_another_place_names_both_places(tmp_path, monkeypatch):
    text = """
import opkit
from torch import Tensor
@opkit.op("t::f", shapes="n -> n")
def f(x: Tensor) -> Tensor:
    return x + 1
"""
    for name in ("opkit_one", "opkit_two"):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    one = importlib.import_module("opkit_one")
    with pytest.raises(
        opkit.DuplicateOpError, match=r"t::f: found two definitions, f \(.*one.py:4\) and f \(.*two.py:4\)"
    ):
        importlib.import_module("opkit_two")
    assert one.f(T).tolist() == [2, 2]
    assert opkit.get("t::f") is one.f


def test_two_functions_of_one_module_may_not_share_a_name():
    define()
    with pytest.raises(opkit.DuplicateOpError, match="found two definitions"):

        @opkit.op("t::f", shapes="n -> n")
        def g(x: Tensor) -> Tensor:
            return x + 2


def test_redefinition_from_the_same_place_replaces():
    define(1)
    again = define(2)
    assert again(T).tolist() == [3, 3]
    assert opkit.get("t::f") is again


def test_reloaded_module_replaces_its_op(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    path = tmp_path / "opkit_reloaded.py"
    head = "import opkit\nfrom torch import Tensor\n\n@opkit.op('t::f')\n"
    text = head + "def f(x: Tensor) -> Tensor:\n    return x + 1\n"
    path.write_text(text)
    module = importlib.import_module("opkit_reloaded")
    path.write_text("# moved\n\n" + text.replace("+ 1", "+ 10"))
    importlib.reload(module)
    assert module.f(T).tolist() == [11, 11]
    assert opkit.get("t::f") is module.f


def test_compiled_function_notices_a_redefinition():
    ops = {"f": define(1)}
    call = torch.compile(lambda x: ops["f"](x), backend="aot_eager", fullgraph=True)
    assert call(T).tolist() == [2, 2]
    ops["f"] = define(2)
    assert call(T).tolist() == [3, 3]


def test_redefinition_reaches_whoever_holds_the_op():
    old = define(1)
    assert old(T).tolist() == [2, 2]
    new = define(2)
    assert old is new is opkit.get("t::f")
    assert old(T).tolist() == [3, 3]


def test_function_that_makes_ops_under_one_name_is_refused():
    def make(k):
        @opkit.op("t::made", shapes="n -> n")
        def made(x: Tensor) -> Tensor:
            return x + k

        return made

    first = make(1)
    with pytest.raises(
        opkit.DuplicateOpError, match="a function that makes ops takes their name as an argument"
    ):
        make(2)
    assert first(T).tolist() == [2, 2]
    assert make(1)(T).tolist() == [2, 2]  # the same once more is no conflict


@pytest.mark.parametrize(
    ("option", "error"),
    [
        ({"inline": True}, opkit.RegistrationError),
        ({"effects": True}, opkit.RegistrationError),
        ({"layout": "dense"}, opkit.SchemaError),
        ({"flops": lambda: 0}, opkit.RegistrationError),
    ],
    ids=["inline", "effects", "layout", "flops"],
)
def test_redefinition_that_is_refused_leaves_the_op_as_it_was(option, error):
    def cell(**options):
        @opkit.op("t::grow", shapes="n ->", mutates_args=["x"], **options)
        def grow(x: Tensor) -> None:
            x.add_(1)

        return grow

    grow, x = cell(), torch.zeros(2)
    with pytest.raises(error):
        cell(**option)
    grow(x)
    assert opkit.get("t::grow") is grow
    assert x.tolist() == [1, 1]


def test_redefinition_with_another_schema_replaces_the_schema():
    def make(second):
        def f(x, y): ...

        f.__annotations__ = {"x": Tensor, "y": second, "return": Tensor}
        return opkit.op("t::f")(f)

    make(int)
    assert str(make(float).overload._schema) == "t::f(Tensor x, float y) -> Tensor"


def test_name_that_torch_library_has_taken_is_refused():
    library = torch.library.Library("t_other", "FRAGMENT")
    library.define("f(Tensor x) -> Tensor")
    try:
        with pytest.raises(
            opkit.DuplicateOpError, match=r"declaring t_other::f from .*g \(.*torch refused it"
        ) as caught:

            @opkit.op("t_other::f")
            def g(x: Tensor) -> Tensor: ...

        assert caught.value.op == "t_other::f"
        assert opkit.find("t_other::f") is None
    finally:
        library._destroy()


def test_removed_op_is_gone_from_torch():
    f = define()
    _registry.remove("t::f")
    assert opkit.find("t::f") is None
    assert not hasattr(torch.ops.t, "f")
    _registry.remove("t::f")
    assert define(4)(T).tolist() == [5, 5]
    assert f is not opkit.get("t::f")


def test_addition_waits_for_its_op_and_is_applied_again_on_redefinition():
    seen = []
    _registry.when_defined("t::f", seen.append)
    assert seen == []
    first = define()
    second = define()
    assert seen == [first, second]
    _registry.when_defined("t::f", seen.append)
    assert seen == [first, second, second]
    with pytest.raises(opkit.SchemaError):
        _registry.when_defined("f", seen.append)


def test_removed_definition_leaves_a_later_one_alone():
    """torch's Library takes its names out of the books once more when it is collected."""
    old = define()._library
    kept = define(2)
    assert kept._library is not old
    del old
    gc.collect()
    assert torch.ops.t.f.default is kept.overload
    assert "t::f" in torch.library._defs


def books() -> dict[str, set[str]]:
    """What torch keeps of ops under the names of the tests."""
    schemas = sys.modules.get("torch.fx.operator_schemas")
    signatures = {name for name, _ in schemas._SCHEMA_TO_SIGNATURE_CACHE} if schemas else set()
    registered = torch._library.simple_registry.singleton._data
    return {
        "dispatcher": {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("t::")},
        "torch.ops": {n for n in vars(torch.ops.t) if n in ("left", "pair", "log")},
        "definitions": {n for n in torch.library._defs if n.startswith("t::")},
        "kernels": {n for n in torch.library._impls if n.startswith("t/")},
        "signatures": {n for n in signatures if n.startswith("t::")},
        "meta functions": {n for n, e in registered.items() if n.startswith("t::") and e.fake_impl.kernel},
        "effects": {n for n, e in registered.items() if n.startswith("t::") and e.effect.effect},
        "decompositions": {
            str(overload)
            for table in (decomposition.decompositions, decomposition.fast_random_decomps())
            for overload in table
            if str(overload).startswith("t.")
        },
        "flops": {str(packet) for packet in flop_counter.flop_registry if str(packet).startswith("t.")},
    }


def test_removed_op_leaves_nothing_behind_in_torch():
    @opkit.op("t::left", shapes="*b n -> *b n", inline=True, flops=lambda x: 1)
    def left(x: Tensor) -> Tensor:
        return x + 1

    @opkit.op("t::pair", mutates_args=("y",))
    def pair(x: Tensor, y: Tensor) -> None:
        y.copy_(x)

    @opkit.op("t::log", shapes="n -> ", effects=True)
    def log(x: Tensor) -> None: ...

    left.register_autograd(opkit.from_reference)
    left.register_jvp(opkit.from_reference)
    left.register_vmap("expand")
    left.register_autocast("cpu", torch.bfloat16)
    left.register_kernel("cpu", lambda x: x + 1)
    left.register_kernel("cpu", lambda x: x.add_(1), backend="fast", inplace=["x"])
    left.maybe_inplace(T.clone())
    left.into(T.clone(), T)
    pair.functional(T, T.clone())
    with opkit.use_backend("python"):
        torch.compile(lambda x: left(x), fullgraph=True, backend="inductor")(T)
    torch.library.opcheck(left.overload, (T,))
    full = books()
    assert all("t::left" in full[name] for name in ("dispatcher", "definitions", "meta functions"))
    assert all(full.values())
    for name in ("t::left", "t::pair", "t::log"):
        _registry.remove(name)
    assert books() == {name: set() for name in full}
    assert not [name for name in opkit.list_ops() if name.startswith("t::")]


def test_op_that_is_defined_again_with_another_signature_goes_through_opcheck():
    def make(k):
        def f(x, y): ...

        f.__annotations__ = {"x": Tensor, "y": k, "return": Tensor}
        op = opkit.op("t::f")(f)
        op.register_fake(lambda x, y: torch.empty_like(x))
        op.register_kernel("cpu", lambda x, y: x * 2)
        return op

    torch.library.opcheck(make(int).overload, (T, 3))
    torch.library.opcheck(make(Tensor).overload, (T, T))


def test_state_dict_of_a_module_that_holds_an_op_loads_with_weights_only(tmp_path):
    op = define()

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.op, self.weight = op, torch.nn.Parameter(torch.ones(2))

    layer = Layer()
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    layer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert layer.op is op


def test_saved_module_that_holds_an_op_is_loaded_in_full_or_refused_by_torch(tmp_path):
    """`weights_only=True` takes no functions: an op is one."""
    op = opkit.get("opkit::rms_norm")
    torch.save({"op": op, "weight": T}, tmp_path / "all.pt")
    assert torch.load(tmp_path / "all.pt", weights_only=False)["op"] is op
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(tmp_path / "all.pt", weights_only=True)


def test_spawned_worker_has_the_ops_of_the_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("""
import multiprocessing, opkit, torch

@opkit.op("t::script", shapes="n -> n")
def script(x: torch.Tensor) -> torch.Tensor:
    return x + 1

declared = opkit.declare("t::declared(Tensor x) -> Tensor", shapes="n -> n")
declared.register_kernel("cpu", lambda x: x + 2)
adopted = opkit.adopt("aten::relu")

def work(ops, queue):
    queue.put([op(torch.ones(2)).tolist() for op in ops])

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    worker = context.Process(target=work, args=([script, declared, adopted], queue))
    worker.start()
    print(queue.get(timeout=60))
    worker.join()
""")
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert run.stdout.strip() == "[[2.0, 2.0], [3.0, 3.0], [1.0, 1.0]]", run.stderr


def test_call_of_a_removed_op_is_refused():
    @opkit.op("t::gone", shapes="n -> n")
    def gone(x: Tensor) -> Tensor:
        return x * 2

    for _ in range(2):
        gone(torch.ones(2))
    opkit._registry.remove("t::gone")
    with pytest.raises(opkit.OpNotFoundError, match="calling t::gone: found an op that was removed"):
        gone(torch.ones(2))
