"""Plugins that are bad, each in its own way, with what opkit is to say of them."""

from __future__ import annotations

from typing import NamedTuple


class Animal(NamedTuple):
    """A plugin named as it is in ANIMALS, in the module `zoo_<name>`.

    Attributes:
        status: what becomes of it.
        why: what `opkit.plugins.why` says of it, as a part of the text.
        code: of its module, or of `__init__.py` where there is a manifest.
        manifest: what follows name and version in its manifest, or all of it where it is bytes.
        native: C or C++ code of a library beside the module, `zoo_<name>.so`.
        value: of its entry point, where it is not `zoo_<name>:register`.
        deaths: how many processes it ends before it is left out.
    """

    status: str
    why: str
    code: str | bytes = "def register(registry): ..."
    manifest: str | bytes | None = None
    native: str = ""
    value: str = ""
    deaths: int = 0


GOOD = {
    "good": """
        import torch

        def register(registry):
            @registry.op("zoo::double", shapes="*b -> *b")
            def double(x: torch.Tensor) -> torch.Tensor:
                return 2 * x

            registry.register_kernel("zoo::double", "cpu", lambda x: x + x, backend="good")
    """,
    "good_too": """
        def register(registry):
            registry.register_kernel("opkit::vector_add", "cpu", lambda x, y: x + y, backend="good_too", priority=99)
    """,
}

OPENS = """
    import ctypes, pathlib
    def register(registry):
        ctypes.CDLL(str(pathlib.Path(__file__).parent / f"{__name__}.so"))
"""
PROBED = "ZOO_DEVICE"  # the variable that the device is there by
AT_OPENING = "__attribute__((constructor)) static void start(void) { %s }"

