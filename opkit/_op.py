"""`Op`, what a user holds: here the rooms below are tied together."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch

from opkit import _html, _registry, _torch_library
from opkit._compiled import Compiled, before_trace
from opkit._kernels import HasKernels
from opkit._rules import HasRules
from opkit._torch import is_compiling
from opkit._variants import HasVariants
from opkit.dispatch import preference, table
from opkit.dispatch.meta import Meta
from opkit.dispatch.native.door import Door
from opkit.dispatch.native.path import Path
from opkit.dispatch.preference import contexts
from opkit.dispatch.validate import runner
from opkit.errors import DuplicateOpError, OpNotFoundError
from opkit.spec import refused
from opkit.spec.plan import Plan
from opkit.spec.schema import Schema, describe
from opkit.transforms import gradient, mutation
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


class _Found:
    """The attribute `overload` of an op, found when it is first read. Dynamo traces no `functools.cached_property`."""

    def __get__(self, op: Op[..., Any] | None, owner: Any = None) -> Any:
        if op is None:
            return self
        if is_compiling():  # inside of a checkpointed function Dynamo refuses to keep it
            return _torch_library.find_overload(op.schema.namespace, op.schema.opname)
        found = op.__dict__["overload"] = op._target()
        return found


class Op(Door, HasKernels[P, R], HasRules[P, R], HasVariants[P, R]):
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
        self._plain = self._bare and not self._special
        if isinstance(schema.container, type) and schema.container is not tuple:
            _torch_library.register_container(schema.container)
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
        self._defined: list[tuple[str, _torch_library.Overload]] = []
        try:
            self._target = self._define("")
            self._overwriting = Overwriting(schema, self._runner, self._meta, self._library, self._tags)
        except BaseException:  # the core's kernels hold the op that holds them: nothing would collect them
            self._withdraw()
            raise

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if is_compiling():  # Dynamo traces what is here, and guards at each call on whatever that reads
            inside = before_trace(self.name)
            if self._plain and inside is None and not contexts:
                return self.overload(*args, **kwargs)  # type: ignore[no-any-return]
            return self._traced(inside, args, kwargs)
        if self._special:
            args, kwargs = self.schema.carry(args, kwargs)  # type: ignore[assignment]
        try:
            result = self.overload(*args, **kwargs)
        except Exception as err:
            refused.explain(self.schema, err, args, kwargs)
            raise
        return result if self._bare else self.schema.pack(result)  # type: ignore[no-any-return]

    def _traced(self, inside: str | None, args: Any, kwargs: Any) -> R:
        wanted = preference.traced(inside)
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

    def _repr_html_(self) -> str:
        name, plan = self.name, self._meta.plan
        lines = [_html.titled(name, str(self.schema).removeprefix(name))]
        lines += [_html.titled("shapes", f" {plan.line}")] if plan is not None else []
        rows = [(k.device, k.backend, k.status, k.reason, k.source) for k in self.kernels]
        return "".join([*lines, _html.table(("device", "backend", "status", "reason", "source"), rows)])

    def __reduce__(self) -> Any:
        return _restore, (self.__module__, self.name)

    def _define(self, variant: str) -> _torch_library.Overload:
        """Define an overload of the op in torch: the op itself, or a variant that carries a preference."""
        schema, name = self.schema, self.schema.opname + variant
        extra = f"str {gradient.EXTRA}" if variant else ""
        self._forget_count()  # a further overload changes the hash of what it is kept by
        try:
            _torch_library.define(self._library, schema.declaration(name, extra), self._tags)
        except RuntimeError as err:
            raise DuplicateOpError(
                f"declaring {self.name} from {describe(self.reference)}: torch refused it: "
                f"{str(err).strip().splitlines()[0]} Expected a name that no other library of this process defines. "
                "Choose another name or namespace.",
                op=self.name,
            ) from None
        target = _torch_library.Overload(schema.namespace, name)
        self._implement(name, target, variant=bool(variant))
        self._defined.append((name, target))
        if self._count is not None:
            count_calls(target().overloadpacket, self._count)
        self._sharding.tell_torch(target)
        if self._effects:
            keep_calls(self._library, name)
        for device in self._autocast.dtypes:
            self._implement_autocast(name, target, device)
        return target

    def _implement(self, name: str, target: _torch_library.Overload, *, variant: bool) -> None:
        """Register the kernels of an overload that was just defined."""
        schema = self.schema
        run = self._runner.preferring if variant else self._runner
        if self._layout is not None:
            run = self._layout.arranging(schema, run)
        _torch_library.register_meta(self._library, name, self._compiled.trace, self._table.reference.source)
        implement = functools.partial(_torch_library.implement, self._library)
        kernel = gradient.autograd_kernel(
            schema, target, run, lambda: self._formula, lambda: self._tangents or self._formula.tangents,
            variant=variant,
        )  # fmt: skip
        for key in self._batching.keys:
            implement(name, self._batching.kernel(target), key)
        if not variant and self._enter_core(run, kernel, target):
            return
        implement(name, run, "CompositeExplicitAutograd", with_keyset=False)
        implement(name, kernel, "Autograd")
        if any(p.mutated for p in schema.params):
            implement(name, mutation.version_kernel(schema, target, gradient.EXTRA), "ADInplaceOrView")

    def _enter_core(self, run: Any, kernel: Any, target: _torch_library.Overload) -> bool:
        """Return whether the core serves the op; where it does not yet, each call in Python asks for it."""
        derivation = gradient.derivation(self.schema, kernel, lambda: self._formula)
        contiguous = self._layout is not None and self._layout.format is torch.contiguous_format
        self._path = Path(self._runner, run, derivation, target, contiguous=contiguous)
        if type(self) is not Op:
            return False
        if self._path.register(self):
            return True
        self._runner.arrive = self._arrive
        return False

    def _arrive(self) -> None:
        if self._path.attach(self):
            self._runner.arrive = None

    def _forget_count(self) -> None:
        if self._count is not None:
            forget_count([target().overloadpacket for _, target in self._defined], self._count)

    def _withdraw(self) -> None:
        """Take back from torch what was defined and registered."""
        if "_path" in vars(self):  # torch may have refused the definition
            self._path.detach()
        _torch_library.destroy(self._library)

    def _destroy(self) -> None:
        self._forget_count()
        self._sharding.forget([target for _, target in self._defined])
        self._compiled.forget()
        self._withdraw()
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
