"""`Op`, what a user holds, and `@op`, which makes one: here the rooms below are tied together."""

from __future__ import annotations

import functools
import importlib
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import CodeType
from typing import Any, Generic, ParamSpec, TypeVar, cast, overload

import torch

from opkit import _registry, _torch, _torch_compile
from opkit.cpp.light import Source
from opkit.dispatch import preference, select, table
from opkit.dispatch.meta import Meta
from opkit.dispatch.preference import Preference
from opkit.dispatch.select import Candidate, Explanation
from opkit.dispatch.table import Kernel
from opkit.dispatch.validate import runner
from opkit.errors import BackendError, DuplicateOpError, RegistrationError, SchemaError, did_you_mean
from opkit.spec import plan as plans
from opkit.spec import schema as schemas
from opkit.spec import signature
from opkit.spec import text as schema_texts
from opkit.spec.plan import Plan
from opkit.spec.schema import Schema, describe
from opkit.transforms import effects as effect
from opkit.transforms import fingerprint, gradient, mutation, overwrite, variants
from opkit.transforms import flops as flop
from opkit.transforms import inline as inlining
from opkit.transforms.autocast import Autocast
from opkit.transforms.formula import (
    Formula,
    FunctionFormula,
    NoFormula,
    OpFormula,
    ReferenceFormula,
    as_in_forward_within_a_kernel,
    from_reference,
)
from opkit.transforms.forward_mode import FunctionTangents, ReferenceTangents, Tangents
from opkit.transforms.layout import Layout
from opkit.transforms.overwrite import Overwriting
from opkit.transforms.sharding import Sharding
from opkit.transforms.vmap import Batching

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])
S = TypeVar("S", bound="Source | Callable[..., Any]")
V = TypeVar("V", bound="str | Callable[..., Any]")


_compiled: weakref.WeakSet[Op[..., Any]] = weakref.WeakSet()  # ops that some function was compiled with
_offering: weakref.WeakSet[Op[..., Any]] = weakref.WeakSet()  # ops of which Inductor may make something else


