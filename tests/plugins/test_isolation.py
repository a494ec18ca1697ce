"""What one call into a plugin comes to, whatever the plugin does; and what plugins are told by it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
import warnings

import pytest
import torch

import opkit
from opkit import _config, cli
from opkit.plugins import isolation, loader, quarantine, resolve, trial
from opkit.plugins.isolation import Subject
from opkit.plugins.natives import Natives
from opkit.plugins.trial import Trial
from opkit.plugins.watchdog import HungError, Stopped

pytestmark = pytest.mark.usefixtures("cache_dir")

LONG = 30.0


@pytest.fixture
def subject(tmp_path, monkeypatch):
    (tmp_path / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path.parent))
    natives = Natives("fast", tmp_path.name, limit=1)
    return Subject("fast", "1.0", natives, ("torch.set_num_threads", "torch.relu"), LONG)


@pytest.mark.parametrize(
    "error",
    [ValueError("no"), SystemExit(3), KeyboardInterrupt(), GeneratorExit(), RecursionError()],
    ids=repr,
)
def test_any_exception_is_contained(subject, error):
    def raises():
        raise error

    outcome = isolation.call(subject, "loading fast", raises)
    assert (outcome.value, outcome.error, outcome.refusals, outcome.notes) == (None, error, [], [])


def test_what_a_call_returns_is_had(subject):
    assert isolation.call(subject, "loading fast", lambda: 5) == isolation.Outcome(5, None, [], [])


def test_ctrl_c_goes_through_and_leaves_torch_as_it_was(subject):
    def stopped():
        torch.set_default_dtype(torch.float64)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(LONG)

    with pytest.raises(Stopped):
        isolation.call(subject, "loading fast", stopped)
    assert torch.get_default_dtype() == torch.float32
    assert quarantine.find("fast", "1.0") is None


def test_ctrl_c_before_the_plugin_was_called_is_not_its_failure(subject, monkeypatch):
    def pressed():
        raise KeyboardInterrupt

    monkeypatch.setattr(isolation, "Patches", pressed)
    with pytest.raises(Stopped):
        isolation.call(subject, "loading fast", int)


def test_what_is_changed_in_torch_is_noted_by_whether_it_was_declared(subject, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "relu", torch.relu)
    monkeypatch.setattr(torch, "tanh", torch.tanh)

    def changes():
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(threads + 1)
        torch.relu = torch.tanh = lambda x: x

    try:
        outcome = isolation.call(subject, "loading fast", changes)
        assert outcome.notes == [
            "as its manifest says, it called: torch.set_num_threads",
            "it changed a setting, which was put back: torch.set_default_dtype",
            "as its manifest says, it replaced: torch.relu",
            "it replaced, without its manifest saying so: torch.tanh",
        ]
        assert (torch.get_default_dtype(), torch.get_num_threads()) == (torch.float32, threads + 1)
    finally:
        torch.set_num_threads(threads)


def test_threads_that_the_process_would_wait_for_are_noted(subject):
    end = threading.Event()

    def starts():
        for name, daemon in (("waits", False), ("does not", True)):
            threading.Thread(target=end.wait, name=name, daemon=daemon).start()

    outcome = isolation.call(subject, "loading fast", starts)
    end.set()
    assert outcome.notes == ["it left threads running that the end of the process waits for: waits"]


def test_what_a_call_within_a_call_does_is_not_put_down_to_the_outer_one(subject, monkeypatch):
    monkeypatch.setattr(torch, "relu", torch.relu)
    monkeypatch.setattr(torch, "tanh", torch.tanh)
    inner = Subject("inner", "1.0", Natives("inner", "json", limit=1), ("torch.set_default_dtype",), LONG)
    came = []

    def inside():
        torch.set_default_dtype(torch.float64)
        torch.tanh = abs

    def outside():
        torch.set_grad_enabled(False)
        came.append(isolation.call(inner, "loading inner", inside))
        torch.relu = abs

    try:
        outer = isolation.call(subject, "loading fast", outside)
        assert came[0].notes == [
            "as its manifest says, it called: torch.set_default_dtype",
            "it replaced, without its manifest saying so: torch.tanh",
        ]
        assert outer.notes == [
            "it changed a setting, which was put back: torch.set_grad_enabled",
            "as its manifest says, it replaced: torch.relu",
        ]
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_hanging_twice_in_a_row_quarantines(subject):
    subject = subject._replace(limit=0.1)
    for hangs in (True, False, True, True):
        assert quarantine.find("fast", "1.0") is None
        outcome = isolation.call(subject, "loading fast", lambda: time.sleep(LONG if hangs else 0))  # noqa: B023
        assert isinstance(outcome.error, HungError) == hangs
    found = quarantine.find("fast", "1.0")
    assert found.reason.startswith("it hung twice in a row: loading fast had not come back after 0.1 s")
    assert "test_isolation.py" in found.evidence


def test_a_call_that_raises_has_come_back_and_the_count_starts_anew(subject):
    for _ in range(3):
        quarantine.suspect("fast", "1.0", "it ended the process")
        isolation.call(subject, "loading fast", lambda: 1 / 0)
    assert quarantine.find("fast", "1.0") is None


@pytest.mark.parametrize("outcome", ["crashed", "hung"])
def test_a_library_that_does_harm_quarantines_who_cannot_do_without(subject, compiled, monkeypatch, outcome):
    library = compiled("int it(void) { return 1; }")
    monkeypatch.setattr(trial, "of", lambda path, **_: Trial(outcome, "so", "stack"))
    for catches in (OSError, ValueError):
        assert quarantine.find("fast", "1.0") is None

        def opens():
            try:
                ctypes.CDLL(library)
            except catches:  # noqa: B023
                return "without"

        came = isolation.call(subject, "loading fast", opens)
        (refusal,) = came.refusals
        assert came.value == ("without" if catches is OSError else None)
    found = quarantine.find("fast", "1.0")
    assert (found.reason, found.evidence) == (str(refusal), "stack")


# ---------------------------------------------------------------- what becomes of the plugin

FALLS_BACK = """
    import ctypes, pathlib

    def register(registry):
        try:
            ctypes.CDLL(str(pathlib.Path(__file__).parent / "it.so"))
        except OSError:
            registry.register_kernel("site::mine", "cpu", lambda x: x, backend="slow")
