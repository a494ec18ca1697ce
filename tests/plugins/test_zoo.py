"""Bad plugins, one by one and all at once: torch and the good ones work, and each bad one is explained.

What they do is in zoo/animals.py, the program that runs among them in zoo/visit.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from tests.plugins.zoo import visit
from tests.plugins.zoo.animals import ANIMALS, GOOD, PROBED, Animal

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]

TIMEOUT = "8"  # seconds that a plugin may hang; the others must be done by then on a busy machine
DEADLY = [name for name, animal in ANIMALS.items() if animal.deaths]
# They leave this process changed, so another one visits them.
WILD = [*DEADLY, "patches", "broken_device"]
HOWS = {
    "plain": [sys.executable, visit.__file__],
    "fork": [sys.executable, visit.__file__],
    "fork_after": [sys.executable, visit.__file__],
    "spawn": [sys.executable, visit.__file__],
    "mp_spawn": [sys.executable, visit.__file__],
    "torchrun": [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        visit.__file__,
    ],
}
PROCESSES = {"plain": 1, "fork_after": 3}  # that look; else two


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """The native libraries, built once."""
    folder = tmp_path_factory.mktemp("libraries")
    for name, animal in ANIMALS.items():
        if animal.native:
            _build(animal.native, folder / name)
    return folder


def _build(code: str, target: Path) -> None:
    place = Path(torch.__file__).parent
    is_cpp = "torch/" in code
    source = target.with_suffix(".cpp" if is_cpp else ".c")
    source.write_text(code)
    command = ["cc", "-shared", "-fPIC", "-w"]
    if is_cpp:
        command = ["c++", "-std=c++20", "-shared", "-fPIC", "-w", f"-I{place}/include"]
        command += [f"-L{place}/lib", "-Wl,--no-as-needed", "-ltorch_cpu", "-lc10"]
    subprocess.run([*command, "-o", target, source], check=True)


def put(name: str, folder: Path, libraries: Path) -> None:
    """Install an animal, or a good plugin, into `folder`."""
    animal = ANIMALS[name] if name in ANIMALS else Animal("loaded", "", GOOD[name])
    module, code = f"zoo_{name}", animal.code
    package = folder
    if animal.manifest is not None:
        package = folder / module
        head = f'schema = 1\nname = "{name}"\nversion = "1.0"\n'
        text = animal.manifest
        _write(package / "opkit-plugin.toml", text if isinstance(text, bytes) else head + text)
    _write(package / (f"{module}.py" if package is folder else "__init__.py"), code)
    if animal.native:
        os.link(libraries / name, package / f"{module}.so")
    info = folder / f"{module}-1.0.dist-info"
    _write(info / "METADATA", f"Metadata-Version: 2.1\nName: zoo-{name}\nVersion: 1.0\n")
    _write(info / "entry_points.txt", f"[opkit.plugins]\n{name} = {animal.value or f'{module}:register'}\n")


def _write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        content = textwrap.dedent(content).encode()
    path.write_bytes(content)


class Zoo:
    """Plugins in a folder, and what the programs that ran among them were told of each."""

    def __init__(self, place: Path) -> None:
        self.site, self.cache, self.notes = place / "site", place / "cache", place / "notes"
        info = (
            self.site / "torch_calls-1.0.dist-info"
        )  # as where opkit is installed, and not only in the path
        _write(info / "METADATA", "Metadata-Version: 2.1\nName: torch-calls\nVersion: 1.0\n")
        _write(info / "entry_points.txt", "[torch.backends]\nopkit_again = opkit_boot:boot\n")

    def visit(self, how: str) -> subprocess.CompletedProcess:
        """Run a program; return how it ended."""
        self.notes.mkdir(exist_ok=True)
        for note in self.notes.iterdir():
            note.unlink()
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("OPKIT_", "PYTHONFAULTHANDLER"))}
        own = {
            "PYTHONPATH": os.pathsep.join([str(self.site), os.environ.get("PYTHONPATH", "")]),
            "OPKIT_CACHE_DIR": str(self.cache),
            "XDG_CONFIG_HOME": str(self.cache),
            "OPKIT_NATIVE": "0",
            PROBED: "1",
            "OPKIT_PLUGINS_TIMEOUT": TIMEOUT,
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.run(
            [*HOWS[how], how, str(self.notes)],
            env={**clean, **own},
            capture_output=True,
            text=True,
            timeout=300,
        )

    def told(self) -> list[dict[str, tuple[str, str]]]:
        """Return what each process was told: status and story, by the name of the plugin."""
        return [json.loads(note.read_text()) for note in self.notes.iterdir()]


@pytest.fixture
def zoo(tmp_path, libraries):
    made = Zoo(tmp_path)
    for name in GOOD:
        put(name, made.site, libraries)
    return made


@pytest.fixture(scope="module")
def full(tmp_path_factory, libraries):
    """All of them at once, after as many starts as the deadly ones end."""
    made = Zoo(tmp_path_factory.mktemp("zoo"))
    for name in (*GOOD, *ANIMALS):
        put(name, made.site, libraries)
    ended = 0
    while (done := made.visit("plain")).returncode:
        ended += 1
        assert not made.told(), done.stderr  # it got no further than the plugin that ended it
        assert ended <= sum(animal.deaths for animal in ANIMALS.values()), done.stderr
    return made, ended


def check(told: dict[str, tuple[str, str]], *, names) -> None:
    """Hold what a process was told against what is to be said of these plugins."""
    assert set(told) == {*GOOD, *names}
    for name in GOOD:
        assert told[name][0] == "loaded", told[name]
    for name in names:
        animal, (status, story) = ANIMALS[name], told[name]
        hung_again = (name, status) == ("hangs", "quarantined")
        assert hung_again or status == animal.status, story
        assert animal.why in story, story
        assert story.startswith(f"{name} of zoo-{name} 1.0: {status}")
        assert "\n  what to do: " in story


def test_there_are_more_than_twenty():
    assert len(ANIMALS) > 20


@pytest.mark.parametrize("name", [name for name in ANIMALS if name not in WILD])
def test_alone_in_this_process(fresh, libraries, monkeypatch, name, tmp_path):
    from opkit import _config

    monkeypatch.setenv("OPKIT_PLUGINS_TIMEOUT", TIMEOUT)
    _config.refresh()
    fresh.modules += [f"zoo_{one}" for one in (name, *GOOD)]
    for one in (name, *GOOD):
        put(one, fresh.folder, libraries)
    visit.look(str(tmp_path))
    visit.look.taken._destroy()
    (note,) = tmp_path.glob("*.json")
    check(json.loads(note.read_text()), names=[name])


@pytest.mark.parametrize("name", WILD)
def test_alone_in_a_process_of_its_own(zoo, libraries, name):
    put(name, zoo.site, libraries)
    for _ in range(ANIMALS[name].deaths):
        done = zoo.visit("plain")
        assert done.returncode != 0
        assert not zoo.told(), done.stderr
    done = zoo.visit("plain")
    assert done.returncode == 0, done.stderr
    (told,) = zoo.told()
    check(told, names=[name])


def test_all_at_once_the_deadly_ones_end_no_more_starts_than_they_do_alone(full):
    _, ended = full
    assert ended == sum(animal.deaths for animal in ANIMALS.values())


@pytest.mark.parametrize("how", HOWS)
def test_all_at_once(full, how):
    zoo, _ = full
    done = zoo.visit(how)
    assert done.returncode == 0, done.stderr
    told = zoo.told()
    assert len(told) == PROCESSES.get(how, 2)
    for one in told:
        check(one, names=ANIMALS)
