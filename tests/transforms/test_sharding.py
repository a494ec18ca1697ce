from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import Tensor

import opkit

pytestmark = [
    pytest.mark.usefixtures("registry"),
    pytest.mark.skipif(
        not torch.distributed.is_available(), reason="torch is built without torch.distributed"
    ),
]

# Run in two processes, with the ops of each case; `check` compares with the same call on whole tensors.
OPS = """
import sys, torch, opkit
from torch import Tensor

assert "torch.distributed.tensor" not in sys.modules  # the rules must reach it when it comes

@opkit.op("t::norm", shapes="*b n, n, n -> *b n:x, *b 1:float64")
def norm(x: Tensor, eps: float = 1e-6, *, w: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
    rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return x * rstd * w, rstd

norm.register_autograd(opkit.from_reference)

@opkit.op("t::share", shapes="*b -> *b")
def share(x: Tensor) -> Tensor:
    return x / x.sum()

@opkit.op("t::product", shapes="*b m k, k n -> *b m n")
def product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b

product.register_sharding(dims=["m", "n"])

@opkit.op("t::softmax", shapes="n m -> n m")
def softmax(x: Tensor) -> Tensor:
    return x.softmax(-1)

@opkit.op("t::cast", shapes="*b -> *b:dtype")
def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype)

@opkit.op("t::several")
def several(items: list[Tensor], k: float = 2.0, other: Tensor | None = None) -> Tensor:
    return sum(items) * k + (0 if other is None else other)

several.register_fake(lambda items, k, other: torch.empty_like(items[0]))

@opkit.op("t::join", shapes="[*b n], *b m -> *b m")
def join(items: list[Tensor], x: Tensor) -> Tensor:
    return x + torch.stack(items).sum((0, -1))[..., None]

@opkit.op("t::mul_", shapes="*b -> ", mutates_args=("x",))
def mul_(x: Tensor) -> None:
    x.mul_(2)

seen = []

@several.register_sharding
def rule(items, k, other):
    from torch.distributed.tensor import Replicate, Shard
    seen.append((len(items), k, other))
    ndim = items[0].ndim
    return [
        ([Shard(i)], [[Shard(i)] * len(items), None, None if other is None else Shard(i)]) for i in range(ndim)
    ] + [([Replicate()], [Replicate(), None, Replicate()])]

import torch.distributed as dist

rank, port = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"tcp://127.0.0.1:{port}")
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
X, W = torch.randn(4, 2, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)

def put(tensor, placement):
    return distribute_tensor(tensor, mesh, [placement])

def check(found, expected, placements):
    found, expected = (v if isinstance(v, tuple) else (v,) for v in (found, expected))
    assert [f.placements[0] for f in found] == list(placements), [f.placements for f in found]
    for one, other in zip(found, expected):
        torch.testing.assert_close(one.full_tensor(), other)

R, S = Replicate(), Shard
"""

CASES = """
# The batch of the shape line is split, the rest replicated; keyword-only tensors too (pytorch#167977).
expected = norm.reference(X, w=W)
for where, then in ((S(0), S(0)), (S(1), S(1)), (S(2), R), (R, R)):
    check(norm(put(X, where), w=put(W, R)), expected, [then, then])
try:
    norm(put(X, S(0)), w=put(W, S(0)))
except opkit.NoKernelError as err:
    assert "keyword-only argument w is placed (Shard(dim=0),), which the op cannot work on" in str(err), err
    assert "Write w.redistribute(placements=[Replicate()])" in str(err), err
else:
    raise AssertionError("w was not moved")

# Gradients.
x, w = put(X, S(0)).requires_grad_(), put(W, R).requires_grad_()
y, rstd = norm(x, w=w)
(y.sin().sum() + rstd.sum()).backward()
a, b = X.clone().requires_grad_(), W.clone().requires_grad_()
y, rstd = norm.reference(a, w=b)
(y.sin().sum() + rstd.sum()).backward()
torch.testing.assert_close(x.grad.full_tensor(), a.grad)
torch.testing.assert_close(w.grad.full_tensor(), b.grad)

# A preference in a compiled function is another overload.
@torch.compile(fullgraph=True, backend="aot_eager")
def run(x, w):
    with opkit.use_backend("reference"):
        return norm(x, w=w)
check(run(put(X, S(0)), put(W, R)), expected, [S(0), S(0)])

# A line that only looks like a batch is found out.
try:
    share(put(X, S(0)))
except RuntimeError as err:  # which torch makes of it
    assert "sharding t::share: its shape line lets DTensor split tensors along '*b'" in str(err), err
else:
    raise AssertionError("share was split")

# Dimensions that the author names, beside the batch.
B = torch.randn(6, 8, dtype=torch.float64)
for left, right, then in ((S(0), R, S(0)), (S(1), R, S(1)), (R, S(1), S(2))):
    check(product(put(X, left), put(B, right)), X @ B, [then])

# Other dimensions are not touched.
check(softmax(put(B, S(1))), B.softmax(-1), [R])

# What DTensor remembers depends on every argument.
assert cast(put(X, S(0)), torch.float32).dtype == torch.float32
assert cast(put(X, S(0)), torch.int64).dtype == torch.int64

# Lists in the shape line.
check(join([put(X, S(0)), put(X, R)], put(X, S(0))), join.reference([X, X], X), [S(0)])

# A function; lists and optionals.
check(several([put(X, S(1)), put(X, S(1))]), several.reference([X, X]), [S(1)])
check(several([put(X, S(0))], 3.0, put(X, S(0))), several.reference([X], 3.0, X), [S(0)])
assert seen[0][:2] == (2, 2.0) and seen[0][2] is None, seen
assert seen[-1][:2] == (1, 3.0) and seen[-1][2] is not None

# A rule that is registered again takes the place of what DTensor remembers.
@several.register_sharding
def replicated(items, k, other):
    return [([R], [R, None, R])]
check(several([put(X, S(1)), put(X, S(1))]), several.reference([X, X]), [R])

# Mutation is refused, by torch.
try:
    mul_(put(X, S(0)))
except NotImplementedError as err:
    assert "t.mul_" in str(err)
else:
    raise AssertionError("mul_ was called")

from opkit import _registry
from torch.distributed.tensor import DTensor
before = len(DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs)
overload = softmax.overload
_registry.remove("t::softmax")
assert overload not in DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs

dist.barrier()
dist.destroy_process_group()
print("done")
"""


