"""A shared cache: what comes from there is looked at first, and nothing that is wrong with it stops a build."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import threading
import warnings
from pathlib import Path

import pytest

from opkit import _config
from opkit.cpp import cache, remote, tidy
from opkit.cpp._manifest import Manifest
from opkit.errors import BuildError
from tests.cpp.cache_tools import Builder, exit_code, forked, obtain, temporaries

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, use):
    yield use(tmp_path / "cache")
    _config.refresh()
    remote._given_up.clear()


@pytest.fixture
def use(monkeypatch):
    def set_to(folder, url=""):
        monkeypatch.setenv("OPKIT_CACHE_DIR", str(folder))
        monkeypatch.setenv("OPKIT_CACHE_REMOTE", url)
        _config.refresh()
        return Path(folder)

    return set_to


@pytest.fixture
def shared(tmp_path, use):
    """A shared cache with the entry f-k, and an empty cache here."""
    use(tmp_path / "there")
    push(f"file://{tmp_path}/shared", obtain(Builder(b"shared")))
    use(tmp_path / "here", f"file://{tmp_path}/shared")
    return tmp_path / "shared"


def push(url: str, library: Path) -> bool:
    entry = library.parent
    manifest = Manifest.parse((entry / "manifest.json").read_bytes(), entry.parent.name)
    return remote.Remote(url).upload(manifest, entry)


def build_two() -> None:
    for key in ("k1", "k2"):
        assert obtain(Builder(), key).exists()


def manifest_of(shared: Path, key="k") -> Path:
    return next((shared / "lib" / f"f-{key}").iterdir())


def rewrite(path: Path, change) -> None:
    data = json.loads(path.read_bytes())
    change(data)
    path.write_text(json.dumps(data))


# ---------------------------------------------------------------- fetching


def test_what_is_there_is_fetched_once_and_not_built(shared, tmp_path):
    build = Builder()
    library = obtain(build)
    assert library.read_bytes() == b"shared"
    assert library.is_relative_to(tmp_path / "here")
    shutil.rmtree(shared)
    assert obtain(build) == library
    assert build.count == 0
    assert temporaries(tmp_path / "here") == []


def test_what_is_not_there_is_built_and_not_sent(shared):
    before = sorted(shared.rglob("*"))
    assert obtain(Builder(b"built"), "other").read_bytes() == b"built"
    assert sorted(shared.rglob("*")) == before


def test_many_processes_fetch_once(shared, tmp_path):
    pids = [forked(lambda: obtain(None)) for _ in range(4)]
    assert [exit_code(pid) for pid in pids] == [0] * 4
    assert len(list(tidy.entries(str(tmp_path / "here")))) == 1


def test_only_a_variant_whose_dependencies_are_the_same_here_is_fetched(tmp_path, use):
    header, url = tmp_path / "a.h", f"file://{tmp_path}/shared"
    use(tmp_path / "there")
    for text in ("one", "two"):
        header.write_text(text)
        push(url, obtain(Builder(text.encode(), depends=[header])))
    use(tmp_path / "here", url)
    build = Builder(b"built", depends=[header])
    for text, wanted in (("two", "two"), ("one", "one"), ("three", "built")):
        header.write_text(text)
        assert obtain(build).read_text() == wanted
    assert build.count == 1


def test_pushing_twice_sends_nothing_and_heals_a_part(shared, tmp_path, use):
    use(tmp_path / "there")
    url, library = f"file://{shared}", cache.find("f-k")
    assert not push(url, library)
    file = next((shared / "files").iterdir())
    file.write_bytes(file.read_bytes()[:-1])
    assert push(url, library)
    assert not push(url, library)


def test_what_was_sent_in_part_is_not_there(shared):
    manifest_of(shared).unlink()  # it is sent last
    assert obtain(Builder(b"built")).read_bytes() == b"built"


# ---------------------------------------------------------------- refused


def refused(shared: Path, match: str) -> None:
    with pytest.warns(UserWarning, match=match) as caught:
        library = obtain(Builder(b"built"))
    assert len(caught) == 1
    assert library.read_bytes() == b"built"
    root = cache.root()
    assert temporaries(root) == []
    assert not list(root.parent.rglob("*evil*"))


@pytest.mark.parametrize("content", [b"sharee", b"", b"shared and more"], ids=["altered", "cut", "longer"])
def test_a_file_with_another_content_is_refused(shared, content):
    file = shared / "files" / hashlib.sha256(b"shared").hexdigest()
    file.write_bytes(content)
    if len(content) > 6:  # only as much as was promised is read, and that is right
        assert obtain(None).read_bytes() == b"shared"
    else:
        refused(
            shared,
            "fetching f-k: file://.* is it.so with another content; expected the sha256 that it is named after. "
            "Remove it there and run opkit cache push. It is not used, and f is built here.",
        )


def test_a_file_that_is_missing_is_refused(shared):
    shutil.rmtree(shared / "files")
    refused(shared, "files/[0-9a-f]{64} is listed and not there. It is not used, and f is built here.")


@pytest.mark.parametrize(
    "name", ["../evil.so", "/tmp/evil.so", "a/evil", "..", ".", "", "manifest.json", "a\0evil", 3]
)
def test_a_name_that_leads_elsewhere_is_refused(shared, name):
    def change(data):
        data["files"][0][0] = data["library"] = name

    rewrite(manifest_of(shared), change)
    refused(shared, "it lists .*, which is no plain file name. It is not used, and f is built here.")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda data: data.update(name="g-k"), "another entry or format"),
        (lambda data: data.update(format=99), "another entry or format"),
        (lambda data: data.update(library="other.so"), "its library 'other.so' is not listed"),
        (lambda data: data["files"][0].__setitem__(3, "../../x"), "without a size and a sha256"),
        (lambda data: data["files"][0].__setitem__(1, "big"), "without a size and a sha256"),
        (lambda data: data.pop("depends"), "it is no manifest"),
    ],
    ids=["name", "format", "library", "hash", "size", "incomplete"],
)
def test_a_manifest_that_is_wrong_is_refused(shared, change, match):
    rewrite(manifest_of(shared), change)
    refused(shared, match)


def test_a_manifest_that_is_no_json_is_refused(shared):
    manifest_of(shared).write_bytes(b"\x00garbage")
    refused(shared, "reading file://.*json: ")


# ---------------------------------------------------------------- unreachable


def test_a_missing_fsspec_is_said_once_with_the_command_that_installs_it(tmp_path, use, monkeypatch):
    use(tmp_path / "here", "file:///nowhere")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.warns(UserWarning, match="fsspec is not installed") as caught:
        build_two()
    assert [str(warning.message) for warning in caught] == [
        "using the shared cache file:///nowhere: fsspec is not installed. Install it: pip install "
        "'torch-opkit[remote]'. Kernels are built here in this process. Correct OPKIT_CACHE_REMOTE or unset it."
    ]


def test_an_unknown_kind_of_address_is_said_once(tmp_path, use):
    use(tmp_path / "here", "nosuch://x")
    with pytest.warns(UserWarning, match="shared cache nosuch://x: Protocol not known: nosuch") as caught:
        build_two()
    assert len(caught) == 1


def test_a_shared_cache_that_does_not_answer_holds_nobody_up(tmp_path, use, monkeypatch):
    monkeypatch.setattr(remote, "_LIMIT", 0.1)
    hangs = threading.Event()

    class Hanging(fsspec.AbstractFileSystem):
        protocol = "hanging"
        cachable = False

        def ls(self, path, **kwargs):
            hangs.wait(60)

    fsspec.register_implementation("hanging", Hanging, clobber=True)
    use(tmp_path / "here", "hanging://x")
    with pytest.warns(
        UserWarning, match="hanging://x: it did not answer within 0 s. Kernels are built here"
    ) as caught:
        build_two()
    assert len(caught) == 1
    hangs.set()


def test_an_empty_place_is_no_warning(tmp_path, use):
    use(tmp_path / "here", f"file://{tmp_path}/nothing")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert obtain(Builder()).exists()


def test_a_hit_does_not_ask(shared, tmp_path, use):
    library = obtain(None)
    use(tmp_path / "here", "nosuch://x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert obtain(None) == library


def test_a_full_disk_while_fetching_is_the_error_of_a_full_disk(shared, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(remote.Remote, "download", full)
    with pytest.raises(BuildError, match=r"fetching f: the cache folder .* \(No space left on device\)"):
        obtain(Builder())
