"""How large the caches are, and what empties them."""

from __future__ import annotations

import pytest
import torch

from opkit.bench import caches

REAL = caches.last_cache  # conftest has the tests see a small one


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(caches, "_FOLDER", tmp_path)

    def write(**sizes):
        for index, text in sizes.items():
            (tmp_path / index).mkdir()
            (tmp_path / index / "size").write_text(f"{text}\n")

    return write


def test_the_largest_cache_is_the_last_one(folder):
    folder(index0="48K", index1="2048K", index3="491520K", index2="odd")
    assert REAL("cpu") == 480 * 2**20


def test_units_are_understood(folder):
    folder(index3="96M")
    assert REAL("cpu") == 96 * 2**20


def test_where_nothing_says_how_large_it_is_something_is_taken(folder):
    assert REAL("cpu") == 32 * 2**20


def test_the_buffer_is_larger_than_the_cache_and_no_burden(monkeypatch):
    monkeypatch.setattr(caches, "last_cache", lambda device: 8000)
    assert caches.Flush("cpu").size == 10_000
    monkeypatch.setattr(caches, "_free", lambda: 4004)
    assert caches.Flush("cpu").size == 1000


def test_free_memory_is_what_linux_says_or_assumed(monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable:       4 kB\n")
    monkeypatch.setattr(caches, "_MEMORY", tmp_path / "meminfo")
    assert caches._free() == 4096
    monkeypatch.setattr(caches, "_MEMORY", tmp_path / "none")
    assert caches._free() == 4 * 2**30


def test_a_flush_reads_all_of_the_buffer_and_changes_none(monkeypatch):
    flush = caches.Flush("cpu")
    read = []
    buffer = flush._buffer
    flush._buffer = type("Spy", (), {"sum": lambda self: read.append(int(buffer.sum()))})()
    flush()
    assert read == [flush.size // 8]


def test_devices_whose_caches_can_be_emptied():
    assert caches.can_flush("cpu")
    assert caches.can_flush("cuda")
    assert not caches.can_flush("xpu")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA device")
def test_caches_of_cuda_are_emptied_by_writing():
    flush = caches.Flush("cuda")
    flush()
    assert not flush._buffer.any()
