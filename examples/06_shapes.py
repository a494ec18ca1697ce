"""What this teaches: the shape line, and all that follows from it.

One line says which sizes go in and which come out. opkit checks calls by it, tells torch.compile and the meta device
what an op returns, derives vmap, and has native kernels allocate their outputs by it. Nobody writes a meta function.
"""

import torch
from torch import Tensor

import opkit


def refused(call: object) -> str:
    """Return the first sentence of what a call is refused with."""
    try:
        call()  # type: ignore[operator]
    except opkit.OpkitError as error:
        return str(error).split(". ")[0]
    raise AssertionError("the call was not refused")


# The same name is the same size. *b stands for any dimensions, alike wherever it appears.
@opkit.op("demo::attend", shapes="*b q d, *b k d, *b k e -> *b q e")
def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return the values, weighted by how well their keys fit each query."""
    return torch.softmax(query @ key.mT / query.shape[-1] ** 0.5, -1) @ value


# Sizes are computed, from each other and from int arguments. A suffix is the dtype of an entry.
@opkit.op("demo::windows", shapes="*b n -> *b n-w+1 w, *b n-w+1:float64")
def windows(x: Tensor, w: int) -> tuple[Tensor, Tensor]:
    """Return all windows of w elements, and their sums."""
    found = x.unfold(-1, w, 1).clone()
    return found, found.double().sum(-1)


# ?m is a size that only the data tells, here at most n: under torch.compile it is an unbacked symbol.
@opkit.op("demo::positions", shapes="n -> ?m<=n:int64")
def positions(x: Tensor) -> Tensor:
    """Return where x is positive."""
    return (x > 0).nonzero().flatten()


# A list of tensors of different shapes: [*s] stands for the shape of each, in every entry alike.
@opkit.op("demo::scale_all", shapes="[*s] -> [*s]")
def scale_all(tensors: list[Tensor], factor: float) -> list[Tensor]:
    """Multiply every tensor of a list."""
    return [tensor * factor for tensor in tensors]


def main() -> None:
    """Use the shape lines for everything that they are good for."""
    query, key, value = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 4)
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(attend(query, key, value), exact)

    # Calls are checked, in the words of the declaration.
    print(f"refused: {refused(lambda: attend(query, key[..., :6], value))}")
    print(f"refused: {refused(lambda: windows(torch.ones(4), 9))}")

    # On the meta device nothing is computed, and the sizes are there all the same.
    assert attend(query.to("meta"), key.to("meta"), value.to("meta")).shape == (2, 3, 5, 4)
    found, sums = windows(torch.empty(10, 100, device="meta"), 8)
    assert (found.shape, sums.shape, sums.dtype) == ((10, 93, 8), (10, 93), torch.float64)
    print("meta: 10 rows of 100 have 93 windows of 8 each")

    # vmap follows from *b: the mapped dimension is one more of them, and the kernel is called once.
    looped = torch.stack([attend(*one) for one in zip(query, key, value, strict=True)])
    torch.testing.assert_close(torch.vmap(attend)(query, key, value), looped)
    print("vmap: one call for all samples")

    # torch.compile needs one graph for all sizes, and gets by with sizes that nobody knows before.
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(lambda x: positions(x) * 2, fullgraph=True, dynamic=True, backend=count)
    for size in (3, 30, 300):
        x = torch.randn(size)
        assert torch.equal(compiled(x), 2 * (x > 0).nonzero().flatten())
    assert graphs == 1
    print("compiled: 1 graph for 3 sizes, of which each result has another one")

    assert [t.shape for t in scale_all([torch.ones(2, 3), torch.ones(())], 2.0)] == [(2, 3), ()]
    print(f"the whole declaration: {scale_all.schema}")


if __name__ == "__main__":
    main()
