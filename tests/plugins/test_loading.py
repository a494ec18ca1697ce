"""When plugins are called, that each is called once, and what they registered afterwards."""

from __future__ import annotations

import sys
import threading

import pytest
import torch

import opkit
from opkit import _sources as sources
from opkit.errors import BackendError, ConfigError, RegistrationError

GOOD = """
    import torch

    print("imported")

    def register(registry):
        print("called")

        @registry.op("site::double", shapes="*b -> *b")
        def double(x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        @registry.register_kernel("site::double", "cpu", backend="fast", dtypes=(torch.float32,))
        def double_fast(x):
            return x + x
"""

KERNEL = """
    def register(registry):
        registry.register_kernel("site::mine", "cpu", lambda x: x + 1, backend={backend!r})
"""

FIRST_NEEDS = {
    "get": lambda mine: opkit.get("site::double"),
    "find": lambda mine: opkit.find("site::double"),
    "list_ops": lambda mine: opkit.list_ops(),
    "use_backend": lambda mine: use_fast(),
    "call": lambda mine: mine(torch.ones(2)),
    "explain": lambda mine: mine.explain(torch.ones(2)),
    "kernels": lambda mine: mine.kernels,
}


def define_mine():
    @opkit.op("site::mine", shapes="*b -> *b")
    def mine(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    return mine


def use_fast():
    with opkit.use_backend("fast"):
        pass


def statuses() -> list[tuple[str, str, str]]:
    return [(p.name, p.distribution, p.status) for p in opkit.plugins.list()]


# ---------------------------------------------------------------- when


def test_no_import_calls_a_plugin_and_importing_plugins_imports_no_torch(site):
    site.install("good", GOOD)
    printed = site.run("""
        import sys
        import opkit, opkit.plugins
        print([p.status for p in opkit.plugins.list() if p.name == "good"], opkit.plugins.why("good").splitlines()[0])
        print("good" in sys.modules, "torch" in sys.modules)
        import torch, opkit_kernels
        print("good" in sys.modules)
        print(opkit.get("site::double"))
    """)
    assert printed.splitlines() == [
        "['discovered'] good of good 1.0: discovered",
        "False False",
        "False",
        "imported",
        "called",
        "<opkit.Op site::double (cpu: fast; reference)>",
    ]


@pytest.mark.parametrize("need", FIRST_NEEDS)
def test_a_plugin_is_called_at_the_first_need_and_only_then(fresh, capsys, need):
    fresh.install("good", GOOD)
    mine = define_mine()
    mine.register_autograd(opkit.from_reference)
    mine.register_kernel("cpu", lambda x: x + 1, backend="own")
    assert capsys.readouterr().out == ""
    FIRST_NEEDS[need](mine)
    assert capsys.readouterr().out == "imported\ncalled\n"
    for again in ("get", "list_ops", "call", "kernels"):
        FIRST_NEEDS[again](mine)
    opkit.plugins.load()
    assert capsys.readouterr().out == ""


def test_first_use_from_eight_threads_loads_once_and_none_goes_on_without(fresh):
    fresh.install(
        "slow",
        """
        import time
        calls = []

        def register(registry):
            calls.append(1)
            time.sleep(0.3)
            registry.register_kernel("site::mine", "cpu", lambda x: x + 1, backend="slow")
        """,
    )
    mine = define_mine()
    barrier = threading.Barrier(8)
    selected = []

    def use():
        barrier.wait()
        selected.append(mine.explain(torch.ones(2)).selected)

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert selected == ["slow"] * 8
    assert sys.modules["slow"].calls == [1]


def test_kernel_of_a_plugin_states_properties_and_what_it_overwrites(fresh):
    fresh.install(
        "opkit-fast",
        """
        def register(registry):
            options = {"backend": "fast", "properties": ["deterministic"], "inplace": (n for n in ["x"])}
            registry.register_kernel("site::mine", "cpu", **options)(lambda x: x.add_(1))
        """,
    )
    mine, x = define_mine(), torch.ones(2)
    with opkit.require("deterministic"):
        assert mine.explain(x).selected == "fast"
    assert mine.maybe_inplace(x) is x


def test_a_plugin_may_look_up_ops_and_load_plugins_itself(fresh):
    fresh.install(
        "curious",
        """
        import opkit, opkit.plugins
        calls = []

        def register(registry):
            global seen
            calls.append(1)
            opkit.plugins.load()
            seen = opkit.list_ops()
            assert opkit.find("site::nothing") is None
            assert opkit.get("opkit::rms_norm").kernels
        """,
    )
    fresh.install("later", GOOD)
    opkit.list_ops()
    assert "site::double" in sys.modules["curious"].seen
    assert sys.modules["curious"].calls == [1]
    assert statuses() == [("curious", "curious", "loaded"), ("later", "later", "loaded")]


def test_autoload_off_calls_none_and_says_so(fresh, monkeypatch, capsys):
    fresh.install("good", GOOD)
    monkeypatch.setenv("OPKIT_AUTOLOAD", "0")
    assert "site::double" not in opkit.list_ops()
    opkit.plugins.load()
    assert capsys.readouterr().out == ""
    (plugin,) = opkit.plugins.list()
    assert (plugin.status, plugin.cause, plugin.rule) == ("rejected", "policy", "OPKIT_AUTOLOAD")
    assert plugin.reason == "OPKIT_AUTOLOAD turns calling plugins off"
    assert "  what to do: Unset OPKIT_AUTOLOAD." in opkit.plugins.why("good").splitlines()


def test_a_wrong_autoload_value_is_refused_at_every_need(fresh, monkeypatch):
    monkeypatch.setenv("OPKIT_AUTOLOAD", "maybe")
    for _ in range(2):
        with pytest.raises(
            ConfigError, match="OPKIT_AUTOLOAD: found 'maybe'; expected one of 0, ops, devices, all, 1, true"
        ):
            opkit.list_ops()


def test_an_interrupted_load_is_taken_up_again(fresh):
    fresh.install(
        "stopped",
        """
        calls = []

        def register(registry):
            calls.append(1)
            registry.op("site::once", shapes="*b -> *b")(once)
            if len(calls) == 1:
                os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C: what a plugin raises by itself is its own failure

        import os, signal
        import torch
        def once(x: torch.Tensor) -> torch.Tensor:
            return x + 1
        """,
    )
    with pytest.raises(KeyboardInterrupt):
        opkit.list_ops()
    assert statuses() == [("stopped", "stopped", "registered")]
    assert "site::once" in opkit.list_ops()
    assert statuses() == [("stopped", "stopped", "loaded")]


def test_a_source_that_raises_is_asked_again():
    answers = iter([ValueError("not yet"), None])

    def source():
        answer = next(answers)
        if answer:
            raise answer

    sources.install(source)
    with pytest.raises(ValueError, match="not yet"):
        sources.consult_for_kernels()
    sources.consult_for_ops()
    assert next(answers, "empty") == "empty"
    sources.consult_for_ops()


# ---------------------------------------------------------------- what


def test_kernels_are_selected_and_name_plugin_and_distribution(fresh):
    fresh.install("good-kernels", GOOD, plugin="good", version="1.2.3")
    double = opkit.get("site::double")
    explanation = double.explain(torch.ones(2))
    assert [(c.backend, c.source) for c in explanation.candidates][0] == (
        "fast",
        "good-kernels 1.2.3 (plugin good)",
    )
    assert explanation.selected == "fast"
    assert "good-kernels 1.2.3 (plugin good)" in str(explanation)
    assert double.explain(torch.ones(2, dtype=torch.float64)).selected == "reference"


def test_an_op_declared_by_a_plugin_sees_the_functions_local_names(fresh):
    fresh.install(
        "local",
        """
        from __future__ import annotations

        def register(registry):
            from typing import NamedTuple
            import torch

            class Halves(NamedTuple):
                low: torch.Tensor
                high: torch.Tensor

            @registry.op("site::halves", shapes="n -> n//2, n//2")
            def halves(x: torch.Tensor) -> Halves:
                return Halves(*(half.clone() for half in x.chunk(2)))
        """,
    )
    assert opkit.get("site::halves")(torch.arange(4.0)).high.tolist() == [2.0, 3.0]


def test_kernels_wait_for_an_op_and_come_back_when_it_is_redefined(fresh):
    fresh.install("early", KERNEL.format(backend="early"))
    opkit.list_ops()
    with opkit.use_backend("early"):  # known, although no op has it yet
        pass
    assert "kernels waiting until their op is defined: site::mine" in opkit.plugins.why("early")
    for _ in range(2):
        mine = define_mine()
        with opkit.use_backend("early", strict=True):
            assert mine(torch.zeros(2)).tolist() == [1.0, 1.0]
    assert "kernels in force: site::mine on cpu (early)" in opkit.plugins.why("early")


def test_waiting_for_an_op_that_does_not_exist_suggests_the_near_name(fresh):
    define_mine()
    fresh.install("typo", KERNEL.format(backend="typo").replace("mine", "mime"))
    opkit.list_ops()
    assert opkit.plugins.why("typo").splitlines()[3:] == [
        "  what happened: kernels waiting until their op is defined: site::mime",
        "  what to do: Import what defines site::mime. Did you mean 'site::mine'?",
    ]


def test_a_backend_for_a_built_in_op_can_be_asked_for_before_the_op_is_imported(site):
    site.install(
        "builtin",
        KERNEL.format(backend="mine").replace("site::mine", "opkit::vector_add").replace("x: x", "x, y: x"),
    )
    printed = site.run("""
        import opkit, torch
        with opkit.use_backend("mine"):
            print(opkit.get("opkit::vector_add").explain(torch.ones(2), torch.ones(2)).candidates[0])
    """)
    assert "status='rejected'" not in printed
    assert "source='builtin 1.0 (plugin builtin)'" in printed


def test_one_name_in_two_distributions_loads_neither_until_one_is_denied(fresh, monkeypatch):
    for name in ("b-dist", "a-dist"):
        fresh.install(name, KERNEL.format(backend=name), plugin="same")
    mine = define_mine()
    with pytest.warns(UserWarning, match="have the plugin name 'same'") as caught:
        assert [c.backend for c in mine.kernels] == ["reference"]
    assert [str(w.message).partition(". ")[0] for w in caught] == [
        f"leaving out plugin 'same' of {name} 1.0: same of a-dist 1.0 and same of b-dist 1.0 have the plugin "
        "name 'same'"
        for name in ("a-dist", "b-dist")
    ]
    assert statuses() == [("same", "a-dist", "rejected"), ("same", "b-dist", "rejected")]
    assert [line for line in opkit.plugins.why("same").splitlines() if line.startswith("same")] == [
        "same of a-dist 1.0: rejected (conflict)",
        "same of b-dist 1.0: rejected (conflict)",
    ]
    advice = "  what to do: To use this one: OPKIT_PLUGINS_DENY=a-dist, or pip uninstall a-dist."
    assert advice in opkit.plugins.why("b-dist").splitlines()
    monkeypatch.setenv("OPKIT_PLUGINS_DENY", "a-dist")
    fresh.again()
    assert {c.backend for c in mine.kernels} == {"b-dist", "reference"}


def test_a_native_kernel_may_be_registered(fresh):
    fresh.install(
        "native",
        """
        import opkit.cpp

        def register(registry):
            registry.register_kernel("site::mine", "cpu", opkit.cpp.kernel("mine.cpp"), backend="mycpp")
        """,
    )
    (fresh.folder / "mine.cpp").write_text("")
    mine = define_mine()
    assert ("mycpp", "native 1.0 (plugin native)") in [(k.backend, k.source) for k in mine.kernels]


def test_registering_checks_at_once_what_can_be_known(fresh):
    registry = opkit.plugins.Registry("here 1.0")
    with pytest.raises(RegistrationError, match="torch knows no device 'gpu'.*Did you mean 'cuda'"):
        registry.register_kernel("site::mine", "gpu", abs, backend="x")
    with pytest.raises(opkit.SchemaError, match="mine"):
        registry.register_kernel("mine", "cpu", abs, backend="x")
    registry.close()
    with pytest.raises(
        RegistrationError,
        match="registering a x kernel for site::mine for here 1.0: the plugin's function has returned already; "
        "expected this while it runs. Register in the function, or use opkit.op and",
    ):
        registry.register_kernel("site::mine", "cpu", abs, backend="x")
    with pytest.raises(
        RegistrationError, match="declaring site::mine for here 1.0: the plugin's function has returned"
    ):
        registry.op("site::mine")


def test_registry_op_has_the_options_of_opkit_op():
    import inspect

    theirs = inspect.signature(opkit.op).parameters
    ours = dict(inspect.signature(opkit.plugins.Registry.op).parameters)
    del ours["self"]
    assert {n: (p.kind, p.default) for n, p in ours.items()} == {
        n: (p.kind, p.default) for n, p in theirs.items()
    }


def test_plugin_declares_an_op_without_a_reference(fresh):
    fresh.install(
        "declares",
        """
        def register(registry):
            op = registry.declare("site::declared(Tensor x) -> Tensor", shapes="n -> n")
            registry.register_kernel("site::declared", "cpu", lambda x: x + 1, backend="mine")
        """,
    )
    op = opkit.get("site::declared")
    assert op(torch.zeros(2)).tolist() == [1, 1]
    registry = opkit.plugins.Registry("here 1.0")
    registry.close()
    with pytest.raises(RegistrationError, match="the plugin's function has returned"):
        registry.declare("site::other(Tensor x) -> Tensor")


def test_an_unknown_backend_is_refused_with_those_of_plugins_in_the_list(fresh):
    fresh.install("good", GOOD)
    with pytest.raises(BackendError, match="registered are .*fast.*Did you mean 'fast'"):
        with opkit.use_backend("fasst"):
            pass
