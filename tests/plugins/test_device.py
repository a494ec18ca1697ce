"""A device of a plugin between `import torch` and its first tensor: what answers, what loads, what is said."""

from __future__ import annotations

import sys
import types

import pytest

from opkit.errors import PluginError
from opkit.plugins.device import Device, DeviceModule
from tests.plugins import tiny_device


@pytest.fixture
def tiny(site):
    tiny_device.install(site)
    return site


def run(site, code, **environment):
    return site.run(code, **{"OPKIT_DEVICE": "tiny", **environment})


def test_the_stub_answers_without_the_library(tiny):
    said = run(
        tiny,
        """
        import torch
        assert not torch.tiny.is_initialized()
        print(torch.device("tiny", 0), torch.tiny.device_count(), torch.tiny.is_available())
        print(torch.accelerator.current_accelerator(), torch.accelerator.device_count(), torch.tiny.current_device())
        print(torch.ones(2).add(1).tolist(), hasattr(torch.tiny, "_private"), "device_count" in dir(torch.tiny))
        with torch.random.fork_rng(devices=[]): torch.manual_seed(3)
        assert not torch.tiny.is_initialized()
        """,
    )
    assert said.splitlines() == ["stub", "tiny:0 1 True", "tiny 1 0", "[2.0, 2.0] False True"]


def test_the_library_loads_at_the_first_use_and_once(tiny):
    code = """
        import threading, torch
        torch.manual_seed(11)
        def use(): torch.empty(2, device="tiny")
        threads = [threading.Thread(target=use) for _ in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        print(torch.empty(2, 3, device="tiny").device, torch.tiny.is_initialized(), torch.tiny.memory())
        import opkit
        print("the library of its device tiny is loaded" in opkit.plugins.why("tiny"))
    """
    assert run(tiny, code).splitlines() == ["stub", "library", "seed 11", "tiny:0 True 7", "True"]


@pytest.mark.parametrize(
    "use",
    ["torch.tiny.memory()", "torch.tiny.init()", "torch.Tensor.tiny(torch.ones(1))", "torch.tiny.Stream()"],
)
def test_what_needs_the_library_loads_it(tiny, use):
    code = f"""
        import torch
        try: {use}
        except (RuntimeError, TypeError): pass  # what the tiny device cannot do
        print(torch.tiny.is_initialized())
    """
    assert run(tiny, code).splitlines()[-1] == "True"


def test_what_torch_makes_without_asking_raises_until_the_library_is_loaded_and_why_says_so(tiny):
    code = """
        import torch
        for make in (torch.Generator, torch.Stream, torch.Event):
            try: make(device="tiny")
            except RuntimeError as error: print("raised")
        print(torch.tiny.is_initialized(), torch.empty(2, device="tiny").device, torch.tiny.is_initialized())
        import opkit
        print(opkit.plugins.why("tiny"))
    """
    lines = run(tiny, code).splitlines()
    assert [line for line in lines if line == "raised"] == ["raised"] * 3
    assert "False tiny:0 True" in lines
    assert (
        "  device: tiny; its library is loaded at the first tensor on it, or by torch.tiny.init(), .Generator(), "
        ".Stream() and .Event(); torch.Generator('tiny') and its like do not load it, and raise until it is"
    ) in lines


def test_a_broken_library_is_said_at_each_use_and_torch_works(site):
    tiny_device.install(site, native="raise ImportError('libtiny.so.3: no such file')")
    said = run(
        site,
        """
        import torch
        print(torch.ones(2).sum().item(), torch.tiny.device_count())
        for use in (lambda: torch.empty(1, device="tiny"), lambda: torch.ones(1).to("tiny"), torch.tiny.init,
                    lambda: torch.tiny.memory(), lambda: torch.tiny.Generator()):
            try: use()
            except RuntimeError as error: print(type(error).__name__, error, type(error.__cause__))
        print(torch.ones(2).sum().item())
        import opkit
        print(opkit.plugins.why("tiny"))
        """,
    )
    lines = said.splitlines()
    assert lines.count("2.0") == 1
    assert lines[1] == "2.0 1"
    failures = [line for line in lines if line.startswith("PluginError")]
    assert len(failures) == 5
    assert len(set(failures)) == 1
    assert "<class 'ImportError'>" in failures[0]
    assert "raised ImportError: libtiny.so.3: no such file" in failures[0]
    assert "loading its device tiny raised ImportError: libtiny.so.3" in said.partition("2.0\n")[2]


