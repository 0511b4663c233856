"""Entry point of the `hibernode` command: the list of commands, and the translation of errors into exit codes."""

from __future__ import annotations

import os
import sys

import click

from agent import __version__
from agent.cli.console.output import note
from agent.cli.lazy_group import LazyCommand, LazyGroup
from agent.cli.options import insecure_option, locator_options, output_option
from agent.core.errors import HibernodeError
from agent.exit_codes import ExitCode, exit_of

_START = "Start"
_NODE = "One node (calls its agent)"
_FLEET = "The fleet (calls the scheduler)"

COMMANDS = {
    "demo": LazyCommand("agent.cli.demo.command:demo", "Try Hibernode on this machine, without a GPU.", _START),
    "agent": LazyCommand("agent.cli.commands.daemons:agent", "Run the daemon of a GPU host.", _START),
    "scheduler": LazyCommand("agent.cli.commands.daemons:scheduler", "Run the central scheduler.", _START),
    "doctor": LazyCommand("agent.cli.doctor.command:doctor", "Check whether this host can freeze instances.", _START),
    "simulate": LazyCommand(
        "agent.cli.commands.simulate:simulate", "Estimate the savings of idle mode from an access log.", _START
    ),
    "emulated": LazyCommand("agent.cli.commands.emulated:emulated", "Emulate GPUs on a machine without one.", _START),
    "completion": LazyCommand("agent.cli.commands.completion:completion", "Print the completion of a shell.", _START),
    "node": LazyCommand("agent.cli.commands.node:node", "Show GPUs, memory and capabilities of the node.", _NODE),
    "ps": LazyCommand("agent.cli.commands.ps:ps", "List instances.", _NODE),
    "create": LazyCommand("agent.cli.commands.create:create", "Start one instance from an s.yaml.", _NODE),
    "inspect": LazyCommand("agent.cli.commands.instances:inspect", "Show everything about one instance.", _NODE),
    "freeze": LazyCommand("agent.cli.commands.instances:freeze", "Freeze idle instances now.", _NODE),
    "wake": LazyCommand("agent.cli.commands.instances:wake", "Wake instances before they are needed.", _NODE),
    "rm": LazyCommand("agent.cli.commands.instances:rm", "Stop and remove instances.", _NODE),
    "logs": LazyCommand("agent.cli.commands.logs_events:logs", "Print the output of an instance.", _NODE),
    "exec": LazyCommand("agent.cli.commands.exec:exec_", "Run a command inside an instance.", _NODE),
    "events": LazyCommand("agent.cli.commands.logs_events:events", "Show past events, oldest first.", _NODE),
    "deploy": LazyCommand("agent.cli.commands.deploy:deploy", "Deploy the functions of an s.yaml.", _FLEET),
    "functions": LazyCommand("agent.cli.commands.functions:functions", "List, show and remove functions.", _FLEET),
    "provision": LazyCommand("agent.cli.commands.provision:provision", "Set instance counts and policies.", _FLEET),
    "invoke": LazyCommand("agent.cli.commands.invoke:invoke", "Send one request to a function.", _FLEET),
    "usage": LazyCommand("agent.cli.commands.usage:usage", "Show active time, idle time and costs.", _FLEET),
}

_EPILOG = """\b
Examples:
  hibernode demo                          a complete run on emulated GPUs
  hibernode deploy -t s.yaml --target 3   prints the function's URL
  hibernode invoke my-function --event hello
  hibernode ps --output json | jq '.instances[] | {uid, state}'

\b
Addresses and tokens of daemons are read from HIBERNODE_HOME (or --home), by
default /var/lib/hibernode. --output json writes exact values for programs.
Exit codes: 0 ok, 1 unexpected, 2 usage, 3 not found, 4 precondition or
conflict, 5 unavailable or timed out, 6 memory corrupted
(doctor --selftest), 130 interrupted.
Completion: eval "$(hibernode completion bash)"; also zsh, fish.
"""


@click.group(
    cls=LazyGroup,
    lazy=COMMANDS,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="hibernode")
@locator_options
@insecure_option
@output_option
def cli() -> None:
    """Run GPU inference instances that freeze when they are idle.

    An idle instance moves its GPU memory to host memory and releases the GPU. It wakes before the next request reaches
    it. Active and idle time are metered separately.
    """


def main(arguments: list[str] | None = None) -> None:
    """Runs the command and exits. A failure prints one line on stderr and exits with the code of its kind."""
    # grpc's fork handlers only print warnings; commands start their processes before the first call.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    sys.exit(_run(arguments))


def _run(arguments: list[str] | None) -> int:
    try:
        result = cli.main(arguments, prog_name="hibernode", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return ExitCode.USAGE
    except click.UsageError as error:
        _print_error(f"{error.format_message()}{_hint(error.ctx)}")
        return ExitCode.USAGE
    except click.ClickException as error:
        _print_error(error.format_message())
        return ExitCode.USAGE
    except (click.Abort, KeyboardInterrupt):
        _print_error("interrupted")
        return ExitCode.INTERRUPTED
    except HibernodeError as error:
        _print_error(f"{error.message} ({error.reason})")
        return exit_of(error)
    except Exception as error:
        if os.environ.get("HIBERNODE_DEBUG"):
            raise
        _print_error(f"unexpected {type(error).__name__}: {error}; HIBERNODE_DEBUG=1 shows where")
        return ExitCode.UNEXPECTED
    return result if isinstance(result, int) else ExitCode.OK


def _hint(context: click.Context | None) -> str:
    return f"\nTry `{context.command_path} --help`." if context is not None else ""


def _print_error(text: str) -> None:
    note(f"hibernode: {text}")


if __name__ == "__main__":
    main()
