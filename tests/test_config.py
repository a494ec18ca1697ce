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
    [(None, "all"), ("all", "all"), ("1", "all"), ("Yes", "all"), ("0", "0"), ("off", "0"), (" OPS", "ops")],
)
def test_autoload_is_a_word_or_a_flag(value, text, wanted):
    assert value("OPKIT_AUTOLOAD", text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("1", True), ("Yes", True), ("true", True), ("0", False), ("off", False), ("no", False)],
)
def test_strict_is_a_flag(value, text, wanted):
    assert value("OPKIT_STRICT", text) is wanted


def test_plugins_may_be_pinned(value):
    digest = "0f" * 32
    assert value("OPKIT_PLUGINS", f"fast, numba==0.1.0, a@sha256:{digest},b==1@sha256:{digest}") == (
        ("fast", "", ""),
        ("numba", "0.1.0", ""),
        ("a", "", digest),
        ("b", "1", digest),
    )


@pytest.mark.parametrize("text", ["fast=1", "a==", "a@sha256:12", "a>=1", "a b"])
def test_a_pin_that_is_none_raises_with_the_forms(value, text):
    with pytest.raises(opkit.ConfigError) as caught:
        value("OPKIT_PLUGINS", text)
    assert str(caught.value) == (
        f"reading OPKIT_PLUGINS: found {text!r}; expected NAME, NAME==VERSION, NAME@sha256:DIGEST or "
        "NAME==VERSION@sha256:DIGEST, with the 64 hexadecimal digits that `opkit plugins why NAME` shows. It says: the "
        "only plugins to use, some perhaps pinned: fast,numba==0.1.0. Unset it or use a legal value."
    )


@pytest.mark.parametrize("text", ["opk:0", "Opk", "2"])
def test_a_device_that_is_no_name_raises_with_an_example(value, text):
    with pytest.raises(opkit.ConfigError) as caught:
        value("OPKIT_DEVICE", text)
    assert str(caught.value) == (
        f"reading OPKIT_DEVICE: found {text!r}; expected the name of a device without an index, such as opk. It says: "
        "the device of a plugin to set up, whatever its probe says. Unset it or use a legal value."
    )


def test_wrong_flag_raises_with_name_meaning_and_legal_values(value):
    with pytest.raises(opkit.ConfigError) as caught:
        value("OPKIT_AUTOLOAD", "maybe")
    assert str(caught.value) == (
        "reading OPKIT_AUTOLOAD: found 'maybe'; expected one of 0, ops, devices, all, 1, true, yes, on, false, no, "
        "off. It says: which installed plugins are used by themselves: none (0), those with ops, those with devices, "
        "or all. Unset it or use a legal value."
    )
    with pytest.raises(
        opkit.ConfigError, match="OPKIT_STRICT: found 'maybe'; expected one of 1, true, yes, on, all, 0"
    ):
        value("OPKIT_STRICT", "maybe")


def test_cache_folder_is_expanded(value, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert value("OPKIT_CACHE_DIR", "~/kernels") == Path("/home/me/kernels")


def test_cache_folder_has_a_default_below_home(value, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert value("OPKIT_CACHE_DIR", None) == Path("/home/me/.cache/opkit")


def test_more_cache_folders_are_split_and_expanded(value, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert value("OPKIT_CACHE_PATH", None) == ()
    assert value("OPKIT_CACHE_PATH", "~/a::/b c:") == (Path("/home/me/a"), Path("/b c"))


@pytest.mark.parametrize(
    "text",
    ["", "s3://bucket/kernels", "file:///mnt/kernels", "abfs://c@account/x", "simplecache::s3://bucket"],
)
def test_a_shared_cache_is_an_address(value, text):
    assert value("OPKIT_CACHE_REMOTE", text) == text


@pytest.mark.parametrize("text", ["/mnt/kernels", "s3:/bucket", "://x", "s3://", "bucket"])
def test_a_shared_cache_that_is_no_address_raises_with_examples(value, text):
    with pytest.raises(opkit.ConfigError) as caught:
        value("OPKIT_CACHE_REMOTE", text)
    assert str(caught.value) == (
        f"reading OPKIT_CACHE_REMOTE: found {text!r}; expected the address of a folder, such as s3://bucket/kernels, "
        "gs://bucket/kernels or file:///mnt/kernels. It says: a shared cache to fetch compiled kernels from, as an "
        "address that fsspec knows. Unset it or use a legal value."
    )


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (None, 10 << 30),
        ("0", 0),
        ("123", 123),
        ("500M", 500 << 20),
        ("10g", 10 << 30),
        (" 1.5 TiB ", 3 << 39),
        ("2KB", 2048),
    ],
)
def test_a_limit_is_a_size(value, text, wanted):
    assert value("OPKIT_CACHE_LIMIT", text) == wanted


@pytest.mark.parametrize("text", ["", "big", "-1", "10X", "1e9", "G", "1,5G", "٣G"])
def test_a_limit_that_is_no_size_raises_with_the_legal_forms(value, text):
    with pytest.raises(opkit.ConfigError) as caught:
        value("OPKIT_CACHE_LIMIT", text)
    assert str(caught.value) == (
        f"reading OPKIT_CACHE_LIMIT: found {text!r}; expected a size such as 500M, 10G or 1.5T, a number of bytes, or "
        "0 for no limit. It says: how large the folder for compiled kernels may grow before the least recently used "
        "ones go. Unset it or use a legal value."
    )


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

    return re.findall(
        r"(?<=get\(\")OPKIT_[A-Z_]+(?=\"\))|(?<=environ\[\")OPKIT_[A-Z_]+|(?<=: \")OPKIT_[A-Z_]+(?=\",\n)",
        text,
    )