def free_port():
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_pytorch_167977_ops_on_dtensors_in_two_processes(tmp_path):
    program = tmp_path / "ranks.py"
    program.write_text(OPS + CASES)
    port = str(free_port())
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(program), str(rank), port], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        results = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for out, err in results:
        assert out.strip().endswith("done"), err[-3000:]


def test_rules_wait_for_dtensor_and_the_wait_ends():
    code = """
        import sys, opkit, torch
        from torch import Tensor
        finders = len(sys.meta_path)
        @opkit.op("t::f", shapes="*b -> *b")
        def f(x: Tensor) -> Tensor: return x * 1
        @opkit.op("t::g", shapes="*b -> *b")
        def g(x: Tensor) -> Tensor: return x * 1
        loaded = "torch.distributed.tensor" in sys.modules
        import torch.distributed.tensor as dtensor
        rules = dtensor.DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs
        print(loaded, len(sys.meta_path) == finders, {f.overload, g.overload} <= set(rules))
        @opkit.op("t::h", shapes="*b -> *b")
        def h(x: Tensor) -> Tensor: return x * 1
        print(h.overload in rules, len(sys.meta_path) == finders)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert run.stdout.split() == ["False", "True", "True", "True", "True"], run.stderr


# ---------------------------------------------------------------- refusals


@pytest.fixture
def product():
    @opkit.op("t::product", shapes="*b m k, k n -> *b m n")
    def product(a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    return product


@pytest.mark.parametrize(
    ("dims", "text"),
    [
        (["q"], "found dims= with 'q'; expected one of k, m, n. Name dimensions"),
        ("k", "found dims= with 'k', which out does not have; expected a dimension of every result"),
    ],
)
def test_dimension_that_cannot_be_split_is_refused(product, dims, text):
    with pytest.raises(opkit.RegistrationError, match=f"registering a sharding rule of t::product: {text}"):
        product.register_sharding(dims=dims)


def test_dimension_that_something_depends_on_is_refused():
    @opkit.op("t::f", shapes="n, m m -> n m 2*n")
    def f(x: Tensor, y: Tensor) -> Tensor:
        return torch.ones(len(x), len(y), 2 * len(x))

    for name in "nm":
        with pytest.raises(
            opkit.RegistrationError, match=f"dims= with '{name}', of which a rank would see a part"
        ):
            f.register_sharding(dims=name)


def test_rule_that_does_not_fit_is_refused(product):
    for rule, text in (
        (lambda x: [], r"found .*lambda.* with the signature \(x\); expected the op's arguments \(a, b\)"),
        (3, "found 3; expected a function of the op's arguments"),
    ):
        with pytest.raises(opkit.RegistrationError, match=text):
            product.register_sharding(rule)
    with pytest.raises(opkit.RegistrationError, match="found a function and dims=; expected one of them"):
        product.register_sharding(lambda a, b: [], dims="m")


def test_op_that_dtensor_cannot_take_is_refused():
    @opkit.op("t::f_", shapes="*b -> ", mutates_args=("x",))
    def f_(x: Tensor) -> None:
        x.mul_(2)

    with pytest.raises(
        opkit.RegistrationError, match="found an op that mutates x; expected .* redistributed copy"
    ):
        f_.register_sharding(lambda x: [])

    @opkit.op("t::noise", shapes="*b n -> *b n", tags=[torch.Tag.nondeterministic_seeded])
    def noise(x: Tensor) -> Tensor:
        return torch.rand_like(x)

    with pytest.raises(opkit.RegistrationError, match="found an op that draws random numbers, or has lists"):
        noise.register_sharding(dims="n")

    @opkit.op("t::plain")
    def plain(x: Tensor) -> Tensor:
        return x * 1

    with pytest.raises(opkit.RegistrationError, match="found dims= for an op without a shape line"):
        plain.register_sharding(dims="n")


def test_rule_that_gives_another_number_of_placements_is_reported(product):
    product.register_sharding(lambda a, b: [([None], [None])])
    with pytest.raises(
        opkit.RegistrationError, match="sharding t::product: its rule gave 1 placements of arguments; exp"
    ):
        product._sharding.strategies(torch.ones(1), torch.ones(1))
