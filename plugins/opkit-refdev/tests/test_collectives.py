"""torch.distributed between the devices of two processes."""

from __future__ import annotations

CODE = """
    import os, torch, torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.refdev.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("refdev")
    rank, size = dist.get_rank(), dist.get_world_size()
    device = torch.device("refdev", rank)
    full = lambda value: torch.full((3,), float(value), device=device)

    x = full(rank + 1); dist.all_reduce(x); assert x.cpu().tolist() == [3] * 3
    x = full(rank); dist.broadcast(x, 1); assert x.cpu().tolist() == [1] * 3
    parts = [full(9) for _ in range(size)]; dist.all_gather(parts, full(rank))
    assert [p.cpu()[0].item() for p in parts] == [0, 1]
    out = torch.empty(6, device=device); dist.all_gather_into_tensor(out, full(rank))
    assert out.cpu().tolist() == [0] * 3 + [1] * 3
    x = full(0); dist.reduce_scatter(x, [full(rank), full(rank + 10)]); assert x.cpu()[0] == (1, 21)[rank]
    if rank == 0: dist.send(full(5), 1)
    else: x = full(0); dist.recv(x, 0); assert x.cpu()[0] == 5
    work = dist.all_reduce(full(1), async_op=True); work.wait()
    assert work.result()[0].device == device and work.get_future().wait()[0].cpu()[0] == 2
    dist.barrier()

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2).double().to(device)
    parallel = DistributedDataParallel(model)
    inputs = torch.arange(8, dtype=torch.float64).view(2, 4)
    parallel(inputs[rank : rank + 1].to(device)).pow(2).sum().backward()
    torch.manual_seed(0)
    alone = torch.nn.Linear(4, 2).double()
    (alone(inputs).pow(2).sum() / size).backward()
    torch.testing.assert_close(model.weight.grad.cpu(), alone.weight.grad)
    dist.destroy_process_group()
    open(f"done-{rank}", "w").close()
"""


def test_two_processes(run, tmp_path):
    run(CODE, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    assert {path.name for path in tmp_path.glob("done-*")} == {"done-0", "done-1"}