def make(stub=None, loader=None):
    """A device's module, in this process and without torch's slot."""
    stub = stub or types.SimpleNamespace(device_count=lambda: 2)
    module = types.ModuleType("stub_of_test")
    vars(module).update(vars(stub))
    return DeviceModule(Device("opk", module, loader or (lambda: None), "opkit-opk 1.0 (plugin opk)", "opk"))


def test_the_librarys_module_wins_over_the_stub(monkeypatch):
    runtime = types.ModuleType("runtime_of_test")
    runtime.device_count, runtime.memory, runtime._is_in_bad_fork = lambda: 5, lambda: 7, lambda: True
    runtime.__getattr__ = lambda name: f"made {name}"
    monkeypatch.setitem(sys.modules, "runtime_of_test", runtime)
    opk = make(loader=lambda: runtime)
    assert (opk.device_count(), opk.is_available(), opk._is_in_bad_fork()) == (2, True, False)
    assert opk.memory() == 7
    assert (opk.device_count(), opk._is_in_bad_fork(), opk.Scheduling) == (5, True, "made Scheduling")


def test_an_attribute_that_nobody_has_loads_and_is_refused():
    loads = []
    opk = make(loader=lambda: loads.append(1))
    with pytest.raises(AttributeError, match=r"module 'torch\.opk' has no attribute '_hidden'"):
        opk._hidden
    assert loads == []
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        opk.nothing
    assert loads == [1]


def test_a_failure_is_kept():
    loads = []

    def load():
        loads.append(1)
        raise SystemExit("no licence")

    opk = make(loader=load)
    for _ in range(2):
        with pytest.raises(
            PluginError, match=r"using the device opk of opkit-opk 1.0 \(plugin opk\): loading its library"
        ) as found:
            opk.init()
    assert "raised SystemExit: no licence" in str(found.value)
    assert "`opkit plugins why opk` shows more" in str(found.value)
    assert loads == [1]


def test_a_device_that_does_not_survive_a_fork_is_left_out_of_the_child(site):
    tiny_device.install(site, manifest="fork = 'unsafe'\n")
    code = """
        import os, torch
        torch.tiny.init()
        import opkit
        if os.fork() == 0:
            print(opkit.plugins.why("tiny"), flush=True)
            os._exit(0)
        os.wait()
        print(opkit.plugins.list()[0].status != "failed")
    """
    said = run(site, code)
    assert "what happened: it was loaded before this process was forked, which it does not survive" in said
    assert said.endswith("True\n")


def test_a_child_that_is_forked_while_the_library_loads_says_so(site):
    slow = tiny_device.NATIVE.replace('print("library")', "sys.slow = True; import time; time.sleep(1)")
    tiny_device.install(site, native=slow)
    code = """
        import os, sys, threading, time, torch
        from opkit.plugins import forks
        forks.PATIENCE = 0.1
        thread = threading.Thread(target=torch.tiny.init)
        thread.start()
        while not hasattr(sys, "slow"): time.sleep(0.01)
        if os.fork() == 0:
            for use in (torch.tiny.init, lambda: torch.tiny.memory(), lambda: torch.empty(1, device="tiny")):
                try: use()
                except RuntimeError as error: print(error, flush=True)
            os._exit(0)
        os.wait()
        thread.join()
        print(torch.empty(2, device="tiny").device)
    """
    *children, parent = run(site, code).splitlines()
    failure = (
        "loading its library raised RuntimeError: another thread was doing so when this process was forked"
    )
    assert [failure in line for line in children if line != "stub"] == [True] * 3
    assert parent == "tiny:0"


