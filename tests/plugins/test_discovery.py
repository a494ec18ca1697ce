"""Where plugins are found, and what is said of names that are not there."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path

import pytest

import opkit
from opkit.plugins import catalog

CODE = """
    def register(registry):
        pass
"""


def test_the_scan_finds_what_the_standard_library_finds(fresh):
    fresh.install(
        "one", CODE, points="[console_scripts]\nx = one:f\n[opkit.plugins]\nb = one:register\na = one:f\n"
    )
    fresh.install("two", CODE, points="# opkit.plugins is only mentioned\n[other]\nx = two:f\n")
    points = [p for p in entry_points(group="opkit.plugins") if Path(p.dist.locate_file("")) == fresh.folder]
    standard = sorted((p.name, p.dist.name, p.value) for p in points)
    assert [(f.name, f.distribution, f.value) for f in catalog.installed()] == standard
    assert ("a", "one", "one:f") in standard


def test_an_earlier_distribution_shadows_a_later_one(fresh, monkeypatch, tmp_path):
    fresh.install("twice", CODE, points="[opkit.plugins]\nold = twice:register\n")
    fresh.install(
        "twice", CODE, points="[console_scripts]\nx = twice:f\n", version="2.0", folder=tmp_path / "first"
    )
    assert [f.name for f in catalog.installed()] == ["old"]
    monkeypatch.syspath_prepend(str(tmp_path / "first"))
    assert catalog.installed() == []
    points = "[opkit.plugins]\nnew = twice:register\n"
    (tmp_path / "first" / "twice-2.0.dist-info" / "entry_points.txt").write_text(points)
    catalog.refresh()  # what is edited where it is, without being a plugin before, no time tells
    assert [(f.name, f.version) for f in catalog.installed()] == [("new", "2.0")]


def test_unreadable_metadata_of_others_hides_no_plugin(fresh):
    fresh.install("broken", CODE, points="[console_scripts]\nno equals sign\n")
    fresh.install("nameless", CODE)
    (fresh.folder / "nameless-1.0.dist-info" / "METADATA").unlink()
    fresh.install("good", CODE)
    with pytest.raises(TypeError):
        entry_points(group="opkit.plugins")
    fresh.install("latin", CODE)
    Path(fresh.folder / "latin-1.0.dist-info" / "entry_points.txt").write_bytes(
        b"[opkit.plugins]\n\xe9 = latin:f\n"
    )
    found = [(f.name, f.distribution, f.version, bool(f.problem)) for f in catalog.installed()]
    assert found == [
        ("good", "good", "1.0", False),
        ("latin", "latin", "1.0", True),
        ("nameless", "(no name)", "(no version)", False),
    ]


def test_an_unknown_name_lists_the_installed(fresh):
    assert opkit.plugins.why("anything") == (
        "No installed distribution has a plugin 'anything'; installed are none. "
        "Install the distribution that brings it into this Python's environment."
    )


def test_a_nearly_right_name_is_suggested(fresh):
    fresh.install("good", CODE)
    assert "installed are good. Did you mean 'good'? Install" in opkit.plugins.why("goood")
