"""What torch does to an op, for every op that opkit ships: one that has no sample here fails."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor

import opkit
import opkit_kernels

OPS = {name: value for name, value in vars(opkit_kernels).items() if isinstance(value, opkit.Op)}


def sample(name: str, device: str) -> tuple[Any, ...]:
    """Return arguments of an op in float64."""
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(2, 3, 5, dtype=torch.float64, generator=generator).to(device) for _ in range(3))
    row, target = a[0, 0].clone(), torch.tensor([[0, 4, 1], [2, 2, 3]], device=device)
    return {
        "vector_add": (a, b),
        "swiglu": (a, b),
        "swiglu_backward": (a, b, c),
        "rms_norm": (a, row, 1e-5),
        "rms_norm_backward": (a, b, row, 1e-5),
        "cross_entropy": (a, target),
        "cross_entropy_backward": (b[..., 0], c[..., 0], a, target, torch.logsumexp(a, -1)),
    }[name]


@pytest.fixture(params=OPS)
def op(request):
    return OPS[request.param]


@pytest.fixture
def args(op, device):
    return sample(op.name.removeprefix("opkit::"), device)


def leaves(args):
    return tuple(
        a.detach().clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in args
    )


def outputs(op, args):
    """What can be differentiated of what an op returns."""
    found = op(*args)
    found = (found,) if isinstance(found, Tensor) else tuple(found)
    return tuple(f for f in found if f.requires_grad)


def test_opcheck(op, args):
    torch.library.opcheck(op.overload, args)
    torch.library.opcheck(op.overload, leaves(args))


def test_gradients_of_both_orders_and_modes(op, args):
    given = leaves(args)
    count = len(outputs(op, given))
    assert count

    def call(*args):
        found = op(*args)
        return (found,) if isinstance(found, Tensor) else tuple(found)[:count]

    assert torch.autograd.gradcheck(call, given, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, given, check_fwd_over_rev=True)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_values_and_gradients_are_those_of_eager(op, args, compiler):
    def run(call):
        given = leaves(args)
        found = outputs(call, given)
        wanted = [g for g in given if isinstance(g, Tensor) and g.requires_grad]
        return found, torch.autograd.grad(sum(f.sin().sum() for f in found), wanted)

    torch._dynamo.reset()
    torch.testing.assert_close(
        run(torch.compile(lambda *args: op(*args), fullgraph=True, backend=compiler)), run(op)
    )


def test_exported_program_is_saved_and_loaded(op, args):
    class Module(torch.nn.Module):
        def forward(self, *args: Any) -> Any:
            return op(*args)

    program = torch.export.export(Module(), args)
    assert op.overload in [node.target for node in program.graph.nodes]
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    found = torch.export.load(stream).module()(*args)
    assert type(found) is type(op(*args))
    torch.testing.assert_close(found, op(*args), rtol=0, atol=0)
