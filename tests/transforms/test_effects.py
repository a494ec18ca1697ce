from __future__ import annotations

import pytest
import torch
from torch import Tensor

import opkit

pytestmark = pytest.mark.usefixtures("registry")

X = torch.ones(3)


@pytest.fixture
def log():
    return []


@pytest.fixture
def note(log):
    @opkit.op("t::note", shapes="*b -> *b", effects=True)
    def note(x: Tensor, word: str) -> Tensor:
        log.append(word)
        return x * 2

    return note


@pytest.fixture
def mark(log):
    @opkit.op("t::mark", shapes="*b -> ", effects=True)
    def mark(x: Tensor, word: str) -> None:
        log.append(word)

    return mark


class Model(torch.nn.Module):
    def __init__(self, note, mark):
        super().__init__()
        self.note, self.mark = note, mark

    def forward(self, x):
        self.note(x, "a")
        y = self.note(x + 1, "b")
        self.mark(y, "c")
        self.note(x, "d")
        return y.sin()


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_code_keeps_every_call_in_order(note, mark, log, backend):
    model = Model(note, mark)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend=backend)(X), model.forward(X))
    assert log == ["a", "b", "c", "d"] * 2


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_gradients_in_compiled_code(note, mark, log, backend):
    note.register_autograd(lambda ctx, grad: (grad * 2, None))
    x = X.clone().requires_grad_()
    torch.compile(Model(note, mark), fullgraph=True, backend=backend)(x).sum().backward()
    assert log == ["a", "b", "c", "d"]
    torch.testing.assert_close(x.grad, 2 * ((X + 1) * 2).cos())


def test_preferred_backend_in_compiled_code(note, mark, log):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x):
        with opkit.use_backend("reference"):
            note(x, "a")
        return x + 1

    run(X)
    assert log == ["a"]


def test_exported_program_keeps_every_call(note, mark, log):
    program = torch.export.export(Model(note, mark), (X,))
    for _ in range(2):
        log.clear()
        program.module()(X)
        assert log == ["a", "b", "c", "d"]
        program = program.run_decompositions()


def test_without_the_word_calls_may_go(log):
    @opkit.op("t::quiet", shapes="*b -> *b")
    def quiet(x: Tensor) -> Tensor:
        log.append("a")
        return x * 2

    def run(x):
        quiet(x)
        return x + 1

    torch.compile(run, fullgraph=True, backend="aot_eager")(X)
    assert log == []


def test_vmap_calls_once_per_sample(note, log):
    torch.testing.assert_close(torch.vmap(lambda x: note(x, "a"))(torch.ones(3, 2)), torch.full((3, 2), 2.0))
    assert log == ["a"] * 3


def test_redefinition_without_effects_has_none():
    for effects in (True, False):
        seen = []

        @opkit.op("t::f", shapes="n -> n", effects=effects)
        def f(x: Tensor) -> Tensor:
            seen.append(1)
            return x * 1

        torch.compile(lambda x: (f(x), x + 1)[1], fullgraph=True, backend="aot_eager")(X)
        assert bool(seen) == effects


def test_effects_and_mutation_are_refused():
    def f(x: Tensor) -> None:
        x.mul_(2)

    with pytest.raises(
        opkit.RegistrationError, match="declaring t::f: found effects=True for an op that mutates x; expected"
    ):
        opkit.op("t::f", mutates_args=("x",), effects=True)(f)


def test_reference_with_effects_is_no_formula(note):
    with pytest.raises(
        opkit.RegistrationError, match="the gradient of t::note: found from_reference for an op with eff"
    ):
        note.register_autograd(opkit.from_reference)
