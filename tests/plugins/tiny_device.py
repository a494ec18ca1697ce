"""A device of a few lines, in Python alone, for tests of how devices are set up: it makes tensors and nothing else."""

from __future__ import annotations

import textwrap

STUB = """
    print("stub")

    def device_count():
        return 1
"""

NATIVE = """
    import sys, torch

    class Hooks(torch._C._acc.PrivateUse1Hooks):
        def is_available(self): return True
        def has_primary_context(self, index): return True
        def is_built(self): return True

    class Guard(torch._C._acc.DeviceGuard):
        def type_(self): return torch._C._autograd.DeviceType.PrivateUse1

    library = torch.library.Library("aten", "IMPL")

    def empty(size, dtype=None, **options):
        return torch._C._acc.create_empty_tensor(size, dtype or torch.float32)

    def load():
        print("library")
        library.impl("empty.memory_format", empty, "PrivateUse1")
        torch._C._acc.register_python_privateuseone_hook(Hooks())
        torch._C._acc.register_python_privateuseone_device_guard(Guard())
        return sys.modules[__name__]

    def manual_seed_all(seed):
        print("seed", seed)

    def memory():
        return 7
"""


def install(site, name="tiny", *, stub=STUB, native=NATIVE, probe="", manifest=""):
    """Install the plugin `name` with a device of that name, and what torch calls where it is not installed."""
    device = f'[device]\nname = "{name}"\nstub = "{name}.stub"\nloader = "{name}.native:load"\n{probe}\n'
    site.install(name, "def register(registry): print('register')", manifest=manifest + device)
    for module, code in (("stub", stub), ("native", native)):
        (site.folder / name / f"{module}.py").write_text(textwrap.dedent(code))
    entry_point(site)


def entry_point(site):
    """Have torch call opkit, as it does where opkit is installed."""
    if not list(site.folder.glob("torch_calls-*")):
        site.install("torch-calls", "", points="[torch.backends]\nopkit_again = opkit_boot:boot\n")
