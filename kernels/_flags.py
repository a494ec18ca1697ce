"""How the CPU kernels are compiled: for this machine, with its widest vectors."""

import platform

CFLAGS: tuple[str, ...] = ("-march=native",)
if platform.machine() == "x86_64":
    # gcc takes 256 bits by default: cross_entropy is a quarter slower
    CFLAGS += ("-mprefer-vector-width=512",)