class Op(Generic[P, R]):
    """An operator: a named contract with kernels, callable like the function that declares it.

    Made by `opkit.op`. In torch it is an ordinary overload, `torch.ops.<namespace>.<name>.default`.

    Attributes:
        name: the qualified name, `namespace::name`.
        schema: the schema; `str(op.schema)` is torch's text.
        reference: the decorated function, which says what every kernel must compute; where the op is only
            declared, a function that raises NoKernelError.
        overload: the `torch.ops` overload.
    """

    def __init__(
        self,
        schema: Schema,
        reference: Callable[P, R],
        *,
        plan: Plan | None = None,
        tags: Sequence[torch.Tag] = (),
        inline: bool = False,
        layout: str | torch.memory_format | None = None,
        flops: Callable[..., Any] | None = None,
        effects: bool = False,
        declared: bool = False,
    ) -> None:
        self._count = None if flops is None else flop.counting(schema, flops)
        self.name = schema.name
        self.schema = schema
        self.reference = reference
        self._formula: Formula = NoFormula(schema)
        self._tangents: Tangents | None = None
        self._table = table.KernelTable(schema, reference, declared=declared)
        self._meta = Meta(schema, plan)
        self._runner = runner(self._table, self._meta)
        self._batching = Batching(
            schema, plan, self._meta.trace,
            random=torch.Tag.nondeterministic_seeded in tags, ordered=effects,
        )  # fmt: skip
        self._autocast = Autocast(schema, plan)
        self._sharding = Sharding(schema, plan, random=torch.Tag.nondeterministic_seeded in tags)
        # Whether what torch returns is already what the caller gets.
        self._bare = schema.container is None or (schema.container is tuple and len(schema.results) > 1)
        self._special = bool(schema.special)
        if isinstance(schema.container, type) and schema.container is not tuple:
            _torch.register_container(schema.container)
        self._inline = inline
        if inline:
            _offering.add(self)
        self._variant: Any = None
        self._inlined: Any = None
        self._compiled_into: weakref.WeakSet[CodeType] = weakref.WeakSet()
        functools.update_wrapper(self, reference, updated=())
        self._layout = Layout.of(layout, self.name, tags)
        if self._layout is not None:
            tags = [*tags, self._layout.tag]
            function = self._layout.results(self._meta)
            if function is not None:
                self._meta.replace(function)
        self._effects = effects
        # Calls with effects are kept, and arguments brought to a format are copies, only under the op's own name.
        self._may_overwrite = not effects and (self._layout is None or self._layout.format is None)
        self._tags = (torch.Tag.pt2_compliant_tag, *dict.fromkeys(tags))
        self._library = torch.library.Library(schema.namespace, "FRAGMENT")
        self._defined: list[tuple[str, Any]] = []
        self.overload = self._define("")
        self._overwriting = Overwriting(schema, self._runner, self._meta, self._library, self._tags)

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if _torch.is_compiling():
            wanted = preference.traced()
            if wanted is not None:
                variant = self._inlined if _ensure_variant(self.name, wanted) else self._variant
                args, kwargs = self.schema.carry(args, kwargs)  # type: ignore[assignment]
                return self.schema.pack(variant(*args, **kwargs, opkit_backend=wanted))  # type: ignore[no-any-return]
        if self._special:
            args, kwargs = self.schema.carry(args, kwargs)  # type: ignore[assignment]
        result = self.overload(*args, **kwargs)
        return result if self._bare else self.schema.pack(result)  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        devices: dict[str, list[str]] = {}
        for kernel in self._table.all():
            if kernel is not self._table.reference:
                devices.setdefault(kernel.device, []).append(kernel.backend)
        parts = [f"{device}: {', '.join(names)}" for device, names in devices.items()]
        last = "no reference" if self._table.declared else "reference"
        return f"<opkit.Op {self.name} ({'; '.join([*parts, last])})>"

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
        self._changed()
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
        properties: Iterable[str] = (),
        inplace: Iterable[str] | Mapping[str, str | None] = (),
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
        properties: Iterable[str] = (),
        inplace: Iterable[str] | Mapping[str, str | None] = (),
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
        properties: Iterable[str] = (),
        inplace: Iterable[str] | Mapping[str, str | None] = (),
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
            properties: what `opkit.require` may ask for: some of `deterministic` (the same arguments give the
                same bits), `batch_invariant` (what comes out for one element of the batch does not depend on the
                others) and `graph_safe` (it can be captured in a CUDA graph).
            inplace: arguments that the kernel overwrites. It gets copies of them, or the buffers themselves where
                the caller gives them away (`maybe_inplace`) or a compiled graph has no further use for them. It
                may return one as a result: the first of the same entry in the shape line, or as a mapping says,
                `{"x": "y"}`, with None where the argument is only destroyed.
            source: who registers it, for `explain`; by default the function's place.

        Raises:
            RegistrationError: the device or a property is unknown, or the function does not fit the op.

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
                device, f, backend=backend, dtypes=dtypes, when=when, priority=priority, source=source,
                properties=properties, inplace=inplace,
            )  # fmt: skip
        kernel = table.make_kernel(
            self.schema,
            device,
            function,
            backend=backend,
            dtypes=dtypes,
            when=when,
            priority=priority,
            source=source,
            properties=properties,
            inplace=inplace,
            plan=self._meta.plan,
        )
        if not isinstance(function, Source):
            schemas.check_signature(self.schema, function, f"a {kernel.backend} kernel")
        self._table.add(kernel)
        if kernel.inplace:  # what it overwrites is decided when a graph is compiled
            _offering.add(self)
            self._changed()
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
          in schema order and the outputs as the caller gets them. A second derivative through a tensor that
          `setup_context` computed raises: save the arguments or outputs, and compute it in `backward`.
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
        if backward is from_reference and self._effects:
            raise self._registration_error(
                "the gradient", "from_reference for an op with effects=True",
                "a formula without them, since the reference would run once more in backward",
                "Register a function or an op",
            )  # fmt: skip
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
        elif backward is from_reference and self._table.declared:
            raise self._registration_error(
                "the gradient", "from_reference", "a formula, as the op is declared without a reference",
                "Register a function or an op",
            )  # fmt: skip
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
        self._changed()
        return backward

    def register_jvp(self, jvp: Any = None, setup_context: Callable[..., None] | None = None) -> Any:
        """Say how the op is differentiated in forward mode: `torch.func.jvp`, `jacfwd`, `hessian`. Also a decorator.

        An op with `register_autograd(opkit.from_reference)` has it already, an op without it raises there.

        Args:
            jvp: one of these.

                - A function: `jvp(ctx, *tangents)` gets one tangent per argument in schema order, lists as lists:
                  zeros where a floating argument has none, None for the others. It returns one per output (None
                  for zeros).
                - `opkit.from_reference`: torch differentiates the reference.
            setup_context: `setup_context(ctx, inputs, output)` saves what the function needs, with
                `ctx.save_for_forward`; by default that of `register_autograd`, or its `saves`.

        Raises:
            RegistrationError: the op mutates an argument, or the function takes other arguments.

        Example:
            >>> import opkit, torch
            >>> @opkit.op("doc::square2", shapes="*b -> *b")
            ... def square2(x: torch.Tensor) -> torch.Tensor:
            ...     return x * x
            >>> @square2.register_jvp(setup_context=lambda ctx, inputs, output: ctx.save_for_forward(*inputs))
            ... def _(ctx, tangent):
            ...     (x,) = ctx.saved_tensors
            ...     return 2 * x * tangent
            >>> torch.func.jvp(square2, (torch.tensor([3.0]),), (torch.ones(1),))
            (tensor([9.]), tensor([6.]))
        """
        if jvp is None:
            return lambda j: self.register_jvp(j, setup_context)
        what, mutated = "the forward-mode formula", [p.name for p in self.schema.params if p.mutated]
        if mutated:
            raise self._registration_error(
                what, f"an op that mutates {', '.join(mutated)}", "one that mutates nothing, since the tangent of "
                "what it overwrites would be lost", "Write the op without mutation",
            )  # fmt: skip
        if jvp is from_reference:
            if setup_context is not None:
                raise self._registration_error(
                    what, "setup_context with from_reference", "it with a function only", "Leave it out"
                )
            reference = self.schema.adapt(self.reference)
            self._tangents = ReferenceTangents(self.schema, reference, as_in_forward_within_a_kernel)
        elif callable(jvp) and not isinstance(jvp, Op):
            self._tangents = FunctionTangents(self.schema, jvp, setup_context)
        else:
            raise self._registration_error(
                what, repr(jvp), "a function or opkit.from_reference", "Pass one of these"
            )
        self._changed()
        return jvp

    def register_vmap(self, rule: V) -> V:
        """Say how the op goes under `torch.vmap`. Also a decorator.

        Where each batched tensor and each result has the same `*b` in the shape line, nothing need be said: the
        op is called once with the batch among these dimensions. That takes `*b` for dimensions along which the op
        works on each index by itself; the first eager call whose samples differ is compared with the op on one.

        Args:
            rule: one of these.

                - `"sequential"`: one call per sample. Also what an op without a rule does, with one warning.
                - `"expand"`: one call with the batch as first dimension of every tensor.
                - `"elementwise"`: one call with all tensors broadcast to the batch and the samples' common shape.
                - a function `(info, in_dims, *args, **kwargs)` that returns `(output, out_dims)`, as for
                  `torch.library.register_vmap`. `info` has `batch_size` and `randomness`; `in_dims` has an int or
                  None for each argument in schema order, keyword-only ones included, and a list for a list.

        Raises:
            RegistrationError: the rule is no choice, or the function or the shape line does not fit it.

        Example:
            >>> import opkit, torch
            >>> @opkit.op("doc::cumsum", shapes="n -> n")
            ... def cumsum(x: torch.Tensor) -> torch.Tensor:
            ...     return x.cumsum(0)
            >>> cumsum.register_vmap("sequential")
            'sequential'
            >>> torch.vmap(cumsum)(torch.ones(2, 3))
            tensor([[1., 2., 3.],
                    [1., 2., 3.]])
        """
        self._batching.register(rule)
        self._changed()
        return rule

    def register_autocast(self, device_type: str, dtype: torch.dtype) -> None:
        """Have the op run in `dtype` inside `torch.autocast(device_type)`.

        Its float32, float16 and bfloat16 arguments on that device are cast, keyword-only ones and lists of tensors
        too, and autocast is off inside. An argument whose dtype the shape line fixes is left as it is, and so is
        one that the op mutates. Casts of weights are kept until the region ends, as torch does.

        Args:
            device_type: such as `cpu` or `cuda`.
            dtype: `torch.float32`, `torch.float16` or `torch.bfloat16`; it replaces one registered before.

        Raises:
            RegistrationError: torch has no autocast for the device, or the dtype is another one.

        Example:
            >>> import opkit, torch
            >>> @opkit.op("doc::join", shapes="*b n, n -> *b n")
            ... def join(x: torch.Tensor, *, weight: torch.Tensor) -> torch.Tensor:
            ...     return x * weight
            >>> join.register_autocast("cpu", torch.bfloat16)
            >>> with torch.autocast("cpu"):
            ...     join(torch.ones(2, 3), weight=torch.ones(3)).dtype
            torch.bfloat16
        """
        new = device_type not in self._autocast.dtypes
        self._autocast.register(device_type, dtype)
        if new:
            for name, target in self._defined:
                self._implement_autocast(name, target, device_type)
        self._changed()

    # ---------------------------------------------------------------- giving arguments away

    def maybe_inplace(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the op, and let its kernel overwrite the arguments that it was registered with `inplace=` for.

        The results are those of a plain call; what is in these arguments afterwards is undefined, and a result may
        be one of them. Where autograd may need an argument again, under torch.func, and where no kernel overwrites
        any, it is the plain call.

        Example:
            >>> import opkit, torch
            >>> @opkit.op("doc::negative", shapes="*b -> *b")
            ... def negative(x: torch.Tensor) -> torch.Tensor:
            ...     return -x
            >>> _ = negative.register_kernel("cpu", lambda x: x.neg_(), backend="fast", inplace=["x"])
            >>> x = torch.ones(2)
            >>> negative(x) is x, negative.maybe_inplace(x) is x
            (False, True)
        """
        carried, named = self.schema.carry(args, kwargs) if self._special else (args, kwargs)
        values = self.schema.fill(carried, named)
        name = self._overwritten_by(values)
        if not name:
            return self(*args, **kwargs)
        return self.schema.pack(self._overwriting.call(name, values))  # type: ignore[no-any-return]

    def _overwritten_by(self, values: tuple[Any, ...]) -> str:
        """Return the name of the overload that overwrites arguments which are given away, or nothing."""
        if overwrite.may_be_needed(values) or not self._may_overwrite or self._autocast.in_force():
            return ""
        if torch.compiler.is_dynamo_compiling():
            name = _foreseen_inplace(self.name, *_kinds(values))
            return name if name and self._overwriting.can_hold(name, values) else ""
        return self._overwriting.find(values)

    def into(self, out: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the op, and have the results in the tensors of `out`: the out form, or in-place form, of the op.

        Args:
            out: a tensor, or a tuple of one for each result, with the shape, dtype and device of that. One may be an
                argument; it is then overwritten without a copy by a kernel that was registered with `inplace=`.
                Otherwise each result is copied once.
            *args: the op's.
            **kwargs: the op's.

        Raises:
            OutputError: a tensor of `out` does not fit its result, or shares memory with another one.
            GradientError: an argument requires grad, as in torch's own out forms.

        Example:
            >>> import opkit, torch
            >>> from opkit_kernels import vector_add
            >>> x = torch.ones(2)
            >>> vector_add.into(x, x, x) is x, x
            (True, tensor([2., 2.]))
        """
        outs = variants.outputs_of(self.schema, out)
        carried, named = self.schema.carry(args, kwargs) if self._special else (args, kwargs)
        values = self.schema.fill(carried, named)
        variants.refuse_gradients(self.schema, values, outs)
        name = self._overwritten_by(values)
        if name and self._overwriting.leaves_in(name, values, outs):
            self._overwriting.call(name, values)
            return self.schema.pack(self.schema.raw(outs))  # type: ignore[no-any-return]
        results = self.schema.flatten(self(*args, **kwargs))
        return variants.into(self.schema, results, outs)  # type: ignore[no-any-return]

    def functional(self, /, *args: P.args, **kwargs: P.kwargs) -> tuple[Any, ...]:
        """Call an op that mutates arguments on copies of these: its functional form.

        Returns:
            The op's results, and after them, in order, what the arguments would be that it mutates.

        Raises:
            RegistrationError: the op mutates nothing.

        Example:
            >>> import opkit, torch
            >>> @opkit.op("doc::fill_one_", shapes="n ->", mutates_args=["x"])
            ... def fill_one_(x: torch.Tensor) -> None:
            ...     x.fill_(1)
            >>> x = torch.zeros(2)
            >>> fill_one_.functional(x), x
            ((tensor([1., 1.]),), tensor([0., 0.]))
        """
        return variants.functional(self.schema, self, args, kwargs)  # type: ignore[no-any-return]

    def register_sharding(self, rule: Callable[..., Any] | None = None, *, dims: Sequence[str] = ()) -> Any:
        """Say how the op works on DTensors. Also a decorator.

        Where each result has the same `*b` in the shape line, nothing need be said: DTensor may split tensors along
        these dimensions, and replicates the others. Everything is replicated where there is no such `*b`.

        Args:
            rule: as for `torch.distributed.tensor.experimental.register_sharding`: it takes the op's arguments, specs
                in the place of tensors, and returns the placements that the op can work on, as a list of (those of
                the results, those of the arguments in schema order: None for what is no tensor, a list for a list).
            dims: in the place of a rule, more names of the shape line along which the op works on each index by
                itself, and which each result has, such as `m` and `n` of a product `m k, k n -> m n`.

        Raises:
            RegistrationError: the op mutates an argument, or the function or a name does not fit it.

        Example:
            >>> import opkit, torch
            >>> @opkit.op("doc::product", shapes="m k, k n -> m n")
            ... def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            ...     return a @ b
            >>> product.register_sharding(dims=["m", "n"])
        """
        if rule is None and not dims:
            return self.register_sharding
        self._sharding.register(rule, [dims] if isinstance(dims, str) else dims)
        for _, target in self._defined:
            self._sharding.tell_torch(target)
        return rule

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
        return select.explain(self._table, self.schema.fill(*self.schema.carry(args, kwargs)))

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
        """Define an overload of the op in torch: the op itself, or a variant that carries a preference."""
        schema, name = self.schema, self.schema.opname + variant
        extra = f"str {gradient.EXTRA}" if variant else ""
        try:
            self._library.define(schema.declaration(name, extra), tags=self._tags)
        except RuntimeError as err:
            raise DuplicateOpError(
                f"declaring {self.name} from {describe(self.reference)}: torch refused it: "
                f"{str(err).strip().splitlines()[0]} Expected a name that no other library of this process defines. "
                "Choose another name or namespace.",
                op=self.name,
            ) from None
        base, _, overload = name.partition(".")
        target = getattr(getattr(getattr(torch.ops, schema.namespace), base), overload or "default")

        run = self._runner.preferring if variant else self._runner
        if self._layout is not None:
            run = self._layout.arranging(schema, run)
        _torch.register_meta(self._library, name, self._trace, describe(self.reference))
        implement = functools.partial(_torch.implement, self._library)
        implement(name, run, "CompositeExplicitAutograd", with_keyset=False)
        kernel = gradient.autograd_kernel(
            schema, target, run, lambda: self._formula, lambda: self._tangents or self._formula.tangents,
            variant=bool(variant),
        )  # fmt: skip
        implement(name, kernel, "Autograd")
        for key in self._batching.keys:
            implement(name, self._batching.kernel(target), key)
        self._defined.append((name, target))
        if self._count is not None:
            flop.register(target.overloadpacket, self._count)
        self._sharding.tell_torch(target)
        if self._effects:
            effect.keep_calls(self._library, name)
        for device in self._autocast.dtypes:
            self._implement_autocast(name, target, device)
        if any(p.mutated for p in schema.params):
            version = mutation.version_kernel(schema, target, gradient.EXTRA)
            implement(name, version, "ADInplaceOrView")
        return target

    def _implement_autocast(self, name: str, target: Any, device_type: str) -> None:
        key = f"Autocast{_torch.dispatch_key(device_type)}"
        _torch.implement(self._library, name, self._autocast.kernel(target, device_type), key)

    def _destroy(self) -> None:
        _offering.discard(self)
        if self._count is not None:
            flop.forget([target.overloadpacket for _, target in self._defined], self._count)
        self._sharding.forget([target for _, target in self._defined])
        self._changed()
        for target in (self.overload, self._inlined):
            _torch_compile.forget_decomposition(target)
        _torch.destroy(self._library)

    def _declared(self) -> tuple[Any, ...]:
        """Return what a graph compiled with the op may have taken from it; `fingerprint` looks into it."""
        meta = self._meta
        return (
            self.schema,
            self._tags,
            self._inline,
            self._overwriting.declared(),
            meta.plan and meta.plan.meaning,
            meta.function,
            self._formula,
            self._tangents,
            self.reference,
            self._batching.rule,
            self._autocast.dtypes,
        )

    def _changed(self) -> None:
        """Have functions compiled anew that were compiled with what the op has been until now."""
        for op in list(_compiled) if _compiled else ():
            if op._compiled_into and (op is self or fingerprint.depends(op, self.name)):
                for code in list(op._compiled_into):
                    _torch_compile.forget_compiled(code)
                op._compiled_into.clear()

    def _offer_to_inductor(self) -> None:
        """Tell Inductor what it may make of the op, before it looks."""
        schema, offer = self.schema, _torch_compile.decompose_in_inductor
        if self._inlined is not None:
            offer(self._inlined, inlining.decomposition(schema, self.reference, self._meta))
        if self._inline:
            offer(self.overload, inlining.decomposition(schema, self.reference, self._meta))
        elif self._may_overwrite and self._table.overwrites() and not any(p.mutated for p in schema.params):
            self._overwriting.define()  # also for code from a cache, which calls them
            offer(self.overload, self._overwriting.decomposition())

    def _ops_behind(self) -> list[str]:
        """Return the names of the ops that the op's formula and reference call."""
        known = {op.name for op in _registry.all_ops()}
        try:
            return sorted(known & fingerprint.of(self)[1])
        except fingerprint.UnseenError:
            return sorted(known)

    def _trace(self, /, *args: Any, opkit_backend: str | None = None, **kwargs: Any) -> Any:
        _torch_compile.extend_cache_keys(_fingerprints)
        code = _torch_compile.traced_code()
        if code is not None:
            self._compiled_into.add(code)
            _compiled.add(self)
        around = preference.inline_around()
        for name in self._ops_behind() if around and code is not None else ():
            _ensure_variant(name, Preference(None, inline=tuple(around.split(","))).encode())
        # All of them: formulas are traced later, when Inductor's tables are read already.
        for op in list(_offering):
            op._offer_to_inductor()
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
    schema: str | None = None,
    inline: bool = False,
    tags: Sequence[torch.Tag] = (),
    layout: str | torch.memory_format | None = None,
    flops: Callable[..., Any] | None = None,
    effects: bool = False,
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Make the decorated function an op.

    The function becomes the op's reference: it says what the op computes, is the oracle in tests, and
    runs where no kernel can. The op keeps its signature, defaults and docstring.

    Args:
        name: `namespace::name`.
        shapes: the shape line, one entry per Tensor argument and per Tensor result. The meta function is
            derived from it, calls are checked against it, and native kernels get their outputs by it.
            Outputs are contiguous, with the first tensor's dtype and device unless a suffix says otherwise.
            The entry of a list of tensors stands in brackets, as in `[*s] -> [*s]`: an output list is as long as the
            input list that it names. Without a line, annotations such as jaxtyping's `Float[Tensor, "*b n"]` say it.
        mutates_args: names of Tensor arguments that the op writes into.
        schema: the op's schema as torch writes it, `(Tensor x, int[] k) -> Tensor`, in the place of annotations;
            its arguments are the function's.
        inline: let Inductor fuse through the reference, in the place of a kernel; `opkit.inline` does so, or the
            opposite, for some calls. Eager calls run kernels, and gradients follow the registered formula.
        tags: torch tags to define the op with, beside `pt2_compliant_tag`. An op that draws random numbers has
            `torch.Tag.nondeterministic_seeded`.
        layout: what its kernels want their tensors to be like.

            - `"exact"`: in compiled code the strides that they have in eager; torch's default.
            - `"order"`: in compiled code the order of strides that they have in eager.
            - `"contiguous"`: contiguous, in eager too: other arguments are copied first.
            - `"flexible"`: anything goes, Inductor may choose.
            - `torch.channels_last`, `torch.channels_last_3d`: arguments of rank 4 (5) and what the shape line says
              of results of that rank are in this format, others contiguous; in eager too.
        flops: how many floating-point operations a call takes, for `torch.utils.flop_counter.FlopCounterMode`: a
            function of the op's arguments with `torch.Size` in the place of tensors, and of `out_shape`, those of
            the results, if it has such a parameter.
        effects: whether a call does something beside what it returns, such as printing. Compiled and exported
            programs then keep every call, in order.

    Raises:
        RegistrationError: an op with `inline=True` mutates arguments.
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
    return declaring(
        name,
        scope,
        shapes=shapes,
        schema=schema,
        mutates_args=mutates_args,
        inline=inline,
        tags=tags,
        layout=layout,
        flops=flops,
        effects=effects,
    )


def declaring(
    name: str,
    scope: Mapping[str, Any],
    *,
    shapes: str | None,
    mutates_args: Sequence[str],
    schema: str | None = None,
    inline: bool = False,
    tags: Sequence[torch.Tag],
    **options: Any,
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Return the decorator that `op` is, for a caller whose local names are `scope`; `options` go to `Op`."""

    def decorate(function: Callable[P, R]) -> Op[P, R]:
        mutated = [mutates_args] if isinstance(mutates_args, str) else list(mutates_args)
        if schema is None:
            read = signature.from_function(name, function, mutates=mutated, scope=scope)
        else:
            read = schema_texts.for_function(name, schema, function, mutated, scope)
        return make(read, function, shapes=shapes, tags=tags, inline=inline, **options)

    return decorate


def make(
    schema: Schema,
    reference: Callable[P, R],
    *,
    shapes: str | None = None,
    kind: type[Op[..., Any]] | None = None,
    **options: Any,
) -> Op[P, R]:
    """Return a new op, entered into the registry in the place of the one that it redefines; `options` go to `Op`."""
    plan = plans.declared(schema, shapes)
    _check_options(schema, **options)  # while the op that it may redefine is there still
    # A redefinition makes the same object anew, so that whoever holds the op has the new one.
    made: Any = _registry.make_room(schema.name, reference)
    kind = kind or Op
    if type(made) is not kind:
        made = kind.__new__(kind)
    made.__dict__.clear()
    made.__init__(schema, reference, plan=plan, **options)
    _registry.add(made)
    return cast("Op[P, R]", made)


def _check_options(
    schema: Schema,
    *,
    tags: Sequence[torch.Tag] = (),
    inline: bool = False,
    layout: str | torch.memory_format | None = None,
    flops: Callable[..., Any] | None = None,
    effects: bool = False,
    **_others: Any,
) -> None:
    """Raise for options that do not fit the op."""
    if inline:
        inlining.refuse_mutation(schema)
    if effects:
        effect.refuse_mutation(schema)
    if flops is not None:
        flop.counting(schema, flops)
    Layout.of(layout, schema.name, tags)


def _fingerprints(graph_module: Any) -> list[tuple[str, str]]:
    """Return what compile caches must know of the ops in a graph."""
    found = fingerprint.of_graph(
        graph_module, {op.schema.home or op.name: op for op in _registry.all_ops()}.get
    )
    return [*found, ("opkit", sys.modules["opkit"].__version__)] if found else []


def _restore(module: str, name: str) -> Op[..., Any]:
    """Return an op in another process: import the module that defines it, then look it up."""
    importlib.import_module(module)
    return _registry.get(name)


@_torch.constant_while_tracing
def _foreseen_inplace(name: str, device: str, dtype: str) -> str:
    """Return the name of the overload that overwrites what the kernel of a call will, or nothing."""
    return _registry.get(name)._overwriting.foresee(device, getattr(torch, dtype, None))


@_torch.constant_while_tracing
def _ensure_variant(name: str, wanted: str) -> bool:
    """Define the overload that takes its preferred backends as an argument; Dynamo runs this as it traces.

    It takes the name, as torch 2.11 passes only constants to such a function, and returns whether the call is to
    be inlined: that overload is another one, as Inductor has one answer for all calls of an overload.
    """
    made = _registry.get(name)
    if inlining.wanted(Preference.decode(wanted).inline, made.schema, made._inline):
        if made._inlined is None:
            made._inlined = made._define(f"{fingerprint.OF_OPKIT}inlined")
            _offering.add(made)
        made._offer_to_inductor()
        return True
    if made._variant is None:
        made._variant = made._define(".opkit_using")
    return False


def _kinds(values: Sequence[Any]) -> tuple[str, str]:
    """Return device type and dtype of the first tensor, as text."""
    first = next(iter(schemas.tensors(values)), None)
    return ("cpu", "") if first is None else (first.device.type, str(first.dtype).removeprefix("torch."))


def decompositions(*ops: Op[..., Any]) -> dict[Any, Callable[..., Any]]:
    """Return the references of ops as a decomposition table, for exporters and `run_decompositions`.

    An exporter that knows torch's operations needs nothing else of the op. Ops that mutate their arguments are
    left out, as tracers replace them first.

    Args:
        *ops: by default all that are registered, those of installed plugins included.

    Example:
        >>> import opkit, torch
        >>> from opkit_kernels import vector_add
        >>> class Model(torch.nn.Module):
        ...     def forward(self, x):
        ...         return vector_add(x, x)
        >>> program = torch.export.export(Model(), (torch.ones(2),))
        >>> plain = program.run_decompositions(opkit.decompositions())
        >>> [str(node.target) for node in plain.graph.nodes if node.op == "call_function"]
        ['aten.add.Tensor']
    """
    if not ops:
        _registry.list_ops()
        ops = tuple(_registry.all_ops())
    table: dict[Any, Callable[..., Any]] = {}
    for op in ops:
        if not (op._table.declared or any(p.mutated for p in op.schema.params)):
            function = inlining.decomposition(op.schema, op.reference, op._meta)
            overloads = (op.overload, op._variant, op._inlined)
            table.update(dict.fromkeys((o for o in overloads if o is not None), function))
    return table
