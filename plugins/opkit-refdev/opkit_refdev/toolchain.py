"""The toolchain of the device: source files in its language, which is C++ for the host with another suffix."""

from __future__ import annotations

from opkit.cpp import Toolchain, compilers
from opkit.cpp.toolchain import CPP, Options


def _command(options: Options) -> list[str]:
    return [*CPP.command(options), "-x", "c++"]


TOOLCHAIN = Toolchain(
    name="refdev",
    suffixes=(".refdev",),
    find=compilers.find_cxx,
    why_none=compilers.why_no_cxx,
    command=_command,
    flags=CPP.flags,
)
