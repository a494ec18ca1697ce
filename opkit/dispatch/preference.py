"""What the caller asks of the choice of a kernel: `use_backend`, `require`, `inline`, and OPKIT_BACKEND.

The preference belongs to the thread, and torch carries it to the autograd threads that work for it.
In a compiled function it belongs to the calls that were traced inside the `with`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from types import TracebackType
from typing import Any, NamedTuple

import torch

from opkit import _config, _torch
from opkit import _sources as sources
from opkit.dispatch import native
from opkit.errors import BackendError, ConfigError, OpkitError, did_you_mean

BUILT_IN = ("reference", "python", "cpp", "cuda")
_known: set[str] = set(BUILT_IN)


# What a kernel may state of itself, and a caller require.
PROPERTIES = ("batch_invariant", "deterministic", "graph_safe")


class Preference(NamedTuple):
    """Backends in order of preference, and what is required of a kernel; `strict` excludes all other backends.

    In a context that leaves something as it is around it, `names` is None. `inline` has what contexts said of
    inlining, `+namespace::name` or `-namespace::name`, the last one last; it matters to compilers only.
    """

    names: tuple[str, ...] | None = ()
    strict: bool = False
    required: tuple[str, ...] = ()
    inline: tuple[str, ...] = ()

    def over(self, below: Preference) -> Preference:
        """Return what holds in a context inside of another one."""
        names, strict = (below.names, below.strict) if self.names is None else (self.names, self.strict)
        more = tuple(name for name in self.required if name not in below.required)
        return Preference(names, strict, below.required + more, below.inline + self.inline)

    def requiring(self, name: str) -> Preference:
        """Return it with one more property."""
        return self if name in self.required else self._replace(required=(*self.required, name))

    def encode(self) -> str:
        """Return it as text, for the graph of a compiled function."""
        backends = "~" if self.names is None else ("!" if self.strict else "") + ",".join(self.names)
        return ";".join((backends, ",".join(self.required), ",".join(self.inline)))

    @staticmethod
    def decode(text: str) -> Preference:
        """Return what `encode` wrote."""
        backends, required, inline = (part.split(",") for part in text.split(";"))
        strict = backends[0].startswith("!")
        names = tuple(n for n in (backends[0].removeprefix("!"), *backends[1:]) if n)
        if names == ("~",):
            return Preference(None, False, tuple(r for r in required if r), tuple(i for i in inline if i))
        return Preference(names, strict, tuple(r for r in required if r), tuple(i for i in inline if i))


# Until a context is first entered, in any thread, no call looks into thread-local storage.
_used = False
# What `inline` says around compiled functions, and over it the contexts entered by the function that Dynamo is tracing
# now. As a rule it is empty, and that is all that Dynamo guards on at a call.
contexts: list[Preference] = []
# The same for contexts inside of a checkpointed function, where Dynamo refuses a list that changes, and of an
# exported one, where it warns of it: it calls the functions over this one as it traces, not tracing into them.
_traced_inside: weakref.WeakKeyDictionary[Any, list[str]] = weakref.WeakKeyDictionary()


def is_used() -> bool:
    """Whether some thread has ever entered a context."""
    return _used


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


def requires(name: str) -> bool:
    """Whether a context in force for this thread requires a property of kernels."""
    return _used and name in current().required


_inline_around = ""  # of the process, as Dynamo guards on it


def inline_around() -> str:
    """Return what `inline` says around compiled functions."""
    return _inline_around


def set_inline_around(said: str) -> str:
    """Say what is inlined in functions that are compiled or called from now on; return what was said before."""
    global _inline_around
    before, _inline_around = _inline_around, said
    contexts[:] = [Preference(None, inline=tuple(said.split(",")))] if said else []
    return before


def traced(inside: str | None) -> str | None:
    """Return what holds for a call in a function that is compiled or exported, encoded; `inside`: `traced_inside`."""
    return contexts[-1].encode() if inside is None and contexts else inside


def traced_inside() -> str | None:
    """Return what holds by the contexts that are entered in a checkpointed or exported function, encoded."""
    tracing = _torch.tracing()
    entered = None if tracing is None else _traced_inside.get(tracing)
    return entered[-1] if entered else None


_innermost = _torch.constant_while_tracing(traced_inside)


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
    native.choose_anew()


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


class Context:
    """A `with` that changes the preference, in eager mode and in functions that are compiled or exported."""

    def __init__(self, change: Preference) -> None:
        self._change = change
        self._before: list[Preference | None] = []

    def __enter__(self) -> None:
        global _used
        if torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting():
            entered = traced(_innermost())
            change = self._change if entered is None else self._change.over(Preference.decode(entered))
            if not torch.compiler.is_dynamo_compiling() or not _enter_inside(change.encode()):
                contexts.append(change)
            return
        if self._change.names:
            check_known(self._change.names)
        if self._change.required:
            check_properties(self._change.required, "choosing kernels", BackendError)
        self._before.append(_torch.stashed())
        _torch.stash(self._change.over(current()))
        if not _used:
            _used = True
            native.expect_preferences()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if torch.compiler.is_dynamo_compiling():
            if not _leave_inside():
                contexts.pop()
            return
        if torch.compiler.is_exporting():
            contexts.pop()
            return
        _torch.stash(self._before.pop())


class use_backend(Context):  # noqa: N801  (a context manager, named like torch.no_grad)
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
        super().__init__(Preference(names, strict))


class require(Context):  # noqa: N801
    """Run only kernels that state these properties, for the calls inside the `with`.

    `deterministic`: the same arguments give the same bits. `batch_invariant`: what comes out for one element of
    the batch does not depend on the others. `graph_safe`: it can be captured in a CUDA graph. A kernel states
    them with `register_kernel(properties=...)`. Contexts add up. Works inside a compiled function and in backward
    as `use_backend` does, and recompiles nothing.

    The reference counts as deterministic, as it then runs under `torch.use_deterministic_algorithms`; it states
    nothing else. That setting of torch also has opkit choose deterministic kernels.

    Args:
        *names: `deterministic`, `batch_invariant` or `graph_safe`.

    Raises:
        BackendError: there is no such property.
        NoKernelError: at a call that no kernel with these properties can take.

    Example:
        >>> import opkit, torch
        >>> @opkit.op("doc::total_of", shapes="n -> ()")
        ... def total_of(x: torch.Tensor) -> torch.Tensor:
        ...     return x.sum()
        >>> _ = total_of.register_kernel("cpu", lambda x: x.sum(), backend="fast", priority=1)
        >>> _ = total_of.register_kernel("cpu", lambda x: x.sum(), backend="exact", properties=["deterministic"])
        >>> with opkit.require("deterministic"):
        ...     print(total_of.explain(torch.ones(2)).selected)
        exact
    """

    def __init__(self, *names: str) -> None:
        if (
            not torch.compiler.is_dynamo_compiling()
        ):  # which cannot trace it; there it is done when the graph runs
            check_properties(names, "choosing kernels", BackendError)
        super().__init__(Preference(None, required=names))


def check_properties(
    names: Iterable[Any], doing: str, error: type[OpkitError], op: str | None = None
) -> tuple[str, ...]:
    """Return the names of properties, sorted, or raise `error` for one that is none."""
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        if name not in PROPERTIES:
            hint = did_you_mean(name, PROPERTIES) if isinstance(name, str) else ""
            raise error(
                f"{doing}: found the property {name!r}; expected some of {', '.join(PROPERTIES)}.{hint} Name one "
                "of these.",
                op=op,
            )
    return tuple(sorted(set(names)))
