"""What is replaced in torch meanwhile is named; what torch does to itself is not."""

from __future__ import annotations

import pytest
import torch

from opkit.plugins.patches import Patches, undeclared


def other(*args):
    return args


REPLACED = {
    "torch.relu": (torch, "relu", other),
    "torch.sigmoid": (torch, "sigmoid", torch.nn.functional.gelu),  # by another of torch's own
    "torch.nn.functional.silu": (torch.nn.functional, "silu", other),
    "torch.nn.Module.to": (torch.nn.Module, "to", other),
    "torch.nn.Linear": (torch.nn, "Linear", type("Linear", (), {})),
    "torch.serialization.save": (torch.serialization, "save", other),
    "torch.Tensor.is_npu": (torch.Tensor, "is_npu", property(other)),
    "torch.Tensor.npu": (torch.Tensor, "npu", other),
    "torch.utils.data.DataLoader.__iter__": (torch.utils.data.DataLoader, "__iter__", other),
}


@pytest.mark.parametrize("name", REPLACED)
def test_what_is_replaced_or_added_is_named(monkeypatch, name):
    owner, attribute, value = REPLACED[name]
    patches = Patches()
    monkeypatch.setattr(owner, attribute, value, raising=False)
    assert patches.found() == [name]
    monkeypatch.undo()
    assert patches.found() == []


def test_what_is_removed_is_named(monkeypatch):
    patches = Patches()
    monkeypatch.delattr(torch.nn.Module, "cuda")
    assert patches.found() == ["torch.nn.Module.cuda"]


def test_a_custom_op_that_takes_the_place_of_another_is_named():
    def make():
        @torch.library.custom_op("site_custom::f", mutates_args=())
        def f(x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        return f

    first = make()
    patches = Patches()
    assert patches.found() == []
    second = make()
    assert patches.found() == ["torch.ops.site_custom.f"]
    assert first is not second


def test_data_is_left_out(monkeypatch):
    patches = Patches()
    monkeypatch.setattr(torch, "__version__", "0")
    monkeypatch.setattr(torch, "note", "of somebody", raising=False)
    assert patches.found() == []


def test_what_follows_the_default_dtype_is_no_patch():
    patches = Patches()
    torch.set_default_dtype(torch.float64)
    try:
        assert patches.found() == []
    finally:
        torch.set_default_dtype(torch.float32)


def test_torch_is_not_blamed_for_what_it_does_to_itself(site):
    printed = site.run("""
        import torch
        from opkit.plugins.patches import Patches
        patches = Patches()
        import torch._dynamo, torch._inductor.compile_fx, torch.distributed.tensor, torch.export, torch.onnx
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
        print(patches.found())
    """)
    assert printed == "[]\n"


def test_a_declared_module_covers_what_is_in_it():
    found = ["torch.nn.Module.to", "torch.nnx.f", "torch.save"]
    assert undeclared(found, []) == found
    assert undeclared(found, ["torch.nn"]) == ["torch.nnx.f", "torch.save"]
    assert undeclared(found, ["torch.nn.Module.to", "torch.save", "torch.nnx"]) == []
