"""Throw-away plugin distributions, and an opkit that has not looked for plugins yet."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import opkit
from opkit import _config, _registry
from opkit import _sources as sources
from opkit.cpp import toolchain
from opkit.dispatch import preference, select
from opkit.plugins import catalog, loader, policy, store


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C interrupts, also where a shell runs the tests in the background, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Site:
    """A folder on sys.path that distributions are put into."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules: list[str] = []
        self.additions: dict[str, list] = {}

    def install(
        self,
        name: str,
        code: str,
        *,
        plugin: str = "",
        version: str = "1.0",
        points: str = "",
        folder: Path | None = None,
        manifest: str | None = None,
    ) -> None:
        """Write the distribution `name`; its module `name` with underscores has `code`, and a function register.

        With a manifest the module is a package, and the manifest in it begins with schema, name and version.
        """
        site = folder or self.folder
        module = name.replace("-", "_")
        self.modules.append(module)
        site.mkdir(parents=True, exist_ok=True)
        if manifest is None:
            (site / f"{module}.py").write_text(textwrap.dedent(code))
        else:
            (site / module).mkdir()
            (site / module / "__init__.py").write_text(textwrap.dedent(code))
            head = f"schema = 1\nname = {plugin or name!r}\nversion = {version!r}\n"
            (site / module / "opkit-plugin.toml").write_text(head + textwrap.dedent(manifest))
        info = site / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        points = points or f"[opkit.plugins]\n{plugin or name} = {module}:register\n"
        (info / "entry_points.txt").write_text(points)

    def again(self) -> None:
        """Let opkit in this process look for plugins as a new process does; ops of the test's own stay."""
        self.take_back()
        start_anew()
        sources.install(opkit._plugins)

    def take_back(self) -> None:
        """Undo what plugins registered, and forget their modules."""
        for state in loader._states or ():
            loader.withdraw(state)
        _registry._additions.clear()
        _registry._additions.update(self.additions)
        importlib.invalidate_caches()
        for module in self.modules:
            for name in [n for n in sys.modules if n.partition(".")[0] == module]:
                del sys.modules[name]

    def uninstall(self, name: str, version: str = "1.0") -> None:
        """Remove the distribution `name`."""
        module = name.replace("-", "_")
        shutil.rmtree(self.folder / f"{module}-{version}.dist-info")
        shutil.rmtree(self.folder / module, ignore_errors=True)
        (self.folder / f"{module}.py").unlink(missing_ok=True)

    def settle(self) -> None:
        """Make the folder look as if nothing had changed in it for a while."""
        os.utime(self.folder, (1e9, 1e9 + 0.5))

    def run(self, code: str, **environment: str) -> str:
        """Run `code` in a new process that has the distributions; return what it prints."""
        paths = os.pathsep.join([str(self.folder), os.environ.get("PYTHONPATH", "")])
        clean = {k: v for k, v in os.environ.items() if not k.startswith("OPKIT_")}
        place = self.folder.parent
        own = {"OPKIT_CACHE_DIR": str(place / "cache"), "XDG_CONFIG_HOME": str(place), "OPKIT_NATIVE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            env={**clean, **own, "PYTHONPATH": paths, **environment},
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


def start_anew():
    """Put opkit in this process back before its first look for plugins."""
    _config.refresh()
    preference.refresh()
    store.forget()
    loader._states = None
    _registry._promised.clear()
    toolchain._promised.clear()
    policy._warned.clear()
    for waiting in (sources._ops, sources._kernels):
        waiting[:] = [source for source in waiting if source is not opkit._plugins]


@pytest.fixture
def fresh(site, monkeypatch, tmp_path):
    """The folder on sys.path, and opkit in this process as before its first look for plugins.

    Plugins that are installed outside of the test's folders, as `make demo` does, are not seen.
    """
    site.folder.mkdir()
    monkeypatch.syspath_prepend(str(site.folder))
    for variable in ("OPKIT_AUTOLOAD", "OPKIT_BACKEND"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("OPKIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("OPKIT_PLUGINS_PARENT", "")  # so that what is set meanwhile goes again
    opkit.list_ops()
    ops = set(_registry._ops)
    site.additions = {k: list(v) for k, v in _registry._additions.items()}
    installed = catalog.installed
    monkeypatch.setattr(
        catalog, "installed", lambda: [f for f in installed() if Path(f.location).is_relative_to(tmp_path)]
    )
    monkeypatch.setattr(preference, "_known", set(preference._known))
    monkeypatch.setattr(select, "_warned", set())
    start_anew()
    sources.install(opkit._plugins)
    yield site
    site.take_back()
    for name in set(_registry._ops) - ops:
        _registry.remove(name)
    start_anew()


@pytest.fixture
def compiled(tmp_path):
    """Make a native library of C code, and return its path."""

    def compile_(code: str, name: str = "it", *flags: str) -> str:
        source, library = tmp_path / f"{name}.c", tmp_path / f"{name}.so"
        source.write_text(textwrap.dedent(code))
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, *flags], check=True)
        return str(library)

    return compile_


@pytest.fixture
def registering(tmp_path):
    """Make a native library that defines a namespace with TORCH_LIBRARY, and return its path."""

    def compile_(
        namespace: str, definitions: str = 'm.def("f(Tensor x) -> Tensor");', kind: str = "({}, m)"
    ) -> str:
        source, library = tmp_path / f"{namespace}.cpp", tmp_path / f"lib{namespace}.so"
        source.write_text(
            "#include <torch/csrc/stable/library.h>\n"
            "void kernel(StableIValue*, uint64_t, uint64_t) {}\n"
            f"STABLE_TORCH_LIBRARY{kind.format(namespace)} {{ {definitions} }}\n"
        )
        torch_folder = Path(torch.__file__).parent
        subprocess.run(
            ["c++", "-std=c++17", "-shared", "-fPIC", f"-I{torch_folder}/include", "-o", library, source]
            + [f"-L{torch_folder}/lib", "-ltorch_cpu", "-lc10"],
            check=True,
        )
        return str(library)

    return compile_
