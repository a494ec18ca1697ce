"""Checks of what is declared: kernels, meta functions, gradients and properties against the reference in float64.

`opkit.testing.plugin` has the tests for plugins. It needs pytest, and is imported when it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from opkit.testing.checker import check as check
from opkit.testing.report import CheckError as CheckError
from opkit.testing.report import Record as Record
from opkit.testing.report import Report as Report

if TYPE_CHECKING:
    from opkit.testing import plugin as plugin

__all__ = ["CheckError", "Record", "Report", "check", "plugin"]


def __getattr__(name: str) -> Any:
    if name != "plugin":
        raise AttributeError(f"module 'opkit.testing' has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
