"""A plugin for another torch, opkit, Python or platform is left out before anything of it is imported."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from packaging.specifiers import SpecifierSet

import opkit
from opkit.errors import PluginError
from opkit.plugins import requirements
from opkit.plugins.catalog import Facts
from opkit.plugins.manifest import Requires

HERE = Facts("2.13.0+cpu", "0.1.0", "3.11.7", "linux-x86_64")
PYTHON = ".".join(map(str, sys.version_info[:3]))


@pytest.mark.parametrize(
    ("needs", "unmet"),
    [
        (Requires(), None),
        (Requires(torch=">=2.11,<2.16", opkit=">=0.1", python=">=3.10", platforms=("linux-*",)), None),
        (Requires(torch="<2.13"), ("torch", "<2.13", "2.13.0+cpu")),
        (Requires(torch="==2.13.0"), None),
        (Requires(opkit=">=1"), ("opkit", ">=1", "0.1.0")),
        (Requires(python="<3.11"), ("python", "<3.11", "3.11.7")),
        (Requires(platforms=("linux-aarch64", "win-*")), ("platform", "linux-aarch64, win-*", "linux-x86_64")),
        (Requires(torch="two"), ("torch", "", "two")),
    ],
)  # fmt: skip
def test_ranges_are_compared_with_what_is_here(needs, unmet):
    assert requirements._unmet(needs, HERE) == unmet


RANGES = (
    ">=2.11",
    "<2.13",
    ">=2.13.0",
    "<2.13.0",
    ">= 2.9, < 3",
    ">=2.13.1",
    "<2.13.1",
    ">=2.11,<2.13",
    "<3,>=2",
    ">=2.10",
)
OTHERS = ("~=2.13", "<=2.13", ">2", "==2.13.*", "!=2.13.0", ">=2.13.0a1", ">=2.13,", "===2.13.0")
VERSIONS = ("2.13.0", "2.13.0+cpu", "2.13", "2.9", "3.0.0", "2.13.1", "2.10.0", "2.100")


@pytest.mark.parametrize("wanted", RANGES)
def test_plain_ranges_are_compared_as_packaging_does(wanted):
    for version in VERSIONS:
        assert requirements._compared(wanted, version) is SpecifierSet(wanted).contains(version), version
    for version in ("2.13.0.dev1", "2.13.0rc1", "1!2.0", "2.13.0.post1"):
        assert requirements._compared(wanted, version) is None


@pytest.mark.parametrize("wanted", OTHERS)
def test_other_ranges_are_left_to_packaging(wanted):
    assert requirements._compared(wanted, "2.13.0") is None
    assert (requirements._unmet(Requires(torch=wanted), HERE) is None) is SpecifierSet(wanted).contains(
        HERE.torch
    )


def test_a_nightly_is_in_the_range_around_it():
    nightly = HERE._replace(torch="2.15.0.dev20261101+cu130", opkit="0.2.0.dev1")
    assert requirements._unmet(Requires(torch=">=2.14", opkit=">=0.1"), nightly) is None
    assert requirements._unmet(Requires(torch="<2.15"), nightly) is not None


@pytest.mark.parametrize(
    ("requires", "reason", "rule", "advice"),
    [
        (
            'torch = "<2"',
            f"it requires torch <2, and this is {torch.__version__}",
            "requires.torch",
            f"Install torch <2, or a version of fast for torch {torch.__version__}.",
        ),
        (
            'python = ">=4"',
            f"it requires python >=4, and this is {PYTHON}",
            "requires.python",
            f"Install a version of fast for python {PYTHON}.",
        ),
        (
            'platforms = ["mars-*"]',
            f"it requires platform mars-*, and this is {sys.platform}-{os.uname().machine}",
            "requires.platforms",
            f"Install a version of fast for platform {sys.platform}-{os.uname().machine}.",
        ),
        (
            'opkit = "new"',
            "its manifest has 'new' for opkit, which is no range of versions",
            "requires.opkit",
            "Install torch-opkit",
        ),
    ],
)  # fmt: skip
def test_it_is_rejected_and_reported_once_and_nothing_is_imported(fresh, requires, reason, rule, advice):
    fresh.install("fast", "raise SystemExit", manifest=f"[requires]\n{requires}\n")
    with pytest.warns(UserWarning, match="leaving out plugin 'fast' of fast 1.0") as caught:
        opkit.list_ops()
    assert len(caught) == 1
    (found,) = opkit.plugins.list()
    assert (found.status, found.cause, found.reason) == ("rejected", "version", reason)
    assert found.rule == f"{rule} in {found.manifest}"
    assert advice in found.remedy
    assert "fast" not in sys.modules


def test_strict_makes_it_an_error(fresh, monkeypatch):
    fresh.install("fast", "", manifest='[requires]\ntorch = "<2"\n')
    monkeypatch.setenv("OPKIT_STRICT", "yes")
    fresh.again()
    with pytest.raises(PluginError, match="leaving out plugin 'fast' of fast 1.0: it requires torch <2"):
        opkit.list_ops()


def test_the_verdict_is_kept_and_packaging_is_imported_only_to_find_it(site):
    site.folder.mkdir()
    site.install("fast", "", manifest='[requires]\ntorch = "~=2.0"\nopkit = ">=0.0"\n')
    code = """
        import sys, opkit
        print(opkit.plugins.list()[0].status, "packaging" in sys.modules, "opkit.plugins.toml" in sys.modules)
    """
    assert site.run(code) == "discovered True True\n"
    site.settle()
    site.run(code)
    assert site.run(code) == "discovered False False\n"
