from __future__ import annotations

import os

import pytest

from opkit.cpp import _jobs
from opkit.errors import ConfigError

GIB = 1 << 30


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A machine of 16 cores and 64 GiB free, whose files may be changed."""
    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    for name, text in (("MEMINFO", f"MemTotal: 1 kB\nMemAvailable:  {64 << 20} kB\n"), ("OWN_CGROUP", "")):
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(_jobs, f"_{name}", tmp_path / name)
    monkeypatch.setattr(_jobs, "_CGROUPS", tmp_path / "cgroup")
    return tmp_path


def in_container(machine, folder=""):
    (machine / "OWN_CGROUP").write_text(f"1:cpu:/other\n0::/{folder}\n")
    (machine / "cgroup" / "app" / "job").mkdir(parents=True, exist_ok=True)
    return machine / "cgroup"


def test_cores_and_free_memory_bound_the_jobs():
    assert _jobs.limit(2 * GIB) == 16
    assert _jobs.limit(8 * GIB) == 8
    assert _jobs.limit(100 * GIB) == 1


def test_a_containers_cpu_quota_counts_wherever_it_stands_above(machine):
    cgroup = in_container(machine, "app/job")
    (cgroup / "app" / "job" / "cpu.max").write_text("max 100000\n")
    (cgroup / "app" / "cpu.max").write_text("350000 100000\n")
    assert _jobs.limit(GIB) == 3
    (cgroup / "app" / "cpu.max").write_text("50000 100000\n")
    assert _jobs.limit(GIB) == 1


def test_a_containers_memory_counts_without_what_it_caches(machine):
    cgroup = in_container(machine)
    (cgroup / "memory.max").write_text(f"{10 * GIB}\n")
    (cgroup / "memory.current").write_text(f"{8 * GIB}\n")
    assert _jobs.limit(2 * GIB) == 1
    (cgroup / "memory.stat").write_text(f"anon 1\ninactive_file {4 * GIB}\n")
    assert _jobs.limit(2 * GIB) == 3
    (cgroup / "memory.max").write_text("max\n")
    assert _jobs.limit(2 * GIB) == 16


def test_a_machine_that_does_not_say_is_bound_by_its_cores(machine):
    (machine / "MEMINFO").unlink()
    (machine / "OWN_CGROUP").unlink()
    assert _jobs.limit(2 * GIB) == 16


def test_max_jobs_wins_and_must_be_a_number(monkeypatch):
    monkeypatch.setenv("MAX_JOBS", " 40 ")
    assert _jobs.limit(64 * GIB) == 40
    for text in ("many", "0", "-1", "1.5", "²"):
        monkeypatch.setenv("MAX_JOBS", text)
        with pytest.raises(ConfigError, match=f"MAX_JOBS: found '{text}'; expected how many.*MAX_JOBS=2"):
            _jobs.limit(GIB)
