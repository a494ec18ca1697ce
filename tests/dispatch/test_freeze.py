from __future__ import annotations

import itertools
import threading
import warnings

import pytest
import torch
from torch import Tensor

import opkit
from opkit import _config, _frozen, _torch
from opkit.cpp import compilers
from opkit.dispatch import select

pytestmark = pytest.mark.usefixtures("registry")
needs_compiler = pytest.mark.skipif(compilers.find_cxx() is None, reason="needs a C++ compiler")

_numbers = itertools.count()
SOURCE = """
#include <opkit/kernel.h>
void NAME(opkit::Tensor x, int64_t k, opkit::Tensor y) {
  for (int64_t i = 0; i < x.numel(); ++i) y.data<float>()[i] = x.data<float>()[i] + k;
}
"""


def make(name="t::frozen"):
    @opkit.op(name, shapes="*b -> *b")
    def plus(x: Tensor, k: int = 1) -> Tensor:
        return x + k

    return plus


@pytest.fixture
def op():
    made = make()
    made.register_kernel("cpu", lambda x, k: x.add(k), backend="fast")
    return made


@pytest.fixture
def native():
    """An op with a native kernel whose library no test has built before."""
    made = make(f"t::native{next(_numbers)}")
    name = made.name.removeprefix("t::")
    made.register_kernel("cpu", opkit.cpp.kernel(SOURCE.replace("NAME", name)), backend="cpp")
    return made


@pytest.fixture
def capturing(monkeypatch):
    monkeypatch.setattr(_torch, "is_capturing", lambda: True)


def refused(function, *args, **kwargs) -> opkit.FrozenError:
    with pytest.raises(opkit.FrozenError) as caught:
        function(*args, **kwargs)
    return caught.value


# ---------------------------------------------------------------- what counts as prepared


def test_a_call_that_was_not_prepared_names_the_op_its_arguments_and_the_line_to_prepare(op):
    with opkit.freeze():
        error = refused(op, torch.ones(4, 8), 3)
    line = "opkit.prepare('t::frozen', [(torch.zeros(4, 8), 3)])"
    assert str(error) == (
        "calling t::frozen with x (4, 8) float32, k=3 on cpu: opkit.freeze() is in force, and the call would select "
        "fast, where nothing was selected for float32 on cpu so far. Expected a call that was prepared. Prepare it "
        f"first:\n    {line}"
    )
    assert (error.op, error.would, error.prepare) == ("t::frozen", "select", line)
    exec(line)
    with opkit.freeze():
        assert op(torch.ones(4, 8), 3).sum() == 128


@pytest.mark.parametrize("how", ["prepared", "called"])
def test_what_was_prepared_or_called_before_goes_on_with_any_shape(op, how):
    if how == "prepared":
        opkit.prepare(op, [(torch.ones(3),)])
    else:
        op(torch.ones(3))
    with opkit.freeze():
        assert op(torch.ones(2, 2)).sum() == 8
        assert refused(op, torch.ones(3, dtype=torch.float64)).would == "select"


def test_the_refused_call_ran_nothing_and_remains_refused(op):
    ran = []
    op.register_kernel("cpu", lambda x, k: ran.append(x) or x.add(k), backend="faster", priority=1)
    with opkit.freeze():
        refused(op, torch.ones(3))
        refused(op, torch.ones(3))
    assert ran == []
    assert op(torch.ones(1)) == 2
    assert len(ran) == 1


def test_another_kernel_by_shape_is_a_changed_selection_unless_it_was_prepared(op):
    op.register_kernel(
        "cpu", lambda x, k: x.add(k), backend="rows", priority=1, when=lambda x, k: x.shape[0] % 8 == 0 or "n % 8 != 0"
    )  # fmt: skip
    opkit.prepare(op, [(torch.ones(8),)])
    with opkit.freeze():
        op(torch.ones(16))
        error = refused(op, torch.ones(9))
        assert "would select fast, where rows was selected for float32 on cpu (rows: n % 8 != 0)." in str(
            error
        )
        opkit.prepare(op, [(torch.ones(9),)])
        op(torch.ones(9))
        op(torch.ones(16))
        op(torch.ones(7))


