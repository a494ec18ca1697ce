"""Where an op falls back to its reference, the warning names the distribution that has a kernel for it."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

import opkit
from opkit.plugins import advice, loader
from opkit.plugins.toml import tomllib

MANIFEST = """
    [[kernels]]
    op = "t::f"
    device = "cpu"
    backend = "fast"
    dtypes = ["float32"]
    factory = "fast_dist:make"
"""


@pytest.fixture
def op(fresh):
    @opkit.op("t::f", shapes="*b -> *b")
    def f(x: Tensor) -> Tensor:
        return x + 1

    fresh.install("fast-dist", "def make(): return lambda x: x + 1", manifest=MANIFEST)
    return f


def warned(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
        call()
    return [str(one.message) for one in caught]


def test_a_plugin_that_is_left_out_is_named_with_the_reason(op, fresh, monkeypatch):
    op.register_kernel("cpu", lambda x: x + 1, backend="half", dtypes=(torch.float16,))
    monkeypatch.setenv("OPKIT_PLUGINS_DENY", "fast-dist")
    fresh.again()
    (text,) = warned(lambda: op(torch.ones(2)))
    assert text == (
        "t::f runs its reference on cpu, which may be slow: half: dtype float32 is not among float16. fast-dist 1.0 "
        "(plugin fast-dist) has one (fast), and is left out: OPKIT_PLUGINS_DENY turns it off. Take fast-dist out of "
        "OPKIT_PLUGINS_DENY. "
        'Or register a kernel for this case, or accept it with opkit.use_backend("reference").'
    )


def test_an_op_without_kernels_is_silent_about_plugins_that_the_user_left_out(op, fresh, monkeypatch):
    monkeypatch.setenv("OPKIT_PLUGINS_DENY", "fast-dist")
    fresh.again()
    assert warned(lambda: op(torch.ones(2))) == []


def test_an_op_without_kernels_names_a_plugin_that_does_not_fit(op, fresh):
    manifest = '[requires]\ntorch = "<1"\n' + MANIFEST.replace("fast_dist", "old_dist")
    fresh.install("old-dist", "", plugin="old", manifest=manifest.replace("\n    ", "\n"))
    (path,) = fresh.folder.glob("fast_dist/opkit-plugin.toml")
    path.write_text(path.read_text().replace("t::f", "t::g"))
    fresh.again()
    text, *_ = [text for text in warned(lambda: op(torch.ones(2))) if text.startswith("t::f")]
    assert text.startswith(
        "t::f runs its reference on cpu, which may be slow: it has no kernel. old-dist 1.0 (plugin old) has one "
        "(fast), and is left out: "
    )


def test_only_a_plugin_that_takes_the_dtype_is_named(op, fresh, monkeypatch):
    op.register_kernel("cpu", lambda x: x + 1, backend="half", dtypes=(torch.float16,))
    monkeypatch.setenv("OPKIT_PLUGINS_DENY", "fast-dist")
    fresh.again()
    (text,) = warned(lambda: op(torch.ones(2).double()))
    assert "fast-dist" not in text


def test_a_plugin_that_is_used_needs_no_advice(op, fresh):
    fresh.again()
    assert warned(lambda: op(torch.ones(2))) == []


def test_what_is_required_and_not_known_of_others_gives_no_advice(op, fresh, monkeypatch):
    monkeypatch.setenv("OPKIT_PLUGINS_DENY", "fast-dist")
    fresh.again()
    op.register_kernel("cpu", lambda x: x + 1, backend="half", dtypes=(torch.float16,))
    with opkit.require("deterministic"):
        (text,) = warned(lambda: op(torch.ones(2)))
    assert "fast-dist" not in text


def test_of_what_is_not_installed_a_plugin_of_opkits_own_is_named(fresh, monkeypatch):
    fresh.again()
    monkeypatch.setattr(loader, "_states", [])
    assert advice.for_op("opkit::swiglu", "cpu", "float32") == "The distribution opkit-numba has one."
    assert advice.for_op("opkit::swiglu", "cpu", "float16") == "The distribution opkit-jax has one."
    assert advice.for_op("opkit::swiglu", "cuda", "float32") == ""
    assert advice.for_op("t::f", "cpu", "float32") == ""
    fresh.install("opkit-numba", "def register(registry): pass", plugin="numba")
    fresh.again()
    assert advice.for_op("opkit::swiglu", "cpu", "float32") == "The distribution opkit-tvm-ffi has one."


def test_opkits_own_plugins_have_what_is_said_of_them():
    folder = Path(__file__).parents[2] / "plugins"
    has = {}
    for path in folder.glob("*/*/opkit-plugin.toml"):
        kernels = tomllib.loads(path.read_text()).get("kernels", [])
        found = {
            k["op"]: tuple(k["dtypes"])
            for k in kernels
            if k["device"] == "cpu" and re.match("opkit::", k["op"])
        }
        if found:
            has[path.parts[-3]] = found
    assert has == advice.OWN
