"""Samples: what is made from a declaration, and what is said where it does not say enough."""

from __future__ import annotations

import enum
from typing import Literal

import pytest
import torch
from torch import Tensor

import opkit
from opkit.testing import check, samples
from opkit.testing.arguments import shown

pytestmark = pytest.mark.usefixtures("registry")


class Mode(enum.Enum):
    UP = "up"
    DOWN = "down"


def full():
    """An op with a batch, an optional tensor, a bool, an enum, a size that is an argument, and two lists."""

    @opkit.op("s::full", shapes="*b n, n, [*s], [*s], n*k -> *b n")
    def full(
        x: Tensor, w: Tensor | None, xs: list[Tensor], ys: list[Tensor], long: Tensor, k: int, eps: float = 0.1,
        up: bool = True, mode: Mode = Mode.UP, kind: Literal["a", "b"] = "a",
    ) -> Tensor:  # fmt: skip
        return x * (1 if w is None else w) + sum((a * b).sum() for a, b in zip(xs, ys)) + long.sum() * eps

    return full


def by_name(op, **options):
    made, missing = samples.derived(op, **options)
    return {one.name: one for one in made}, {one.name: one.reason for one in missing}


def test_samples_have_sizes_dtypes_layouts_and_optionals():
    made, missing = by_name(full())
    assert missing == {}
    assert list(made) == [
        "small", "without w", "float64", "bfloat16", "float16", "transposed", "sliced", "expanded", "misaligned",
        "up=False", "mode=DOWN", "kind='b'", "sizes 1", "odd sizes", "sizes of 32", "an empty batch", "sizes 0",
        "large",
    ]  # fmt: skip
    shapes = {name: [tuple(a.shape) for a in one.args if isinstance(a, Tensor)] for name, one in made.items()}
    assert shapes["small"] == [(2, 5), (5,), (5,)]
    assert shapes["without w"] == [(2, 5), (5,)]
    assert shapes["sizes 1"] == [(1,), (1,), (1,)]
    assert shapes["odd sizes"] == [(3, 1, 7), (7,), (7,)]
    assert shapes["sizes of 32"] == [(4, 32), (32,), (64,)]
    assert shapes["an empty batch"] == [(0, 5), (5,), (5,)]
    assert shapes["sizes 0"][0] == (2, 0)
    assert 1 << 16 < made["large"].args[0].numel() < 1 << 18
    small = made["small"].args
    assert [a.shape for a in small[2]] == [b.shape for b in small[3]] == [(2,), (2, 2)]
    assert small[5:] == (1, 0.1, True, Mode.UP, "a")
    assert made["bfloat16"].args[0].dtype == torch.bfloat16
    assert made["transposed"].args[0].stride() == (1, 2)
    assert made["sliced"].args[0].stride() == (11, 2)
    assert made["expanded"].args[0].stride() == (0, 1)
    assert made["misaligned"].args[0].storage_offset() == 1
    assert made["mode=DOWN"].args[8] is Mode.DOWN


def test_the_numbers_are_the_same_each_time_and_differ_between_arguments():
    op = full()
    first, second = (by_name(op)[0]["small"].args for _ in range(2))
    assert first[0].equal(second[0])
    assert not first[1].equal(first[4])
    assert not first[2][0].equal(first[3][0])


def test_what_is_written_to_is_not_expanded_and_dims_that_are_stars_only_have_a_size():
    @opkit.op("s::add", shapes="*b, *b ->", mutates_args=("x",))
    def add(x: Tensor, y: Tensor) -> None:
        x += y

    made, _ = by_name(add)
    x, y = made["expanded"].args
    assert (x.stride(), y.stride()) == ((5, 1), (0, 1))
    assert made["an empty batch"].args[0].shape == (0, 5)


