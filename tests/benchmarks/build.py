"""What a kernel costs until it can be called: the tiers of opkit against a bare compiler, torch and tvm-ffi.

One kernel with two outputs, an elementwise one and the sums of rows, in every form. Cold builds count CPU
seconds of this process and its compilers, which other work on the machine changes least. Warm ones are a
fresh process each, imports done, from the call to something that can be called.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import _forms as forms
import torch
from _measure import medians, report, table

COLD = 5  # repeats of what takes under a second
WARM = 9
MANY = 16
HERE = Path(__file__).parent


def cpu_seconds() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def cold(build: Callable[[Path], object], repeats: int = 1) -> float:
    """Return the CPU seconds of `build` in an empty folder, the median of `repeats`."""
    found = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            start = cpu_seconds()
            build(Path(folder))
            found.append(cpu_seconds() - start)
    return statistics.median(found)


def fresh(form: str, folder: Path) -> dict[str, float]:
    """Run one form in a process of its own and return what it measured."""
    environment = {
        **os.environ,
        "OPKIT_CACHE_DIR": str(folder / "opkit"),
        "TVM_FFI_CACHE_DIR": str(folder / "tvm"),
    }
    environment["TORCH_EXTENSIONS_DIR"] = str(folder / "torch")
    command = [sys.executable, str(HERE / "_forms.py"), form]
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, text=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def cold_builds(folder: Path) -> None:
    print("cold builds, about two minutes ...", flush=True)
    seconds = {"bare g++ -shared": cold(forms.bare, COLD)}
    for name, form in (
        ("opkit light, first on a machine", "light"),
        ("opkit light", "light again"),
        ("opkit stable, first on a machine", "stable"),
        ("opkit stable, second on a machine", "stable second"),
        ("opkit stable", "stable again"),
    ):
        seconds[name] = statistics.median(fresh(form, folder / f"{form}{n}")["cpu"] for n in range(COLD))
    fresh("headers", folder / "aten")  # torch's headers, precompiled once a machine
    runs = []
    for _ in range(3):
        runs.append(fresh("aten", folder / "aten")["cpu"])
        for built in (folder / "aten" / "opkit" / "lib").glob("fused*"):
            shutil.rmtree(built)
    seconds["opkit load_inline"] = statistics.median(runs)
    if forms.tvm_ffi_is_here():
        seconds["tvm-ffi"] = statistics.median(fresh("tvm", folder / f"tvm{n}")["cpu"] for n in range(3))
    seconds["torch load_inline"] = fresh("torch", folder / "torch")["cpu"]
    table(
        "cold build of one kernel, CPU seconds",
        ("", "CPU s", "of bare g++", "faster than torch's load_inline"),
        [
            (
                name,
                f"{s:.3f}",
                f"{s / seconds['bare g++ -shared']:.1f}x",
                f"{seconds['torch load_inline'] / s:.0f}x"
                if s < 2
                else f"{seconds['torch load_inline'] / s:.1f}x",
            )
            for name, s in seconds.items()
        ],
    )


def warm_loads(folder: Path) -> None:
    candidates = {"opkit light": "light", "opkit stable": "stable", "torch load_inline": "torch"}
    if forms.tvm_ffi_is_here():
        candidates["tvm-ffi"] = "tvm"
    times: dict[str, list[dict[str, float]]] = {name: [] for name in candidates}
    for form in candidates.values():
        fresh(form, folder)
    for _ in range(WARM):
        for name, form in candidates.items():
            times[name].append(fresh(form, folder))
    rows = {
        what: {name: statistics.median(t[key] for t in found) for name, found in times.items()}
        for what, key in (("call to callable", "wall"), ("the first result", "first call"))
    }
    report("a kernel that is built, in a fresh process", rows, unit=1e3, name="ms")


def calls(folder: Path) -> None:
    os.environ["OPKIT_CACHE_DIR"] = str(folder / "opkit")
    light, full = forms.light_entry(), forms.library_entry()
    x = torch.randn(4, 8)
    report(
        "one call through torch's dispatcher, 4x8 floats",
        {
            "two outputs": medians(
                {"TORCH_LIBRARY": lambda: full(x, 2.0), "opkit light": lambda: light(x, 2.0)}
            )
        },
    )


def many_at_once(folder: Path) -> None:
    rows = []
    for number in range(3):
        one = forms.at_once(1, folder / f"one{number}")
        many = forms.at_once(MANY, folder / f"many{number}")
        rows.append((one[0], many[0], many[1]))
    one_s, many_s = statistics.median(r[0] for r in rows), statistics.median(r[1] for r in rows)
    ratio = statistics.median(r[1] / r[0] for r in rows)
    table(
        f"{MANY} processes at once want one cold kernel, stable tier",
        ("one process, s", f"{MANY} processes, s", "ratio", "compiles"),
        [(f"{one_s:.2f}", f"{many_s:.2f}", f"{ratio:.2f}x", str(max(r[2] for r in rows)))],
    )


def two_hundred(folder: Path) -> None:
    fresh("200", folder)
    found = [fresh("200", folder)["wall"] for _ in range(5)]
    table("200 cached kernels loaded by one process", ("seconds",), [(f"{statistics.median(found):.3f}",)])


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="opkit-bench-"))
    try:
        warm_loads(folder / "warm")
        two_hundred(folder / "200")
        many_at_once(folder / "at-once")
        calls(folder / "calls")
        cold_builds(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    started = time.monotonic()
    main()
    print(f"{time.monotonic() - started:.0f} s in all")
