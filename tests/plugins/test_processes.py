"""Plugins in child processes: the same ones as in the parent, and none that does not survive a fork."""

from __future__ import annotations

import os
import sys

import pytest

CODE = """
    def kernel():
        return lambda x: x + 1

    def register(registry): ...
"""
KERNEL = """
    [[kernels]]
    op = "site::mine"
    device = "cpu"
    factory = "fast:kernel"
"""

MAIN = """
import multiprocessing, os, sys
import opkit

def look(change):
    os.environ.update(change)
    try:
        opkit.list_ops()
    except opkit.PluginError as error:
        print(error, flush=True)
    else:
        print([(p.name, p.status) for p in opkit.plugins.list()], flush=True)

if __name__ == "__main__":
    opkit.list_ops()
    context = multiprocessing.get_context(sys.argv[1])
    for change in ({}, {"OPKIT_PLUGINS_DENY": "fast"}):
        child = context.Process(target=look, args=(change,))
        child.start()
        child.join()
"""


def script(site, tmp_path, text, *arguments, **environment):
    path = tmp_path / "main.py"
    path.write_text(text)
    run = (
        f"import subprocess, sys; subprocess.run([sys.executable, {str(path)!r}, *{arguments!r}], check=True)"
    )
    return site.run(run, **environment).splitlines()


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_children_use_what_their_parent_uses_or_raise(site, tmp_path, method):
    site.install("fast", CODE, manifest=KERNEL)
    same, other = script(site, tmp_path, MAIN, method)
    assert same == "[('fast', 'registered')]"
    assert other == (
        "finding plugins in a child process: only its parent has fast==1.0; expected the same in both. Give the child "
        "the parent's environment, working directory and sys.path, and install or remove nothing meanwhile."
    )


def test_a_plugin_that_only_the_child_has_is_named(site):
    site.install("fast", CODE, manifest=KERNEL)
    code = """
        import opkit
        try:
            opkit.list_ops()
        except opkit.PluginError as error:
            print(str(error).partition(";")[0])
    """
    rank = {"TORCHELASTIC_RUN_ID": "none", "OPKIT_PLUGINS_PARENT": f"{sys.prefix}|numb==1.0"}
    expected = "finding plugins in a child process: only this process has fast==1.0 and only its parent has numb==1.0\n"
    assert site.run(code, **rank) == expected


def test_other_programs_go_their_own_way(site):
    site.install("fast", CODE, manifest=KERNEL)
    code = "import opkit; opkit.list_ops(); print([p.status for p in opkit.plugins.list()])"
    assert site.run(code, OPKIT_PLUGINS_PARENT=f"{sys.prefix}|numb==1.0") == "['registered']\n"
    other = {"TORCHELASTIC_RUN_ID": "none", "OPKIT_PLUGINS_PARENT": "/other|numb==1.0"}
    assert site.run(code, **other) == "['registered']\n"


RANK = """
import os, sys
rank = os.environ["RANK"]
if rank == "1" and sys.argv[1:] == ["differ"]:
    os.environ["OPKIT_PLUGINS_DENY"] = "fast"
import opkit
try:
    opkit.list_ops()
except opkit.PluginError as error:
    print(rank, str(error).partition(";")[0], flush=True)
else:
    print(rank, [p.status for p in opkit.plugins.list()], flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "second"), [
    ("alike", "1 ['registered']"),
    ("differ", "1 finding plugins in a child process: only its parent has fast==1.0"),
])  # fmt: skip
def test_ranks_use_what_their_launcher_uses_or_raise(site, tmp_path, how, second):
    site.install("fast", CODE, manifest=KERNEL)
    site.install("host", "", points="[torch.backends]\nopkit = opkit_boot:boot\n")
    (tmp_path / "rank.py").write_text(RANK)
    words = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(tmp_path / "rank.py"),
        how,
    ]
    printed = site.run(f"import subprocess, sys; subprocess.run([sys.executable, *{words!r}], check=True)")
    assert sorted(printed.splitlines()) == ["0 ['registered']", second]


@pytest.mark.parametrize(("fork", "expected"), [("unsafe", "reference failed"), ("safe", "fast loaded")])
def test_what_was_loaded_before_a_fork_and_does_not_survive_it_is_left_out(site, fork, expected):
    site.install("fast", CODE, manifest=f"fork = {fork!r}\n" + KERNEL)
    printed = site.run("""
        import os
        import opkit, torch

        @opkit.op("site::mine", shapes="*b -> *b")
        def mine(x: torch.Tensor) -> torch.Tensor:
            return x + 1

        def look():
            with opkit.use_backend("fast"):
                print(mine.explain(torch.ones(2)).selected, opkit.plugins.list()[0].status, flush=True)

        def child():
            if os.fork() == 0:
                look()
                print(opkit.plugins.why("fast").splitlines()[3], flush=True)
                os._exit(0)
            os.wait()

        opkit.list_ops()
        child()
        look()
        child()
        look()
    """)
    lines = printed.splitlines()
    assert (lines[0], lines[2], lines[5]) == ("fast loaded",) * 3
    assert lines[3] == expected
    if fork == "unsafe":
        assert lines[4].startswith(
            "  what happened: it was loaded before this process was forked, which it does not survive"
        )


SLOW = {
    "importing": "import sys, time\nsys.slow = True\ntime.sleep(1)\ndef register(registry): ...\n",
    "calling": "import sys, time\ndef register(registry):\n    sys.slow = True\n    time.sleep(1)\n",
}
FORK = """
    import os, signal, sys, threading, time
    import opkit, torch
    from opkit.plugins import forks
    {before}
    thread = threading.Thread(target=opkit.list_ops)
    thread.start()
    while not hasattr(sys, "slow"):
        time.sleep(0.01)
    begun = time.monotonic()
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        opkit.list_ops()
        print([p.status for p in opkit.plugins.list()], opkit.plugins.why("slow"), flush=True)
        os._exit(0)
    print(os.waitpid(pid, 0)[1])
    thread.join()
    print([p.status for p in opkit.plugins.list()])
    pid = os.fork()  # the lock is free again, on both sides
    if pid == 0:
        threading.Thread(target=opkit.list_ops).start()
        os._exit(0)
    print(os.waitpid(pid, 0)[1])
"""


@pytest.mark.parametrize("doing", SLOW)
def test_a_fork_waits_for_a_plugin_that_another_thread_loads(site, doing):
    site.install("slow", SLOW[doing])
    printed = site.run(FORK.format(before="")).splitlines()
    assert printed[0].startswith("['loaded'] slow of slow 1.0: loaded")
    assert printed[-3:] == ["0", "['loaded']", "0"]
    assert os.environ.get("OPKIT_PLUGINS_PARENT") is None


@pytest.mark.parametrize("doing", SLOW)
def test_a_child_that_is_forked_all_the_same_does_without_the_plugin(site, doing):
    site.install("slow", SLOW[doing])
    printed = site.run(FORK.format(before="forks.PATIENCE = 0.1"), PYTHONWARNINGS="ignore")
    assert printed.startswith("['failed'] slow of slow 1.0: failed")
    assert f"another thread was {doing} slow:register when this process was forked" in printed
    assert "Start the process with spawn or forkserver" in printed
    assert printed.splitlines()[-3:] == ["0", "['loaded']", "0"]
