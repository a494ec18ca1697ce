"""opkit_kernels.nn: each module beside torch.nn's, with its state."""

from __future__ import annotations

import copy

import pytest
import torch

import opkit_kernels.nn

# Name, arguments of the module, shape of x.
CASES = [
    ("RMSNorm", (5,), {}, (3, 5)),
    ("RMSNorm", ((4, 5),), {"eps": 1e-3}, (3, 4, 5)),
    ("RMSNorm", (5,), {"elementwise_affine": False}, (2, 3, 5)),
    ("LayerNorm", (5,), {}, (3, 5)),
    ("LayerNorm", ((4, 5),), {"bias": False}, (3, 4, 5)),
    ("LayerNorm", (5,), {"elementwise_affine": False}, (2, 3, 5)),
    ("GroupNorm", (2, 4), {}, (3, 4, 5, 6)),
    ("GroupNorm", (2, 4), {"affine": False}, (3, 4)),
    ("BatchNorm1d", (4,), {}, (3, 4)),
    ("BatchNorm1d", (4,), {"momentum": None}, (3, 4, 5)),
    ("BatchNorm2d", (4,), {"affine": False}, (3, 4, 5, 6)),
    ("BatchNorm3d", (4,), {"track_running_stats": False}, (3, 4, 2, 5, 6)),
    ("InstanceNorm1d", (4,), {"affine": True}, (3, 4, 5)),
    ("InstanceNorm1d", (4,), {}, (4, 5)),
    ("InstanceNorm2d", (4,), {"affine": True, "track_running_stats": True}, (3, 4, 5, 6)),
    ("InstanceNorm3d", (4,), {}, (3, 4, 2, 5, 6)),
]


def twins(name, args, kwargs):
    """Return torch's module with random state, and ours that has loaded it."""
    theirs = getattr(torch.nn, name)(*args, **kwargs)
    for value in [*theirs.parameters(), *theirs.buffers()]:
        if value.is_floating_point():
            torch.nn.init.uniform_(value, 0.5, 1.5)
    ours = getattr(opkit_kernels.nn, name)(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("name", "args", "kwargs", "shape"), CASES, ids=str)
def test_module_is_as_torch_has_it(name, args, kwargs, shape, training):
    torch.manual_seed(0)
    modules = [m.train(training) for m in twins(name, args, kwargs)]
    assert isinstance(modules[1], type(modules[0]))
    assert repr(modules[0]) == repr(modules[1])
    found = []
    for module in modules:
        torch.manual_seed(1)
        for _ in range(2):
            x = torch.randn(shape, requires_grad=True)
            y = module(x)
            wanted = [x, *module.parameters()]
            grads = torch.autograd.grad(y, wanted, torch.randn(shape))
        found.append(([y, *grads], module.state_dict()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_rms_norm_takes_eps_of_the_dtype_as_torch_does(dtype):
    x = torch.randn(3, 5).to(dtype) * 1e-3
    theirs, ours = torch.nn.RMSNorm(5, dtype=dtype), opkit_kernels.nn.RMSNorm(5, dtype=dtype)
    torch.testing.assert_close(ours(x), theirs(x), rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "InstanceNorm1d", "InstanceNorm2d"]
)
def test_module_refuses_other_numbers_of_dimensions(name):
    with pytest.raises(ValueError, match="expected .* dimensions. Use the module"):
        getattr(opkit_kernels.nn, name)(4)(torch.ones(1, 4, 2, 2, 2, 2))


def test_layer_norm_refuses_another_shape():
    with pytest.raises(ValueError, match=r"last dimensions \(4, 5\): found x of shape \(3, 5\)"):
        opkit_kernels.nn.LayerNorm((4, 5))(torch.ones(3, 5))


def test_batch_norm_refuses_one_value_per_channel():
    module = opkit_kernels.nn.BatchNorm1d(4)
    with pytest.raises(ValueError, match="one value per channel"):
        module(torch.ones(1, 4))
    assert module.eval()(torch.ones(1, 4)).shape == (1, 4)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (3, 5, 2, 4)], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_loss_is_as_torch_has_it(shape, reduction, smoothing):
    torch.manual_seed(0)
    classes = shape[0] if len(shape) == 1 else shape[1]
    target = torch.randint(classes, shape[:1] + shape[2:] if len(shape) > 1 else ())
    if target.dim():
        target.view(-1)[0] = -100
    kwargs = {"reduction": reduction, "label_smoothing": smoothing}
    found = []
    for module in (torch.nn.CrossEntropyLoss(**kwargs), opkit_kernels.nn.CrossEntropyLoss(**kwargs)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1), requires_grad=True)
        loss = module(x, target)
        found.append([loss, *torch.autograd.grad(loss.sum(), x)])
    torch.testing.assert_close(found[1], found[0])


def test_cross_entropy_loss_leaves_weights_and_probabilities_to_torch():
    x, target = torch.randn(3, 5), torch.randn(3, 5).softmax(-1)
    torch.testing.assert_close(
        opkit_kernels.nn.CrossEntropyLoss()(x, target), torch.nn.CrossEntropyLoss()(x, target)
    )
    weight = torch.rand(5)
    torch.testing.assert_close(
        opkit_kernels.nn.CrossEntropyLoss(weight)(x, target.argmax(-1)),
        torch.nn.CrossEntropyLoss(weight)(x, target.argmax(-1)),
    )


def test_modules_are_copied_and_compiled():
    module = copy.deepcopy(opkit_kernels.nn.LayerNorm(8))
    x = torch.randn(3, 8)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
