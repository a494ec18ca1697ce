"""Opening a native library in another process first, where a crash or a hang hurts nobody.

What became of it is remembered by the content of the file, for this torch, Python and kind of processor: the two
or so seconds are spent once for a library. Of several processes that want to know, one finds out. What the
library would define in torch's dispatcher is found on the way.

A library that cannot be opened by itself (a symbol is missing, say) has passed: opening it raises, and
that is no harm. Libraries that a library is linked against are not part of what is remembered.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import IO, Any, Literal, NamedTuple

from opkit.cpp import _manifest
from opkit.plugins import namespaces, records

LIMIT = 60.0  # seconds that opening may take, once torch is imported

_START = 300.0  # seconds that the process may take until then
_READY = b"ready\n"
_TIMED_OUT = "Timeout ("  # what faulthandler writes first
_SAID = 2000  # characters of stderr that are kept
_CHILD = (
    "import json, sys; job = json.loads(sys.argv[1]); sys.path[:] = job['sys_path']; "
    "from opkit.plugins import trial; trial.run(job)"
)


class Trial(NamedTuple):
    """What became of a library: `detail` is a signal, a time or an error, `said` what it left on stderr."""

    outcome: Literal["passed", "crashed", "hung", "untried"]
    detail: str = ""
    said: str = ""
    namespaces: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()

    @property
    def is_harmful(self) -> bool:
        return self.outcome in ("crashed", "hung")


def of(path: str, *, plugin: str, module: str = "", after: Sequence[str] = (), limit: float = LIMIT) -> Trial:
    """Return what becomes of opening the library at `path`, from memory or by a trial.

    Args:
        path: the library.
        plugin: whose it is, for `forget`.
        module: the name it is imported by, where it is an extension module.
        after: libraries of the plugin that are opened before it.
        limit: seconds until it counts as hung.
    """
    import torch

    try:
        contents = [_content(library) for library in (path, *after)]
    except OSError as error:  # opening it will say so, too
        return Trial("untried", f"it cannot be read ({error.strerror or error})")
    here = (
        torch.__version__,
        sys.version,
        torch.backends.cpu.get_cpu_capability(),
    )  # a cache may be of many machines
    what = (*contents, module, *here)
    file = records.path("trials", f"{records.key('library', *what)}.json")
    if known := _parse(records.read(file)):
        return known
    with records.turn(file):
        if known := _parse(records.read(file)):
            return known
        found = _try(path, module, after, limit)
        if found.outcome != "untried":
            records.write(file, {"plugin": plugin, "path": path, **found._asdict()})
        return found


def forget(plugin: str) -> bool:
    """Have the libraries of a plugin tried again; return whether there were some."""
    folder, found = records.path("trials"), False
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            file = os.path.join(folder, name)
            if name.endswith(".json") and records.read(file).get("plugin") == plugin:
                with contextlib.suppress(OSError):
                    os.unlink(file)
                    found = True
    return found


def run(job: Mapping[str, Any]) -> None:
    """Open a library in this process, which ends then; see `_try` for the job."""
    import faulthandler
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is what this is for
    with open(job["report"], "wb", buffering=0) as report:
        import torch  # noqa: F401

        report.write(_READY)
        faulthandler.enable()
        faulthandler.dump_traceback_later(job["limit"], exit=True)
        error = ""

        def open_library() -> None:
            nonlocal error
            try:
                for path in job["after"]:
                    _open(path, "")
                _open(job["path"], job["module"])
            except Exception as raised:
                error = f"{type(raised).__name__}: {raised}"

        defined = namespaces.defined_by(job["path"], open_library)
        report.write(json.dumps({"error": error, **defined._asdict()}).encode())
    os._exit(0)  # what it does when a process ends is not asked for


def _open(path: str, module: str) -> None:
    import ctypes
    import importlib.machinery
    import importlib.util

    if not module:
        ctypes.CDLL(path)
        return
    loader = importlib.machinery.ExtensionFileLoader(module, path)
    spec = importlib.util.spec_from_file_location(module, path, loader=loader)
    assert spec is not None
    loader.exec_module(importlib.util.module_from_spec(spec))


def _try(path: str, module: str, after: Sequence[str], limit: float) -> Trial:
    if not sys.executable or getattr(sys, "frozen", False):
        return Trial("untried", "this process was not started by a Python that can be started again")
    with tempfile.TemporaryDirectory(prefix="opkit-trial-") as folder, tempfile.TemporaryFile() as errors:
        report = os.path.join(folder, "report")
        job = {
            "path": os.path.abspath(path),
            "module": module,
            "after": [os.path.abspath(library) for library in after],
            "limit": limit,
            "report": report,
            "sys_path": [os.path.abspath(entry) for entry in sys.path],
        }
        try:
            code = _wait(job, errors, limit + _START)
        except OSError as error:
            return Trial("untried", f"no process could be started ({error.strerror or error})")
        try:
            with open(report, "rb") as stream:
                said = stream.read()
        except OSError:
            said = b""
        errors.seek(0)
        text = errors.read().decode(errors="replace").strip()
    return _judge(code, said, text, limit)


def _wait(job: Mapping[str, Any], errors: IO[bytes], limit: float) -> int | None:
    """Run the trial and return its exit code, None where it had to be ended.

    Raises:
        OSError: there can be no process.
    """
    # Nothing else of opkit's or torch's plugins: the library alone is on trial.
    environment = {**os.environ, "OPKIT_AUTOLOAD": "0", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD, json.dumps(job)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        env=environment,
        start_new_session=True,
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(OSError):  # and what it started
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _judge(code: int | None, report: bytes, text: str, limit: float) -> Trial:
    said = text[-_SAID:]
    if not report.startswith(_READY):  # torch itself was not there: the library has nothing to do with it
        return Trial("untried", "the process for it did not start", said)
    if code is None or _TIMED_OUT in text:
        return Trial("hung", f"it was not open after {limit:g} s", said)
    try:
        found = json.loads(report[len(_READY) :])
        names = tuple(found["namespaces"]), tuple(found["ops"])
    except (ValueError, KeyError, TypeError):
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return Trial("crashed", f"the process ended {how}", said)
    return Trial("passed", found["error"], "", *names)


def _parse(content: Mapping[str, Any]) -> Trial | None:
    try:
        names = tuple(content["namespaces"]), tuple(content["ops"])
        return Trial(content["outcome"], content["detail"], content["said"], *names)
    except (KeyError, TypeError):
        return None


def _content(path: str) -> str:
    """Return the hash of a file's content, which is read again only where size or time of the file changed.

    Raises:
        OSError: it cannot be read.
    """
    real = os.path.realpath(path)
    file = records.path("hashes", f"{records.key(os.path.basename(real), real)}.json")
    with contextlib.suppress(TypeError):
        known, check = _manifest.Record(**records.read(file)), _manifest.Check()
        if check.holds([known]):
            if check.found_other_times:
                records.write(file, vars(known))
            return known.sha256
    record = _manifest.Record.of(real, real)
    records.write(file, vars(record))
    return record.sha256
