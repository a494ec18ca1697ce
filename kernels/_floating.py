"""The refusal that the references share whose results are floating-point numbers.

torch computes with integers and complex numbers too, and `.to(x.dtype)` at the end would round the first to
zeros and drop the imaginary part on the way. Native kernels declare their dtypes and never get here.
"""

from __future__ import annotations

from torch import Tensor

import opkit


def require_floating(op: str, **arguments: Tensor | None) -> None:
    """Raise where an argument that is not None has no real floating-point dtype."""
    for name, value in arguments.items():
        if value is not None and not value.dtype.is_floating_point:
            advice = (
                f"Pass its real part: {name}.real"
                if value.dtype.is_complex
                else f"Convert it: {name}.float()"
            )
            raise opkit.DtypeError(
                f"calling {op}: argument {name} has dtype {value.dtype}, expected a floating-point one. {advice}.",
                op=op,
            )
