"""opkit-jax: kernels and gradients that JAX compiles, on torch's tensors, without copies.

`opkit-plugin.toml` beside this file says which ops of opkit's it has kernels for, and names the functions here that
return them. `kernel` and `vjp` make kernels for ops of your own. JAX is imported when one is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["kernel", "rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward", "vjp"]


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a kernel for tensors on the CPU from a function of JAX arrays, which is compiled for every new shape.

    Example:
        >>> import torch, opkit_jax
        >>> twice = opkit_jax.kernel(lambda x, by: x * by)
        >>> twice(torch.ones(2), 2.0)
        tensor([2., 2.])

    Args:
        function: takes the op's arguments, in order, and returns an array or several. Tensors and floats arrive as
            arrays of JAX; ints, bools and texts as they are, and it is compiled for each value of them.
    """
    from opkit_jax import bridge

    return bridge.kernel(function)


def vjp(
    function: Callable[..., Any], argnums: int | Sequence[int] = 0, *, outputs: int = 1
) -> Callable[..., Any]:
    """Return the kernel of a backward op: it takes the gradients of the results of `function`, then its arguments.

    Example:
        >>> import torch, opkit_jax
        >>> backward = opkit_jax.vjp(lambda x: x**3)
        >>> backward(torch.ones(2), torch.tensor([1.0, 2.0]))
        tensor([ 3., 12.])

    Args:
        function: as for `kernel`.
        argnums: the arguments whose gradients are returned, as in `jax.grad`: one, or a tuple for several.
        outputs: how many results it has.
    """
    from opkit_jax import bridge

    return bridge.vjp(function, argnums, outputs=outputs)


def rms_norm() -> Callable[..., Any]:
    """Return the kernel of `opkit::rms_norm`."""
    from opkit_jax import functions

    return kernel(functions.rms_norm)


def rms_norm_backward() -> Callable[..., Any]:
    """Return the kernel of `opkit::rms_norm_backward`."""
    from opkit_jax import functions

    return vjp(functions.normalised, (0, 1))


def swiglu() -> Callable[..., Any]:
    """Return the kernel of `opkit::swiglu`."""
    from opkit_jax import functions

    return kernel(functions.swiglu)


def swiglu_backward() -> Callable[..., Any]:
    """Return the kernel of `opkit::swiglu_backward`."""
    from opkit_jax import functions

    return vjp(functions.swiglu, (0, 1))
