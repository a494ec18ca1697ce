"""Plugins that fail: reported once, with what to do, and never in the way of anything else."""

from __future__ import annotations

import re
import warnings

import pytest
import torch

import opkit

GOOD = """
    def register(registry):
        registry.register_kernel("site::mine", "cpu", lambda x: x + 1, backend="good")
"""

# code of the module, what the report says happened, what it says to do
BROKEN = {
    "raises": (
        "def register(registry):\n    raise ValueError('no licence')",
        "calling broken_dist:register raised ValueError: no licence",
        "Report it to the authors of broken-dist, or take it out: pip uninstall broken-dist.",
    ),
    "raises_without_text": (
        "def register(registry):\n    raise RuntimeError",
        "calling broken_dist:register raised RuntimeError",
        "Report it to the authors of broken-dist, or take it out: pip uninstall broken-dist.",
    ),
    "raises_what_has_no_text": (
        "class Odd(Exception):\n    def __str__(self):\n        raise KeyError\n\n"
        "def register(registry):\n    raise Odd",
        "calling broken_dist:register raised Odd: its text cannot be shown",
        "Report it to the authors of broken-dist, or take it out: pip uninstall broken-dist.",
    ),
    "exits": (
        "import sys\n\ndef register(registry):\n    sys.exit(3)",
        "calling broken_dist:register raised SystemExit: 3",
        "Report it to the authors of broken-dist, or take it out: pip uninstall broken-dist.",
    ),
    "exits_while_imported": (
        "raise SystemExit('not on this machine')",
        "importing broken_dist:register raised SystemExit: not on this machine",
        "Report it to the authors of broken-dist, or take it out: pip uninstall broken-dist.",
    ),
    "lacks_a_module": (
        "import not_there.inner",
        "importing broken_dist:register raised ModuleNotFoundError: No module named 'not_there'",
        "Install what provides the module 'not_there', or take it out: pip uninstall broken-dist.",
    ),
    "syntax_error": (
        "def register(registry:",
        "importing broken_dist:register raised SyntaxError",
        "Report it to the authors of broken-dist, or take it out: pip uninstall broken-dist.",
    ),
    "no_such_function": (
        "def other(registry): ...",
        "importing broken_dist:register raised AttributeError: module 'broken_dist' has no attribute 'register'",
        "Report it to the authors of broken-dist, or take it out: pip uninstall broken-dist.",
    ),
    "not_callable": (
        "register = 5",
        "broken_dist:register is of type int; expected a function of one argument",
        "Report it to the authors of broken-dist, or take it out: pip uninstall broken-dist.",
    ),
    "takes_no_registry": (
        "def register(): ...",
        "calling broken_dist:register raised TypeError: register() takes 0 positional arguments but 1 was given",
        "Report it to the authors of broken-dist, or take it out: pip uninstall broken-dist.",
    ),
    "registers_for_no_device": (
        "def register(registry):\n    registry.register_kernel('site::mine', 'gpu', abs, backend='x')",
        "calling broken_dist:register raised RegistrationError: registering a kernel for site::mine: torch knows no",
        "Report it to the authors of broken-dist, or take it out: pip uninstall broken-dist.",
    ),
}


