"""What opkit touches of torch's private interfaces for defining ops, registering kernels and asking about them.

The other half of the one small place for private interfaces is `_torch`, which this stands on. Each entry says which
upstream code it stands on, and when it may go. The test-suite has run over them on torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import functools
import re
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from opkit import _torch

# What a node of a graph calls: an op, or one by its name alone.
OpOverload = torch._ops.OpOverload
OpOverloadPacket = torch._ops.OpOverloadPacket


def define(library: torch.library.Library, declaration: str, tags: Sequence[torch.Tag]) -> None:
    """Define an overload in `library`; RuntimeError where torch refuses it.

    `Library.define` first asks torch.ops for an op of the name, and that there is none takes it as long as the
    definition (torch/library.py). Where there is one, or a tag that torch may want to check, it is left to it.
    """
    name = declaration.partition("(")[0]
    # Made before the op is there, torch's entry for it need not look at a schema for objects of TorchScript.
    torch._library.simple_registry.singleton.find(f"{library.ns}::{name}")
    if len(tags) > 1 or name.partition(".")[0] in vars(getattr(torch.ops, library.ns)):
        library.define(declaration, tags=tags)
        return
    assert library.m is not None  # it is, until `destroy`
    library.m.define(declaration, "", tuple(tags))
    qualified = f"{library.ns}::{name}"
    library._op_defs.add(qualified)
    torch.library._defs.add(qualified)


def register_meta(
    library: torch.library.Library, name: str, function: Callable[..., Any], source: str
) -> None:
    """Register the meta function of an op defined in `library`.

    `Library._register_fake` looks up the source text of its caller, which takes 0.45 ms per op; opkit knows the
    source already. And nothing is there that this could override (torch/_library/fake_impl.py, register).
    """
    qualified = f"{library.ns}::{name}"
    fake = torch._library.simple_registry.singleton.find(qualified).fake_impl
    kernel = torch._library.utils.Kernel(function, source)
    fake.kernels.append(kernel)
    handle = torch._library.utils.RegistrationHandle(lambda: fake.kernels.remove(kernel))
    library._registration_handles.append(handle)
    on_meta = torch._library.fake_impl.construct_meta_kernel(qualified, fake)
    implement(library, name, on_meta, "Meta", with_keyset=False)


def implement(
    library: torch.library.Library,
    name: str,
    kernel: Callable[..., Any],
    key: str,
    *,
    with_keyset: bool = True,
) -> None:
    """Register a kernel of an op defined in `library`, without the books that `Library.impl` keeps of overrides.

    They are a third of what a registration takes (torch/library.py, impl); what is registered goes with the library.
    """
    assert library.m is not None  # it is, until `destroy`
    library.m.impl(name, key, kernel, with_keyset)


def override(library: torch.library.Library, name: str, kernel: Callable[..., Any], key: str) -> None:
    """Register a kernel in the place of another; torch would warn of what is meant (torch/library.py, impl)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        library.impl(name, kernel, key, with_keyset=True, allow_override=True)


def register_effect(library: torch.library.Library, name: str) -> None:
    """Have compiled code keep every call of an op defined in `library`, in order.

    `Library._register_effectful_op` does this (torch/library.py), and imports higher-order operators first.
    """
    entry = torch._library.simple_registry.singleton.find(f"{library.ns}::{name}")
    handle = entry.effect.register(torch._library.effects.EffectType.ORDERED)
    library._registration_handles.append(handle)


def destroy(library: torch.library.Library) -> None:
    """Take back everything that was defined and registered through `library`.

    Its finalizer would do the rest when it is collected, perhaps after the same names are defined anew, and then
    take theirs out of torch's books (torch/library.py, _del_library). So that is done now, and it finds nothing.
    """
    from torch.fx.operator_schemas import _SCHEMA_TO_SIGNATURE_CACHE

    library._destroy()
    for name in library._op_defs:
        base, _, overload = name.partition(".")
        _SCHEMA_TO_SIGNATURE_CACHE.pop((base, overload), None)
    torch.library._defs.difference_update(library._op_defs)
    library._op_defs.clear()
    library._op_impls.clear()


