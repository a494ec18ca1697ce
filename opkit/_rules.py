"""What an op has of rules: how torch's tracers, autograd, `torch.vmap`, autocast and DTensor take it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import torch

from opkit import _torch, _torch_library
from opkit._compiled import Compiled
from opkit.dispatch.meta import Meta
from opkit.dispatch.native.path import Path
from opkit.dispatch.run import Runner
from opkit.dispatch.table import KernelTable
from opkit.errors import RegistrationError
from opkit.spec.schema import Schema, check_signature, describe
from opkit.transforms import registered
from opkit.transforms.autocast import Autocast
from opkit.transforms.formula import Formula
from opkit.transforms.forward_mode import Tangents
from opkit.transforms.sharding import Sharding
from opkit.transforms.vmap import Batching

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])
V = TypeVar("V", bound="str | Callable[..., Any]")


class HasRules(Generic[P, R]):
    """An op, as the holder of its rules."""

    schema: Schema
    reference: Callable[P, R]
    _table: KernelTable
    _meta: Meta
    _runner: Runner
    _formula: Formula
    _tangents: Tangents | None
    _batching: Batching
    _autocast: Autocast
    _sharding: Sharding
    _effects: bool
    _compiled: Compiled
    _path: Path
    _samples: Callable[..., Any] | None = None  # what `register_samples` was given
    _library: torch.library.Library
    _defined: list[tuple[str, _torch_library.Overload]]

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
        check_signature(self.schema, function, "a meta function")
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

    def register_samples(self, function: F) -> F:
        """Give calls to check the op with, in the place of those that its shape line gives. Also a decorator.

        It says what a declaration cannot: which values an index has, or that one size divides another.
        `opkit.testing.check(op)` makes the calls, the first one in other dtypes and layouts too.

        Args:
            function: called without arguments, or with the device type as a str. It returns a list of calls, each a
                tuple of arguments, or a pair of them and of keyword arguments.

        Raises:
            RegistrationError: it is no function, or takes more than a device.

        Example:
            >>> import opkit, torch
            >>> @opkit.op("doc::take", shapes="n, m:int64 -> m:x")
            ... def take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            ...     return x[index]
            >>> @take.register_samples
            ... def _(device):
            ...     return [(torch.randn(5, device=device), torch.tensor([0, 4, 2], device=device))]
            >>> opkit.testing.check(take).ok
            True
        """
        name = self.schema.name
        if not callable(function):
            raise RegistrationError(
                f"registering samples of {name}: found {function!r}; expected a function that returns a list of "
                "calls. Pass lambda: [(x, y)].",
                op=name,
            )
        count = len([p for p in inspect.signature(function).parameters.values() if p.default is p.empty])
        if count > 1:
            raise RegistrationError(
                f"registering samples of {name}: found {describe(function)} with {count} arguments; expected a "
                "function of none, or of the device type. Change its parameters.",
                op=name,
            )
        self._samples = function
        return function

    def _implement_autocast(self, name: str, target: _torch_library.Overload, device_type: str) -> None:
        key = f"Autocast{_torch.dispatch_key(device_type)}"
        _torch_library.implement(self._library, name, self._autocast.kernel(target, device_type), key)
