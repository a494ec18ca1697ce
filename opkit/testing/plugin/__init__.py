"""The conformance suite for plugins: what every plugin must be, as tests that its author subclasses.

    import opkit.testing.plugin

    class TestFast(opkit.testing.plugin.Suite):
        name = "fast"

    $ pip install -e . && python -m pytest

It stands above the room of plugins, which it looks into; the other checks of `opkit.testing` know nothing of plugins.
Needs pytest.
"""

from __future__ import annotations

from opkit.testing.plugin.suite import Suite as Suite

__all__ = ["Suite"]
