"""What torch does to an op, for every op that opkit ships: one that has no sample here fails."""

from __future__ import annotations

import functools
import io
from typing import Any

import pytest
import torch
from torch import Tensor

import opkit
import opkit_kernels
from opkit.transforms.formula import NoFormula

OPS = {name: value for name, value in vars(opkit_kernels).items() if isinstance(value, opkit.Op)}
WITH_RESULTS = [name for name, op in OPS.items() if op.schema.results]
WITH_GRADIENTS = [name for name in WITH_RESULTS if not isinstance(OPS[name]._formula, NoFormula)]
with_results = pytest.mark.parametrize("op", WITH_RESULTS, indirect=True)
with_gradients = pytest.mark.parametrize("op", WITH_GRADIENTS, indirect=True)


def sample(name: str, device: str) -> tuple[Any, ...]:
    """Return arguments of an op in float64."""
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(2, 3, 5, dtype=torch.float64, generator=generator).to(device) for _ in range(3))
    row, target = a[0, 0].clone(), torch.tensor([[0, 4, 1], [2, 2, 3]], device=device)
    heads, keys, angles = a.unsqueeze(-2).expand(2, 3, 2, 5), b.unsqueeze(-2), c[0, :, :2].clone()
    places = torch.tensor([[2, 0, 1], [1, 1, 0]], device=device)
    column, zeros = a[0, :, 0].clone(), torch.zeros(3, dtype=torch.float64, device=device)
    return {
        "vector_add": (a, b),
        "swiglu": (a, b),
        "swiglu_backward": (a, b, c),
        "geglu": (a, b),
        "geglu_backward": (a, b, c),
        "rope": (heads, keys, angles.cos(), angles.sin(), places, True),
        "rope_backward": (heads, keys, angles.cos(), angles.sin(), None, False),
        "topk_softmax": (a, 3),
        "topk_softmax_backward": (b[..., :3], a, a.topk(3).indices, False),
        "adamw_step": ([a, b], [c, c], [b / 2, c], [c.abs(), a.abs()], 0.1, (0.9, 0.99), 1e-8, 0.01, 2),
        "rms_norm": (a, row, 1e-5),
        "rms_norm_backward": (a, b, row, 1e-5),
        "layer_norm": (a, row, b[0, 0], 1e-5),
        "layer_norm_backward": (a, b, row, None, 1e-5),
        "add_rms_norm": (a, b, row, 1e-5),
        "add_rms_norm_backward": (a, b, c, row, 1e-5),
        "quant_fp8": (a, 2),
        "rms_norm_quant": (a, row, 1e-5),
        "group_norm": (a, 3, column, b[0, :, 0], 1e-5),
        "group_norm_backward": (a, b, 3, column, None, 1e-5),
        "batch_norm": (a, column, b[0, :, 0], zeros, zeros + 1, 0.1, 1e-5),
        "batch_norm_backward": (a, b, column, None, b.mean((0, 2)).float(), 1e-5),
        "cross_entropy": (a, target, 0.1, 2, 0.01),
        "cross_entropy_backward": (b[..., 0], c[..., 0], a, target, torch.logsumexp(a, -1), 0.1, 2, 0.01),
    }[name]


@pytest.fixture(params=OPS)
def op(request):
    return OPS[request.param]


@pytest.fixture
def args(op, device):
    return sample(op.name.removeprefix("opkit::"), device)


def leaves(op, args):
    """Return the arguments, those that require gradients in double; others are written to, or constants."""
    constant = op._formula.non_differentiable
    return tuple(
        a.detach()
        .clone()
        .requires_grad_(a.dtype == torch.float64 and not p.mutated and p.name not in constant)
        if isinstance(a, Tensor)
        else a
        for a, p in zip(args, op.schema.params)
    )


def outputs(op, args):
    """What can be differentiated of what an op returns."""
    found = op(*args)
    found = (found,) if isinstance(found, Tensor) else tuple(found)
    return tuple(f for f in found if f.requires_grad)


def test_opcheck(op, args):
    torch.library.opcheck(op.overload, args)
    if op.name.removeprefix("opkit::") in WITH_GRADIENTS or not op.schema.results:
        torch.library.opcheck(op.overload, leaves(op, args))


@with_gradients
def test_gradients_of_both_orders_and_modes(op, args):
    given = leaves(op, args)
    count = len(outputs(op, given))
    assert count
    forward = not any(p.mutated for p in op.schema.params)  # tangents of what is overwritten would be lost

    def call(*args):
        found = op(*args)
        return (found,) if isinstance(found, Tensor) else tuple(found)[:count]

    assert torch.autograd.gradcheck(call, given, check_forward_ad=forward)
    assert torch.autograd.gradgradcheck(call, given, check_fwd_over_rev=forward)


@with_gradients
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_values_and_gradients_are_those_of_eager(op, args, compiler):
    def run(call):
        given = leaves(op, args)
        found = outputs(call, given)
        wanted = [g for g in given if isinstance(g, Tensor) and g.requires_grad]
        return found, torch.autograd.grad(sum(f.sin().sum() for f in found), wanted)

    torch._dynamo.reset()
    torch.testing.assert_close(
        run(torch.compile(lambda *args: op(*args), fullgraph=True, backend=compiler)), run(op)
    )


@with_results
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


@pytest.mark.parametrize("name", ["layer_norm", "group_norm", "batch_norm"])
def test_second_derivatives_for_a_bias(name):
    x, weight = torch.randn(4, 6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    others = {
        "layer_norm": ((), ()),
        "group_norm": ((2,), ()),
        "batch_norm": ((), (torch.zeros(6).double(), torch.ones(6).double())),
    }
    before, after = others[name]

    def loss(function, bias):
        copies = (t.clone() for t in after)
        return function(x, *before, weight, bias, *copies)[0].pow(4).sum()

    op, bias = getattr(opkit_kernels, name), torch.rand(6, dtype=torch.float64, requires_grad=True)
    found, expected = (
        torch.autograd.functional.hessian(functools.partial(loss, f), bias.detach())
        for f in (op, op.reference)
    )
    assert expected.diagonal().min() > 0
    torch.testing.assert_close(found, expected)
