"""A plugin's device as torch sees it before anybody uses it: a name, and a module that loads the library when needed.

    torch.ones(2, device="opk")       torch asks `torch.opk._lazy_init`, which loads the library
    torch.opk.is_available()          is answered by the plugin's stub, without the library
    torch.opk.memory_allocated()      is not in the stub: the library is loaded, and asked
    torch.opk.Generator()             loads the library; so do Stream and Event

torch.Generator("opk"), torch.Stream and torch.Event are made in C, which asks nobody in Python: they raise until the
library is loaded.

torch has one slot for all devices of plugins, and what has been put there stays: whoever comes second is shadowed.
Which device gets it is the part of `boot`; this module imports torch only when a device takes the slot.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from opkit import _sources as sources
from opkit import _torch_device
from opkit.errors import PluginError

# torch asks for these by name: what the library says comes before opkit's answer.
_ASKED = ("_is_in_bad_fork", "_utils")


class Device(NamedTuple):
    """A device that a plugin brings.

    Attributes:
        name: what it is called in `torch.device(name)`.
        stub: a module, or its name: the part of `torch.<name>` that needs no library. It has `device_count`.
        loader: loads the library and returns the rest of `torch.<name>`, as a module; or `module:function`.
        source: whose it is, for texts.
        call: calls the plugin's code, with whatever is wanted around it.
        plugin: what `opkit plugins why` knows it by.
    """

    name: str
    stub: ModuleType | str
    loader: Callable[[], ModuleType | None] | str
    source: str
    plugin: str = ""
    call: Callable[[Callable[[], Any]], Any] = lambda function: function()


class DeviceModule(ModuleType):
    """`torch.<name>`: what the stub has, what opkit has for every device, and once it is loaded the library's."""

    def __init__(self, device: Device) -> None:
        super().__init__(f"torch.{device.name}", f"The device {device.name} of {device.source}.")
        self._opkit = Lazy(device, self)

    def __getattr__(self, name: str) -> Any:
        return self._opkit.find(name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._opkit.stub())})

    def _lazy_init(self) -> None:  # torch calls it before it makes a tensor on the device
        self._opkit.load()

    def init(self) -> None:
        """Load the library, if it is not."""
        self._opkit.load()

    def is_initialized(self) -> bool:
        """Whether the library is loaded."""
        return self._opkit.is_loaded


class Lazy:
    """What `torch.<name>` is made of."""

    def __init__(self, device: Device, module: DeviceModule) -> None:
        self.device = device
        self.module = module
        self.is_loaded = False
        self._loading = 0  # the thread that does
        self._error: BaseException | None = None
        self._seed: int | None = None
        self._runtime = ""
        self._stub: ModuleType | None = device.stub if isinstance(device.stub, ModuleType) else None

    def load(self) -> None:
        """Load the library, once; other threads wait.

        Raises:
            PluginError: it did not load, now or before; a library that was half loaded is not tried again.
        """
        if self.is_loaded:
            return
        with sources.lock:  # the plugin may register kernels meanwhile, which takes this lock
            if self.is_loaded or self._is_loading():
                return
            if self._loading:  # this thread has the lock: a fork has left the other one behind
                self._error = RuntimeError("another thread was doing so when this process was forked")
            if self._error is None:
                self._loading = threading.get_ident()
                try:
                    self._fill(self.device.call(self._run_loader))
                    return
                except (Exception, SystemExit) as error:
                    self._error = error
                finally:
                    self._loading = 0
            raise self._failure("loading its library", self._error) from self._error

    def find(self, name: str) -> Any:
        """Return an attribute of `torch.<name>` that is not there yet."""
        if name.startswith("__"):  # Python asks every module for some
            return self._refuse(name)
        stub = self.stub()
        if hasattr(stub, name):
            return getattr(stub, name)
        if name in _OFFERS and not (self.is_loaded and name in _UNTIL_LOADED):
            return _OFFERS[name](self)
        if not name.startswith("_") and not self._is_loading():
            self.load()
            if name in self.module.__dict__:
                return self.module.__dict__[name]
            # the module may answer by a function of its own, and import what it answers with
            return getattr(sys.modules[self._runtime], name) if self._runtime else self._refuse(name)
        return self._refuse(name)

    def stub(self) -> ModuleType:
        """Return the plugin's stub, imported at the first need."""
        if self._stub is None:
            name = str(self.device.stub)
            try:
                self._stub = importlib.import_module(name)
            except (Exception, SystemExit) as error:
                raise self._failure(f"importing {name}", error) from error
        return self._stub

    def seed(self, seed: int) -> None:
        """Seed all of the device's generators, once there are some."""
        self._seed = seed

    def _is_loading(self) -> bool:
        """Whether this thread is loading the library."""
        return self._loading == threading.get_ident()

    def _run_loader(self) -> ModuleType | None:
        loader = self.device.loader
        if isinstance(loader, str):
            module, _, function = loader.partition(":")
            loader = getattr(importlib.import_module(module), function)
        return loader()

    def _fill(self, runtime: ModuleType | None) -> None:
        if runtime is not None:
            own = vars(DeviceModule)
            for name, value in vars(runtime).items():
                if name in _ASKED or not (name.startswith("_") or name in own or name == "annotations"):
                    setattr(self.module, name, value)
            self._runtime = runtime.__name__
        self.is_loaded = True
        if self._seed is not None and (seed_all := vars(self.module).get("manual_seed_all")):
            seed_all(self._seed)

    def _refuse(self, name: str) -> Any:
        raise AttributeError(
            f"module 'torch.{self.device.name}' has no attribute {name!r}", name=name, obj=self.module
        )

    def _failure(self, doing: str, error: BaseException) -> PluginError:
        device = self.device
        known_as = device.plugin or device.name
        return PluginError(
            f"using the device {device.name} of {device.source}: {doing} raised {type(error).__name__}: {error}. "
            f"Expected a library that loads. `opkit plugins why {known_as}` shows more; start a new process once it is "
            "mended."
        )


