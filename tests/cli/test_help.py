"""Help of every command, its speed, and hints after typos."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys

import click
import pytest

from agent.cli.main import COMMANDS, cli
from tests.cli.conftest import Run

SUBCOMMANDS = [
    ["emulated", "up"],
    ["emulated", "wait"],
    ["emulated", "env"],
    ["emulated", "ps"],
    ["emulated", "flip-byte"],
    ["emulated", "fault"],
    *(["emulated", "fault", name] for name in ("add", "list", "clear", "xid", "device", "reserve")),
    *(["functions", name] for name in ("list", "show", "rm")),
    *(["node", name] for name in ("cordon", "uncordon", "drain")),
    ["usage", "reconcile"],
]


@pytest.mark.parametrize("words", [*([name] for name in COMMANDS), *SUBCOMMANDS], ids=" ".join)
def test_help_of_every_command(run: Run, words: list[str]) -> None:
    module = COMMANDS[words[0]].location.partition(":")[0]
    assert importlib.util.find_spec(module), f"{module} is in the list of commands"
    done = run(*words, "--help")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"Usage: hibernode {' '.join(words)}")
    assert max(map(len, done.out.splitlines())) <= 110


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("agent", "scheduler", "demo", "functions")])
def test_help_teaches_by_example(run: Run, name: str) -> None:
    out = run(name, "--help").out
    assert "Example" in out
    assert f"hibernode {name}" in out


def test_the_list_of_commands_matches_the_commands() -> None:
    context = click.Context(cli)
    for name, listed in COMMANDS.items():
        if name == "demo":
            continue  # test_help_of_every_command loads it
        command = cli.get_command(context, name)
        assert command is not None
        assert command.help, name
        assert listed.summary.endswith((".", "?")), name


def test_top_help_loads_no_heavy_modules() -> None:
    """Checks imports instead of milliseconds, which depend on the machine."""
    script = (
        "import sys; from agent.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('grpc', 'google.protobuf', 'rich', 'yaml', 'msgspec', 'asyncio', 'agent.v1')"
        " if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True)
    assert "Start:" in done.stdout
    assert done.stderr == "[]\n"


def test_without_a_command_help_is_shown_and_the_exit_says_usage(run: Run) -> None:
    done = run()
    assert (done.code, done.out) == (2, "")
    assert "One node (calls its agent):" in done.err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["nod"], "there is no command 'nod'; did you mean 'node'?"),
        (["invok"], "did you mean 'invoke'?"),
        (["zzz"], "`hibernode --help` lists them"),
        (["ps", "--outptu", "json"], "--outptu"),
        (["inspect"], "Missing argument 'UID'"),
        (["node", "drain"], "Missing argument 'NAME'"),
        (["node", "--fleet", "cordon", "gpu-1"], "leave it out before cordon"),
        (["ps", "--output", "xml"], "'xml' is not one of"),
        (["wake", "i-1", "--timeout", "soon"], "expected a duration"),
        (["deploy", "--target", "-1"], "-1 is not in the range"),
        (["ps", "--all", "--fleet"], "--all lists ended instances of one node"),
        (["usage", "--since", "yesterdayish"], "neither a duration like 24h nor a time"),
        (["usage", "--local", "--since", "1h"], "--local takes only --function"),
        (["invoke", "f", "-e", "x", "-f", "/dev/null"], "not both"),
        (["invoke", "f", "-H", "novalue"], "a header is NAME:VALUE"),
    ],
)
def test_usage_error_is_exit_2_with_a_hint(run: Run, arguments: list[str], problem: str) -> None:
    done = run(*arguments)
    assert (done.code, done.out) == (2, "")
    assert problem in done.err
    assert "--help`." in done.err


def test_version(run: Run) -> None:
    done = run("--version")
    assert done.code == 0
    assert done.out.startswith("hibernode, version ")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_that_calls_the_program(run: Run, shell: str) -> None:
    done = run("completion", shell)
    assert (done.code, done.err) == (0, "")
    assert f"_HIBERNODE_COMPLETE={shell}_complete" in done.out
    if program := shutil.which(shell):
        subprocess.run([program, "-n"], input=done.out, text=True, timeout=10, check=True)


def test_completion_knows_the_commands(program: list[str]) -> None:
    environment = {"_HIBERNODE_COMPLETE": "bash_complete", "COMP_WORDS": "hibernode in", "COMP_CWORD": "1"}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout.split() == ["plain,inspect", "plain,invoke"]
