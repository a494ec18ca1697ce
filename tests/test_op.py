from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
import textwrap
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import opkit

pytestmark = pytest.mark.usefixtures("registry")

T = torch.ones(2, 3)


class Pair(NamedTuple):
    low: Tensor
    high: Tensor


@pytest.fixture
def op():
    @opkit.op("t::f", shapes="*b n -> *b n, *b n")
    def f(x: Tensor, k: float = 2.0, *, shift: int = 0) -> Pair:
        """Scale twice."""
        return Pair(x * k + shift, x * k * k + shift)

    return f


def test_op_keeps_signature_doc_name_and_defaults(op):
    assert inspect.signature(op) == inspect.signature(op.reference)
    assert (op.__name__, op.__doc__, op.__module__) == ("f", "Scale twice.", __name__)
    assert inspect.signature(op).parameters["k"].default == 2.0
    assert op.__wrapped__ is op.reference


def test_op_says_what_it_is(op):
    assert op.name == "t::f"
    assert str(op.schema) == "t::f(Tensor x, float k=2.0, *, SymInt shift=0) -> (Tensor low, Tensor high)"
    assert op.overload is torch.ops.t.f.default
    assert torch.Tag.pt2_compliant_tag in op.overload.tags
    assert isinstance(op, opkit.Op)
    assert repr(op) == "<opkit.Op t::f (reference)>"
    op.register_kernel("cuda", lambda x, k, *, shift: None, backend="a")
    op.register_kernel("cpu", lambda x, k, *, shift: None, backend="b", priority=1)
    assert repr(op) == "<opkit.Op t::f (cpu: b; cuda: a; reference)>"


def test_named_tuple_comes_out_of_a_compiled_graph(op):
    found = torch.compile(lambda x: op(x, shift=1), fullgraph=True, backend="aot_eager")(T)
    assert type(found) is Pair
    torch.testing.assert_close(found, op.reference(T, shift=1))


def test_tags_reach_torch():
    @opkit.op("t::f", shapes="n -> n", tags=[torch.Tag.needs_exact_strides])
    def f(x: Tensor) -> Tensor: ...

    assert torch.Tag.needs_exact_strides in f.overload.tags


def test_wrong_call_raises_type_error(op):
    for call in (lambda: op(), lambda: op(T, 1.0, 2), lambda: op(T, unknown=1), lambda: op(T.tolist())):
        with pytest.raises((TypeError, opkit.ArgumentError), match="calling t::f: "):
            call()


@pytest.mark.parametrize("name", ["self", "keyset", "args", "kwargs", "values", "call", "ctx"])
def test_argument_may_have_any_name(name):
    scope: dict = {}
    exec(f"def f({name}, k=1): return {name} * k", scope)
    scope["f"].__annotations__ = {name: Tensor, "k": int, "return": Tensor}
    op = opkit.op("t::f", shapes="*b -> *b")(scope["f"])
    op.register_autograd(opkit.from_reference)
    x = torch.ones(2, requires_grad=True)
    assert op(**{name: x}, k=4).tolist() == [4, 4]
    assert op.explain(**{name: x}).selected == "reference"
    op(x).sum().backward()
    assert x.grad.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("signature", "name"),
    [("_x", "_x"), ("opkit_backend", "opkit_backend"), ("*, self", "self"), ("*, keyset", "keyset")],
)
def test_argument_name_that_is_taken_is_refused(signature, name):
    scope: dict = {}
    exec(f"def f({signature}): return {name}", scope)
    scope["f"].__annotations__ = {name: Tensor, "return": Tensor}
    with pytest.raises(opkit.SchemaError, match=f"parameter '{name}' has a name that .* needs.*Rename it"):
        opkit.op("t::f")(scope["f"])


# ---------------------------------------------------------------- copies


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy], ids=["copy", "deepcopy"])
def test_copy_of_an_op_is_the_op(copied):
    op = opkit.get("opkit::rms_norm")
    assert copied(op) is op
    assert copied([op])[0] is op


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_op_is_pickled_by_name(protocol):
    op = opkit.get("opkit::rms_norm")
    assert pickle.loads(pickle.dumps(op, protocol)) is op


def test_pickled_op_is_imported_in_another_process(tmp_path):
    path = tmp_path / "op.pickle"
    path.write_bytes(pickle.dumps(opkit.get("opkit::rms_norm")))
    code = f"import pickle; print(pickle.load(open({str(path)!r}, 'rb')).name)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "opkit::rms_norm", run.stderr


