"""Which backends the caller would like: `use_backend` and OPKIT_BACKEND.

The preference belongs to the thread, and torch carries it to the autograd threads that work for it.
In a compiled function it belongs to the calls that were traced inside the `with`.
"""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import Any, NamedTuple

import torch

from opkit import _config, _torch
from opkit import _sources as sources
from opkit.errors import BackendError, ConfigError, did_you_mean

BUILT_IN = ("reference", "python", "cpp", "cuda")
_known: set[str] = set(BUILT_IN)


class Preference(NamedTuple):
    """Backends in order of preference; `strict` excludes all others."""

    names: tuple[str, ...] = ()
    strict: bool = False

    def encode(self) -> str:
        """Return it as text, for the graph of a compiled function."""
        return ("!" if self.strict else "") + ",".join(self.names)

    @staticmethod
    def decode(text: str) -> Preference:
        """Return what `encode` wrote."""
        names = text.removeprefix("!").split(",")
        return Preference(tuple(n for n in names if n), text.startswith("!"))


# Until a context is first entered, in any thread, no call looks into thread-local storage.
_used = False
# Contexts entered by the function that Dynamo is tracing now; empty whenever nothing is traced.
_traced: list[Preference] = []
# The same for contexts inside of a checkpointed function, where Dynamo refuses a list that changes, and of an
# exported one, where it warns of it: it calls the functions over this one as it traces, not tracing into them.
_traced_inside: weakref.WeakKeyDictionary[Any, list[str]] = weakref.WeakKeyDictionary()


def know(backend: str) -> None:
    """Remember that some kernel has this backend."""
    _known.add(backend)


def current() -> Preference:
    """Return the preference in force for this thread."""
    if _used:
        preference = _torch.stashed()
        if preference is not None:
            return preference  # type: ignore[no-any-return]
    return _from_environment()


def traced() -> str | None:
    """Return the preference entered in the function that is being compiled or exported, encoded, or None."""
    inside = _innermost() if torch.compiler.is_dynamo_compiling() else None
    if inside is None and _traced:
        return _traced[-1].encode()
    return inside


@_torch.constant_while_tracing
def _innermost() -> str | None:
    entered = _traced_inside.get(_torch.tracing())
    return entered[-1] if entered else None


@_torch.constant_while_tracing
def _enter_inside(encoded: str) -> bool:
    """Note a context if it is entered in a checkpointed or exported function; return whether it is."""
    if _torch.in_subgraph() or torch.compiler.is_exporting():
        _traced_inside.setdefault(_torch.tracing(), []).append(encoded)
        return True
    return False


@_torch.constant_while_tracing
def _leave_inside() -> bool:
    if _torch.in_subgraph() or torch.compiler.is_exporting():
        _traced_inside[_torch.tracing()].pop()
        return True
    return False


def _from_environment() -> Preference:
    global _environment
    if _environment is None:
        names = _config.get("OPKIT_BACKEND")
        if names:
            sources.consult_for_kernels()
        for name in names:
            if name not in _known:
                raise ConfigError(
                    f"reading OPKIT_BACKEND: found {name!r}; expected one of {', '.join(sorted(_known))}."
                    f"{did_you_mean(name, _known)} Change or unset the variable, or install the plugin that brings it."
                )
        _environment = Preference(names)
    return _environment


_environment: Preference | None = None


def refresh() -> None:
    """Read OPKIT_BACKEND anew at the next call."""
    global _environment
    _environment = None


def check_known(names: tuple[str, ...]) -> None:
    """Raise BackendError for a name that no kernel of any op has."""
    sources.consult_for_kernels()
    for name in names:
        if name not in _known:
            raise BackendError(
                f"choosing backends: no kernel has the backend {name!r}; registered are "
                f"{', '.join(sorted(_known))}.{did_you_mean(name, _known)} "
                "Install the plugin that brings it, or name one of these."
            )


class use_backend:  # noqa: N801  (a context manager, named like torch.no_grad)
    """Prefer backends, first one first, for the calls inside the `with`.

    The others remain as a fallback unless `strict=True`, which makes a call fail that none of
    the named backends can take. Backward passes follow the preference in force where
    `.backward()` is called. Works inside a compiled function without a graph break, and entering
    it around one recompiles nothing. The variable OPKIT_BACKEND says the same for a whole process; it is
    read when a kernel is first chosen.

    Args:
        *names: backends, such as `cpp`, `reference`, or one that a plugin brings.
        strict: exclude the backends that are not named.

    Raises:
        BackendError: no kernel of any op has one of the backends.

    Example:
        >>> import opkit, torch
        >>> from opkit_kernels import rms_norm
        >>> x, w = torch.ones(2, 4), torch.ones(4)
        >>> with opkit.use_backend("reference"):
        ...     print(rms_norm.explain(x, w).selected)
        reference
    """

    def __init__(self, *names: str, strict: bool = False) -> None:
        if not all(isinstance(name, str) for name in names) or (strict and not names):
            raise BackendError(
                f"choosing backends: found use_backend({', '.join(map(repr, names))}, strict={strict}); expected "
                'names, and with strict at least one. Write opkit.use_backend("cpp", "reference").'
            )
        self._preference = Preference(names, strict)
        self._before: list[Preference | None] = []

    def __enter__(self) -> None:
        global _used
        if torch.compiler.is_dynamo_compiling():
            if not _enter_inside(self._preference.encode()):
                _traced.append(self._preference)
            return
        if torch.compiler.is_exporting():
            _traced.append(self._preference)
            return
        check_known(self._preference.names)
        self._before.append(_torch.stashed())
        _torch.stash(self._preference)
        _used = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if torch.compiler.is_dynamo_compiling():
            if not _leave_inside():
                _traced.pop()
            return
        if torch.compiler.is_exporting():
            _traced.pop()
            return
        _torch.stash(self._before.pop())