def register_container(container: type) -> None:
    """Let torch look into a NamedTuple or a dataclass, and let torch.export.save name it.

    `torch.export.register_dataclass` is public, but imports torch.export, a second, and there is none for a
    NamedTuple (torch/utils/_pytree.py; pytorch#46187, #150472). One that the user has registered is left as it is.
    """
    pytree = torch.utils._pytree
    if container in pytree.SUPPORTED_NODES:
        return
    name = f"{container.__module__}.{container.__qualname__}"
    if issubclass(container, tuple):
        pytree._register_namedtuple(container, serialized_type_name=name)
    else:
        pytree.register_dataclass(container, serialized_type_name=name)


def register_sharding(overload: Any, rule: Callable[..., Any], static: int, named: Sequence[str]) -> None:
    """Give DTensor the sharding rule of an overload.

    `torch.distributed.tensor.experimental.register_sharding` keeps the decision for all calls with the same integers:
    it would serve another dtype, flag or placement of a keyword-only tensor an old one (derive_schema_info in
    torch/distributed/tensor/experimental/_register_sharding.py). So the arguments from `static` on and those `named`
    are told to count.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    propagator = DTensor._op_dispatcher.sharding_propagator
    if overload in propagator.op_strategy_funcs:
        from torch.distributed.tensor import debug

        debug._clear_sharding_prop_cache()  # of what was decided by the rule before
    register_sharding(overload)(rule)
    propagator.op_to_schema_info[overload] = RuntimeSchemaInfo(static, list(named) or None, needs_pytree=True)


def forget_sharding(overload: Any) -> None:
    """Take back what `register_sharding` did."""
    propagator = torch.distributed.tensor.DTensor._op_dispatcher.sharding_propagator
    propagator.op_strategy_funcs.pop(overload, None)
    propagator.op_to_schema_info.pop(overload, None)


class Straight:
    """Whether calls of an overload may go straight to opkit's kernel, without another trip through dispatch.

    They may where nothing but a device is left below autograd, and nobody else has a kernel on that device:
    the dispatcher is asked once per kind of call, and torch's list of later registrations from Python every time.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._known: dict[int, bool] = {}
        # torch/library.py notes every Library.impl there, as namespace/op/key.
        qualified = self._name.replace("::", "/")
        self._impls = torch.library._impls
        self._cpu, self._cuda = f"{qualified}/CPU", f"{qualified}/CUDA"

    def __call__(self, keyset: Any) -> bool:
        """Return the answer for a call with the dispatch keys `keyset`."""
        kind = keyset.raw_repr()
        known = self._known.get(kind)
        if known is None:
            highest = (keyset & _torch.after_inplace_or_view).highestPriorityTypeId()
            # As texts: Dynamo, which in torch 2.11 looks into kernels behind a graph break, fails on the keys.
            plain = highest in (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)
            has = torch._C._dispatch_has_kernel_for_dispatch_key
            known = self._known[kind] = plain and not has(self._name, highest.name)
        return known and self._cpu not in self._impls and self._cuda not in self._impls


def find_overload(namespace: str, name: str) -> Any:
    """Return the overload `name` of a namespace, such as `add` or `add.out`, as `torch.ops` has it."""
    base, _, overload = name.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), base), overload or "default")


_finding = threading.Lock()


class Overload:
    """An overload in `torch.ops`, found when it is first asked for.

    Until then torch need not make the objects that stand for it, which takes twice as long as to define it
    (torch/_ops.py); of a library with hundreds of ops a program calls few.
    """

    __slots__ = ("_call", "_found", "_names", "_wrap", "qualified")

    def __init__(self, namespace: str, name: str) -> None:
        self.qualified = f"{namespace}::{name}"
        self._names = namespace, name
        self._found: Any = None
        self._call: Any = None  # torch's own
        self._wrap: Callable[[Any], Any] | None = None

    def __call__(self) -> Any:
        """Return what `torch.ops` has."""
        if self._found is None:
            with _finding:  # two threads would make two of it
                found = find_overload(*self._names)
                self._call = found._op
                self._put(found)
                self._found = found
        return self._found

    def call_by(self, wrap: Callable[[Any], Any] | None) -> None:
        """Have calls of the overload go to `wrap(what torch calls)`, or with None to that itself.

        torch 2.15 itself may put another function there (torch/_ops.py, OpOverload._enable_pyobj_dispatch). The hash
        of an overload is that of what is there, before torch 2.15.
        """
        with _finding:
            self._wrap = wrap
            if self._found is not None:
                self._put(self._found)

    def _put(self, found: Any) -> None:
        found._op = self._call if self._wrap is None else self._wrap(self._call)


