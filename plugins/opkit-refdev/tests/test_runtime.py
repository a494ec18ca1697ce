"""Random numbers, streams, memory, autocast and profiles of the device."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

DEVICE = "refdev"


def test_a_generator_draws_what_the_cpus_does():
    mine, host = torch.Generator(DEVICE).manual_seed(7), torch.Generator().manual_seed(7)
    for draw in (
        lambda **o: torch.randn(5, **o),
        lambda **o: torch.randperm(9, **o),
        lambda **o: torch.randint(100, (4,), **o),
    ):
        assert torch.equal(draw(device=DEVICE, generator=mine).cpu(), draw(generator=host))
    state = mine.get_state()
    first = torch.rand(3, device=DEVICE, generator=mine)
    mine.set_state(state)
    assert torch.equal(torch.rand(3, device=DEVICE, generator=mine).cpu(), first.cpu())
    assert mine.device == torch.device("refdev:0")
    assert mine.initial_seed() == 7


def test_the_default_generators_are_the_devices_own():
    torch.manual_seed(3)
    zero, one = torch.randn(4, device="refdev:0"), torch.randn(4, device="refdev:1")
    assert torch.equal(zero.cpu(), one.cpu())
    state = torch.get_rng_state()
    torch.randn(4, device=DEVICE)
    assert torch.equal(torch.get_rng_state(), state)
    torch.refdev.manual_seed_all(3)
    assert torch.equal(torch.randn(4, device=DEVICE).cpu(), zero.cpu())
    with torch.random.fork_rng(devices=[0, 1], device_type=DEVICE):
        torch.randn(4, device=DEVICE)
    state = torch.refdev.get_rng_state()
    first = torch.dropout(torch.ones(20, device=DEVICE), 0.5, True)
    torch.refdev.set_rng_state(state)
    assert torch.equal(torch.dropout(torch.ones(20, device=DEVICE), 0.5, True).cpu(), first.cpu())


def test_streams_and_events():
    stream, other = torch.Stream(DEVICE), torch.refdev.Stream()
    assert stream != other
    assert stream.device == torch.device("refdev:0")
    assert stream.query()
    with stream:
        assert torch.accelerator.current_stream() == stream == torch.refdev.current_stream()
    assert torch.accelerator.current_stream().stream_id == 0
    start, end = (torch.Event(DEVICE, enable_timing=True) for _ in range(2))
    start.record(stream)
    torch.randn(64, 64, device=DEVICE).mm(torch.randn(64, 64, device=DEVICE))
    end.record(stream)
    stream.wait_event(end)
    end.synchronize()
    assert end.query()
    assert 0 < start.elapsed_time(end) < 60_000
    torch.ones(1, device=DEVICE).record_stream(stream)
    torch.accelerator.synchronize()


def test_memory_is_counted_and_limited():
    gc.collect()
    torch.refdev.reset_peak_memory_stats(1)
    before = torch.refdev.memory_allocated(1)
    x = torch.empty(1 << 20, dtype=torch.uint8, device="refdev:1")
    assert (
        torch.refdev.memory_allocated(1) - before == 1 << 20 == torch.accelerator.memory_allocated(1) - before
    )
    assert torch.refdev.memory_stats(1)["allocated_bytes.large_pool.current"] >= 1 << 20
    free, total = torch.accelerator.get_memory_info(1)
    assert total - free == torch.refdev.memory_allocated(1)
    del x
    assert torch.refdev.memory_allocated(1) == before
    assert torch.refdev.max_memory_allocated(1) - before >= 1 << 20
    try:
        torch.refdev.set_memory_limit(before + 1000, 1)
        with pytest.raises(
            torch.OutOfMemoryError, match="refdev:1 is out of memory: 2000 bytes were asked for"
        ):
            torch.empty(2000, dtype=torch.uint8, device="refdev:1")
        torch.empty(900, dtype=torch.uint8, device="refdev:1")
    finally:
        torch.refdev.set_memory_limit(total, 1)


def test_pinned_memory_is_known():
    x = torch.arange(5.0).pin_memory()
    assert x.is_pinned()
    assert not torch.arange(5.0).is_pinned()
    assert x[2:].is_pinned()
    assert x.to(DEVICE, non_blocking=True).cpu().tolist() == x.tolist()


def test_autocast():
    a, b = torch.randn(3, 4, device=DEVICE), torch.randn(4, 3, device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert (a @ b).dtype == torch.bfloat16
        assert torch.softmax((a @ b), -1).dtype == torch.float32
        assert torch.cat([a, b.t().bfloat16()]).dtype == torch.float32
        assert torch.norm(a @ b).dtype == torch.float32
        assert (a @ b).sum().dtype == torch.float32
        assert torch.nn.functional.linear(a, a).dtype == torch.bfloat16
        with torch.autocast(DEVICE, enabled=False):
            assert (a @ b).dtype == torch.float32
    torch.testing.assert_close((a @ b).cpu(), a.cpu() @ b.cpu())
    assert torch.refdev.get_amp_supported_dtype() == [torch.bfloat16, torch.float16]


def test_every_kernel_is_one_of_an_op_that_this_torch_has():
    assert not [impl for impl in torch._C._dispatch_find_dangling_impls() if "csrc/" in impl]


def test_a_profile_shows_the_device():
    x = torch.randn(32, 32, device=DEVICE)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.PrivateUse1]) as found:
        x.mm(x).cpu()
    events = found.events()
    assert {"aten::mm", "aten::_to_copy"} <= {event.name for event in events}
    if torch.__version__ >= "2.12":  # before, torch has no interface for spans of such a device
        assert sum(average.device_time_total for average in found.key_averages()) > 0


def test_a_generator_of_another_device_is_used_as_it_is():
    host = torch.Generator().manual_seed(1)
    found = torch.randn(3, device="cpu", generator=host)
    assert torch.equal(found, torch.randn(3, generator=torch.Generator().manual_seed(1)))