"""


def test_a_plugin_that_gets_along_without_its_library_is_loaded(fresh, compiled, monkeypatch):
    fresh.install("fast", FALLS_BACK)
    os.link(compiled("int it(void) { return 1; }"), fresh.folder / "it.so")
    monkeypatch.setattr(trial, "of", lambda path, **_: Trial("crashed", "so"))
    opkit.plugins.load("fast")
    story = opkit.plugins.why("fast")
    assert story.startswith("fast of fast 1.0: loaded")
    assert "; its library it.so crashes when it is opened: so; it gets along without" in story


def test_a_quarantined_plugin_is_left_out_and_said_so_with_the_command_that_lifts_it(fresh, capsys):
    fresh.install("fast", "raise SystemExit('it was imported')")
    (state,) = loader.states()
    quarantine.put(
        "fast", resolve.tried_as(state.found), "loading fast:register crashed the process", "the stack"
    )
    fresh.again()
    with pytest.warns(UserWarning, match="leaving out") as caught:
        opkit.list_ops()
    (text,) = (str(warning.message) for warning in caught)
    assert text.startswith(
        "leaving out plugin 'fast' of fast 1.0: loading fast:register crashed the process. opkit goes on without it. "
        "Upgrade it, or try it once more: opkit plugins enable fast."
    )
    story = opkit.plugins.why("fast").splitlines()
    assert story[0] == "fast of fast 1.0: quarantined"
    assert story[2:5] == [
        "  decided by: it broke a process",
        "  what happened: loading fast:register crashed the process",
        "  what to do: Upgrade it, or try it once more: opkit plugins enable fast.",
    ]
    assert story[-1] == "the stack"
    assert "fast" not in sys.modules
    assert cli.main(["plugins", "enable", "fast"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert (said[0], said[-1]) == (
        "fast is tried once more: it is quarantined no longer",
        "fast is discovered",
    )
    assert not isolation.forgive("fast")
    fresh.again()
    with pytest.warns(UserWarning, match="it was imported"):
        opkit.list_ops()


def test_a_quarantine_is_for_one_version_and_one_torch(fresh):
    fresh.install("fast", "def register(registry): ...", version="2.1")
    (state,) = loader.states()
    assert resolve.tried_as(state.found).startswith(f"2.1 with torch {torch.__version__.partition('+')[0]}")


def test_the_time_a_plugin_may_take_is_a_variable(fresh, monkeypatch):
    fresh.install("fast", "import time\ndef register(registry): time.sleep(30)")
    monkeypatch.setenv("OPKIT_PLUGINS_TIMEOUT", "0.2")
    _config.refresh()
    with pytest.warns(
        UserWarning, match="loading fast:register had not come back after 0.2 s, and was interrupted at"
    ):
        opkit.list_ops()
    story = opkit.plugins.why("fast")
    assert "; " not in story.partition("what happened: ")[2].partition("\n")[0]
    assert "in register\n" in story
    assert "time.sleep(30)" in story


def test_a_time_that_is_none_is_refused(monkeypatch):
    for text in ("soon", "-1", ""):
        monkeypatch.setenv("OPKIT_PLUGINS_TIMEOUT", text)
        _config.refresh()
        with pytest.raises(
            opkit.ConfigError, match="expected a number of seconds such as 30 or 0.5. It says: seconds"
        ):
            _config.get("OPKIT_PLUGINS_TIMEOUT")


def test_a_conflict_names_what_has_defined_it(fresh, compiled, monkeypatch):
    fresh.install("fast", FALLS_BACK.replace("except OSError", "except ZeroDivisionError"))
    os.link(compiled("int it(void) { return 1; }"), fresh.folder / "it.so")
    monkeypatch.setattr(trial, "of", lambda path, **_: Trial("passed", "", "", ("aten",), ()))
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        opkit.list_ops()
    story = opkit.plugins.why("fast").splitlines()
    assert story[0] == "fast of fast 1.0: rejected (conflict)"
    assert story[2] == "  decided by: torch takes one definition of each"
    assert story[3].startswith(
        "  what happened: its library it.so would define once more the namespace 'aten' (TORCH_LIBRARY), which "
    )
    assert story[4].startswith("  what to do: Use only one of the two: OPKIT_PLUGINS_DENY=fast")
