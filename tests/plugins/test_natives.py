"""A plugin's native libraries are asked about as it opens them; nobody else's are."""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import os

import pytest
import torch

from opkit.plugins import natives, trial
from opkit.plugins.natives import Natives
from opkit.plugins.trial import Trial

pytestmark = pytest.mark.usefixtures("cache_dir")

GOOD = "int it(void) { return 1; }"


@pytest.fixture
def verdicts(monkeypatch):
    """What trials find, by the name of the library; and which were asked for."""

    class Verdicts(dict):
        asked: list = []

    found = Verdicts()

    def of(path, **options):
        found.asked.append(
            (os.path.basename(path), options["module"], [os.path.basename(p) for p in options["after"]])
        )
        return found.get(os.path.basename(path), Trial("passed"))

    found.asked = []
    monkeypatch.setattr(trial, "of", of)
    return found


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of a plugin, where `compiled` puts libraries."""
    (tmp_path / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path.parent))
    return Natives("fast", f"{tmp_path.name}.inner", limit=5)


def test_libraries_are_asked_about_in_turn_and_once(package, compiled, verdicts):
    first, second = compiled(GOOD, "first"), compiled(GOOD, "second")
    with package.watched():
        assert ctypes.CDLL(first).it() == 1
        torch.ops.load_library(second)
        ctypes.CDLL(first)
    assert verdicts.asked == [("first.so", "", []), ("second.so", "", ["first.so"])]
    assert package.refusals == []


@pytest.mark.parametrize(
    ("found", "cause", "said"),
    [
        (
            Trial("crashed", "the process ended by SIGSEGV", "stack"),
            "crash",
            "crashes when it is opened: the process ended by SIGSEGV",
        ),
        (
            Trial("hung", "it was not open after 5 s"),
            "hang",
            "hangs when it is opened: it was not open after 5 s",
        ),
        (
            Trial("passed", "", "", ("aten",), ("aten::add.Tensor",)),
            "conflict",
            "would define once more the namespace 'aten' (TORCH_LIBRARY), which ",
        ),
    ],
    ids=["crash", "hang", "conflict"],
)
def test_a_library_that_does_harm_is_not_opened(package, compiled, verdicts, found, cause, said):
    library = compiled(GOOD, "bad")
    verdicts["bad.so"] = found
    with package.watched():
        with pytest.raises(OSError, match="opkit does not open .*bad.so: its library bad.so ") as caught:
            ctypes.CDLL(library)
    (refusal,) = package.refusals
    assert (refusal.path, refusal.cause, refusal.said) == (library, cause, found.said)
    assert str(refusal).startswith(f"its library bad.so {said}")
    assert str(refusal) in str(caught.value)
    assert not natives._is_open(library)
    if cause == "conflict":
        assert str(refusal).endswith(" has defined, and 1 more")


def test_an_extension_module_is_asked_about_by_its_name(package, compiled, verdicts):
    verdicts["bad.so"] = Trial("crashed", "the process ended by SIGSEGV")
    library = compiled(GOOD, "bad")
    loader = importlib.machinery.ExtensionFileLoader("fast._c", library)
    spec = importlib.util.spec_from_file_location("fast._c", library, loader=loader)
    with package.watched():
        with pytest.raises(ImportError, match="opkit does not open .*bad.so") as caught:
            importlib.util.module_from_spec(spec)
    assert (caught.value.name, caught.value.path) == ("fast._c", library)
    assert verdicts.asked == [("bad.so", "fast._c", [])]


def test_what_is_open_already_is_opened_as_ever(package, compiled, verdicts):
    library = compiled(GOOD, "early")
    verdicts["early.so"] = Trial("crashed")
    ctypes.CDLL(library)
    with package.watched():
        ctypes.CDLL(library)
    assert verdicts.asked == []


def test_libraries_of_others_are_not_asked_about(package, tmp_path_factory, verdicts):
    with package.watched():
        ctypes.CDLL(None)
        ctypes.CDLL("libc.so.6")
        with pytest.raises(OSError):
            ctypes.CDLL(str(tmp_path_factory.mktemp("other") / "absent.so"))
    assert verdicts.asked == []


def test_outside_of_a_call_nothing_is_in_the_way(package, compiled, verdicts):
    before = ctypes.CDLL.__init__, importlib.machinery.ExtensionFileLoader.create_module
    with package.watched(), package.watched():
        assert ctypes.CDLL.__init__ is not before[0]
    assert before == (ctypes.CDLL.__init__, importlib.machinery.ExtensionFileLoader.create_module)
    ctypes.CDLL(compiled(GOOD, "free"))
    assert verdicts.asked == []


def test_a_module_without_a_package_owns_what_lies_beside_it(tmp_path, monkeypatch):
    (tmp_path / "site_alone.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    alone = Natives("alone", "site_alone", limit=5)
    assert alone.owns(str(tmp_path / "it.so"))
    assert not alone.owns(str(tmp_path / "numpy" / "it.so"))
    assert not Natives("none", "site_nowhere", limit=5).owns(str(tmp_path / "it.so"))
