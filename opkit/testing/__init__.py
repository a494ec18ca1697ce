"""Checks of what is declared: kernels, meta functions, gradients and properties against the reference in float64.

- `check(op)` or `check(op, *args)`: one report of all of it.
- `samples`: the calls that `check(op)` makes. `strategies`: the same for hypothesis.
- `opkit.testing.pytest_plugin`: the fixtures `opkit_backend` and `opkit_registry`, which pytest finds by itself.
- `plugin`: the tests for plugins. It needs pytest.

Names are loaded when they are used: pytest imports this package for its plugin, also where nothing is about torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import opkit.testing.strategies as strategies  # noqa: F401
    from opkit.testing import plugin as plugin
    from opkit.testing import samples as samples
    from opkit.testing.checker import check as check
    from opkit.testing.report import CheckError as CheckError
    from opkit.testing.report import Record as Record
    from opkit.testing.report import Report as Report
    from opkit.testing.samples import Sample as Sample

_LAZY = {
    "CheckError": "opkit.testing.report",
    "Record": "opkit.testing.report",
    "Report": "opkit.testing.report",
    "Sample": "opkit.testing.samples",
    "check": "opkit.testing.checker",
    "plugin": "",
    "samples": "",
    "strategies": "",
}

__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'opkit.testing' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name] or f"{__name__}.{name}")
    value = getattr(module, name) if _LAZY[name] else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
