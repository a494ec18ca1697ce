"""What finding plugins costs a process, with 16 plugins among 20, 100 and 300 distributions; beside it, others' ways.

Every figure is taken inside of a process that has just started, and is the median of many. Ten of the plugins have a
manifest of 15 kernels with ranges of versions; six have none, and what they register is remembered. Code is imported
before the clock starts. A *miss* reads all folders, as after an install; a *hit* is what every process after it has.
The system's own caches are warm. What `import torch` costs with all this is in boot.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import _measure
import torch

REPOSITORY = Path(__file__).parents[2]
PLUGINS, WITH_MANIFEST, KERNELS = 16, 10, 15
TURNS = 25
FILE = "opkit-plugin.toml"

MANIFEST = """
schema = 1
name = "{name}"
version = "1.0"
[requires]
torch = ">=2.11,<3"
opkit = ">=0.0"
python = ">=3.10"
"""
KERNEL = """
[[kernels]]
op = "{name}::op_{number}"
device = "cpu"
dtypes = ["float32", "float64", "bfloat16"]
factory = "{name}:kernel_{number}"
"""

OPKIT = "from opkit.plugins import loader, toml\n"
WAYS = {
    "opkit: what is installed": ("from opkit.plugins import catalog", "catalog.installed()"),
    "opkit: and what is used": (OPKIT, "loader.states()"),
    "importlib.metadata": (
        "import importlib.metadata as metadata",
        "metadata.entry_points(group='opkit.plugins')",
    ),
    "importlib-metadata": ("import importlib_metadata as m", "m.entry_points(group='opkit.plugins')"),
    "stevedore": ("import stevedore", "stevedore.ExtensionManager('opkit.plugins', invoke_on_load=False)"),
}
CHILD = f"""
import sys, time
sys.prefix = {sys.prefix!r}  # as the process has it that called the plugins without a manifest
sys.path[:0] = {{paths!r}}
{{before}}
begun = time.perf_counter()
{{timed}}
print((time.perf_counter() - begun) * 1e3)
"""


def install(folder: Path, count: int) -> None:
    """Put distributions into a folder, the last ones plugins."""
    for number in range(count):
        name = "torch" if number == 0 else f"dist_{number}"
        info = folder / f"{name}-{torch.__version__}.dist-info"
        info.mkdir(parents=True)
        text = (
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {torch.__version__}\n\n"
            + "A description.\n" * 100
        )
        (info / "METADATA").write_text(text)
        (info / "RECORD").write_text(f"{name}/__init__.py,,\n" * 20)
        if number % 2:
            (info / "entry_points.txt").write_text(f"[console_scripts]\n{name} = {name}:main\n")
        if number >= count - PLUGINS:
            plugin(folder, info, name, with_manifest=count - number <= WITH_MANIFEST)
    os.utime(folder, (1e9, 1e9 + 0.5))


def plugin(folder: Path, info: Path, name: str, *, with_manifest: bool) -> None:
    (info / "entry_points.txt").write_text(f"[opkit.plugins]\n{name} = {name}:register\n")
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(
        "def register(registry):\n"
        f"    for number in range({KERNELS}):\n"
        f"        registry.register_kernel(f'{name}::op_{{number}}', 'cpu', abs, backend='{name}')\n"
    )
    if with_manifest:
        kernels = (KERNEL.format(name=name, number=number) for number in range(KERNELS))
        (folder / name / FILE).write_text(MANIFEST.format(name=name) + "".join(kernels))


def borrow(folder: Path) -> None:
    """Link what the ways need, without its metadata, so that only the distributions above are there."""
    folder.mkdir()
    for name in ("packaging", "importlib_metadata", "zipp", "lazy_importer", "stevedore"):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin:
            origin = Path(spec.origin)
            origin = origin.parent if spec.submodule_search_locations else origin
            (folder / origin.name).symlink_to(origin)
    for name in ("opkit", "opkit_boot.py"):
        if (REPOSITORY / name).exists():
            (folder / name).symlink_to(REPOSITORY / name)


def run(code: str, cache: Path, *, isolated: bool = True) -> str:
    environment = {"PATH": os.environ["PATH"], "OPKIT_CACHE_DIR": str(cache), "XDG_CONFIG_HOME": str(cache)}
    flags = ["-S", "-E"] if isolated else []
    command = [sys.executable, *flags, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=cache)
    return done.stdout


def measure(count: int, place: Path) -> dict[str, dict[str, float]]:
    """Return the median milliseconds of each way, when nothing is cached and when everything is."""
    site, library, cache = place / "site", place / "library", place / "cache"
    install(site, count)
    borrow(library)
    cache.mkdir()
    paths = [str(site), str(library)]
    remember = f"import sys; sys.path[:0] = {paths!r}; import opkit; opkit.list_ops()"
    found: dict[str, dict[str, list[float]]] = {}
    for turn in range(TURNS):
        for name, (before, timed) in WAYS.items():
            if "stevedore" in before and not (library / "stevedore").exists():
                continue
            code = CHILD.format(paths=paths, before=before, timed=timed)
            own = name.startswith("opkit")
            times = found.setdefault(name, {"miss": [], "hit": []})
            if own and turn % 5 == 0:  # fewer: what they keep has to be found again
                shutil.rmtree(cache / "plugins", ignore_errors=True)
                times["miss"].append(float(run(code, cache)))
                run(remember, cache, isolated=False)
                run(CHILD.format(paths=paths, before="", timed=f"{OPKIT}loader.states()"), cache)
            times["hit"].append(float(run(code, cache)))
    return {
        name: {what: statistics.median(values) for what, values in times.items() if values}
        for name, times in found.items()
    }


def main() -> None:
    found = {}
    for count in (20, 100, 300):
        with tempfile.TemporaryDirectory() as place:
            found[str(count)] = measure(count, Path(place))
    columns = [(count, what) for count in found for what in ("miss", "hit")]
    rows = [
        [name, *(f"{found[c][name][w]:.2f}" if w in found[c][name] else "" for c, w in columns)]
        for name in found["300"]
    ]
    header = ["", *(f"{count}, {what}" for count, what in columns)]
    _measure.table("finding 16 plugins among so many distributions, ms in a fresh process", header, rows)
    _measure.save("discovery", {"milliseconds": found})
    if "stevedore" not in json.dumps(found):
        print("stevedore is not installed: pip install stevedore to have it beside the others")


if __name__ == "__main__":
    main()