def overload(name: str) -> Callable[..., Any]:
    """Return what calls the op `name`, without the objects that `torch.ops` makes around it (torch/_ops.py)."""
    call: Callable[..., Any] = torch._C._get_operation_overload(name, "")[0]
    return call


def operators(namespace: str) -> list[str]:
    """Return the names of a namespace's operators."""
    names = (name.split(".")[0] for name in torch._C._dispatch_get_all_op_names())
    return sorted({name for name in names if name.startswith(f"{namespace}::")})


def all_operators() -> set[str]:
    """Return the names of all operators that are defined, with their overloads: `aten::add.Tensor`.

    The dispatcher has a kernel that is registered before its operator under that name too, without a schema.
    """
    waiting = [dump.partition("\n")[0] for dump in torch._C._dispatch_find_dangling_impls()]
    return set(torch._C._dispatch_get_all_op_names()) - {first.removeprefix("name: ") for first in waiting}


def custom_ops() -> dict[str, Any]:
    """Return what torch.library.custom_op has made, by name; a second one of a name takes the place of the first."""
    return dict(torch._library.custom_ops.OPDEFS)


def definer(name: str) -> str:
    """Return where an operator or a whole namespace (TORCH_LIBRARY) was defined, empty where it was not.

    A second definition in C++ ends the process (aten/src/ATen/core/dispatch/Dispatcher.cpp, registerLibrary and
    registerDef). The dispatcher shows no list of libraries, but refuses one from Python, and says where the first is.
    """
    if "::" in name:
        found = re.search(r"^debug: (?:registered at )?(.*)$", torch._C._dispatch_dump(name), re.MULTILINE)
        return (found[1] if found else "") or ("torch" if name in all_operators() else "")
    try:
        torch.library.Library(name, "DEF")._destroy()
    except RuntimeError as error:
        found = re.search(r"Previous registration of TORCH_LIBRARY was registered at (.*?);", str(error))
        return found[1] if found else "torch"
    except ValueError:  # a namespace that torch keeps for itself
        return "torch"
    return ""


def is_composite(overload: Any) -> bool:
    """Whether an operator is made of others, which autograd differentiates (torch/_ops.py asks the same)."""
    key = "CompositeImplicitAutograd"
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), key))


def has_autograd(overload: Any) -> bool:
    """Whether torch differentiates an operator; where not, it only warns (autograd_not_implemented_fallback.cpp)."""
    backends = ("", "CPU", "CUDA", "XPU", "MPS", "HPU", "PrivateUse1", "Other")
    has, name = torch._C._dispatch_has_kernel_for_dispatch_key, overload.name()
    return is_composite(overload) or any(has(name, f"Autograd{backend}") for backend in backends)


def parse_schema(text: str) -> Any:
    """Return a schema as torch parses it; RuntimeError or IndexError where it does not (torch/library.py, define)."""
    return torch._C.parse_schema(text)


def dtype_of(number: int) -> torch.dtype:
    """Return the dtype that torch's schemas write as a number."""
    return _dtypes()[number]


@functools.cache
def _dtypes() -> dict[int, torch.dtype]:
    found = {}
    for name, dtype in vars(torch).items():
        if isinstance(dtype, torch.dtype) and str(dtype) == f"torch.{name}":
            parsed = parse_schema(f"opkit::f(ScalarType d={name}) -> ()")
            found[parsed.arguments[0].default_value] = dtype
    return found
