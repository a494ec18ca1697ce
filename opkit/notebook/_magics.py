"""The cell magics: what their lines say, and how a cell's text becomes a kernel of an op."""

from __future__ import annotations

import dataclasses
import functools
import shlex
import traceback
from typing import Any, NamedTuple

import torch
from IPython.core import magic_arguments
from IPython.core.error import UsageError
from IPython.core.magic import Magics, cell_magic, magics_class

import opkit.cpp
from opkit import _registry
from opkit._op import Op
from opkit.cpp.light import Source
from opkit.errors import BuildError, OpkitError, OpNotFoundError, did_you_mean

_CELL = "cell "  # begins the source of a kernel that is from one


class _Cell(NamedTuple):
    """A kernel that a cell has made of itself."""

    source: Source
    options: dict[str, Any]

    def attach(self, op: Op[..., Any]) -> None:
        """Give the kernel to an op, in the place of that of another cell."""
        for kernel in op._table.all():
            is_same = (kernel.device, kernel.backend) == (self.options["device"], self.options["backend"])
            if is_same and kernel.source.startswith(_CELL):
                op._table.discard(kernel)  # else it would warn that one takes the place of the other
        op.register_kernel(function=self.source, **self.options)


_cells: dict[str, dict[tuple[str, str], _Cell]] = {}  # by op, and by device and backend


_OPTIONS: dict[str, dict[str, Any]] = {
    "op": {"help": "the op: namespace::name, or a variable that holds it"},
    "--backend": {"help": "the name of this way of writing the kernel (default: cpp, cuda)"},
    "--device": {"help": "torch's device type (default: cpu, cuda)"},
    "--dtypes": {"help": "take only calls whose first tensor has one of these: float32,float64"},
    "--when": {
        "help": "a Python function of the op's arguments, which returns True or why not: --when 'lambda x: …'"
    },
    "--priority": {"type": int, "default": 0, "help": "higher ones are tried first (default: 0)"},
    "--properties": {"default": "", "help": "what opkit.require may ask for: deterministic,graph_safe"},
    "--symbol": {"help": "the name of the C++ function, where it is not the op's"},
    "--cflags": {"default": "", "help": "more flags for the compiler: --cflags='-O2 -g'"},
    "--ldflags": {"default": "", "help": "more flags for the linker"},
}


def _arguments(method: Any) -> Any:
    """Give a magic what both understand."""
    for word, options in reversed(_OPTIONS.items()):
        method = magic_arguments.argument(word, **options)(method)
    return magic_arguments.magic_arguments()(method)


@magics_class
class Kernels(Magics):
    """`%%opkit_cpp` and `%%opkit_cuda`."""

    @cell_magic
    @_arguments
    def opkit_cpp(self, line: str, cell: str) -> Op[..., Any]:
        """Compile the cell as a kernel of an op for the CPU, in C++, and return the op."""
        return self._run(Kernels.opkit_cpp, "cpp", "cpu", line, cell)

    @cell_magic
    @_arguments
    def opkit_cuda(self, line: str, cell: str) -> Op[..., Any]:
        """Compile the cell as a kernel of an op for CUDA, and return the op."""
        return self._run(Kernels.opkit_cuda, "cuda", "cuda", line, cell)

    def _run(self, magic: Any, language: str, device: str, line: str, cell: str) -> Op[..., Any]:
        try:
            given = magic.parser.parse_args(shlex.split(line))
        except ValueError as error:  # a quotation that does not end
            raise UsageError(f"reading {line}: {error}") from None
        try:
            return self._attach(given, language, device, cell)
        except OpkitError as error:
            # IPython asks for this: of how the magic came to fail nobody needs to know.
            error._render_traceback_ = functools.partial(_shown, error)  # type: ignore[attr-defined]
            raise

    def _attach(self, given: Any, language: str, device: str, cell: str) -> Op[..., Any]:
        op = self._op(given.op)
        flags = tuple(shlex.split(given.cflags))
        source = opkit.cpp.kernel(
            f"{cell}\n",
            symbol=given.symbol,
            toolchain=language,
            extra_cflags=() if language == "cuda" else flags,
            extra_cuda_cflags=flags if language == "cuda" else (),
            extra_ldflags=shlex.split(given.ldflags),
        )
        # Errors name the cell and its line, of which the first is that of the magic.
        place = f"In [{self._running.displayhook.prompt_count}]"
        source = dataclasses.replace(source, place=place, line=2, where=f"{_CELL}{place}")
        options = {
            "device": given.device or device,
            "backend": given.backend or language,
            "dtypes": self._dtypes(op, given.dtypes),
            "when": self._condition(op, given.when),
            "priority": given.priority,
            "properties": tuple(filter(None, given.properties.split(","))),
            "source": source.where,
        }
        made = _Cell(source, options)
        self._build(op, made)
        known = _cells.setdefault(op.name, {})
        is_new = not known
        known[options["device"], options["backend"]] = made
        if is_new:
            _registry.when_defined(
                op.name, _attach_cells
            )  # when the cell that declares the op is run again, too
        else:
            made.attach(op)
        return op

    def _build(self, op: Op[..., Any], made: _Cell) -> None:
        """Compile before anything is changed."""
        try:
            made.source.build(op.schema, op._runner.native_plan, made.options["backend"])
        except BuildError as error:
            known = any(
                (k.device, k.backend) == (made.options["device"], made.options["backend"])
                for k in op._table.all()
            )
            if known:
                error.args = (f"{error}\n{op.name} keeps the {made.options['backend']} kernel that it has.",)
            raise

    @property
    def _running(self) -> Any:
        """The shell that runs the cell."""
        assert self.shell is not None
        return self.shell

    def _op(self, text: str) -> Op[..., Any]:
        held = self._running.user_ns.get(text)
        if isinstance(held, Op):
            return held
        if "::" in text:
            return _registry.named(text, f"looking up {text} for a cell")
        variables = sorted(name for name, value in self._running.user_ns.items() if isinstance(value, Op))
        raise OpNotFoundError(
            f"looking up {text} for a cell: it is no op's name, and no variable here that holds an op; those that do "
            f"are {', '.join(variables) or 'none'}.{did_you_mean(text, variables)} Write namespace::name, or the "
            "variable.",
            op=text,
        )

    def _dtypes(self, op: Op[..., Any], text: str | None) -> tuple[torch.dtype, ...] | None:
        if text is None:
            return None
        found = []
        for name in text.split(","):
            dtype = getattr(torch, name.strip().removeprefix("torch."), None)
            if not isinstance(dtype, torch.dtype):
                raise UsageError(
                    f"making a cell a kernel of {op.name}: --dtypes has {name!r}; expected torch's dtypes, with "
                    "commas between. Write --dtypes float32,float64."
                )
            found.append(dtype)
        return tuple(found)

    def _condition(self, op: Op[..., Any], text: str | None) -> Any:
        if text is None:
            return None
        try:
            return self._running.ev(text)
        except Exception as error:
            raise UsageError(
                f"making a cell a kernel of {op.name}: --when is {text}, which fails with {type(error).__name__}: "
                f"{error}; expected a function of the op's arguments. Define one in a cell before, and give its name."
            ) from None


def _attach_cells(op: Op[..., Any]) -> None:
    for made in _cells[op.name].values():
        made.attach(op)


def _shown(error: OpkitError) -> list[str]:
    """Return what a notebook shows of an error: its text."""
    return traceback.format_exception_only(type(error), error)
