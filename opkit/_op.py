"""`Op`, what a user holds, and `@op`, which makes one: here the rooms below are tied together."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar, cast, overload

import torch

from opkit import _registry, _torch
from opkit.cpp.light import Source
from opkit.dispatch import preference, select, table
from opkit.dispatch.meta import Meta
from opkit.dispatch.run import Runner
from opkit.dispatch.select import Candidate, Explanation
from opkit.dispatch.table import Kernel
from opkit.errors import BackendError, DuplicateOpError, RegistrationError, SchemaError, did_you_mean
from opkit.spec import plan as plans
from opkit.spec import schema as schemas
from opkit.spec import shapes as shape_lines
from opkit.spec.plan import Plan
from opkit.spec.schema import Schema, describe
from opkit.transforms import gradient
from opkit.transforms.formula import (
    Formula,
    FunctionFormula,
    NoFormula,
    OpFormula,
    ReferenceFormula,
    from_reference,
)

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])
S = TypeVar("S", bound="Source | Callable[..., Any]")


class Op(Generic[P, R]):
    """An operator: a named contract with kernels, callable like the function that declares it.

    Made by `opkit.op`. In torch it is an ordinary overload, `torch.ops.<namespace>.<name>.default`.

    Attributes:
        name: the qualified name, `namespace::name`.
        schema: the schema; `str(op.schema)` is torch's text.
        reference: the decorated function, which says what every kernel must compute.
        overload: the `torch.ops` overload.
    """

    def __init__(
        self,
        schema: Schema,
        reference: Callable[P, R],
        *,
        plan: Plan | None = None,
        tags: Sequence[torch.Tag] = (),
    ) -> None:
        self.name = schema.name
        self.schema = schema
        self.reference = reference
        self._formula: Formula = NoFormula(schema)
        self._table = table.KernelTable(schema, reference)
        self._meta = Meta(schema, plan)
        self._runner = Runner(self._table, self._meta)
        # Whether what torch returns is already what the caller gets.
        self._bare = schema.container is None or (schema.container is tuple and len(schema.results) > 1)
        self._variant: Any = None
        functools.update_wrapper(self, reference, updated=())
        self._tags = (torch.Tag.pt2_compliant_tag, *tags)
        self._library = torch.library.Library(schema.namespace, "FRAGMENT")
        self.overload = self._define("")

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            wanted = preference.traced()
            if wanted is not None:
                _ensure_variant(self.name)
                return self.schema.pack(self._variant(*args, **kwargs, opkit_backend=wanted))  # type: ignore[no-any-return]
        result = self.overload(*args, **kwargs)
        return result if self._bare else self.schema.pack(result)  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        devices: dict[str, list[str]] = {}
        for kernel in self._table.all():
            if kernel is not self._table.reference:
                devices.setdefault(kernel.device, []).append(kernel.backend)
        parts = [f"{device}: {', '.join(names)}" for device, names in devices.items()]
        return f"<opkit.Op {self.name} ({'; '.join([*parts, 'reference'])})>"

    def __reduce__(self) -> Any:
        return _restore, (self.__module__, self.name)

    # ---------------------------------------------------------------- registering

    def register_fake(self, function: F) -> F:
        """Replace the meta function that the shape line gives.

        It takes the op's arguments and returns empty tensors with the outputs' shape, dtype, device and
        strides. It runs while tracing and on the `meta` device, and never sees data. Also a decorator.

        Raises:
            RegistrationError: its signature is not that of the op.

        Example:
            >>> import opkit, torch
            >>> @opkit.op("doc::total")
            ... def total(x: torch.Tensor) -> torch.Tensor:
            ...     return x.sum()
            >>> @total.register_fake
            ... def _(x):
            ...     return x.new_empty(())
            >>> total(torch.ones(3, device="meta")).shape
            torch.Size([])
        """
        schemas.check_signature(self.schema, function, "a meta function")
        self._meta.replace(function)
        self._runner.forget()
        return function

    register_meta = register_fake

    @overload
    def register_kernel(
        self,
        device: str,
        function: None = None,
        *,
        backend: str | None = None,
        dtypes: Iterable[torch.dtype] | None = None,
        when: Callable[..., bool | str] | None = None,
        priority: int = 0,
        source: str | None = None,
    ) -> Callable[[F], F]: ...

    @overload
    def register_kernel(
        self,
        device: str,
        function: S,
        *,
        backend: str | None = None,
        dtypes: Iterable[torch.dtype] | None = None,
        when: Callable[..., bool | str] | None = None,
        priority: int = 0,
        source: str | None = None,
    ) -> S: ...

    def register_kernel(
        self,
        device: str,
        function: Any = None,
        *,
        backend: str | None = None,
        dtypes: Iterable[torch.dtype] | None = None,
        when: Callable[..., bool | str] | None = None,
        priority: int = 0,
        source: str | None = None,
    ) -> Any:
        """Add a kernel for a device. Also a decorator.

        Args:
            device: torch's device type, such as `cpu` or `cuda`.
            function: a Python function with the op's signature, or `opkit.cpp.kernel(...)`.
            backend: the name of the way it is written; `python`, or that of the native source.
            dtypes: take only calls whose first tensor has one of these.
            when: called with all arguments, keyword-only ones by name; returns True, or False or a
                reason (str) why the kernel cannot take the call. Not called while tracing.
            priority: higher ones are tried first.
            source: who registers it, for `explain`; by default the function's place.

        Raises:
            RegistrationError: the device is unknown, or the function does not fit the op.

        Example:
            >>> import opkit, torch
            >>> @opkit.op("doc::double", shapes="*b -> *b")
            ... def double(x: torch.Tensor) -> torch.Tensor:
            ...     return 2 * x
            >>> @double.register_kernel("cpu", backend="add", dtypes=(torch.float32,))
            ... def _(x):
            ...     return x + x
            >>> double.explain(torch.ones(2)).selected
            'add'
        """
        if function is None:
            return lambda f: self.register_kernel(
                device, f, backend=backend, dtypes=dtypes, when=when, priority=priority, source=source
            )
        kernel = table.make_kernel(
            self.schema,
            device,
            function,
            backend=backend,
            dtypes=dtypes,
            when=when,
            priority=priority,
            source=source,
        )
        if not isinstance(function, Source):
            schemas.check_signature(self.schema, function, f"a {kernel.backend} kernel")
        self._table.add(kernel)
        return function

    def register_autograd(
        self,
        backward: Any = None,
        setup_context: Callable[..., None] | None = None,
        *,
        saves: Sequence[str] = (),
        non_differentiable: Sequence[str] = (),
    ) -> Any:
        """Say how the op is differentiated, in one of three forms. Also a decorator.

        - A function: `backward(ctx, *grads)` gets one gradient per output and returns one per argument (None
          where there is none); `setup_context(ctx, inputs, output)` saves what it needs, with all arguments
          in schema order and the outputs as the caller gets them.
        - An Op: it is called with one gradient per differentiable output, then the values named in `saves`
          (arguments and outputs), and returns one gradient per differentiable Tensor argument.
        - `opkit.from_reference`: the reference is run again in backward and differentiated by torch.

        Args:
            backward: the formula.
            setup_context: for the function form.
            saves: for the Op form, names of arguments and outputs (`out`, or `out0`, `out1`, … where the
                results have no names).
            non_differentiable: outputs and arguments that have no gradient.

        Raises:
            RegistrationError: a name does not exist, or the Op's signature does not fit.

        Example:
            >>> import opkit, torch
            >>> @opkit.op("doc::square", shapes="*b -> *b")
            ... def square(x: torch.Tensor) -> torch.Tensor:
            ...     return x * x
            >>> square.register_autograd(opkit.from_reference)
            from_reference
            >>> x = torch.tensor([3.0], requires_grad=True)
            >>> square(x).backward()
            >>> x.grad
            tensor([6.])
        """
        if backward is None:
            return lambda b: self.register_autograd(
                b, setup_context, saves=saves, non_differentiable=non_differentiable
            )
        saves = [saves] if isinstance(saves, str) else saves
        non_differentiable = (
            [non_differentiable] if isinstance(non_differentiable, str) else non_differentiable
        )
        self._check_names(non_differentiable)
        is_function = not isinstance(backward, Op) and backward is not from_reference
        if saves and not isinstance(backward, Op):
            raise self._registration_error(
                "the gradient", "saves= with a formula that is not an op", "saves= with the Op form only",
                "Save values in setup_context, or leave saves= out",
            )  # fmt: skip
        if setup_context is not None and not is_function:
            raise self._registration_error(
                "the gradient", "setup_context with a formula that is not a function",
                "setup_context with the function form only", "Name the values in saves=",
            )  # fmt: skip
        if isinstance(backward, Op):
            self._formula = OpFormula(self.schema, self._meta.plan, backward, saves, non_differentiable)
        elif backward is from_reference:
            self._formula = ReferenceFormula(self.schema, self.reference, non_differentiable)
        elif callable(backward):
            self._formula = FunctionFormula(self.schema, backward, setup_context, non_differentiable)
        else:
            raise self._registration_error(
                "the gradient",
                repr(backward),
                "a function, an Op or opkit.from_reference",
                "Pass one of these",
            )
        return backward

    # ---------------------------------------------------------------- asking

    @property
    def kernels(self) -> tuple[Candidate, ...]:
        """The kernels on every device, those of plugins included, as `explain` records them."""
        return select.listing(self._table)

    def explain(self, /, *args: P.args, **kwargs: P.kwargs) -> Explanation:
        """Say which kernel a call with these arguments would run, and why not the others.

        Compiles nothing. The result prints as a table; `.candidates` has the records, `.selected` the
        backend.

        Example:
            >>> import opkit, torch
            >>> from opkit_kernels import vector_add
            >>> vector_add.explain(torch.ones(2), torch.ones(2)).selected
            'cpp'
        """
        return select.explain(self._table, self.schema.fill(args, kwargs))

    def build(self, *backends: str) -> list[Path]:
        """Compile native kernels of the op now, and load none of them. Calls after that run what was built.

        Works without the device that they are for: with nvcc, a CUDA kernel compiles on any machine.

        Args:
            *backends: whose kernels; by default all that have native source.

        Returns:
            The libraries' paths.

        Raises:
            BuildError: the source does not compile, or there is no compiler for it.
            BackendError: the op has no native kernel of that backend.

        Example:
            >>> from opkit_kernels import vector_add
            >>> [path.suffix for path in vector_add.build("cpp")]
            ['.so']
        """
        paths = []
        for kernel in self.native_kernels(*backends):
            assert isinstance(kernel.function, Source)
            paths.append(kernel.function.build(self.schema, self._runner.native_plan, kernel.backend))
            kernel.forget()  # its source may have been edited
        return paths

    def native_kernels(self, *backends: str) -> list[Kernel]:
        """Return the kernels that are native source, of all backends or of some.

        Raises:
            BackendError: the op has no native kernel of that backend.

        Example:
            >>> from opkit_kernels import vector_add
            >>> [kernel.device for kernel in vector_add.native_kernels("cpp", "cuda")]
            ['cpu', 'cuda']
        """
        found = [k for k in self._table.all() if isinstance(k.function, Source)]
        known = {k.backend for k in found}
        for name in backends:
            if name not in known:
                raise BackendError(
                    f"building {self.name}: no native kernel has the backend {name!r}; native kernels of the op: "
                    f"{', '.join(sorted(known)) or 'none'}.{did_you_mean(name, known)} Name one of these.",
                    op=self.name,
                )
        return [k for k in found if not backends or k.backend in backends]

    def compile_commands(self, *backends: str) -> list[dict[str, Any]]:
        """Return how the native kernels are compiled, as entries of compile_commands.json for clangd.

        Raises:
            BackendError: the op has no native kernel of that backend.

        Example:
            >>> from opkit_kernels import vector_add
            >>> [sorted(entry) for entry in vector_add.compile_commands("cpp")]
            [['arguments', 'directory', 'file']]
        """
        commands: list[dict[str, Any]] = []
        for kernel in self.native_kernels(*backends):
            assert isinstance(kernel.function, Source)
            job = kernel.function.job(self.schema, self._runner.native_plan, kernel.backend)
            commands += job.compile_commands()
        return commands

    # ---------------------------------------------------------------- torch's side

    def _define(self, variant: str) -> Any:
        """Define an overload of the op in torch: the op itself, or the variant that carries a preference."""
        schema, name = self.schema, self.schema.opname + (f".{variant}" if variant else "")
        extra = f"str {gradient.EXTRA}" if variant else ""
        try:
            self._library.define(schema.declaration(name, extra), tags=self._tags)
        except RuntimeError as err:
            raise DuplicateOpError(
                f"declaring {self.name} from {describe(self.reference)}: torch refused it: "
                f"{str(err).splitlines()[0]} Expected a name that no other library of this process defines. "
                "Choose another name or namespace.",
                op=self.name,
            ) from None
        packet = getattr(getattr(torch.ops, schema.namespace), schema.opname)
        target = getattr(packet, variant or "default")

        run = self._runner.preferring if variant else self._runner
        _torch.register_meta(self._library, name, self._trace, describe(self.reference))
        implement = self._library.impl
        implement(name, run, "CompositeExplicitAutograd")
        kernel = gradient.autograd_kernel(schema, target, run, lambda: self._formula, variant=bool(variant))
        implement(name, kernel, "Autograd", with_keyset=True)
        if any(p.mutated for p in schema.params):
            implement(name, gradient.version_kernel(schema, target), "ADInplaceOrView", with_keyset=True)
        return target

    def _destroy(self) -> None:
        _torch.destroy(self._library)

    def _trace(self, /, *args: Any, opkit_backend: str | None = None, **kwargs: Any) -> Any:
        return self._meta.trace(self.schema.fill(args, kwargs))

    # ---------------------------------------------------------------- checking registrations

    def _check_names(self, non_differentiable: Sequence[str]) -> None:
        names = [p.name for p in self.schema.params] + [r.name for r in self.schema.results]
        for name in non_differentiable:
            if name not in names:
                raise self._registration_error(
                    "the gradient", f"non_differentiable names {name!r}", f"one of {', '.join(names)}",
                    "Name arguments or outputs of the op",
                )  # fmt: skip

    def _registration_error(self, what: str, found: str, expected: str, advice: str) -> RegistrationError:
        return RegistrationError(
            f"registering {what} of {self.name}: found {found}; expected {expected}. {advice}.", op=self.name
        )


def op(
    name: str,
    *,
    shapes: str | None = None,
    mutates_args: Sequence[str] = (),
    tags: Sequence[torch.Tag] = (),
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Make the decorated function an op.

    The function becomes the op's reference: it says what the op computes, is the oracle in tests, and
    runs where no kernel can. The op keeps its signature, defaults and docstring.

    Args:
        name: `namespace::name`.
        shapes: the shape line, one entry per Tensor argument and per Tensor result. The meta function is
            derived from it, calls are checked against it, and native kernels get their outputs by it.
            Outputs are contiguous, with the first tensor's dtype and device unless a suffix says otherwise.
        mutates_args: names of Tensor arguments that the op writes into.
        tags: torch tags to define the op with, beside `pt2_compliant_tag`.

    Raises:
        SchemaError: the name has no namespace, or an annotation is not one that an op can have.
        ShapeError: the shape line does not fit the signature.
        DuplicateOpError: another function has defined this name.

    Example:
        >>> import opkit, torch
        >>> from torch import Tensor
        >>> @opkit.op("doc::scale", shapes="*b n, n -> *b n")
        ... def scale(x: Tensor, factor: Tensor, power: int = 1) -> Tensor:
        ...     return x * factor**power
        >>> print(scale.schema)
        doc::scale(Tensor x, Tensor factor, SymInt power=1) -> (Tensor)
        >>> scale(torch.ones(2, 3), torch.full((3,), 2.0), power=3)
        tensor([[8., 8., 8.],
                [8., 8., 8.]])
    """
    if callable(name):
        raise SchemaError(
            f"declaring an op from {describe(name)}: @opkit.op was used without a name; expected "
            f'namespace::name. Write @opkit.op("mylib::{getattr(name, "__name__", "my_op")}").'
        )
    schemas.check_name(name)
    scope = dict(sys._getframe(1).f_locals)
    return declaring(name, scope, shapes=shapes, mutates_args=mutates_args, tags=tags)