def test_a_kernel_that_is_registered_later_changes_the_selection(op):
    op(torch.ones(3))
    op.register_kernel("cpu", lambda x, k: x.add(k), backend="other", priority=-1)
    with opkit.freeze():
        op(torch.ones(3))
        op.register_kernel("cpu", lambda x, k: x.add(k), backend="best", priority=1)
        assert "would select best, where fast was selected for float32 on cpu." in str(
            refused(op, torch.ones(3))
        )


def test_a_kernel_that_takes_the_place_of_the_selected_one_changes_the_selection(op):
    op(torch.ones(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        op.register_kernel("cpu", lambda x, k: x.add(2 * k), backend="fast")
    with opkit.freeze():
        error = refused(op, torch.ones(3))
    assert "would select fast, where a kernel that is replaced now was selected for float32 on cpu." in str(
        error
    )


def test_a_preference_is_prepared_for_in_its_context(op):
    op(torch.ones(3))
    with opkit.freeze(), opkit.use_backend("reference"):
        error = refused(op, torch.ones(3))
        assert error.prepare == (
            "with opkit.use_backend('reference'): opkit.prepare('t::frozen', [(torch.zeros(3),)])"
        )
        exec(error.prepare)
        op(torch.ones(3))
    with opkit.freeze(), opkit.use_backend("reference", strict=True), opkit.require("deterministic"):
        line = refused(op, torch.ones(3)).prepare
        assert line.startswith(
            "with opkit.use_backend('reference', strict=True), opkit.require('deterministic'): opkit.prepare("
        )
        exec(line)
        op(torch.ones(3))


def test_preferences_of_the_process_are_not_in_the_line(op, monkeypatch):
    monkeypatch.setenv("OPKIT_BACKEND", "reference")
    _config.refresh()
    select.preference.refresh()
    torch.use_deterministic_algorithms(True)
    try:
        with opkit.freeze():
            assert refused(op, torch.ones(3)).prepare == "opkit.prepare('t::frozen', [(torch.zeros(3),)])"
    finally:
        torch.use_deterministic_algorithms(False)


def test_inlining_does_not_count_as_a_preference(op):
    other = make("t::inlined")
    op(torch.ones(3))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x):
        with opkit.inline(other):
            return op(x)

    with opkit.freeze():
        compiled(torch.ones(3))


def test_a_redefined_op_is_to_be_prepared_again(op):
    op(torch.ones(3))
    again = make()
    with opkit.freeze():
        refused(again, torch.ones(3))


# ---------------------------------------------------------------- native kernels


@needs_compiler
def test_a_build_and_a_load_are_told_apart(native):
    with opkit.freeze():
        error = refused(native, torch.ones(3))
        assert "would select cpp and build its kernel, where nothing was selected" in str(error)
        with _frozen.thawed():
            native.build()
        assert "would select cpp and load its kernel, where nothing was selected" in str(
            refused(native, torch.ones(3))
        )
        assert native._table.for_device("cpu")[0].slot() == []
        opkit.prepare(native, [(torch.ones(3),)])
        native(torch.ones(3))


@needs_compiler
def test_a_prepared_kernel_that_is_forgotten_would_be_loaded_again(native):
    native(torch.ones(3))
    native.build()
    with opkit.freeze():
        error = refused(native, torch.ones(3))
    assert (
        f"calling {native.name} with x (3,) float32 on cpu: opkit.freeze() is in force, and the call would "
        in str(error)
    )
    assert "would load its cpp kernel. Expected a call that was prepared." in str(error)
    assert error.would == "load"


@needs_compiler
def test_a_kernel_that_cannot_be_built_here_would_be_built(native, monkeypatch):
    native(torch.ones(3))
    for kernel in native.native_kernels():
        kernel.forget()
    monkeypatch.setattr("opkit.cpp.light.Source.find", _raise_build_error)
    with opkit.freeze():
        assert refused(native, torch.ones(3)).would == "build"


def _raise_build_error(*_):
    raise opkit.BuildError("no compiler")


@needs_compiler
def test_extensions_are_not_built_either_and_those_in_the_cache_load(cache_dir):
    source = 'extern "C" int one() { return 1; }\n'
    with opkit.freeze():
        error = refused(opkit.cpp.build, "freeze_one", source)
    assert str(error) == (
        "building freeze_one [cpp]: opkit.freeze() is in force, and it is in no cache; expected what was built before. "
        "Build it first, with opkit.prepare or the command `opkit build`, or look whether OPKIT_CACHE_DIR is the "
        "folder that it was built into."
    )
    assert (error.would, error.prepare) == ("build", None)
    path = opkit.cpp.build("freeze_one", source)
    with opkit.freeze():
        assert opkit.cpp.build("freeze_one", source) == path


# ---------------------------------------------------------------- how it is said, and for whom


def test_freeze_acts_when_it_is_called_and_with_takes_it_back(op):
    frozen = opkit.freeze()
    try:
        refused(op, torch.ones(3))
        with opkit.freeze(warn=True):
            with pytest.warns(UserWarning, match="would select fast"):
                op(torch.ones(3))
        refused(op, torch.ones(3, dtype=torch.float64))
    finally:
        frozen.__exit__(None, None, None)
    op(torch.ones(3, dtype=torch.float64))


def test_warn_goes_on_and_warns_once_for_each_selection(op):
    with opkit.freeze(warn=True), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert op(torch.ones(3)).sum() == 6
        op(torch.ones(4))
        op(torch.ones(4, dtype=torch.float64))
    texts = [str(w.message) for w in caught]
    assert len(texts) == 2
    assert "float32 on cpu: opkit.freeze() is in force" in texts[0]
    assert caught[0].filename == __file__


@needs_compiler
def test_warn_says_once_what_a_native_call_does(native):
    with opkit.freeze(warn=True), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert native(torch.ones(3)).sum() == 6
    (warning,) = caught
    assert "would select cpp and build its kernel" in str(warning.message)


@pytest.mark.parametrize(
    ("text", "mode"), [("1", "error"), ("true", "error"), ("warn", "warn"), ("0", ""), ("", "")]
)
def test_the_variable_freezes_from_the_start(op, monkeypatch, text, mode):
    monkeypatch.setenv("OPKIT_FROZEN", text)
    _config.refresh()
    assert _config.get("OPKIT_FROZEN") == mode
    if mode == "error":
        assert "on cpu: OPKIT_FROZEN is set, and the call would select fast" in str(
            refused(op, torch.ones(3))
        )
        opkit.prepare(op, [(torch.ones(3),)])
    elif mode == "warn":
        with pytest.warns(UserWarning, match="OPKIT_FROZEN is set"):
            op(torch.ones(3))
    op(torch.ones(3))


def test_freeze_counts_more_than_the_variable(op, monkeypatch):
    monkeypatch.setenv("OPKIT_FROZEN", "1")
    _config.refresh()
    with opkit.freeze(warn=True), pytest.warns(UserWarning, match="opkit.freeze"):
        op(torch.ones(3))
    refused(op, torch.ones(3, dtype=torch.float64))


def test_a_wrong_value_of_the_variable_lists_the_legal_ones(monkeypatch):
    monkeypatch.setenv("OPKIT_FROZEN", "maybe")
    _config.refresh()
    with pytest.raises(opkit.ConfigError) as caught:
        _config.get("OPKIT_FROZEN")
    assert str(caught.value) == (
        "reading OPKIT_FROZEN: found 'maybe'; expected warn, or one of 1, true, yes, on, all, 0, false, no, off. It "
        "says: whether a call that was not prepared is an error, or with warn a warning. Unset it or use a legal value."
    )


def test_all_threads_are_frozen_and_preparing_frees_its_own_only(op):
    other = make("t::slow")
    inside, go_on, errors = threading.Event(), threading.Event(), []
    other.register_kernel("cpu", lambda x, k: inside.set() or go_on.wait(30) and x.add(k), backend="fast")

    def call():
        try:
            op(torch.ones(3))
        except opkit.FrozenError as error:
            errors.append(error)

    def in_a_thread(function):
        thread = threading.Thread(target=function)
        thread.start()
        return thread

    with opkit.freeze():
        in_a_thread(call).join()
        assert len(errors) == 1
        preparing = in_a_thread(lambda: opkit.prepare(other, [(torch.ones(3),)]))
        assert inside.wait(30)
        in_a_thread(call).join()
        go_on.set()
        preparing.join()
        assert len(errors) == 2
        assert other(torch.ones(1)) == 2


def test_compiled_functions_are_frozen_when_they_run(op):
    compiled = torch.compile(lambda x: op(x) * 2, fullgraph=True, backend="aot_eager")
    with opkit.freeze():
        assert "opkit.prepare('t::frozen'" in refused(compiled, torch.ones(3)).prepare
        opkit.prepare(op, [(torch.ones(3),)])
        assert compiled(torch.ones(3)).sum() == 12


def test_backward_is_frozen_where_its_formula_was_not_prepared():
    op = make("t::forward")

    @opkit.op("t::forward_backward", shapes="*b -> *b")
    def backward(grad: Tensor) -> Tensor:
        return grad.clone()

    op.register_autograd(backward)
    x = torch.ones(3, requires_grad=True)
    op(x.detach())
    with opkit.freeze():
        y = op(x)
        assert "calling t::forward_backward with grad (3,) float32 on cpu" in str(refused(y.sum().backward))
        opkit.prepare(op, [(x,)])
        assert x.grad is None
        op(x).sum().backward()
        assert torch.equal(x.grad, torch.ones(3))


# ---------------------------------------------------------------- plugins


def waiting_source(monkeypatch, pending):
    """A source that asks for plugins, as the one that opkit installs does."""
    from opkit import _sources
    from opkit.plugins import loader
    from opkit.plugins.discovery import Found
    from opkit.plugins.state import State

    states = [State(Found(name, name, "1.0", f"{name}:register", "/site")) for name in pending]
    called = []

    def call(state):
        if state.status == "registered":
            state.status = "loaded"
            called.append(state.found.name)

    monkeypatch.setattr(loader, "states", lambda: states)
    monkeypatch.setattr(loader, "call", call)
    _sources.consult_for_ops()
    _sources.install(loader.load_when_needed)
    return called


@pytest.fixture
def sources():
    """Sources that a test installs are taken away again."""
    from opkit import _sources

    yield
    _sources._ops.clear()
    _sources._kernels.clear()


def test_a_plugin_is_not_loaded_for_a_call(op, sources, monkeypatch):
    called = waiting_source(monkeypatch, ["fast-ops", "slow-ops"])
    with opkit.freeze():
        error = refused(op, torch.ones(3))
        assert str(error) == (
            "calling t::frozen with x (3,) float32 on cpu: opkit.freeze() is in force, and the call would load the "
            "plugins fast-ops, slow-ops. Expected a call that was prepared. Prepare it first:\n"
            "    opkit.prepare('t::frozen', [(torch.zeros(3),)])"
        )
        assert (error.would, called) == ("load a plugin", [])
        opkit.prepare(op, [(torch.ones(3),)])
        assert called == ["fast-ops", "slow-ops"]
        op(torch.ones(3))


def test_a_plugin_is_not_loaded_for_a_lookup_and_opkit_plugins_load_loads_it(op, sources, monkeypatch):
    called = waiting_source(monkeypatch, ["fast-ops"])
    with opkit.freeze():
        error = refused(opkit.list_ops)
        assert str(error) == (
            "looking for ops and kernels: opkit.freeze() is in force, and the plugin fast-ops would be loaded; "
            "expected them to be loaded before. Load them first, with opkit.prepare or opkit.plugins.load()."
        )
        opkit.plugins.load()
        assert called == ["fast-ops"]
        opkit.list_ops()


def test_without_plugins_nothing_is_refused(op, sources, monkeypatch):
    waiting_source(monkeypatch, [])
    with opkit.freeze():
        opkit.list_ops()


# ---------------------------------------------------------------- CUDA graph capture


def test_a_capture_takes_a_first_kernel_but_no_other_one(op, capturing):
    op(torch.ones(3))
    with opkit.use_backend("reference"):
        error = refused(op, torch.ones(3))
    assert str(error).startswith(
        "calling t::frozen with x (3,) float32 on cpu: a CUDA graph is being captured, and the call would select "
        "reference, where fast was selected for float32 on cpu. Expected a call that was prepared."
    )
    with opkit.freeze(warn=True), opkit.use_backend("reference"):
        refused(op, torch.ones(3))  # nothing softens that


@needs_compiler
def test_a_capture_builds_and_loads_nothing(native, capturing):
    assert "a CUDA graph is being captured, and the call would build its cpp kernel." in str(
        refused(native, torch.ones(3))
    )
    error = refused(opkit.prepare, native, [(torch.ones(3),)])
    assert str(error) == (
        "preparing ops: a CUDA graph is being captured; expected a call before that, as kernels are loaded and called. "
        "Prepare before the capture begins."
    )


def test_without_cuda_nothing_is_captured():
    assert not _torch.is_capturing()


# ---------------------------------------------------------------- the line to prepare


@pytest.mark.parametrize(
    ("make_values", "case"),
    [
        (lambda: (torch.ones(()),), "(torch.zeros(()),)"),
        (lambda: (torch.ones(2, 3).t(),), "(torch.zeros(6).as_strided((3, 2), (1, 3)),)"),
        (lambda: (torch.ones(1).expand(4),), "(torch.zeros(1).as_strided((4,), (0,)),)"),
        (lambda: (torch.ones(2, requires_grad=True),), "(torch.zeros(2, requires_grad=True),)"),
        (lambda: (torch.ones(2).bfloat16(), 7), "(torch.zeros(2, dtype=torch.bfloat16), 7)"),
    ],
    ids=["scalar", "transposed", "expanded", "grad", "int"],
)
def test_the_line_makes_tensors_of_the_same_kind(op, make_values, case):
    with opkit.freeze():
        error = refused(op, *make_values())
        assert error.prepare == f"opkit.prepare('t::frozen', [{case}])"
        exec(error.prepare)
        op(*make_values())


def test_the_line_has_lists_and_keywords():
    @opkit.op("t::many")
    def many(xs: list[Tensor], scale: float, *, mode: str = "a", sizes: list[int] | None = None) -> Tensor:
        return torch.cat(xs) * scale

    with opkit.freeze():
        error = refused(many, [torch.ones(2), torch.ones(3)], float("inf"), mode="b", sizes=[1, 2])
        assert error.prepare == (
            "opkit.prepare('t::many', [(([torch.zeros(2), torch.zeros(3)], float('inf')), "
            "{'mode': 'b', 'sizes': [1, 2]})])"
        )
        assert (
            "with xs[0] (2,) float32, xs[1] (3,) float32, scale=float('inf'), mode='b', sizes=[1, 2] on cpu:"
            in (str(error))
        )
        exec(error.prepare)
        many([torch.ones(2)], 2.0)