def define_mine():
    @opkit.op("site::mine", shapes="*b -> *b")
    def mine(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    return mine


def broken_plugin() -> opkit.plugins.Plugin:
    return next(p for p in opkit.plugins.list() if p.name == "broken")


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_reported_once_and_the_others_work(fresh, case):
    code, happened, advice = BROKEN[case]
    fresh.install("broken-dist", code, plugin="broken", version="2.1")
    fresh.install("good", GOOD)
    mine = define_mine()
    with pytest.warns(UserWarning, match="broken") as caught:
        assert mine.explain(torch.ones(2)).selected == "good"
    (warning,) = caught
    assert warning.filename == __file__  # the line that needed plugins
    text = str(warning.message)
    assert text.startswith(f"loading plugin 'broken' of broken-dist 2.1: {happened}")
    assert ". opkit goes on without it. " + advice in text
    assert "opkit.plugins.why('broken') shows " in text
    assert "\n" not in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine(torch.ones(2))
        opkit.list_ops()
        opkit.plugins.load()

    plugin = broken_plugin()
    assert (plugin.distribution, plugin.version, plugin.status) == ("broken-dist", "2.1", "failed")
    assert plugin.reason.startswith(happened)
    story = opkit.plugins.why("broken").splitlines()
    assert story[:3] == [
        "broken of broken-dist 2.1: failed",
        f"  found: broken_dist:register in {fresh.folder}",
        "  decided by: the default, by which installed plugins are used",
    ]
    assert story[3].startswith(f"  what happened: {happened}")
    assert story[4] == f"  what to do: {advice}"


def test_a_module_that_is_not_there_is_named(fresh):
    fresh.install("hollow", "", points="[opkit.plugins]\nbroken = hollow_inside:register\n")
    with pytest.warns(
        UserWarning, match="Reinstall hollow: its entry point names a module that is not there."
    ) as caught:
        opkit.list_ops()
    assert "importing hollow_inside:register raised ModuleNotFoundError" in str(caught[0].message)


@pytest.mark.parametrize("value", ["", "a b:c", "hollow:"])
def test_an_entry_point_that_names_nothing_is_reported(fresh, value):
    fresh.install("hollow", "", points=f"[opkit.plugins]\nbroken = {value}\n")
    with pytest.warns(
        UserWarning, match="loading plugin 'broken' of hollow 1.0: .*opkit goes on without it"
    ) as caught:
        opkit.list_ops()
    assert len(caught) == 1


def test_entry_points_that_cannot_be_parsed_are_reported_for_their_distribution(fresh):
    fresh.install("torn", "", points="[opkit.plugins]\nno equals sign\n")
    fresh.install("good", GOOD)
    mine = define_mine()
    with pytest.warns(
        UserWarning,
        match=r"loading plugin 'torn' of torn 1.0: its entry_points.txt cannot be read \(ValueError: the "
        r"line 'no equals sign' has no equals sign\). "
        r"opkit goes on without it. Reinstall torn. opkit.plugins.why\('torn'\) shows where it is.",
    ):
        assert mine.explain(torch.ones(2)).selected == "good"
    assert f"  found: entry_points.txt in {fresh.folder}" in opkit.plugins.why("torn")


def test_the_traceback_is_kept_from_the_plugins_first_frame_on(fresh):
    fresh.install("broken-dist", BROKEN["raises"][0], plugin="broken")
    with pytest.warns(UserWarning, match="shows the traceback"):
        opkit.list_ops()
    lines = broken_plugin().traceback.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1] == f'  File "{fresh.folder}/broken_dist.py", line 2, in register'
    assert lines[-1] == "ValueError: no licence"
    assert opkit.plugins.why("broken").endswith("\n".join(lines))


def test_a_plugin_that_raises_leaves_nothing_behind(fresh):
    fresh.install(
        "broken-dist",
        """
        import torch

        def register(registry):
            registry.register_kernel("site::mine", "cpu", lambda x: x + 1, backend="half")

            @registry.op("site::half", shapes="*b -> *b")
            def half(x: torch.Tensor) -> torch.Tensor:
                return x / 2

            raise OSError("the rest")
        """,
        plugin="broken",
    )
    mine = define_mine()
    with pytest.warns(UserWarning, match="OSError: the rest"):
        assert [c.backend for c in mine.kernels] == ["reference"]
    assert opkit.find("site::half") is None
    assert not hasattr(torch.ops.site, "half")
    with pytest.raises(opkit.BackendError, match="'half'"):
        with opkit.use_backend("half"):
            pass

    @opkit.op("site::half", shapes="*b -> *b")  # the name is free
    def half(x: torch.Tensor) -> torch.Tensor:
        return x / 2


