"""opkit's conformance suite for plugins."""

from __future__ import annotations

import opkit.testing.plugin


class TestPlugin(opkit.testing.plugin.Suite):
    name = "refdev"