ANIMALS = {
    # It raises.
    "raises": Animal(
        "failed", "raised ValueError: no licence", "def register(registry): raise ValueError('no licence')"
    ),
    "raises_early": Animal(
        "failed", "importing zoo_raises_early:register raised OSError", "raise OSError('no')"
    ),
    "raises_oddly": Animal(
        "failed",
        "raised Odd: its text cannot be shown",
        """
        class Odd(Exception):
            def __str__(self): raise KeyError
        def register(registry): raise Odd
        """,
    ),
    "exits": Animal("failed", "raised SystemExit: 3", "import sys\ndef register(registry): sys.exit(3)"),
    "interrupts": Animal(
        "failed", "raised KeyboardInterrupt", "def register(registry): raise KeyboardInterrupt"
    ),
    "recurses": Animal("failed", "raised RecursionError", "def register(registry): register(registry)"),
    # It is not what it says.
    "absent_module": Animal("failed", "names a module that is not there", value="zoo_nowhere:register"),
    "absent_function": Animal("failed", "has no attribute 'start'", value="zoo_absent_function:start"),
    "not_callable": Animal("failed", "is of type int", "register = 5"),
    "lacks_a_module": Animal(
        "failed", "Install what provides the module 'zoo_missing'", "import zoo_missing"
    ),
    "syntax_error": Animal("failed", "raised SyntaxError", "def register(registry:"),
    "not_utf8": Animal("failed", "raised SyntaxError", b"name = '\xff\xfe'\ndef register(registry): ...\n"),
    "circular": Animal(
        "failed",
        "raised ImportError: cannot import name 'late' from partially initialized module",
        """
        import sys
        import torch
        from zoo_circular import late
        """,
    ),
    "wrong_device": Animal(
        "failed",
        "torch knows no device 'gpu'",
        "def register(registry): registry.register_kernel('zoo::double', 'gpu', abs, backend='x')",
    ),
    "registers_twice": Animal(
        "failed",
        "zoo::twice",
        """
        import torch
        def f(x: torch.Tensor) -> torch.Tensor: return x
        def g(x: torch.Tensor, y: int) -> torch.Tensor: return x
        def register(registry):
            registry.op("zoo::twice", shapes="n -> n")(f)
            registry.op("zoo::twice", shapes="n -> n")(g)
        """,
    ),
    # Its manifest is wrong, or asks for something else.
    "broken_manifest": Animal("failed", "it is no TOML", manifest="ops = [["),
    "not_utf8_manifest": Animal("failed", "", manifest=b'schema = 1\nname = "\xff"\n'),
    "other_schema": Animal("failed", "schema", manifest=b"schema = 99\n"),
    "wrong_torch": Animal("rejected", "requires torch >=99", manifest='[requires]\ntorch = ">=99"'),
    "wrong_python": Animal("rejected", "requires python <3", manifest='[requires]\npython = "<3"'),
    "wrong_platform": Animal("rejected", "amiga", manifest='[requires]\nplatforms = ["amiga-68k"]'),
    "huge": Animal(
        "loaded",
        "",
        code=f"def f(): return abs\ndef register(registry): ...\ndata = {'x' * 2_000_000!r}",
        manifest=f"conflicts = {[f'none{n}' for n in range(5000)]}\n"
        + "\n".join(
            f'[[kernels]]\nop = "zoo::none{n}"\ndevice = "cpu"\nfactory = "zoo_huge:f"' for n in range(50)
        ),
    ),
    # It takes its time.
    "hangs": Animal(
        "failed",
        "had not come back after",
        """
        import time
        def register(registry):
            while True:
                try:
                    time.sleep(3600)
                except Exception:
                    pass
        """,
    ),
    "slow": Animal("loaded", "", "import time; time.sleep(0.3)\ndef register(registry): ..."),
    # It ends the process.
    "aborts": Animal(
        "quarantined",
        "loading zoo_aborts:register crashed the process (Aborted)",
        "import os\ndef register(registry): os.abort()",
        deaths=1,
    ),
    "exits_hard": Animal(
        "quarantined",
        "loading zoo_exits_hard:register ended the process, 2 times in a row",
        "import os\ndef register(registry): os._exit(7)",
        deaths=2,
    ),
    "segfaults": Animal(
        "quarantined",
        "crashed the process (Segmentation fault)",
        "import ctypes\ndef register(registry): ctypes.string_at(1)",
        deaths=1,
    ),
    # Its native library would.
    "native_crash": Animal(
        "quarantined", "crashes when it is opened: ", OPENS, native=AT_OPENING % "*(volatile int *)0 = 1;"
    ),
    "native_exit": Animal(
        "quarantined",
        "ended with exit code 3",
        OPENS,
        native="#include <unistd.h>\n" + AT_OPENING % "_exit(3);",
    ),
    "native_hang": Animal(
        "quarantined",
        "hangs when it is opened",
        OPENS,
        native="#include <unistd.h>\n" + AT_OPENING % "for (;;) pause();",
    ),
    "native_lacking": Animal(
        "failed",
        "undefined symbol: nowhere",
        OPENS,
        native="void nowhere(void); " + AT_OPENING % "nowhere();",
    ),
    "native_duplicate": Animal(
        "rejected",
        "would define once more the namespace 'zoo_taken' (TORCH_LIBRARY), which ",
        OPENS,
        native='#include <torch/library.h>\nTORCH_LIBRARY(zoo_taken, m) { m.def("f(Tensor x) -> Tensor"); }',
    ),
    # Its device does not work: the probe finds what it wants, and the library does not open.
    "broken_device": Animal(
        "failed",
        "loading its device zoo_device raised ImportError: no driver",
        "def device_count(): return 1\ndef load(): raise ImportError('no driver')\ndef register(registry): ...",
        manifest='[device]\nname = "zoo_device"\nstub = "zoo_broken_device"\nloader = "zoo_broken_device:load"\n'
        f'probe = {{ variable = "{PROBED}" }}',
    ),
    # It changes what is not its own.
    "patches": Animal(
        "loaded",
        "it replaced, without its manifest saying so: torch.nn.Module.to, torch.save",
        """
        import torch
        def register(registry):
            to, save = torch.nn.Module.to, torch.save
            torch.nn.Module.to = lambda self, *args, **kwargs: to(self, *args, **kwargs)
            torch.save = lambda *args, **kwargs: save(*args, **kwargs)
        """,
    ),
    "changes_dtype": Animal(
        "loaded",
        "it changed a setting, which was put back: torch.set_default_dtype, torch.manual_seed",
        """
        import torch
        def register(registry):
            torch.set_default_dtype(torch.float64)
            torch.manual_seed(0)
        """,
    ),
    "changes_folder": Animal(
        "loaded", "put back: os.chdir", "import os\ndef register(registry): os.chdir('/')"
    ),
    "spawns_threads": Animal(
        "loaded",
        "it left threads running that the end of the process waits for: zoo",
        """
        import threading, time
        def register(registry):
            threading.Thread(target=time.sleep, args=(1.5,), name="zoo").start()
        """,
    ),
    "prints": Animal(
        "loaded",
        "",
        "import sys\nprint('hello')\nprint('hello', file=sys.stderr)\ndef register(registry): ...",
    ),
}
