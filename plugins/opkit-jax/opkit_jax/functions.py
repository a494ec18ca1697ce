"""The forward computations, as functions of JAX arrays. Their gradients are JAX's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def rms_norm(x: Array, weight: Array, eps: float = 1e-6) -> tuple[Array, Array]:
    """y = x rstd weight and rstd = 1 / sqrt(mean(x^2) + eps), over the last dimension."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    rstd = jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)
    return (wide * rstd * weight.astype(wide.dtype)).astype(x.dtype), rstd.astype(jnp.float32)


def normalised(x: Array, weight: Array, eps: float = 1e-6) -> Array:
    """The y of `rms_norm`, which alone has a gradient."""
    return rms_norm(x, weight, eps)[0]


def swiglu(gate: Array, up: Array) -> Array:
    """y = gate sigmoid(gate) up, element by element."""
    wide = jnp.promote_types(gate.dtype, jnp.float32)
    return (jax.nn.silu(gate.astype(wide)) * up.astype(wide)).astype(gate.dtype)
