"""Plugins in each other's way: both are named, and neither is loaded; and the order of those that are not."""

from __future__ import annotations

import sys

import pytest
import torch

import opkit
from opkit.plugins import conflicts
from opkit.plugins.discovery import Found
from opkit.plugins.manifest import Manifest
from opkit.plugins.state import State

CODE = """
    def register(registry):
        pass
"""

KERNEL = """
    [[kernels]]
    op = "site::mine"
    device = "cpu"
    factory = "dist_{name}:kernel"
    priority = {priority}
"""


def reasons():
    return {p.name: (p.status, p.cause, p.reason) for p in opkit.plugins.list()}


def test_two_manifests_that_define_one_op(fresh):
    for name in ("first", "second"):
        fresh.install(name, CODE, manifest='ops = ["site::same"]')
    with pytest.warns(UserWarning, match="leaving out plugin") as caught:
        assert "site::same" not in opkit.list_ops()
    assert len(caught) == 2
    said = ("rejected", "conflict", "first of first 1.0 and second of second 1.0 define the op site::same")
    assert reasons() == {"first": said, "second": said}
    story = opkit.plugins.why("first").splitlines()
    assert "  decided by: one definition of an op" in story
    assert "  what to do: To use this one: OPKIT_PLUGINS_DENY=second, or pip uninstall second." in story
    assert not {"first", "second"} & set(sys.modules)


def test_the_one_that_is_denied_is_in_nobodys_way(fresh, monkeypatch):
    for name in ("first", "second"):
        fresh.install(name, CODE, manifest='ops = ["site::same"]')
    monkeypatch.setenv("OPKIT_PLUGINS_DENY", "second")
    fresh.again()
    assert "site::same" in opkit.list_ops()
    assert {name: status for name, (status, *_) in reasons().items()} == {
        "first": "registered",
        "second": "rejected",
    }


def test_a_manifest_that_excludes_another_plugin(fresh):
    fresh.install("first", CODE, manifest='conflicts = ["second", "absent"]')
    fresh.install("second", CODE)
    with pytest.warns(UserWarning, match="cannot be used together"):
        opkit.list_ops()
    assert {status for status, *_ in reasons().values()} == {"rejected"}
    assert f"  decided by: conflicts in {fresh.folder}/first/opkit-plugin.toml" in opkit.plugins.why("second")


def test_several_kernels_for_an_op_and_device_are_no_conflict(fresh):
    for name, priority in (("b", 1), ("a", 1), ("c", 2)):
        fresh.install(
            f"dist-{name}",
            "def kernel(): return lambda x: x + 1\n",
            plugin=name,
            manifest=KERNEL.format(name=name, priority=priority),
        )

    @opkit.op("site::mine", shapes="*b -> *b")
    def mine(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    assert [c.backend for c in mine.explain(torch.ones(2)).candidates] == ["c", "a", "b", "reference"]
    with opkit.use_backend("b"):
        assert mine.explain(torch.ones(2)).selected == "b"


def state(name, **said):
    made = State(Found(name, name, "1.0", f"{name}:register", "/site"))
    made.remembered = Manifest(name, "1.0", **said)
    return made


def names(states):
    return [one.found.name for one in states]


def test_after_and_before_decide_the_order():
    plugins = [state("a", after=("c", "absent")), state("b", before=("c",)), state("c"), state("d")]
    assert names(conflicts.ordered(plugins)) == ["b", "c", "a", "d"]
    assert names(conflicts.before(plugins[0], plugins)) == ["c"]
    assert names(conflicts.before(plugins[2], plugins)) == ["b"]


def test_plugins_that_wait_for_each_other_are_left_out():
    plugins = [state("a", after=("b",)), state("b", after=("a",)), state("c", after=("a",)), state("d")]
    conflicts.apply(plugins)
    assert [one.status for one in plugins] == ["rejected", "rejected", "discovered", "discovered"]
    assert plugins[0].reason == "its manifest and those of others have it load both before and after b"
    assert sorted(names(conflicts.ordered(plugins))) == ["a", "b", "c", "d"]
