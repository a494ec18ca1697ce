from __future__ import annotations

from pathlib import Path

import pytest

import opkit
from opkit import _config


@pytest.fixture
def value(monkeypatch):
    """Read a variable with a given text, or unset (None)."""

    def read(name, text):
        if text is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, text)
        _config.refresh()
        return _config.get(name)

    return read


@pytest.mark.parametrize(
    ("text", "wanted"),
    [(None, ()), ("", ()), ("cpp", ("cpp",)), (" cpp , reference,", ("cpp", "reference"))],
)
def test_backends_are_split_at_commas(value, text, wanted):
    assert value("OPKIT_BACKEND", text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [(None, True), ("all", True), ("1", True), ("Yes", True), ("0", False), ("off", False)],
)
def test_autoload_is_a_flag(value, text, wanted):
    assert value("OPKIT_AUTOLOAD", text) is wanted


def test_wrong_flag_raises_with_name_meaning_and_legal_values(value):
    with pytest.raises(opkit.ConfigError) as caught:
        value("OPKIT_AUTOLOAD", "maybe")
    assert str(caught.value) == (
        "reading OPKIT_AUTOLOAD: found 'maybe'; expected one of 1, true, yes, on, all, 0, false, no, off. It says: "
        "whether installed plugins are called on first need. Unset it or use a legal value."
    )


def test_cache_folder_is_expanded(value, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert value("OPKIT_CACHE_DIR", "~/kernels") == Path("/home/me/kernels")


def test_cache_folder_has_a_default_below_home(value, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert value("OPKIT_CACHE_DIR", None) == Path("/home/me/.cache/opkit")


def test_values_are_kept_until_refreshed(monkeypatch):
    monkeypatch.setenv("OPKIT_BACKEND", "a")
    _config.refresh()
    assert _config.get("OPKIT_BACKEND") == ("a",)
    monkeypatch.setenv("OPKIT_BACKEND", "b")
    assert _config.get("OPKIT_BACKEND") == ("a",)
    _config.refresh()
    assert _config.get("OPKIT_BACKEND") == ("b",)


def test_every_variable_is_in_the_table_with_its_meaning():
    package = Path(opkit.__file__).parent
    used = {w for p in package.rglob("*.py") for w in _names(p.read_text())}
    assert used == set(_config.VARIABLES)
    assert all(v.meaning and name == v.name for name, v in _config.VARIABLES.items())


def _names(text):
    import re

    return re.findall(r"(?<=get\(\")OPKIT_[A-Z_]+(?=\"\))|(?<=environ\[\")OPKIT_[A-Z_]+", text)
