"""The conformance suite on an installed plugin, without a test module of its author's: `opkit plugins test`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from opkit.plugins import loader

_MODULE = """
import opkit.testing.plugin

class TestPlugin(opkit.testing.plugin.Suite):
    name = {name!r}
"""


def run(name: str) -> int:
    """Run the suite in a new process, where the plugin's device is chosen if it has one, and return its exit code.

    Raises:
        PluginError: the plugin is not installed.
    """
    manifest = loader.named(name).found.manifest
    chosen = {"OPKIT_DEVICE": manifest.device.name} if manifest is not None and manifest.device else {}
    with tempfile.TemporaryDirectory(prefix="opkit-suite-") as folder:
        module = Path(folder, "test_plugin.py")
        module.write_text(_MODULE.format(name=name))
        options = ["--rootdir", folder, "-p", "no:cacheprovider", "-W", "ignore::DeprecationWarning", "-ra"]
        command = [sys.executable, "-m", "pytest", *options, str(module)]
        return subprocess.call(command, env={**os.environ, **chosen})
