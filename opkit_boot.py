"""What torch calls at the end of `import torch`, and whether there is a device of a plugin to set up then.

Every `import torch` comes through here, so this imports nothing of opkit. It reads one small file that says which
folders of `sys.path` hold plugins with a device, and leaves it at that where none is wanted. What is left is the part
of `opkit.plugins.boot`: to look anew at folders that changed, and to set a device up. Never raises: what went wrong
is kept in `problem`, for `opkit plugins doctor`.
"""

from __future__ import annotations

import marshal
import os
import sys
import zlib
from collections.abc import Iterator, Sequence

problem: BaseException | None = None  # what ended the last call

Probe = Sequence[tuple[str, str]]  # what must exist: pairs of a kind and a name

FOLDERS = 64  # that are kept in the file
_OFF = ("0", "false", "no", "off", "ops")


def boot() -> None:
    """Set up the device that is wanted, if one is. The entry point of the group `torch.backends`."""
    global problem
    problem = None
    try:
        if _is_launcher():
            from opkit.plugins import loader

            loader.states()  # tells the ranks what it uses, which they must use too
        if os.environ.get("OPKIT_AUTOLOAD", "").strip().lower() not in _OFF and is_wanted(installed()):
            from opkit.plugins import boot as slow

            slow.boot()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        problem = error
        if os.environ.get("OPKIT_DEVICE"):
            _warn(f"opkit: {error}")


def _is_launcher() -> bool:
    """Whether this process starts the ranks of a job."""
    words = [os.path.basename(word) for word in sys.orig_argv[1:4]]
    return "torchrun" in words or "torch.distributed.run" in words


def _warn(text: str) -> None:
    """Tell a user who chose a device why it is not there; an error where warnings are errors would be torch's."""
    import contextlib
    import warnings

    with contextlib.suppress(Warning):
        warnings.warn(text, RuntimeWarning, stacklevel=2)


def is_wanted(devices: Sequence[tuple[str, Probe]] | None) -> bool:
    """Whether one of the devices may have to be set up; None stands for folders that must be looked at anew.

    Each device is its name and its probe, whose kinds are file, variable and module.
    """
    if devices is None or os.environ.get("OPKIT_DEVICE"):  # where no plugin has the device, that is said
        return True
    return bool(devices) and (any(passes(probe) for _, probe in devices) or _is_configured())


def passes(probe: Probe) -> bool:
    """Whether all that a probe names exists; without a probe a device is set up only where it is chosen."""
    return bool(probe) and not missing(probe)


def missing(probe: Probe) -> list[str]:
    """Return in words what a probe does not find."""
    return [f"the {kind} {name}" for kind, name in probe if not _EXISTS[kind](name)]


def installed() -> list[tuple[str, Probe]] | None:
    """Return the devices of all plugins in `sys.path`, or None where a folder must be looked at anew."""
    try:
        data = read(path("devices"))
        known = {} if data is None else marshal.loads(data)
    except (OSError, ValueError, EOFError, TypeError):
        return None
    if not isinstance(known, dict):
        return None
    found: list[tuple[str, Probe]] = []
    for folder, changed in folders():
        changed_then, names_then, devices, watched = known.get(folder, (None, None, (), ()))
        if changed != changed_then:
            names = distributions(folder)
            # of an egg-info the name stays the same whatever is in it
            if names and (names != names_then or any(name.endswith(".egg-info") for name in names)):
                return None
            devices, watched = (devices, watched) if names else ((), ())
        if any(stamp(file) != before for file, before in watched):
            return None
        found += devices
    return found


def folder() -> str:
    """Return where processes leave for one another what they know of plugins; the same place after `os.chdir`."""
    chosen = os.environ.get("OPKIT_CACHE_DIR")
    root = (
        chosen
        or f"{os.environ.get('TORCH_EXTENSIONS_DIR') or os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/opkit"
    )
    if not root.startswith("/"):
        root = os.path.expanduser(root)
        root = _absolute.setdefault(root, os.path.abspath(root))
    return f"{root}/plugins"


_absolute: dict[str, str] = {}


def path(what: str) -> str:
    """Return the file in which processes of this environment keep what they found of `what`."""
    environment = f"{sys.prefix}\0{sys.version}".encode()
    return f"{folder()}/{what}-{zlib.crc32(environment):08x}"


def read(file: str) -> bytes | None:
    """Return what a file of this user's own has, or None where there is none.

    Raises:
        OSError: it is somebody else's.
    """
    try:
        opened = os.open(file, os.O_RDONLY | os.O_CLOEXEC)  # half of what `open` takes
    except OSError:
        return None
    try:
        about = os.fstat(opened)
        if about.st_uid != os.getuid():
            raise PermissionError(f"{file} is another user's")
        return os.read(opened, about.st_size)
    finally:
        os.close(opened)


def folders() -> Iterator[tuple[str, int]]:
    """Yield the folders of `sys.path` that exist, each with the time when something was put in or taken out."""
    for folder in dict.fromkeys(sys.path):
        folder = folder if folder.startswith("/") else os.path.abspath(folder)
        try:
            yield folder, os.stat(folder).st_mtime_ns
        except OSError:
            pass


def distributions(folder: str) -> list[str]:
    """Return the names of the folders that installers keep in a folder of `sys.path`."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.name.endswith((".dist-info", ".egg-info")))
    except OSError:
        return []


def stamp(file: str) -> tuple[int, int] | None:
    """Return what changes when a file does, or None where there is none."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _is_configured() -> bool:
    """Whether the user's or the project's file may choose a device: whether they have the words for it."""
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    if _has(os.path.join(home, "opkit", "config.toml"), b"device"):
        return True
    folder, inner = os.getcwd(), ""
    while folder != inner:
        project = os.path.join(folder, "pyproject.toml")
        if os.path.isfile(project):
            return _has(project, b"tool.opkit", b"device")
        folder, inner = os.path.dirname(folder), folder
    return False


def _has(file: str, *words: bytes) -> bool:
    try:
        with open(file, "rb") as opened:
            text = opened.read()
    except OSError:
        return False
    return all(word in text for word in words)


def _file_exists(pattern: str) -> bool:
    if not any(letter in pattern for letter in "*?["):
        return os.path.exists(os.path.expanduser(pattern))
    import glob

    return bool(glob.glob(os.path.expanduser(pattern)))


def _module_exists(name: str) -> bool:
    """Whether a module could be imported; only the outermost package is looked for, as the others would be imported."""
    from importlib.machinery import PathFinder

    return name in sys.modules or PathFinder.find_spec(name.partition(".")[0]) is not None


_EXISTS = {
    "file": _file_exists,
    "variable": lambda name: bool(os.environ.get(name)),
    "module": _module_exists,
}
