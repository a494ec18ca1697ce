"""The tests that a plugin's author gets by subclassing `Suite`."""

from __future__ import annotations

import opkit
from opkit.testing.plugin import calls
from opkit.testing.plugin.absence import Absence
from opkit.testing.plugin.calls import Case
from opkit.testing.plugin.kernels import Kernels
from opkit.testing.plugin.loading import Loading
from opkit.testing.plugin.processes import Processes


class Suite(Loading, Absence, Processes, Kernels):
    """The conformance suite for a plugin. Subclass it in a test module, with the name that the plugin has.

    The plugin must be installed, and have a manifest. What does not apply to it is skipped, with the reason; most tests
    start a process, so that a plugin that breaks one is reported like any other.

    Attributes:
        name: the plugin's.
        limit: seconds that a process may take. Native code is compiled within it.

    Example:
        >>> import opkit
        >>> class TestFast(opkit.testing.plugin.Suite):
        ...     name = "fast"
        ...
        ...     def case(self, op, n):  # only where the shape line does not say what an op takes
        ...         if op == "fast::gather":
        ...             return (torch.randn(n + 1), torch.tensor([0, n])), {}
        ...         return super().case(op, n)
    """

    name = ""
    limit = 600.0

    def case(self, op: str, n: int) -> Case | None:
        """Return the arguments of a call of an op, as (args, kwargs), on the CPU and in float32; None if there is none.

        Args:
            op: its name.
            n: about how large dimensions are: 0, 1, 5, or for the largest call the number of elements in a tensor.

        Raises:
            ArgumentError: nothing says what the op takes. Override this method then.
        """
        return calls.derived(opkit.get(op), n)

    def slack(self, op: str, dtype: str) -> float:
        """Return how far results of an op may be off in a dtype, beyond the tolerance of `opkit.testing.check`.

        Override it where large terms cancel in a result: the tolerance is by the size of what is left.
        """
        return 0.0
