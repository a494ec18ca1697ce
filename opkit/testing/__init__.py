"""Checks of what is declared: kernels, meta functions, gradients and properties against the reference in float64."""

from __future__ import annotations

from opkit.testing.checker import check as check
from opkit.testing.report import CheckError as CheckError
from opkit.testing.report import Record as Record
from opkit.testing.report import Report as Report

__all__ = ["CheckError", "Record", "Report", "check"]
