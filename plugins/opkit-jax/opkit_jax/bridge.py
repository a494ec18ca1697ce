"""From torch's tensors to JAX's arrays and back, through DLPack: both sides look at the same memory.

- A strided input is made contiguous first, as XLA takes no gaps; one that does not begin at a multiple of XLA's
  alignment is copied by JAX.
- JAX computes in the background. A kernel waits for the result: what it was given belongs to the caller again.
- JAX narrows 64 bits to 32 unless told otherwise; it is told so for calls with tensors of 64 bits, and for them alone.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import torch
from torch import Tensor

_WIDE = (torch.float64, torch.int64, torch.uint64, torch.complex128)


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a kernel that runs `function`, compiled; `opkit_jax.kernel` says more."""

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def run(structure: Any, fixed: tuple[Any, ...], *arrays: jax.Array) -> Any:
        given = iter(arrays)
        leaves = [next(given) if value is _ARRAY else value for value in fixed]
        args, kwargs = jax.tree.unflatten(structure, leaves)
        return function(*args, **kwargs)

    @functools.wraps(function)
    def launch(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = jax.tree.flatten((args, kwargs))
        with _wide() if any(_is_wide(leaf) for leaf in leaves) else contextlib.nullcontext():
            arrays = [_array(leaf) for leaf in leaves if _is_array(leaf)]
            fixed = tuple(_ARRAY if _is_array(leaf) else leaf for leaf in leaves)
            found = jax.block_until_ready(run(structure, fixed, *arrays))
        return jax.tree.map(torch.from_dlpack, found)

    return launch


def vjp(function: Callable[..., Any], argnums: int | Sequence[int], *, outputs: int) -> Callable[..., Any]:
    """Return a kernel that pulls gradients back through `function`; `opkit_jax.vjp` says more."""
    chosen = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    def backward(*arguments: Any, **kwargs: Any) -> Any:
        grads, given = arguments[:outputs], list(arguments[outputs:])

        def of_chosen(*values: jax.Array) -> Any:
            for index, value in zip(chosen, values, strict=True):
                given[index] = value
            return function(*given, **kwargs)

        results, pull = jax.vjp(of_chosen, *[given[index] for index in chosen])
        found = pull(jax.tree.unflatten(jax.tree.structure(results), grads))
        return found[0] if isinstance(argnums, int) else found

    backward.__name__ = f"{getattr(function, '__name__', 'function')}_vjp"
    return kernel(backward)


class _Array:
    """Stands for an array among the arguments that a function is compiled for."""


_ARRAY = _Array()


def _is_array(value: Any) -> bool:
    return isinstance(value, (Tensor, float))


def _is_wide(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in _WIDE


def _array(value: Any) -> Any:
    if isinstance(value, float):
        return value
    return jax.dlpack.from_dlpack(value.detach().resolve_conj().resolve_neg().contiguous())


def _wide() -> contextlib.AbstractContextManager[Any]:
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64  # of JAX 0.6, the last for Python 3.10

    return enable_x64(True)
