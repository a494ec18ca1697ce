"""What is installed is read once, and read again when it changes."""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path

import importlib_metadata
import pytest

import opkit
import opkit_boot
from opkit.plugins import catalog, discovery, store

CODE = """
    def register(registry):
        pass
"""


@pytest.fixture
def reads(fresh, monkeypatch):
    """The folders that were read, those of the test only."""
    read, folders = discovery.read, []

    def counted(folder):
        if folder.startswith(str(fresh.folder.parent)):
            folders.append(folder)
        return read(folder)

    monkeypatch.setattr(catalog, "read", counted)
    return folders


def names() -> list[tuple[str, str]]:
    store.forget()  # as a new process does
    return [(f.name, f.version) for f in catalog.installed()]


def settled(site) -> list[tuple[str, str]]:
    """What is found, with the folders looking as if nothing had changed for a while."""
    site.settle()
    return names()


def test_a_folder_is_read_once_until_it_changes(fresh, reads):
    fresh.install("one", CODE, manifest='ops = ["site::x"]')
    assert settled(fresh) == [("one", "1.0")]
    reads.clear()
    assert names() == [("one", "1.0")]
    (found,) = catalog.installed()
    assert (found.manifest.ops, found.location, found.value) == (
        ("site::x",),
        str(fresh.folder),
        "one:register",
    )
    assert found.manifest_path == str(fresh.folder / "one" / "opkit-plugin.toml")
    assert reads == []


def test_installs_upgrades_and_removals_are_noticed(fresh, reads):
    fresh.install("one", CODE)
    assert settled(fresh) == [("one", "1.0")]
    fresh.install("two", CODE)
    assert names() == [("one", "1.0"), ("two", "1.0")]
    fresh.settle()
    names()
    fresh.uninstall("one")
    fresh.install("one", CODE, version="1.1")
    assert names() == [("one", "1.1"), ("two", "1.0")]
    fresh.settle()
    names()
    fresh.uninstall("two")
    assert names() == [("one", "1.1")]
    assert reads.count(str(fresh.folder)) >= 4


def test_a_change_within_the_clocks_tick_is_noticed(fresh, reads):
    fresh.install("one", CODE)
    before = os.stat(fresh.folder)
    assert names() == [("one", "1.0")]
    fresh.install("two", CODE)
    os.utime(fresh.folder, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert names() == [("one", "1.0"), ("two", "1.0")]


def project(fresh) -> tuple[Path, Path]:
    """Put the metadata of `one` beside its code, as a build leaves them; return its manifest and its entry points."""
    fresh.install("one", CODE, manifest="")
    installed, info = fresh.folder / "one-1.0.dist-info", fresh.folder / "one.egg-info"
    installed.rename(info)
    (info / "METADATA").rename(info / "PKG-INFO")
    return fresh.folder / "one" / "opkit-plugin.toml", info / "entry_points.txt"


def test_a_manifest_and_entry_points_of_a_project_edited_in_place_are_noticed(fresh):
    manifest, points = project(fresh)
    assert settled(fresh) == [("one", "1.0")]
    manifest.write_text(manifest.read_text() + 'ops = ["site::new"]\n')
    names()
    assert catalog.installed()[0].manifest.ops == ("site::new",)
    points.write_text(points.read_text() + "also = one:register\n")
    assert [name for name, _ in names()] == ["also", "one"]
    manifest.unlink()
    assert [name for name, _ in names()] == ["also", "one"]
    assert catalog.installed()[0].manifest is None


def test_a_manifest_that_a_project_gets_later_is_noticed(fresh):
    manifest, _ = project(fresh)
    content = manifest.read_text()
    manifest.unlink()
    settled(fresh)
    assert catalog.installed()[0].manifest is None
    manifest.write_text(content)
    names()
    assert catalog.installed()[0].manifest is not None


def test_what_is_edited_where_an_installer_has_put_it_is_found_by_refresh(fresh):
    fresh.install("one", CODE, manifest="")
    settled(fresh)
    path = fresh.folder / "one" / "opkit-plugin.toml"
    path.write_text(path.read_text() + 'ops = ["site::new"]\n')
    names()
    assert catalog.installed()[0].manifest.ops == ()
    catalog.refresh()
    assert catalog.installed()[0].manifest.ops == ("site::new",)


def editable(fresh, tmp_path, monkeypatch, how):
    """Install `one` so that its code stays in a project's folder; return that folder."""
    project = tmp_path / "project"
    fresh.install("one", CODE, manifest='ops = ["site::x"]')
    project.mkdir()
    (fresh.folder / "one").rename(project / "one")
    if how == "path":  # a .pth file, which Python has read when it started
        monkeypatch.syspath_prepend(str(project))
    else:  # a finder, as setuptools writes it

        class Finder:
            @staticmethod
            def find_spec(name, path=None, target=None):
                if name == "one":
                    from importlib.util import spec_from_file_location

                    return spec_from_file_location(name, project / "one" / "__init__.py")

        monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder])
    return project