def test_module_holding_an_op_can_be_deep_copied(op):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.op, self.weight = op, torch.nn.Parameter(T)

    layer = Layer()
    copied = copy.deepcopy(layer)
    assert copied.op is op
    assert copied.weight is not layer.weight
    assert set(copied.state_dict()) == {"weight"}


# ---------------------------------------------------------------- register_fake


@pytest.fixture
def total():
    """An op without a shape line."""

    @opkit.op("t::total")
    def total(x: Tensor, k: int = 2, *, s: str = "a") -> Tensor:
        return x.sum(-1) * k

    return total


def test_tracing_without_shapes_or_fake_says_what_is_missing(total):
    assert total(T).tolist() == [6, 6]
    for call in (lambda: total(T.to("meta")), lambda: torch.compile(lambda x: total(x), fullgraph=True)(T)):
        with pytest.raises(
            Exception, match="tracing t::total: nothing says the shapes of its outputs; expected a shape line"
        ):
            call()


@pytest.mark.parametrize("verb", ["register_fake", "register_meta"])
def test_registered_fake_is_used_by_meta_and_compile(total, verb):
    seen = []

    @getattr(total, verb)
    def fake(x, k, *, s):
        seen.append((k, s))
        return x.new_empty(x.shape[:-1])

    assert total(T.to("meta")).shape == (2,)
    call = torch.compile(lambda x: total(x, 3, s="b") + 1, fullgraph=True, backend="aot_eager")
    assert call(T).tolist() == [10, 10]
    assert seen[0] == (2, "a")
    assert set(seen[1:]) == {(3, "b")}
    torch.library.opcheck(total.overload, (T,))


def test_registered_fake_replaces_the_derived_one():
    @opkit.op("t::f", shapes="n m -> n m")
    def f(x: Tensor) -> Tensor:
        return x.t().clone(memory_format=torch.preserve_format)

    assert f(T.to("meta")).stride() == (3, 1)
    f.register_fake(lambda x: x.t().new_empty(3, 2).t().t())
    assert f(T.to("meta")).shape == (3, 2)
    found = torch.compile(lambda x: f(x), fullgraph=True, backend="aot_eager")(T)
    assert found.shape == (3, 2)


@pytest.mark.parametrize(
    "fake", [lambda x: x, lambda x, k: x, lambda x, k, *, t: x, lambda x, k, z, *, s: x, 3],
    ids=["too few", "no keyword", "another keyword", "too many", "no function"],
)  # fmt: skip
def test_fake_with_another_signature_is_refused(total, fake):
    with pytest.raises(
        opkit.RegistrationError, match="registering a meta function of t::total: found .*; expected"
    ):
        total.register_fake(fake)


@pytest.mark.parametrize(
    "fake", [lambda x, k=2, *, s="a": x, lambda *args, **kwargs: args[0], lambda x, k, extra=1, *, s, more=2: x],
    ids=["defaults", "any", "more with defaults"],
)  # fmt: skip
def test_fake_that_can_take_the_ops_arguments_is_accepted(total, fake):
    assert total.register_fake(fake) is fake


# ---------------------------------------------------------------- misuse in other processes


def test_first_call_may_come_from_several_threads():
    code = """
        import threading, opkit, torch
        from torch import Tensor
        @opkit.op("t::f", shapes="n -> n")
        def f(x: Tensor) -> Tensor: return x + 1
        barrier, found = threading.Barrier(8), []
        def work():
            barrier.wait()
            found.append(f(torch.ones(1)).item() + len(opkit.list_ops()) * 0)
        threads = [threading.Thread(target=work) for _ in range(8)]
        [t.start() for t in threads]; [t.join() for t in threads]
        print(found == [2.0] * 8)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert run.stdout.strip() == "True", run.stderr


def test_an_op_that_cannot_be_made_leaves_nothing_in_torch(monkeypatch):
    def define():
        @opkit.op("t::half", shapes="n -> n")
        def half(x: Tensor) -> Tensor:
            return x / 2

        return half

    def fail(*args):
        raise KeyboardInterrupt

    has = torch._C._dispatch_has_kernel_for_dispatch_key
    with monkeypatch.context() as patch:
        patch.setattr("opkit._op.Overwriting", fail)
        with pytest.raises(KeyboardInterrupt):
            define()
    # torch forgets the name when nothing of it is left, and a kernel without a definition is something
    assert "t::half" not in torch._C._dispatch_get_all_op_names()
    with pytest.raises(RuntimeError, match="t::half"):
        has("t::half", "AutogradCPU")
    half = define()
    assert half(torch.ones(2)).tolist() == [0.5, 0.5]
