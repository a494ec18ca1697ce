"""opkit::adamw_step: against torch.optim.AdamW and float64, in place, and compiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import opkit
from opkit_kernels import adamw_step
from tests.kernels.kernel_cases import DTYPES, INTERPRETS, LAYOUTS, TOLERANCES, layout_name

# Parameters: a scalar, none, sizes off the vector width, and enough elements to go parallel.
SHAPES = ((), (0, 3), (7,), (3, 5), (2, 3, 65), (13, 9) if INTERPRETS else (130, 129))
OPTIONS = (1e-2, (0.8, 0.95), 1e-7, 0.1)


def lists(dtype, average, device, layout=lambda x: x, shapes=SHAPES) -> tuple[list[Tensor], ...]:
    """Return params, grads, exp_avgs and exp_avg_sqs; where layout is not contiguous, these lie differently."""

    def some(dtype, change=lambda x: x, laid=lambda x: x):
        found = [change(torch.randn(shape)).to(device, dtype) for shape in shapes]
        return [laid(x) if x.dim() else x for x in found]

    return some(dtype, laid=layout), some(dtype), some(average, laid=layout), some(average, torch.square)


def copies(tensors, dtype=None):
    return [x.detach().clone() if dtype is None else x.to(dtype) for x in tensors]


WRITABLE = [layout for layout in LAYOUTS if layout.__name__ != "expanded"]
KINDS = [(d, a) for d in DTYPES for a in {d, torch.promote_types(d, torch.float32)}]


@pytest.mark.parametrize("layout", WRITABLE, ids=layout_name)
@pytest.mark.parametrize(("dtype", "average"), KINDS, ids=lambda d: str(d).removeprefix("torch."))
def test_adamw_step_matches_float64(device, dtype, average, layout):
    given = lists(dtype, average, device, layout)
    exact = tuple(copies(one, torch.float64) for one in given)
    adamw_step(*given, *OPTIONS, 3)
    adamw_step.reference(*exact, *OPTIONS, 3)
    for name, found, wanted in zip(("param", "grad", "exp_avg", "exp_avg_sq"), given, exact, strict=True):
        for got, want in zip(found, wanted, strict=True):
            relative, absolute = TOLERANCES[got.dtype]
            torch.testing.assert_close(
                got.double(),
                want,
                rtol=relative,
                atol=absolute,
                msg=lambda text, name=name: f"{name}: {text}",
            )


@pytest.mark.parametrize(
    "options", [{}, {"foreach": True}, {"fused": True}], ids=["loop", "foreach", "fused"]
)
def test_adamw_step_is_that_of_torch(device, options):
    params, _, exp_avgs, exp_avg_sqs = lists(torch.float64, torch.float64, device)
    for x in (*exp_avgs, *exp_avg_sqs):
        x.zero_()
    theirs = copies(params)
    lr, betas, eps, weight_decay = OPTIONS
    optimizer = torch.optim.AdamW(theirs, lr, betas, eps, weight_decay, **options)
    for step in range(1, 6):
        grads = [torch.randn_like(p) for p in params]
        for p, grad in zip(theirs, grads, strict=True):
            p.grad = grad.clone()
        optimizer.step()
        adamw_step(params, grads, exp_avgs, exp_avg_sqs, *OPTIONS, step)
    torch.testing.assert_close(params, theirs, rtol=1e-12, atol=1e-12)
    for p, m, v in zip(theirs, exp_avgs, exp_avg_sqs, strict=True):
        torch.testing.assert_close(
            [m, v], [optimizer.state[p][n] for n in ("exp_avg", "exp_avg_sq")], rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_adamw_step_is_as_exact_as_torch(device, dtype):
    if INTERPRETS and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts digits off instead of rounding")
    shape = (200, 100)
    param, grad = torch.randn(shape).to(device, dtype), torch.randn(shape).to(device, dtype)
    ours, theirs, exact = param.clone(), param.clone(), param.double()
    for x, own in ((theirs, dtype), (exact, torch.float64)):
        x.grad = grad.to(own)
        torch.optim.AdamW([x], *OPTIONS).step()
    adamw_step([ours], [grad], [torch.zeros_like(grad)], [torch.zeros_like(grad)], *OPTIONS, 1)
    error, aten = ((x.double() - exact).square().mean().sqrt() for x in (ours, theirs))
    assert error <= aten


def test_adamw_step_without_parameters(device):
    adamw_step([], [], [], [], *OPTIONS, 1)


def test_adamw_step_of_many_parameters_of_all_kinds(device):
    """More than one launch on a GPU, and all its types in one call."""
    parts = [lists(*KINDS[i % len(KINDS)], device, shapes=((i % 5, 3),)) for i in range(200)]
    given = tuple([part[which][0] for part in parts] for which in range(4))
    expected = tuple(copies(one) for one in given)
    adamw_step(*given, *OPTIONS, 2)
    adamw_step.reference(*expected, *OPTIONS, 2)
    for found, wanted in zip(given, expected, strict=True):
        for got, want in zip(found, wanted, strict=True):
            relative, absolute = TOLERANCES[got.dtype]
            torch.testing.assert_close(got, want, rtol=2 * relative, atol=2 * absolute)


def test_adamw_step_passes_on_what_is_not_finite(device):
    inf, nan = float("inf"), float("nan")
    grads = torch.tensor([inf, -inf, nan, 0.0], device=device)
    param, m, v = torch.ones(4, device=device), torch.zeros(4, device=device), torch.zeros(4, device=device)
    expected = param.clone()
    expected.grad = grads.clone()
    torch.optim.AdamW([expected], *OPTIONS).step()
    adamw_step([param], [grads], [m], [v], *OPTIONS, 1)
    torch.testing.assert_close(param, expected, equal_nan=True)
    assert v[:2].tolist() == [inf, inf]


@pytest.mark.parametrize("count", [1, 30])
def test_adamw_step_reads_a_gradient_that_lies_in_a_parameter_as_it_was(device, count):
    memory = torch.randn(count, 6, device=device)
    averages = [[torch.zeros(3, device=device) for _ in range(count)] for _ in range(4)]
    apart = list(memory[:, :3].clone()), list(memory[:, 2:5].clone())
    together = list(memory[:, :3]), list(memory[:, 2:5])
    adamw_step(*apart, *averages[:2], *OPTIONS, 1)
    adamw_step(*together, *averages[2:], *OPTIONS, 1)
    assert all(map(torch.equal, together[0], apart[0]))


def test_adamw_step_is_deterministic(device):
    before = torch.get_num_threads()
    given = lists(torch.float32, torch.float32, device)
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            own = tuple(copies(one) for one in given)
            adamw_step(*own, *OPTIONS, 4)
            found.append([x for one in own for x in one])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_adamw_step_tells_autograd_what_it_wrote(device):
    (param,), *rest = lists(torch.float32, torch.float32, device, shapes=((3,),))
    versions = [param._version, rest[0][0]._version]
    adamw_step([param], *rest, *OPTIONS, 1)
    assert param._version > versions[0]
    assert rest[0][0]._version == versions[1]
    weight = torch.ones(3, device=device, requires_grad=True)
    with pytest.raises(
        opkit.GradientError, match=r"argument params requires grad and is overwritten.*no_grad"
    ):
        adamw_step([weight], *rest, *OPTIONS, 1)
    with torch.no_grad():
        adamw_step([weight], *rest, *OPTIONS, 1)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_adamw_step_compiles_once_for_all_steps(device, compiler):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend(compiler)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda given, step: adamw_step(*given, 1e-2, (0.8, 0.95), 1e-7, 0.1, step),
        backend=counter,
        fullgraph=True,
        dynamic=True,
    )
    given = lists(torch.float32, torch.float32, device, shapes=((3, 5), (7,)))
    expected = tuple(copies(one) for one in given)
    for step in (2, 3, 4, 5):
        compiled(given, step)
        adamw_step(*expected, *OPTIONS, step)
    for found, wanted in zip(given, expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert counter.frame_count == 1


def test_adamw_step_refuses_before_it_writes(device):
    good = lists(torch.float32, torch.float32, device, shapes=((3,), (4,)))
    before = [copies(one) for one in good]
    for index, bad, error, text in (
        (
            2,
            torch.zeros(4, device=device).double(),
            (opkit.DtypeError, RuntimeError),
            r"exp_avgs\[1\] is .*float64",
        ),
        (1, torch.zeros(4, device=device).half(), opkit.DtypeError, r"grads\[1\]"),
        (1, torch.zeros(5, device=device), opkit.ShapeError, r"grads\[1\]"),
    ):
        given = [[*one] for one in good]
        given[index][1] = bad
        if index == 2:
            given[3][1] = bad.clone()
        with pytest.raises(error, match=text):
            adamw_step(*given, *OPTIONS, 1)
    with pytest.raises(opkit.ShapeError, match="grads has 1 tensors, params has 2"):
        adamw_step(good[0], good[1][:1], *good[2:], *OPTIONS, 1)
    with pytest.raises(RuntimeError, match=r"step is 0.*, expected 1 or more"):
        adamw_step(*good, *OPTIONS, 0)
    for found, wanted in zip(good, before, strict=True):
        assert all(map(torch.equal, found, wanted))