@pytest.mark.parametrize("how", ["path", "finder"])
def test_an_editable_install_is_found_and_its_manifest_watched(fresh, tmp_path, monkeypatch, how):
    project = editable(fresh, tmp_path, monkeypatch, how)
    assert settled(fresh) == [("one", "1.0")]
    (found,) = catalog.installed()
    assert (found.manifest_path, found.manifest.ops) == (
        str(project / "one" / "opkit-plugin.toml"),
        ("site::x",),
    )
    (project / "one" / "opkit-plugin.toml").write_text("schema = 1\nname = 'one'\nversion = '1.0'\n")
    names()
    assert catalog.installed()[0].manifest.ops == ()
    fresh.run("import opkit; opkit.plugins.list()")


def test_metadata_beside_the_code_are_noticed_when_a_build_writes_them_again(fresh):
    info = fresh.folder / "one.egg-info"
    info.mkdir()
    (info / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: one\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[console_scripts]\nx = one:f\n")
    assert settled(fresh) == []
    (info / "entry_points.txt").write_text("[opkit.plugins]\none = one:register\n")
    assert names() == [("one", "1.0")]
    fresh.install("one", CODE, version="0.9", folder=fresh.folder.parent / "later")
    sys.path.append(str(fresh.folder.parent / "later"))
    try:
        assert names() == [("one", "1.0")]  # it shadows the other
    finally:
        sys.path.pop()


def test_both_ways_find_the_same_plugins(fresh, tmp_path, monkeypatch):
    fresh.install(
        "plain", CODE, points="[console_scripts]\nx = one:f\n[opkit.plugins]\nb = plain:register\na=plain:f\n"
    )
    fresh.install("With.Dots_and-dashes", CODE, plugin="dots")
    fresh.install(
        "extra",
        CODE,
        points="[opkit.plugins]\n; comment? no\nextra = extra:register [fast]\n".replace(
            "; comment? no\n", "# a comment\n\n"
        ),
    )
    fresh.install("no-plugin", CODE, points="# [opkit.plugins]\n[other]\nx = no:f\n")
    fresh.install("spaced", CODE, points="[opkit.plugins]\n  spaced   =   spaced:register  \n")
    fresh.install("upper", CODE, points="[opkit.plugins]\nMixed Case = upper:register\n")
    first = tmp_path / "first"
    fresh.install(
        "plain", CODE, points="[opkit.plugins]\nnewer = plain:register\n", version="2.0", folder=first
    )
    archive = tmp_path / "archive.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("zipped-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: zipped\nVersion: 1.0\n")
        file.writestr("zipped-1.0.dist-info/entry_points.txt", "[opkit.plugins]\nzipped = zipped:register\n")
    monkeypatch.syspath_prepend(str(first))
    monkeypatch.syspath_prepend(str(archive))
    points = [
        p
        for p in importlib_metadata.entry_points(group="opkit.plugins")
        if str(tmp_path) in str(p.dist.locate_file(""))
    ]
    standard = sorted((p.name, p.dist.name, p.dist.version, p.value) for p in points)
    for _ in range(2):  # read, and from the catalog
        store.forget()
        assert [(f.name, f.distribution, f.version, f.value) for f in catalog.installed()] == standard
    assert {name for name, *_ in standard} == {"newer", "dots", "extra", "spaced", "Mixed Case", "zipped"}


DAMAGE = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "flipped": lambda data: data.replace(b"one:register", b"two:register"),
    "other": lambda data: b"something else entirely",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_catalog_is_written_anew(fresh, reads, damage):
    fresh.install("one", CODE)
    settled(fresh)
    path = Path(opkit_boot.path("catalog"))
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    reads.clear()
    assert names() == [("one", "1.0")]
    assert reads
    reads.clear()
    assert names() == [("one", "1.0")]
    assert reads == []


def test_a_folder_that_cannot_be_written_costs_only_time(fresh, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OPKIT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    opkit._config.refresh()
    fresh.install("one", CODE)
    assert names() == [("one", "1.0")]


def test_refresh_forgets_what_no_time_tells(fresh):
    fresh.install("one", CODE, points="[other]\nx = y:z\n")
    assert settled(fresh) == []
    (fresh.folder / "one-1.0.dist-info" / "entry_points.txt").write_text(
        "[opkit.plugins]\none = one:register\n"
    )
    assert names() == []
    catalog.refresh()
    assert names() == [("one", "1.0")]


def test_answers_are_kept_for_the_next_process(fresh):
    assert store.answer(("test", 1), lambda: (1, "x")) == (1, "x")
    store.forget()
    assert store.answer(("test", 1), lambda: pytest.fail("it is kept")) == (1, "x")


def test_the_version_of_torch_is_known_without_importing_it(site):
    site.folder.mkdir()
    printed = site.run("""
        import sys
        from opkit.plugins import catalog
        catalog.installed()
        found = catalog.facts()
        print("torch" in sys.modules)
        import torch
        print(found.torch == torch.__version__, found == catalog.facts(), found.platform)
    """)
    assert printed.splitlines()[:2] == ["False", f"True True {sys.platform}-{os.uname().machine}"]
