"""The core as a library: what it must fit, where it is found, how it is built, and that it once did not build.

    opkit_core-<key>     in the cache, or in `prebuilt/` of a wheel

The key is made of the core's sources and of the torch and the Python that it is for. It has no compiler, so that a
machine without one finds what another one built. Who loads the core, and when, is not decided here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import platform
import re
import sys
import sysconfig
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader
from pathlib import Path
from types import ModuleType

from opkit.errors import BuildError

NAME = "opkit_core"
LABEL = "opkit's native core"
SOURCES = Path(__file__).parent / "core"
PREBUILT = Path(__file__).parent / "prebuilt"
MACHINES = ("x86_64", "aarch64")

_FORMAT = 1  # raise it when what is built from the same sources changes
_FLAGS = ("-O2", "-DNDEBUG", "-fvisibility=hidden")
_FAILURE = "failure.json"


def unsupported() -> str | None:
    """Return why this Python cannot have the core, or None."""
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "this Python is built without the GIL (free threading), on which opkit's native core counts"
    if sys.implementation.name != "cpython":
        return f"opkit's native core is an extension of CPython, and this is {sys.implementation.name}"
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        return (
            f"opkit's native core is for Linux on {' and '.join(MACHINES)}, and this is {sys.platform} on "
            f"{platform.machine()}"
        )
    return None


def name() -> str:
    """Return the name of the library that fits this process, and no other one."""
    return f"{NAME}-{_key()}"


def _key() -> str:
    import torch

    from opkit.cpp import cache

    files = sorted(path for path in SOURCES.rglob("*") if path.suffix in (".cpp", ".h"))
    return cache.digest(
        _FORMAT,
        _FLAGS,
        [(str(path.relative_to(SOURCES)), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files],
        # The commit tells two builds of one version apart.
        (torch.__version__, torch.version.git_version, torch.version.cuda, torch.version.hip),
        torch.compiled_with_cxx11_abi(),
        (sys.platform, platform.machine(), EXTENSION_SUFFIXES[0]),
    )


def carried() -> Path | None:
    """Return the library that the wheel carries, if it carries one that fits."""
    from opkit.cpp import prebuilt

    return prebuilt.find(PREBUILT, name(), ()) if PREBUILT.is_dir() else None


def cached() -> Path | None:
    """Return the library that is in a cache, if there is one that fits.

    Raises:
        BuildError: somebody else may write the cache.
    """
    from opkit.cpp import cache

    return cache.find(name())


def build() -> Path:
    """Return the library in the cache, else a new one, which one process builds for all.

    Raises:
        BuildError: it does not compile, or there is no compiler.
        FrozenError: nothing may be built now.
    """
    if reason := unsupported():
        raise BuildError(
            f"building {LABEL}: {reason}. Python runs the ops here; there is nothing to be built."
        )
    from opkit.cpp import _aten, cache

    def run(work: cache.Workspace) -> Path:
        sources = sorted(SOURCES.glob("unit_*.cpp"))
        job = _aten.Job.of(NAME, sources, _FLAGS, None, None, [SOURCES], None, False, is_module=True)
        return dataclasses.replace(job, title=LABEL).build(work)

    path = cache.obtain(_key, label=NAME, build=run)
    forget_failure()
    return path


def load(path: Path) -> ModuleType:
    """Return the module that the library at `path` is.

    Raises:
        BuildError: it does not load here, or was compiled with the headers of another torch.
    """
    import torch

    full = f"opkit.dispatch.native.{NAME}"
    spec = importlib.util.spec_from_file_location(full, path, loader=ExtensionFileLoader(full, str(path)))
    if spec is None or spec.loader is None:
        raise AssertionError(path)
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise BuildError(
            f"loading {LABEL} from {path}: {error}; expected a library for torch {torch.__version__} and Python "
            f"{platform.python_version()}. Remove it, and build it again with `opkit build --native`."
        ) from error
    found, expected = module.torch_version, _release(torch.__version__)
    if _release(found) != expected:
        raise BuildError(
            f"loading {LABEL} from {path}: it was compiled with the headers of torch {found}; expected those of "
            f"{expected}. Look for headers of another torch in CPATH and CPLUS_INCLUDE_PATH, remove the library, and "
            "build it again with `opkit build --native`."
        )
    sys.modules[full] = module
    return module


def _release(version: str) -> str:
    """Return what of a version the headers say, too: no commit, no local part."""
    found = re.match(r"\d+(\.\d+)*", version)
    return found[0] if found else version


# ---------------------------------------------------------------- failures


@dataclasses.dataclass(frozen=True)
class Failure:
    """That the core did not build: of these sources, for this torch, with this compiler."""

    message: str
    log: str | None
    compiler: str | None

    def first_told(self) -> bool:
        """Whether nobody has been told of it yet; who asks tells."""
        with contextlib.suppress(OSError):
            os.close(os.open(_failed_folder() / "told", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            return True
        return False


def remember_failure(error: BuildError) -> None:
    """Have no process try again before the sources, torch or the compiler are others.

    It lies among what failed builds leave, and is forgotten with them, after a week.
    """
    from opkit.cpp import compilers

    cxx = compilers.find_cxx()
    told = {
        "message": str(error),
        "log": str(error.log_path) if error.log_path else None,
        "compiler": cxx.version if cxx else None,
    }
    folder = _failed_folder()
    with contextlib.suppress(OSError):  # no room: the next process tries again
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        (folder / "told").unlink(missing_ok=True)
        unfinished = folder / f"{_FAILURE}.{os.getpid()}"
        unfinished.write_text(json.dumps(told))
        os.replace(unfinished, folder / _FAILURE)


def find_failure() -> Failure | None:
    """Return how building the core failed, where trying again would be no different."""
    from opkit.cpp import compilers

    try:
        told = json.loads((_failed_folder() / _FAILURE).read_bytes())
        failure = Failure(told["message"], told["log"], told["compiler"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    cxx = compilers.find_cxx()
    return failure if failure.compiler == (cxx.version if cxx else None) else None


def forget_failure() -> None:
    """Let processes try again."""
    with contextlib.suppress(OSError):
        (_failed_folder() / _FAILURE).unlink(missing_ok=True)


def _failed_folder() -> Path:
    from opkit.cpp import cache

    return cache.root() / "failed" / name()
