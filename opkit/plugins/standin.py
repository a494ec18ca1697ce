"""A kernel of a plugin that is known by name, and in its op's table before anything of it is imported.

When it is selected the real one is fetched and takes its place; when that fails it goes, and the next candidate runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from opkit.plugins.manifest import KernelEntry
from opkit.plugins.registry import Registration

if TYPE_CHECKING:
    import torch

    from opkit._op import Op
    from opkit.plugins.state import State


class StandIn:
    """One kernel of a plugin's manifest.

    It is what `dispatch.table.Kernel.fetch` holds.

    Args:
        entry: what the manifest says of the kernel.
        state: the plugin's.
        load: fetches it: registers a kernel through `fill`, or gives it up.
    """

    def __init__(self, entry: KernelEntry, state: State, load: Callable[[StandIn], None]) -> None:
        self.entry = entry
        self.state = state
        self.registration: Registration | None = None  # of the real kernel
        self.gone = False
        self._load = load
        self._ops: list[Op[..., Any]] = []

    def __call__(self) -> None:
        """Fetch the kernel: afterwards it is in the table of its op, or nothing is in its place."""
        self._load(self)

    @property
    def busy(self) -> bool:
        """Whether this thread is loading it, so that a call cannot wait for it."""
        return self.state.is_loading

    @property
    def waiting(self) -> bool:
        """Whether the kernel is still to be fetched."""
        return self.registration is None and not self.gone

    @property
    def is_homeless(self) -> bool:
        """Whether there is no op yet to give it to."""
        return not self.gone and not self._ops and not (self.registration and self.registration.applied)

    @property
    def key(self) -> tuple[str, str, str]:
        """Op, device and backend."""
        return self.entry[:3]

    def place(self, op: Op[..., Any]) -> None:
        """Put it, or the real kernel, into the table of an op that was defined.

        Raises:
            RegistrationError: it does not fit the op.
        """
        if self.registration is not None:
            self.registration.apply(op, self.state.found.source)
        elif not self.gone:
            entry = self.entry
            op._expect_kernel(
                entry.device,
                self,
                backend=entry.backend,
                dtypes=self.dtypes(),
                priority=entry.priority,
                properties=entry.properties,
                inplace=self.inplace(),
                source=self.state.found.source,
            )
            self._ops = [op]

    def fill(self, registration: Registration) -> None:
        """Let the real kernel take its place."""
        self.registration = registration
        for op in self._ops:
            registration.apply(op, self.state.found.source)
        self._ops = []

    def give_up(self) -> None:
        """Take it out of its op's table."""
        self.gone = True
        for op in self._ops:
            op._forget_expected(self)
        self._ops = []

    def dtypes(self) -> tuple[torch.dtype, ...] | None:
        """Return the dtypes as torch's own.

        Raises:
            RegistrationError: torch has no dtype of that name.
        """
        import torch

        from opkit.errors import RegistrationError

        if self.entry.dtypes is None:
            return None
        found = []
        for name in self.entry.dtypes:
            dtype = getattr(torch, name, None)
            if not isinstance(dtype, torch.dtype):
                raise RegistrationError(
                    f"registering a {self.entry.backend} kernel for {self.entry.op}: its manifest names the dtype "
                    f"{name!r}; expected one of torch {torch.__version__}, such as float32. Correct the manifest.",
                    op=self.entry.op,
                )
            found.append(dtype)
        return tuple(found)

    def inplace(self) -> Any:
        """Return what the kernel overwrites, as `Op.register_kernel` takes it."""
        entries = self.entry.inplace
        return dict(entries) if entries and isinstance(entries[0], tuple) else entries