def test_a_seed_is_not_taken_for_a_library_that_takes_none():
    opk = make()
    opk.manual_seed_all(3)
    opk.init()
    with pytest.raises(AttributeError, match="has no attribute 'manual_seed_all'"):
        opk.manual_seed_all(3)


def test_a_loader_may_use_what_it_loads():
    opk = make(loader=lambda: opk.init())
    opk.init()
    assert opk.is_initialized()


def test_a_stub_that_cannot_be_imported_is_said():
    opk = DeviceModule(Device("opk", "no_such_stub", lambda: None, "opkit-opk 1.0", "opk"))
    with pytest.raises(PluginError, match=r"importing no_such_stub raised ModuleNotFoundError"):
        opk.device_count()


def test_ctrl_c_while_loading_leaves_another_chance():
    loads = []

    def load():
        loads.append(1)
        if len(loads) == 1:
            raise KeyboardInterrupt

    opk = make(loader=load)
    with pytest.raises(KeyboardInterrupt):
        opk.init()
    opk.init()
    assert opk.is_initialized()


def test_the_slot_is_given_once(site):
    said = site.run(
        """
        import torch, types
        from opkit.plugins import device
        stub = types.ModuleType("stub"); stub.device_count = lambda: 1
        def install(name, source="a 1.0"):
            try: device.install(device.Device(name, stub, lambda: None, source)); print("ok")
            except Exception as error: print(error)
        install("nn"); install("one"); install("one"); install("two", "b 1.0"); print(device.owner().name)
        """,
        OPKIT_AUTOLOAD="0",
    )
    taken, first, again, second, owner = said.splitlines()
    assert taken == (
        "setting up the device nn of a 1.0: there is a torch.nn already; expected a name that torch does not have. "
        "Rename the device, or uninstall what brings the other one."
    )
    assert (first, again, owner) == ("ok", "ok", "one")
    assert second == (
        "setting up the device two of b 1.0: torch's slot for devices of plugins has one of a 1.0; expected it to be "
        "free, as there is only one. Start a new process with OPKIT_DEVICE=two."
    )


REGISTER = """
    import types
    stub = types.ModuleType("stub"); stub.device_count = lambda: 1
    def register(registry):
        registry.register_device("called", stub=stub, loader=lambda: None, probe={probe})
        print(registry.devices)
"""


@pytest.mark.parametrize(
    ("probe", "environment", "said"),
    [
        ("None", {}, "{'called': 'it has no probe, and nobody chose it'}"),
        ("None", {"OPKIT_DEVICE": "called"}, "{'called': ''}"),
        ("lambda: 'no card'", {}, "{'called': 'no card'}"),
        ("lambda: True", {"OPKIT_AUTOLOAD": "ops"}, "{'called': 'OPKIT_AUTOLOAD turns devices off'}"),
        ("{'variable': 'CARD'}", {"CARD": "1"}, "{'called': ''}"),
        ("{'variable': 'CARD'}", {}, "{'called': 'its probe does not find the variable CARD'}"),
    ],
)
def test_a_device_can_be_registered_by_a_call(site, probe, environment, said):
    site.install("by-call", REGISTER.format(probe=probe))
    code = "import torch, opkit; opkit.list_ops(); print(hasattr(torch, 'called'))"
    assert site.run(code, **environment).splitlines() == [said, str(said.endswith("''}"))]


def test_a_probe_of_another_kind_is_refused():
    from opkit.errors import RegistrationError
    from opkit.plugins import Registry

    with pytest.raises(
        RegistrationError,
        match=r"its probe is \{'card': 'x'\}; expected a function, or a dict with some of file",
    ):
        Registry("x 1.0").register_device("opk", stub="s", loader="m:f", probe={"card": "x"})