def test_dtypes_of_the_shape_line_annotations_and_kernels():
    @opkit.op("s::fixed", shapes="n:float64, n:x, m:bool -> n")
    def fixed(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return x + y

    made, _ = by_name(fixed)
    assert [a.dtype for a in made["small"].args] == [torch.float64, torch.float64, torch.bool]
    assert "bfloat16" not in made or made["bfloat16"].args[0].dtype == torch.float64
    declared = opkit.declare("s::declared(Tensor x) -> Tensor", shapes="n -> n")
    declared.register_kernel("cpu", lambda x: x + 1, dtypes=(torch.float32, torch.complex64))
    made, _ = by_name(declared)
    assert made["complex64"].args[0].dtype == torch.complex64
    assert "bfloat16" not in made


def test_what_the_reference_refuses_is_missing_with_the_reason():
    @opkit.op("s::even", shapes="n -> n")
    def even(x: Tensor) -> Tensor:
        if x.shape[0] % 2:
            raise ValueError(f"{x.shape[0]} is odd")
        return x + 1

    made, missing = by_name(even)
    assert list(made) == ["sizes of 32", "sizes 0"]
    assert missing["small"] == "the reference refuses it, ValueError: 5 is odd"
    report = check(even, checks=["results"])
    assert report.ok
    assert "inputs: small: the reference refuses it, ValueError: 5 is odd" in str(report)


def test_an_index_is_said_to_be_missing_and_how_to_give_it():
    @opkit.op("s::take", shapes="n, m:int64 -> m:x")
    def take(x: Tensor, index: Tensor) -> Tensor:
        return x[index]

    with pytest.raises(opkit.ArgumentError) as caught:
        check(take)
    assert str(caught.value) == (
        "making a call of s::take from its declaration: its argument index is of torch.int64, and nothing says which "
        "values it may have; expected a shape line over floating tensors, and defaults for the rest. Give calls: "
        "opkit.testing.check(take, samples=[(x, index)]), or once and for all a function that returns them: "
        "take.register_samples(function)."
    )
    sample = (torch.randn(5), torch.tensor([0, 4]))
    report = check(take, samples=[sample, (sample, {})], checks=["results"])
    assert [text.partition(":")[0] for text in report.inputs] == [
        "sample 0", "sample 1", "sample 0, float64", "sample 0, bfloat16", "sample 0, float16",
        "sample 0, transposed", "sample 0, sliced", "sample 0, expanded", "sample 0, misaligned",
    ]  # fmt: skip
    take.register_samples(lambda device: [(torch.randn(3, device=device), torch.tensor([2], device=device))])
    assert check(take, checks=["results"]).inputs[0] == "sample 0: x: float32[3], index: int64[1]"


def test_an_optional_index_is_left_out_and_said():
    @opkit.op("s::maybe", shapes="n, m:int64, n -> n")
    def maybe(x: Tensor, index: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        return x + 1

    made, missing = by_name(maybe)
    assert all(one.args[1] is None for one in made.values())
    assert missing == {
        "with index": "its argument index is of torch.int64, and nothing says which values it may have"
    }
    assert "without w" in made
    assert "inputs: with index: its argument index" in str(check(maybe, checks=["results"]))


@pytest.mark.parametrize(
    ("shapes", "lack"),
    [
        (None, "it has no shape line, which says what shapes its tensors have"),
        ("n -> n", "nothing says which values its argument how, a str, may have"),
    ],
)
def test_what_else_a_declaration_may_lack(shapes, lack):
    @opkit.op("s::lacks", shapes=shapes)
    def lacks(x: Tensor, how: str) -> Tensor:
        return x + 1

    with pytest.raises(opkit.ArgumentError, match=lack):
        check(lacks)


def test_samples_that_are_none_or_fail():
    @opkit.op("s::one", shapes="n -> n")
    def one(x: Tensor) -> Tensor:
        return x + 1

    with pytest.raises(
        opkit.ArgumentError, match=r"checking s::one: found no samples; expected at least one"
    ):
        check(one, samples=[])
    with pytest.raises(
        opkit.ArgumentError, match=r"checking s::one: cases is of type int; expected a list of tuples"
    ):
        check(one, samples=3)
    one.register_samples(lambda: 1 / 0)
    with pytest.raises(
        opkit.ArgumentError, match=r"register_samples failed with ZeroDivisionError.*Call it in Python"
    ):
        check(one)
    with pytest.raises(
        opkit.RegistrationError, match=r"registering samples of s::one: found 3; expected a function"
    ):
        one.register_samples(3)
    with pytest.raises(
        opkit.RegistrationError, match=r"with 2 arguments; expected a function of none, or of the dev"
    ):
        one.register_samples(lambda a, b: [])


def test_a_sample_of_given_sizes():
    op = opkit.get("opkit::topk_softmax")
    made = samples.sample(op, {"b": (2, 3), "n": 8, "k": 4}, dtype=torch.float64, layout="transposed")
    assert (made.args[0].shape, made.args[0].dtype, made.args[1]) == ((2, 3, 8), torch.float64, 4)
    assert not made.args[0].is_contiguous()
    with pytest.raises(
        opkit.ArgumentError, match=r"found a size for 'm'; expected some of n, k, b, the names in its"
    ):
        samples.sample(op, {"m": 3})
    with pytest.raises(
        opkit.ArgumentError, match=r"found the layout 'slice'; expected one of.*Did you mean 'sliced'"
    ):
        samples.sample(op, layout="slice")
    norm = opkit.get("opkit::layer_norm")
    assert samples.sample(norm, absent=["bias"]).args[2] is None


def test_arguments_are_shown_with_what_is_special_about_them():
    op = full()
    made, _ = by_name(op)
    values = op.schema.fill(*op.schema.carry(made["sliced"].args, made["sliced"].kwargs))
    assert shown(op, values) == (
        "x: float32[2, 5] strides (11, 2), w: float32[5] strides (2,), xs: [float32[2] strides (2,), float32[2, 2] "
        "strides (5, 2)], ys: [float32[2] strides (2,), float32[2, 2] strides (5, 2)], long: float32[5] strides (2,), "
        "k=1, eps=0.1, up=True, mode=<Mode.UP: 'up'>, kind='a'"
    )
    assert (
        shown(opkit.get("opkit::swiglu"), [torch.ones(3)[1:], None]) == "gate: float32[2] offset 1, up=None"
    )