def _generator(lazy: Lazy) -> Callable[..., Any]:
    def Generator(device: Any = None) -> Any:
        """Return a generator of random numbers of the device."""
        import torch

        lazy.load()
        return torch.Generator(_full(lazy, device))

    return Generator


def _stream(lazy: Lazy) -> Callable[..., Any]:
    def Stream(device: Any = None, *, priority: int = 0) -> Any:
        """Return a new stream of the device."""
        import torch

        lazy.load()
        return torch.Stream(_full(lazy, device), priority=priority)

    return Stream


def _event(lazy: Lazy) -> Callable[..., Any]:
    def Event(device: Any = None, *, enable_timing: bool = False, blocking: bool = False) -> Any:
        """Return an event of the device's streams."""
        import torch

        lazy.load()
        return torch.Event(_full(lazy, device), enable_timing=enable_timing, blocking=blocking)

    return Event


def _full(lazy: Lazy, device: Any) -> Any:
    """Return a torch.device of this type: the current one where none is named."""
    import torch

    if device is None:
        return torch.device(lazy.device.name, lazy.module.current_device())
    return torch.device(lazy.device.name, device) if isinstance(device, int) else torch.device(device)


def _context(lazy: Lazy) -> type:
    class device:  # noqa: N801 -- as in torch.cuda
        """Use another device of this type inside a `with` block."""

        def __init__(self, device: Any) -> None:
            self.index = _full(lazy, device).index

        def __enter__(self) -> None:
            self.before = lazy.module.current_device()
            if self.index is not None:
                lazy.module.set_device(self.index)

        def __exit__(self, *raised: object) -> None:
            lazy.module.set_device(self.before)

    return device


# What every device has, until its library's module says it itself.
_OFFERS: dict[str, Callable[[Lazy], Any]] = {
    "is_available": lambda lazy: lambda: lazy.stub().device_count() > 0,
    "current_device": lambda lazy: lambda: 0,
    "manual_seed": lambda lazy: lazy.seed,
    "manual_seed_all": lambda lazy: lazy.seed,
    "_is_in_bad_fork": lambda lazy: lambda: False,
    "device": _context,
    "Generator": _generator,
    "Stream": _stream,
    "Event": _event,
}

# Seeds are kept for the library; one that cannot be seeded must not look as if it could.
_UNTIL_LOADED = ("manual_seed", "manual_seed_all")

_owner: Device | None = None


def owner() -> Device | None:
    """Return the device of a plugin that has torch's slot through opkit."""
    return _owner


def shadowed_by(name: str) -> str:
    """Return what keeps the device `name` from torch's slot, in words; nothing where it is free or has it."""
    slot = _torch_device.slot()
    if slot in (_torch_device.FREE, name):
        return ""
    return f"{slot} of {_owner.source}" if _owner else f"{slot}, which another package has set up"


def install(device: Device) -> None:
    """Let torch know the device. Its library is loaded at the first tensor on it.

    Raises:
        PluginError: another device has torch's slot, or torch has something else of that name.
    """
    global _owner
    import torch

    with sources.lock:
        doing = f"setting up the device {device.name} of {device.source}"
        if _owner is not None and (_owner.name, _owner.source) == (device.name, device.source):
            return
        if shadow := shadowed_by(device.name):
            raise PluginError(
                f"{doing}: torch's slot for devices of plugins has {shadow}; expected it to be free, as there is only "
                f"one. Start a new process with OPKIT_DEVICE={device.name}."
            )
        if hasattr(torch, device.name):
            raise PluginError(
                f"{doing}: there is a torch.{device.name} already; expected a name that torch does not have. Rename "
                "the device, or uninstall what brings the other one."
            )
        _torch_device.take_slot(device.name, DeviceModule(device))
        _owner = device
