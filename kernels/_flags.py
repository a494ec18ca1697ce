"""How the CPU kernels are compiled: for this machine, with fused multiply-add and its widest vectors."""

import platform

CFLAGS: tuple[str, ...] = ("-march=native", "-ffp-contract=fast")
if platform.machine() == "x86_64":
    CFLAGS += (
        "-mprefer-vector-width=512",
    )  # gcc takes 256 bits by default: cross_entropy is a quarter slower
