from __future__ import annotations

import pytest

from opkit import _sources as sources


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No source but those of the test."""
    monkeypatch.setattr(sources, "_ops", [])
    monkeypatch.setattr(sources, "_kernels", [])


def test_source_is_called_once_when_ops_are_looked_up():
    calls = []
    sources.install(lambda: calls.append(1))
    sources.consult_for_ops()
    sources.consult_for_ops()
    sources.consult_for_kernels()
    assert calls == [1]


def test_source_of_ops_only_waits_until_ops_are_looked_up():
    calls = []
    sources.install(lambda: calls.append("ops"), ops_only=True)
    sources.install(lambda: calls.append("both"))
    sources.consult_for_kernels()
    assert calls == ["both"]
    sources.consult_for_ops()
    assert calls == ["both", "ops"]


def test_source_may_consult_the_others_itself():
    calls = []

    def first():
        sources.consult_for_ops()
        calls.append("first")

    sources.install(first)
    sources.install(lambda: calls.append("second"))
    sources.consult_for_ops()
    assert calls == ["second", "first"]
