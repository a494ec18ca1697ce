"""Every exception that opkit raises on purpose.

Each class also derives from the builtin that a caller would catch:

    OpkitError
    ├── SchemaError(TypeError)            a declaration cannot become an op
    ├── ArgumentError(ValueError)         a call has a value that the declaration excludes
    ├── ShapeError(ValueError)            a shape line is wrong, or a call does not fit it
    ├── DtypeError(TypeError)             a call has a tensor of another dtype than declared
    ├── DeviceError(RuntimeError)         a call has tensors on several devices
    ├── OutputError(RuntimeError)         a kernel returned what the declaration forbids
    ├── DuplicateOpError(ValueError)      one op name, two definitions
    ├── OpNotFoundError(KeyError)         no op has that name
    ├── RegistrationError(ValueError)     a meta function, formula or kernel does not fit its op
    ├── BackendError(LookupError)         a backend was asked for that nobody registered
    ├── NoKernelError(NotImplementedError)  no kernel of the op can take this call
    ├── GradientError(RuntimeError)       differentiating the op is impossible or its formula is wrong
    ├── VmapError(RuntimeError)           torch.vmap of the op is impossible or its rule is wrong
    ├── FrozenError(RuntimeError)         a call would build, load or select what was not prepared
    ├── BuildError(RuntimeError)          native code did not compile or load
    ├── PluginError(RuntimeError)         an installed plugin is broken, and somebody asked for it
    └── ConfigError(ValueError)           an environment variable has a value opkit does not know

Fields such as `op` and `log_path` are on the object, so that tools need not parse texts.
This module imports nothing of opkit.
"""

from __future__ import annotations

import difflib
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


class OpkitError(Exception):
    """Something that opkit was asked for cannot be done; the text says what and what to do."""

    def __init__(self, message: str, *, op: str | None = None) -> None:
        super().__init__(message)
        self.op = op


class SchemaError(OpkitError, TypeError):
    """You declared an op whose name or signature cannot become a torch schema."""


class ArgumentError(OpkitError, ValueError):
    """You called an op with a value that is none of those its annotation names."""


class ShapeError(OpkitError, ValueError):
    """You wrote a shape line that cannot be understood, or called an op with other sizes."""


class DtypeError(OpkitError, TypeError):
    """You called an op with a tensor of another dtype than its shape line declares."""


class DeviceError(OpkitError, RuntimeError):
    """You called an op with tensors that are on different devices."""


class OutputError(OpkitError, RuntimeError):
    """Your kernel returned another shape, dtype or device than declared, or an alias, or wrote into an argument."""


class DuplicateOpError(OpkitError, ValueError):
    """You defined an op name that is already defined somewhere else."""


class OpNotFoundError(OpkitError, KeyError):
    """You asked for an op that nobody defined."""

    __str__ = Exception.__str__  # KeyError would show the repr of the text


class RegistrationError(OpkitError, ValueError):
    """You registered a meta function, formula or kernel that does not fit its op."""


class BackendError(OpkitError, LookupError):
    """You asked for a backend that no kernel has."""


class NoKernelError(OpkitError, NotImplementedError):
    """You called an op on a device, or with arguments, that none of its kernels takes."""


class GradientError(OpkitError, RuntimeError):
    """You differentiated an op that has no formula, or its formula returned the wrong gradients."""


class VmapError(OpkitError, RuntimeError):
    """You mapped an op in a way that cannot be right, or its vmap rule does not fit it."""


class FrozenError(OpkitError, RuntimeError):
    """You made a call that was not prepared, after `opkit.freeze()` or while a CUDA graph is captured.

    `would` says what it would do: `build`, `load`, `load a plugin`, `select` or `tune`; `prepare` is the line of code
    that prepares for it, None where no call is concerned.
    """

    def __init__(
        self, message: str, *, op: str | None = None, would: str = "", prepare: str | None = None
    ) -> None:
        super().__init__(message, op=op)
        self.would = would
        self.prepare = prepare


@dataclass(frozen=True)
class Diagnostic:
    """One error line of a compiler."""

    file: str
    line: int
    column: int
    message: str


class BuildError(OpkitError, RuntimeError):
    """Your native source did not compile or load.

    `diagnostics` are the compiler's errors, `log_path` its whole output and
    `command` the command line that repeats the failing step.
    """

    def __init__(
        self,
        message: str,
        *,
        op: str | None = None,
        diagnostics: Sequence[Diagnostic] = (),
        log_path: Path | None = None,
        command: str | None = None,
    ) -> None:
        super().__init__(message, op=op)
        self.diagnostics = tuple(diagnostics)
        self.log_path = log_path
        self.command = command


class PluginError(OpkitError, RuntimeError):
    """You asked for a plugin that is broken or excluded, or for errors where one is (OPKIT_STRICT)."""


class ConfigError(OpkitError, ValueError):
    """You set an environment variable to a value that opkit does not know."""


for _error in list(globals().values()):
    if isinstance(_error, type) and issubclass(_error, OpkitError):
        _error.__module__ = "opkit"  # tracebacks read opkit.SchemaError


def warn(message: str) -> None:
    """Warn at the line of the user's code that led here, outside of opkit and torch."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and _INSIDE.search(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level + 1)


_INSIDE = re.compile(r"[/\\](opkit|torch)[/\\](?!.*(tests|examples)[/\\])")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the nearest known name, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
