"""Which distribution has a kernel that an op lacks on a device: one that is installed and left out, or one of opkit's.

Nothing here imports a plugin, or asks an index of packages: of what is not installed, only opkit's own plugins are
known.
"""

from __future__ import annotations

from opkit.plugins import loader

_FLOATS = ("float32", "float64")
_OPS = ("opkit::rms_norm", "opkit::rms_norm_backward", "opkit::swiglu", "opkit::swiglu_backward")
# opkit's own plugins with kernels for the CPU, in the order in which to try them, and the dtypes that these take.
OWN: dict[str, dict[str, tuple[str, ...]]] = {
    "opkit-numba": dict.fromkeys(_OPS, _FLOATS),
    "opkit-tvm-ffi": dict.fromkeys(_OPS, (*_FLOATS, "bfloat16")),
    "opkit-jax": dict.fromkeys(_OPS, (*_FLOATS, "bfloat16", "float16")),
}


def for_op(op: str, device: str, dtype: str | None, *, lone: bool = False) -> str:
    """Return who has a kernel of an op for a device and a dtype, and how to come by it; nothing where nobody has.

    Args:
        op: its name.
        device: the device type.
        dtype: of the first tensor, without `torch.`; None names nobody whose kernels are for some dtypes.
        lone: whether the op has no kernel at all: then only plugins count that the user did not leave out.
    """
    for state in loader.states():
        known = state.is_out and state.manifest is not None and not (lone and state.cause == "policy")
        for entry in state.manifest.kernels if known and state.manifest is not None else ():
            if (entry.op, entry.device) == (op, device) and (entry.dtypes is None or dtype in entry.dtypes):
                has = f"{state.found.source} has one ({entry.backend}), and is left out"
                return f"{has}: {state.reason}. {state.remedy}"
    installed = {state.found.distribution for state in loader.states()}
    own = [name for name, ops in OWN.items() if name not in installed and dtype in ops.get(op, ())]
    return f"The distribution {own[0]} has one." if own and device == "cpu" and not lone else ""