def declaring(
    name: str,
    scope: Mapping[str, Any],
    *,
    shapes: str | None,
    mutates_args: Sequence[str],
    tags: Sequence[torch.Tag],
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Return the decorator that `op` is, for a caller whose local names are `scope`."""

    def decorate(function: Callable[P, R]) -> Op[P, R]:
        mutated = [mutates_args] if isinstance(mutates_args, str) else list(mutates_args)
        schema = schemas.from_function(name, function, mutates=mutated, scope=scope)
        plan = None
        if shapes is not None:
            plan = plans.bind(shape_lines.parse(shapes, op=name), schema, shapes)
        # A redefinition makes the same object anew, so that whoever holds the op has the new one.
        made: Any = _registry.make_room(name, function) or Op.__new__(Op)
        made.__dict__.clear()
        Op.__init__(made, schema, function, plan=plan, tags=tags)
        _registry.add(made)
        return cast("Op[P, R]", made)

    return decorate


def _restore(module: str, name: str) -> Op[..., Any]:
    """Return an op in another process: import the module that defines it, then look it up."""
    importlib.import_module(module)
    return _registry.get(name)


@_torch.constant_while_tracing
def _ensure_variant(name: str) -> bool:
    """Define the overload that takes its preferred backends as an argument; Dynamo runs this as it traces.

    It takes the name, as torch 2.11 passes only constants to such a function.
    """
    made = _registry.get(name)
    if made._variant is None:
        made._variant = made._define("opkit_using")
    return True
