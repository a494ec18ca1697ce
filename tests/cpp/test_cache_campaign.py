"""Builders that are killed, and files that are damaged, many times over.

Each round starts builders of one new library, and of one that may have been damaged, and kills one of
them at a random moment. Whoever survives must end, in time, with the right library.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from opkit import _config
from opkit.cpp import _turn, cache, compilers, remote, tidy  # noqa: F401  (imported before the forks)
from tests.cpp.cache_tools import exit_code, forked, temporaries, until

BUILDERS = 4
IN_TIME = 10.0  # seconds

pytestmark = pytest.mark.skipif(compilers.find_cxx() is None, reason="needs a C++ compiler")


@pytest.fixture
def cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("OPKIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(_turn, "_SAY_AFTER", 60.0)
    _config.refresh()
    yield tmp_path / "cache"
    _config.refresh()


def library_of(value: int, header: Path) -> Path:
    """A real library, whose function `answer` returns `value` and what the header says."""

    def build(work):
        source, library = work.folder / "unit.cpp", work.folder / "unit.so"
        source.write_text(f'#include "{header}"\nextern "C" int answer() {{ return {value} + ADDED; }}\n')
        command = [*compilers.get_cxx().command, "-shared", "-fPIC", "-MMD", str(source), "-o", str(library)]
        environment = {**os.environ, "TMPDIR": str(work.folder)}
        done = subprocess.run(command, cwd=work.folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        work.depend_on((work.folder / "unit.d").read_text().replace("\\\n", " ").split()[1:])
        return library

    return cache.obtain(lambda: str(value), label="campaign", build=build)


def damage(cache_dir: Path, chance: random.Random) -> str | None:
    """Truncate, cut or garble a random file; nobody has any of them open."""
    files = sorted(path for path in cache_dir.rglob("*") if path.is_file())
    if not files:
        return None
    path = chance.choice(files)
    content = path.read_bytes()
    cut = chance.randrange(len(content) + 1)
    path.write_bytes(chance.choice([b"", content[:cut], content[:cut] + b"\0" * (len(content) - cut)]))
    return str(path.relative_to(cache_dir))


def campaign(cache_dir: Path, tmp_path: Path, rounds: int, seed: int) -> dict[str, int]:
    chance = random.Random(seed)
    header = tmp_path / "added.h"
    seen = {"killed": 0, "while_building": 0, "damaged": 0}
    slowest, usual = 0.0, 0.3
    for number in range(rounds):
        added = chance.randrange(2)
        header.write_text(f"#define ADDED {added}\n")
        damaged = damage(cache_dir, chance) if chance.random() < 0.5 else None
        seen["damaged"] += damaged is not None
        values = [number, chance.randrange(number + 1)]
        what = f"seed {seed}, round {number}, damaged {damaged}"

        def work(values=values, added=added):
            for value in values:
                assert ctypes.CDLL(str(library_of(value, header))).answer() == value + added

        started = time.monotonic()
        pids = [forked(work) for _ in range(BUILDERS)]
        victim = chance.choice(pids)
        time.sleep(chance.uniform(0, usual))
        seen["while_building"] += (cache_dir / "tmp").exists() and bool(temporaries(cache_dir))
        os.kill(victim, signal.SIGKILL)
        codes = {pid: exit_code(pid, max(0.0, started + IN_TIME - time.monotonic())) for pid in pids}
        seen["killed"] += codes[victim] == -signal.SIGKILL
        assert all(code == 0 for pid, code in codes.items() if pid != victim), f"{what}: {codes}"
        usual = 0.8 * usual + 0.2 * (time.monotonic() - started)
        slowest = max(slowest, time.monotonic() - started)

        # The compiler that a killed builder started runs on for a moment.
        assert until(lambda: tidy.collect(str(cache_dir)) or not temporaries(cache_dir), IN_TIME), what
        assert tidy.held(str(cache_dir)) == set(), what
    seen["slowest_ms"] = int(slowest * 1000)
    return seen


def test_survivors_of_a_short_campaign_end_in_time_with_the_right_library(cache_dir, tmp_path):
    campaign(cache_dir, tmp_path, rounds=6, seed=1)


@pytest.mark.soak
@pytest.mark.slow
def test_survivors_of_a_campaign_end_in_time_with_the_right_library(cache_dir, tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    seen = campaign(cache_dir, tmp_path, rounds=200, seed=seed)
    print(f"200 rounds, seed {seed}: {seen}")
    assert seen["killed"] > 20
    assert seen["while_building"] > 20
