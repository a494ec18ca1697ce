"""Fixtures for all tests: a clean environment, one kernel cache per session, and ops that go away again."""

from __future__ import annotations

import importlib
import os

import pytest

from opkit import _config, _registry
from opkit.dispatch import native, preference, select
from opkit.testing.isolation import isolated


def pytest_configure(config):
    """Decide which twin runs ops: Python, or with OPKIT_NATIVE=1 the native core, which is built first."""
    os.environ.setdefault("OPKIT_NATIVE", "0")
    native.need()


def pytest_report_header(config):
    return f"opkit: ops run by {'Python' if native.core() is None else 'the native core'}"


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory):
    """Where kernels are built, so that each compiles once per session and never in the user's cache."""
    return tmp_path_factory.mktemp("opkit-cache")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, session_cache):
    """No OPKIT_* variable of the user's, and nothing remembered of one that a test has set."""
    for name in [name for name in os.environ if name.startswith("OPKIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OPKIT_CACHE_DIR", str(session_cache))
    monkeypatch.setenv(
        "OPKIT_NATIVE", "0"
    )  # processes that a test starts build no core; this one has decided
    _config.refresh()
    preference.refresh()
    yield
    monkeypatch.undo()
    _config.refresh()
    preference.refresh()


@pytest.fixture
def cache_dir(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("OPKIT_CACHE_DIR", str(tmp_path / "cache"))
    _config.refresh()
    yield tmp_path / "cache"
    _config.refresh()


@pytest.fixture
def registry():
    """Ops that the test defines are removed after it, and what was said once may be said again."""
    importlib.import_module(
        "opkit_kernels"
    )  # a test that looks ops up would load them, as if it defined them
    select._warned.clear()
    with isolated():
        yield _registry
