"""Throw-away plugin distributions, and an opkit that has not looked for plugins yet."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import opkit
from opkit import _config, _registry
from opkit import _sources as sources
from opkit.dispatch import preference, select
from opkit.plugins import discovery, loader


class Site:
    """A folder on sys.path that distributions are put into."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules: list[str] = []

    def install(
        self,
        name: str,
        code: str,
        *,
        plugin: str = "",
        version: str = "1.0",
        points: str = "",
        folder: Path | None = None,
    ) -> None:
        """Write the distribution `name`; its module `name` with underscores has `code`, and a function register."""
        site = folder or self.folder
        module = name.replace("-", "_")
        self.modules.append(module)
        site.mkdir(parents=True, exist_ok=True)
        (site / f"{module}.py").write_text(textwrap.dedent(code))
        info = site / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        points = points or f"[opkit.plugins]\n{plugin or name} = {module}:register\n"
        (info / "entry_points.txt").write_text(points)

    def run(self, code: str, **environment: str) -> str:
        """Run `code` in a new process that has the distributions; return what it prints."""
        paths = os.pathsep.join([str(self.folder), os.environ.get("PYTHONPATH", "")])
        clean = {k: v for k, v in os.environ.items() if not k.startswith("OPKIT_")}
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            env={**clean, "PYTHONPATH": paths, **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def site(tmp_path):
    """A folder for distributions; in this process they are not on sys.path."""
    return Site(tmp_path / "site")


@pytest.fixture
def fresh(site, monkeypatch, tmp_path):
    """The folder on sys.path, and opkit in this process as before its first look for plugins.

    Plugins that are installed outside of the test's folders, as `make demo` does, are not seen.
    """
    site.folder.mkdir()
    monkeypatch.syspath_prepend(str(site.folder))
    for variable in ("OPKIT_AUTOLOAD", "OPKIT_BACKEND"):
        monkeypatch.delenv(variable, raising=False)
    opkit.list_ops()
    _config.refresh()
    preference.refresh()
    ops, additions = set(_registry._ops), {k: list(v) for k, v in _registry._additions.items()}
    scan = discovery.scan
    monkeypatch.setattr(
        discovery, "scan", lambda: [f for f in scan() if Path(f.location).is_relative_to(tmp_path)]
    )
    monkeypatch.setattr(loader, "_states", None)
    monkeypatch.setattr(preference, "_known", set(preference._known))
    monkeypatch.setattr(select, "_warned", set())
    sources.install(opkit._plugins)
    yield site
    _config.refresh()
    preference.refresh()
    for waiting in (sources._ops, sources._kernels):
        waiting[:] = [source for source in waiting if source is not opkit._plugins]
    for name in set(_registry._ops) - ops:
        _registry.remove(name)
    _registry._additions.clear()
    _registry._additions.update(additions)
    for module in site.modules:
        sys.modules.pop(module, None)
