"""`Op`, what a user holds: here the rooms below are tied together."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch

from opkit import _registry, _torch
from opkit._compiled import Compiled, before_trace
from opkit._kernels import HasKernels
from opkit.dispatch import preference, table
from opkit.dispatch.meta import Meta
from opkit.dispatch.native.door import Door
from opkit.dispatch.native.path import Path
from opkit.dispatch.validate import runner
from opkit.errors import DuplicateOpError, OpNotFoundError
from opkit.spec import refused
from opkit.spec import schema as schemas
from opkit.spec.plan import Plan
from opkit.spec.schema import Schema, describe
from opkit.transforms import gradient, mutation, overwrite, registered, variants
from opkit.transforms.autocast import Autocast
from opkit.transforms.effects import keep_calls
from opkit.transforms.flops import count_calls, counting, forget_count
from opkit.transforms.formula import Formula, NoFormula
from opkit.transforms.forward_mode import Tangents
from opkit.transforms.layout import Layout
from opkit.transforms.overwrite import Overwriting
from opkit.transforms.sharding import Sharding
from opkit.transforms.vmap import Batching

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])
V = TypeVar("V", bound="str | Callable[..., Any]")


class _Found:
    """The attribute `overload` of an op, found when it is first read. Dynamo traces no `functools.cached_property`."""

    def __get__(self, op: Op[..., Any] | None, owner: Any = None) -> Any:
        if op is None:
            return self
        if _torch.is_compiling():  # inside of a checkpointed function Dynamo refuses to keep it
            return _torch.find_overload(op.schema.namespace, op.schema.opname)
        found = op.__dict__["overload"] = op._target()
        return found


class Op(Door, HasKernels[P, R]):
    """An operator: a named contract with kernels, callable like the function that declares it.

    Made by `opkit.op`. In torch it is an ordinary overload, `torch.ops.<namespace>.<name>.default`.

    Attributes:
        name: the qualified name, `namespace::name`.
        schema: the schema; `str(op.schema)` is torch's text.
        reference: the decorated function, which says what every kernel must compute; where the op is only
            declared, a function that raises NoKernelError.
        overload: the `torch.ops` overload.
    """

    overload = _Found()

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
        self._count = None if flops is None else counting(schema, flops)
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
        self._compiled = Compiled(self, inline=inline)
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
        self._defined: list[tuple[str, _torch.Overload]] = []
        self._target = self._define("")
        self._overwriting = Overwriting(schema, self._runner, self._meta, self._library, self._tags)

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if _torch.is_compiling():
            return self._traced(args, kwargs)
        if self._special:
            args, kwargs = self.schema.carry(args, kwargs)  # type: ignore[assignment]
        try:
            result = self.overload(*args, **kwargs)
        except Exception as err:
            refused.explain(self.schema, err, args, kwargs)
            raise
        return result if self._bare else self.schema.pack(result)  # type: ignore[no-any-return]

    def _traced(self, args: Any, kwargs: Any) -> R:
        """Be the call in a function that is compiled: Dynamo traces this."""
        before_trace(self.name)
        wanted = preference.traced()
        if self._special:
            args, kwargs = self.schema.carry(args, kwargs)
        if wanted is None:
            result = self.overload(*args, **kwargs)
        else:
            result = self._compiled.variant(wanted)(*args, **kwargs, opkit_backend=wanted)
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
        self._compiled.changed()
        return function

    register_meta = register_fake

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
        - `opkit.from_reference`: the reference is run again in backward and differentiated by torch. A tensor with
          `requires_grad` that it has from elsewhere than its arguments raises there.

        Args:
            backward: the formula.
            setup_context: for the function form.
            saves: for the Op form, names of arguments and outputs (`out`, or `out0`, `out1`, … where the
                results have no names).
            non_differentiable: outputs and arguments that have no gradient. What the op writes into an argument has
                none either: where it depends on arguments that require grad, it must be named here.

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
        self._formula = registered.formula(
            self.schema,
            self._meta.plan,
            None if self._table.declared else self.reference,
            backward,
            setup_context,
            saves=saves,
            non_differentiable=non_differentiable,
            effects=self._effects,
        )
        self._path.formula_changed()
        self._compiled.changed()
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
        self._tangents = registered.tangents(self.schema, self.reference, jvp, setup_context)
        self._compiled.changed()
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
        self._compiled.changed()
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
        self._path.autocast_registered()
        if new:
            for name, target in self._defined:
                self._implement_autocast(name, target, device_type)
        self._compiled.changed()

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
            name = self._compiled.foreseen_inplace(values)
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

    # ---------------------------------------------------------------- torch's side

    def _define(self, variant: str) -> _torch.Overload:
        """Define an overload of the op in torch: the op itself, or a variant that carries a preference."""
        schema, name = self.schema, self.schema.opname + variant
        extra = f"str {gradient.EXTRA}" if variant else ""
        self._forget_count()  # a further overload changes the hash of what it is kept by
        try:
            _torch.define(self._library, schema.declaration(name, extra), self._tags)
        except RuntimeError as err:
            raise DuplicateOpError(
                f"declaring {self.name} from {describe(self.reference)}: torch refused it: "
                f"{str(err).strip().splitlines()[0]} Expected a name that no other library of this process defines. "
                "Choose another name or namespace.",
                op=self.name,
            ) from None
        target = _torch.Overload(schema.namespace, name)
        run = self._runner.preferring if variant else self._runner
        if self._layout is not None:
            run = self._layout.arranging(schema, run)
        _torch.register_meta(self._library, name, self._compiled.trace, self._table.reference.source)
        implement = functools.partial(_torch.implement, self._library)
        implement(name, run, "CompositeExplicitAutograd", with_keyset=False)
        kernel = gradient.autograd_kernel(
            schema, target, run, lambda: self._formula, lambda: self._tangents or self._formula.tangents,
            variant=bool(variant),
        )  # fmt: skip
        implement(name, kernel, "Autograd")
        if not variant:
            derivation = gradient.derivation(schema, kernel, lambda: self._formula)
            self._path = Path(self._runner, run, derivation, f"{schema.namespace}::{name}")
            if type(self) is Op:
                self._runner.arrive = self._arrive
        for key in self._batching.keys:
            implement(name, self._batching.kernel(target), key)
        self._defined.append((name, target))
        if self._count is not None:
            count_calls(target().overloadpacket, self._count)
        self._sharding.tell_torch(target)
        if self._effects:
            keep_calls(self._library, name)
        for device in self._autocast.dtypes:
            self._implement_autocast(name, target, device)
        if any(p.mutated for p in schema.params):
            version = mutation.version_kernel(schema, target, gradient.EXTRA)
            implement(name, version, "ADInplaceOrView")
        return target

    def _arrive(self) -> None:
        if self._path.attach(self):
            self._runner.arrive = None

    def _implement_autocast(self, name: str, target: _torch.Overload, device_type: str) -> None:
        key = f"Autocast{_torch.dispatch_key(device_type)}"
        _torch.implement(self._library, name, self._autocast.kernel(target, device_type), key)

    def _forget_count(self) -> None:
        if self._count is not None:
            forget_count([target().overloadpacket for _, target in self._defined], self._count)

    def _destroy(self) -> None:
        self._path.detach()
        self._forget_count()
        self._sharding.forget([target for _, target in self._defined])
        self._compiled.forget()
        _torch.destroy(self._library)
        self.__dict__["overload"] = functools.partial(_refuse_removed, self.name)  # torch's handle is freed

    def _declared(self) -> tuple[Any, ...]:
        """Return what a graph compiled with the op may have taken from it; `fingerprint` looks into it."""
        meta = self._meta
        return (
            self.schema,
            self._tags,
            self._compiled.inline,
            self._overwriting.declared(),
            meta.plan and meta.plan.meaning,
            meta.function,
            self._formula,
            self._tangents,
            self.reference,
            self._batching.rule,
            self._autocast.dtypes,
        )


def _refuse_removed(name: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise OpNotFoundError(
        f"calling {name}: found an op that was removed; expected one that is defined. Define it again, and take it "
        f"from opkit.get({name!r}).",
        op=name,
    )


def _restore(module: str, name: str) -> Op[..., Any]:
    """Return an op in another process: import the module that defines it, then look it up."""
    importlib.import_module(module)
    return _registry.get(name)
