"""`opkit --print-completion`: what it prints completes commands, and what it says without shtab."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from opkit import cli


def test_completions_of_bash_know_commands_and_options():
    pytest.importorskip("shtab")
    script = subprocess.run(
        [sys.executable, "-m", "opkit", "--print-completion", "bash"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert script.returncode == 0, script.stderr
    function = re.search(r"^complete .*-F (\S+) opkit$", script.stdout, re.MULTILINE)[1]
    ask = """
        for words in "opkit do" "opkit info --sig"; do
            COMP_WORDS=($words) COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMPREPLY=()
            FUNCTION; echo "${COMPREPLY[@]}"
        done
    """.replace("FUNCTION", function)
    done = subprocess.run(["bash", "-c", script.stdout + ask], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["doctor", "--signature"], done.stderr


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_completions_are_written_for_other_shells(capsys, shell):
    pytest.importorskip("shtab")
    assert cli.main(["--print-completion", shell]) == 0
    assert "doctor" in capsys.readouterr().out


def test_completion_without_shtab_is_one_sentence(capsys, without):
    without("shtab")
    assert cli.main(["--print-completion", "bash"]) == 1
    assert capsys.readouterr().err == (
        "opkit: printing completions for bash: shtab is not installed, which writes them. Install it: "
        "pip install 'torch-opkit[cli]'.\n"
    )


def test_completion_for_another_shell_is_wrong_usage(capsys):
    assert cli.main(["--print-completion", "fish"]) == 2
    assert "invalid choice: 'fish'" in capsys.readouterr().err
