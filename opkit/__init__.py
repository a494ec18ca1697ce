"""opkit: write a PyTorch operator once, use it everywhere.

    import opkit, torch
    from torch import Tensor

    @opkit.op("demo::scale", shapes="*b n, n -> *b n")
    def scale(x: Tensor, factor: Tensor) -> Tensor:
        return x * factor

    scale.register_autograd(opkit.from_reference)
    scale.register_kernel("cpu", opkit.cpp.kernel("scale.cpp"))   # compiled on first use
    torch.compile(lambda x, f: scale(x, f), fullgraph=True)(torch.ones(2, 3), torch.ones(3))

Importing opkit imports neither torch nor a plugin, and compiles nothing: names are loaded when used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from opkit import _sources as _sources
from opkit import errors as errors
from opkit.errors import ArgumentError as ArgumentError
from opkit.errors import BackendError as BackendError
from opkit.errors import BuildError as BuildError
from opkit.errors import ConfigError as ConfigError
from opkit.errors import DeviceError as DeviceError
from opkit.errors import DtypeError as DtypeError
from opkit.errors import DuplicateOpError as DuplicateOpError
from opkit.errors import FrozenError as FrozenError
from opkit.errors import GradientError as GradientError
from opkit.errors import NoKernelError as NoKernelError
from opkit.errors import OpkitError as OpkitError
from opkit.errors import OpNotFoundError as OpNotFoundError
from opkit.errors import OutputError as OutputError
from opkit.errors import PluginError as PluginError
from opkit.errors import RegistrationError as RegistrationError
from opkit.errors import SchemaError as SchemaError
from opkit.errors import ShapeError as ShapeError
from opkit.errors import VmapError as VmapError

if TYPE_CHECKING:
    from opkit import bench as bench
    from opkit import cpp as cpp
    from opkit import plugins as plugins
    from opkit import testing as testing
    from opkit._adopt import adopt as adopt
    from opkit._compiled import decompositions as decompositions
    from opkit._declare import declare as declare
    from opkit._frozen import freeze as freeze
    from opkit._inline import inline as inline
    from opkit._make import op as op
    from opkit._op import Op as Op
    from opkit._prepare import prepare as prepare
    from opkit._registry import find as find
    from opkit._registry import get as get
    from opkit._registry import list_ops as list_ops
    from opkit._tune import tune as tune
    from opkit.dispatch.preference import require as require
    from opkit.dispatch.preference import use_backend as use_backend
    from opkit.dispatch.select import Explanation as Explanation
    from opkit.transforms.recompute import from_reference as from_reference

__version__ = "0.1.0"

_LAZY = {
    "Explanation": "opkit.dispatch.select",
    "Op": "opkit._op",
    "adopt": "opkit._adopt",
    "bench": "",
    "cpp": "",
    "declare": "opkit._declare",
    "decompositions": "opkit._compiled",
    "find": "opkit._registry",
    "freeze": "opkit._frozen",
    "from_reference": "opkit.transforms.recompute",
    "get": "opkit._registry",
    "inline": "opkit._inline",
    "list_ops": "opkit._registry",
    "op": "opkit._make",
    "plugins": "",
    "prepare": "opkit._prepare",
    "require": "opkit.dispatch.preference",
    "testing": "",
    "tune": "opkit._tune",
    "use_backend": "opkit.dispatch.preference",
}

# What other programs ask for, and users do not: IPython for `%load_ext opkit`.
_ASKED = {"load_ipython_extension": "opkit.notebook"}

__all__ = sorted(
    [*_LAZY, "errors", *(n for n, v in vars(errors).items() if isinstance(v, type) and n.endswith("Error"))]
)


def __getattr__(name: str) -> Any:
    if name in _ASKED:
        return getattr(importlib.import_module(_ASKED[name]), name)
    if name not in _LAZY:
        raise AttributeError(f"module 'opkit' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name] or f"opkit.{name}")
    value = getattr(module, name) if _LAZY[name] else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _built_in() -> None:
    importlib.import_module("opkit_kernels")


def _plugins() -> None:
    importlib.import_module("opkit.plugins.loader").load_when_needed()


def _advice(op: str, device: str, dtype: str | None, lone: bool) -> str:
    found: str = importlib.import_module("opkit.plugins.advice").for_op(op, device, dtype, lone=lone)
    return found


_sources.install(_built_in, ops_only=True)
_sources.install(_plugins)
_sources.advise(_advice)
