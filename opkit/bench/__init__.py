"""How fast the kernels of an op are: beside each other, beside other functions, and beside what the machine can do."""

from __future__ import annotations

from opkit.bench.comparison import compare as compare
from opkit.bench.regression import Change as Change
from opkit.bench.regression import Regression as Regression
from opkit.bench.report import Report as Report
from opkit.bench.report import Row as Row
from opkit.bench.report import load as load

__all__ = ["Change", "Regression", "Report", "Row", "compare", "load"]