def test_two_plugins_that_declare_one_op_are_both_left_out_and_named(fresh):
    code = """
        import torch

        def register(registry):
            @registry.op("site::same", shapes="*b -> *b")
            def {name}(x: torch.Tensor) -> torch.Tensor:
                return x
    """
    for name in ("first", "second"):
        fresh.install(name, code.format(name=name))
    with pytest.warns(UserWarning, match="site::same") as caught:
        assert opkit.find("site::same") is None
    assert [str(w.message).partition(". ")[0] for w in caught] == [
        f"leaving out plugin {name!r} of {name} 1.0: first of first 1.0 and second of second 1.0 define the op "
        "site::same"
        for name in ("first", "second")
    ]
    assert "OPKIT_PLUGINS_DENY=second, or pip uninstall second" in str(caught[0].message)
    assert [(p.status, p.cause) for p in opkit.plugins.list()] == [("rejected", "conflict")] * 2
    assert "site::same" not in opkit.list_ops()


WRONG = """
    def register(registry):
        registry.register_kernel("site::mine", "cpu", lambda wrong, x: x + 1, backend="wrong")
        registry.register_kernel("site::mine", "cpu", lambda x: x + 1, backend="right")
"""


def test_a_kernel_that_does_not_fit_is_left_out_and_the_others_stay(fresh):
    fresh.install("partly", WRONG)
    mine = define_mine()
    with pytest.warns(UserWarning, match="partly") as caught:
        assert {c.backend for c in mine.kernels} == {"right", "reference"}
    (warning,) = caught
    assert re.match(
        r"loading plugin 'partly' of partly 1.0: its kernel for site::mine on cpu \(wrong\) does not fit: "
        r"RegistrationError: registering a wrong kernel of site::mine: found .* expected the op's arguments \(x\) in "
        r"this order. Change its parameters. What else it registered is in force. Report it to the authors of partly",
        str(warning.message),
    )
    assert [p.status for p in opkit.plugins.list()] == ["failed"]
    story = opkit.plugins.why("partly")
    assert "; kernels in force: site::mine on cpu (right)\n" in story
    assert "waiting" not in story


def test_a_late_kernel_that_does_not_fit_does_not_break_the_definition(fresh):
    fresh.install("partly", WRONG)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opkit.list_ops()
    assert [p.status for p in opkit.plugins.list()] == ["loaded"]
    with pytest.warns(UserWarning, match="partly") as caught:
        mine = define_mine()
    (warning,) = caught
    assert str(warning.message).startswith(
        "loading plugin 'partly' of partly 1.0: its kernel for site::mine on cpu (wrong) does not fit"
    )
    assert mine.explain(torch.ones(2)).selected == "right"
    assert [p.status for p in opkit.plugins.list()] == ["failed"]
    assert "register_kernel" in opkit.plugins.list()[0].traceback
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert define_mine().explain(torch.ones(2)).selected == "right"  # redefined: said already


def test_warnings_as_errors_lose_no_plugin(fresh):
    fresh.install("broken-a", BROKEN["raises"][0])
    fresh.install("broken-b", BROKEN["exits"][0])
    fresh.install("good", GOOD)
    mine = define_mine()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("broken-a", "broken-b"):
            with pytest.raises(UserWarning, match=name):
                mine.kernels  # noqa: B018
        assert mine.explain(torch.ones(2)).selected == "good"


def test_a_process_with_a_broken_plugin_goes_on(site):
    site.install("broken-dist", BROKEN["exits"][0], plugin="broken")
    printed = site.run("""
        import warnings
        import opkit, torch
        with warnings.catch_warnings(record=True) as caught:
            print(opkit.get("opkit::vector_add").name, len(caught), "SystemExit: 3" in str(caught[0].message))
    """)
    assert printed == "opkit::vector_add 1 True\n"
