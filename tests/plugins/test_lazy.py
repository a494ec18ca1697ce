"""What a manifest names: known at the first need, and imported when it is selected."""

from __future__ import annotations

import sys
import threading

import pytest
import torch

import opkit
from opkit.errors import OpNotFoundError, PluginError

CODE = """
    print("imported")

    def kernel():
        print("made")
        return lambda x: x + 1

    def takes(x):
        return x.shape[0] % 2 == 0 or "needs an even length"

    def register(registry):
        import torch

        print("called")

        @registry.op("fast::double", shapes="*b -> *b")
        def double(x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        registry.register_kernel("site::mine", "cpu", lambda x: x + 1, backend="own")
"""

KERNEL = """
    [[kernels]]
    op = "site::mine"
    device = "cpu"
    factory = "fast:kernel"
"""


def define_mine():
    @opkit.op("site::mine", shapes="*b -> *b")
    def mine(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    return mine


def status(name="fast"):
    return next(p.status for p in opkit.plugins.list() if p.name == name)


def test_nothing_is_imported_until_a_kernel_is_selected(fresh, capsys):
    fresh.install("fast", CODE, manifest=KERNEL + 'dtypes = ["float32"]\npriority = 5\n')
    mine = define_mine()
    opkit.list_ops()
    records = [(c.backend, c.status, c.source) for c in mine.kernels]
    assert records[0] == ("fast", "available", "fast 1.0 (plugin fast)")
    mine(torch.ones(2, dtype=torch.float64))  # another dtype
    with opkit.use_backend("reference"):
        mine(torch.ones(2))
    with opkit.use_backend("fast"):
        pass
    assert ("fast" in sys.modules, status(), capsys.readouterr().out) == (False, "registered", "")
    assert "kernels loaded when they are selected: site::mine on cpu (fast)" in opkit.plugins.why("fast")
    assert mine(torch.zeros(2)).tolist() == [1.0, 1.0]
    assert (status(), capsys.readouterr().out) == ("loaded", "imported\nmade\n")
    mine(torch.zeros(3))
    explanation = mine.explain(torch.ones(2))
    assert (explanation.selected, explanation.candidates[0].reason) == ("fast", "priority 5")
    assert capsys.readouterr().out == ""
    assert "kernels in force: site::mine on cpu (fast)" in opkit.plugins.why("fast")


def test_explain_fetches_what_it_says_is_selected(fresh):
    fresh.install("fast", CODE, manifest=KERNEL + 'when = "fast:takes"\n')
    mine = define_mine()
    assert mine.explain(torch.ones(2)).selected == "fast"
    explanation = mine.explain(torch.ones(3))
    assert (explanation.selected, explanation.candidates[0].reason) == ("reference", "needs an even length")


def test_a_factory_that_fails_leaves_the_next_candidate(fresh):
    fresh.install("fast", CODE.replace('print("made")', "raise OSError('no licence')"), manifest=KERNEL)
    mine = define_mine()
    said = "calling fast:kernel raised OSError: no licence. opkit goes on without it. Report it to the authors of fast"
    with pytest.warns(UserWarning, match=f"loading plugin 'fast' of fast 1.0: {said}"):
        assert mine(torch.zeros(2)).tolist() == [1.0, 1.0]
    assert [c.backend for c in mine.kernels] == ["reference"]
    assert status() == "failed"
    assert "line 5, in kernel" in opkit.plugins.why("fast")


def test_a_factory_that_fails_leaves_the_plugins_ops(fresh):
    broken = CODE.replace('print("made")', "raise OSError('no licence')")
    fresh.install("fast", broken, manifest='ops = ["fast::double"]\n' + KERNEL)
    mine = define_mine()
    with pytest.warns(UserWarning, match="no licence. What else it registered is in force."):
        mine(torch.ones(2))
    assert opkit.get("fast::double")(torch.ones(2)).tolist() == [2.0, 2.0]
    assert status() == "failed"


def test_a_kernel_that_does_not_fit_its_op_leaves_the_next_candidate(fresh):
    fresh.install(
        "fast",
        CODE.replace("lambda x: x + 1\n\n    def takes", "lambda wrong, x: 1\n\n    def takes"),
        manifest=KERNEL,
    )
    mine = define_mine()
    with pytest.warns(
        UserWarning, match="registering its kernel for site::mine on cpu .fast. raised RegistrationErr"
    ):
        mine(torch.zeros(2))
    assert status() == "failed"


def test_a_dtype_that_torch_does_not_have_is_reported(fresh):
    fresh.install("fast", CODE, manifest=KERNEL + 'dtypes = ["flot32"]\n')
    define_mine()
    with pytest.warns(UserWarning, match="its manifest names the dtype 'flot32'; expected one of torch "):
        opkit.list_ops()
    assert status() == "failed"


def test_an_op_is_listed_and_defined_when_it_is_asked_for(fresh, capsys):
    fresh.install("fast", CODE, manifest='ops = ["fast::double"]\n' + KERNEL)
    assert "fast::double" in opkit.list_ops()
    assert "fast" not in sys.modules
    assert opkit.get("fast::double")(torch.ones(2)).tolist() == [2.0, 2.0]
    assert capsys.readouterr().out == "imported\ncalled\n"
    mine = define_mine()
    with opkit.use_backend("own"):  # which its manifest does not name
        assert mine.explain(torch.ones(2)).selected == "own"
    assert opkit.list_ops().count("fast::double") == 1


def test_a_table_of_all_decompositions_has_ops_that_were_only_promised(fresh):
    fresh.install("fast", CODE, manifest='ops = ["fast::double"]\n')
    overloads = {str(overload) for overload in opkit.decompositions()}
    assert "fast.double.default" in overloads


def test_an_op_whose_plugin_fails_is_not_found_and_no_longer_listed(fresh):
    fresh.install(
        "fast", CODE.replace('print("called")', "raise OSError"), manifest='ops = ["fast::double"]\n'
    )
    assert "fast::double" in opkit.list_ops()
    with pytest.warns(UserWarning, match="loading plugin 'fast'"), pytest.raises(OpNotFoundError):
        opkit.get("fast::double")
    assert "fast::double" not in opkit.list_ops()


def test_a_kernel_without_a_factory_comes_from_the_function(fresh, capsys):
    fresh.install("fast", CODE, manifest=KERNEL.replace('factory = "fast:kernel"', 'backend = "own"'))
    mine = define_mine()
    assert mine.explain(torch.ones(2)).selected == "own"
    assert capsys.readouterr().out == "imported\ncalled\n"
    assert [c.backend for c in mine.kernels] == ["own", "reference"]


def test_a_kernel_that_the_function_does_not_register_goes_with_a_note(fresh):
    fresh.install("fast", CODE, manifest=KERNEL.replace('factory = "fast:kernel"', ""))
    mine = define_mine()
    assert mine.explain(torch.ones(2)).selected == "own"
    assert [c.backend for c in mine.kernels] == ["own", "reference"]
    expected = "its function did not register a kernel that is expected: site::mine on cpu (fast)"
    assert expected in opkit.plugins.why("fast")


def test_a_toolchain_is_registered_when_its_suffix_is_met(fresh, tmp_path, capsys):
    code = """
        print("imported")

        def register(registry):
            import dataclasses
            import opkit.cpp

            from opkit.cpp import toolchain
            registry.register_toolchain(dataclasses.replace(toolchain.CPP, name="fastc", suffixes=(".fast",)))
    """
    fresh.install("fast", code, manifest='[toolchain]\nname = "fastc"\nsuffixes = [".fast"]\n')
    (tmp_path / "k.fast").write_text("")
    opkit.list_ops()
    assert capsys.readouterr().out == ""
    assert opkit.cpp.kernel(tmp_path / "k.fast").backend == "fastc"
    assert capsys.readouterr().out == "imported\n"


def test_stand_ins_come_back_when_the_op_is_redefined(fresh):
    fresh.install("fast", CODE, manifest=KERNEL)
    opkit.list_ops()
    for _ in range(2):
        assert [c.backend for c in define_mine().kernels] == ["fast", "reference"]
    define_mine()(torch.zeros(2))
    assert status() == "loaded"
    assert define_mine().explain(torch.ones(2)).selected == "fast"


def test_load_imports_everything(fresh, capsys):
    fresh.install("fast", CODE, manifest='ops = ["fast::double"]\n' + KERNEL)
    mine = define_mine()
    opkit.plugins.load()
    assert capsys.readouterr().out == "imported\ncalled\nmade\n"
    assert status() == "loaded"
    mine(torch.ones(2))
    opkit.plugins.load("fast")
    assert capsys.readouterr().out == ""


def test_load_by_name_raises_what_load_warns_of(fresh):
    fresh.install("fast", "raise OSError('gone')")
    with pytest.raises(
        PluginError, match="loading plugin 'fast' of fast 1.0: importing fast:register raised OSError"
    ):
        opkit.plugins.load("fast")
    with pytest.raises(
        PluginError, match="loading the plugin fats: it is not installed; installed are fast. Did you"
    ):
        opkit.plugins.load("fats")


def test_eight_threads_fetch_a_kernel_once_and_none_goes_on_without(fresh, capsys):
    slow = CODE.replace('print("made")', 'print("made"); import time; time.sleep(0.3)')
    fresh.install("fast", slow, manifest=KERNEL)
    mine = define_mine()
    opkit.list_ops()
    barrier, selected = threading.Barrier(8), []

    def use():
        barrier.wait()
        mine(torch.ones(2))
        selected.append(mine.explain(torch.ones(2)).selected)

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert selected == ["fast"] * 8
    assert capsys.readouterr().out == "imported\nmade\n"


def test_a_factory_may_call_the_op_itself(fresh):
    code = """
        def kernel():
            import torch, opkit
            mine = opkit.get("site::mine")
            assert mine.explain(torch.ones(2)).candidates[0].reason == "it is being loaded"
            mine(torch.ones(2))
            return lambda x: x + 1
    """
    fresh.install("fast", code, manifest=KERNEL)
    assert define_mine().explain(torch.ones(2)).selected == "fast"


def test_a_frozen_process_fetches_nothing_that_was_not_prepared(fresh):
    fresh.install("fast", CODE, manifest=KERNEL)
    mine = define_mine()
    with opkit.freeze():
        with pytest.raises(
            opkit.FrozenError, match="the call would load the plugin fast. Expected a call that was"
        ):
            mine(torch.ones(2))
        assert "fast" not in sys.modules
        opkit.prepare(mine, [(torch.ones(2),)])
        assert mine(torch.zeros(2)).tolist() == [1.0, 1.0]
        assert mine.explain(torch.ones(2)).selected == "fast"


def test_a_native_kernel_is_fetched_to_be_built(fresh):
    code = """
        import opkit.cpp

        def kernel():
            return opkit.cpp.kernel("mine.cpp")
    """
    fresh.install("fast", code, manifest=KERNEL)
    (fresh.folder / "fast" / "mine.cpp").write_text("")
    opkit.list_ops()
    assert [k.backend for k in define_mine().native_kernels()] == ["fast"]


def test_a_compiled_function_runs_a_kernel_that_is_fetched_when_it_is_called(fresh, capsys):
    fresh.install("fast", CODE.replace("lambda x: x + 1", "lambda x: print('ran') or x + 1"), manifest=KERNEL)
    mine = define_mine()
    compiled = torch.compile(lambda x: mine(x) * 2, fullgraph=True, backend="aot_eager")
    assert compiled(torch.zeros(2)).tolist() == [2.0, 2.0]
    assert capsys.readouterr().out.splitlines()[-1] == "ran"


def test_order_decides_what_is_loaded_first(fresh, capsys):
    code = "print({name!r})\ndef register(registry): ...\ndef kernel(): return lambda x: x + 1\n"
    order = '[order]\nafter = ["last"]\n'
    fresh.install("fast", code.format(name="fast"), manifest=order + KERNEL)
    fresh.install("last", code.format(name="last"), manifest="")
    define_mine()(torch.ones(2))
    assert capsys.readouterr().out.splitlines() == ["last", "fast"]
