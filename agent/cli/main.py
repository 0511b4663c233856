"""The entry of the `hibernode` command: the list of commands, and how every ending becomes an exit code."""

from __future__ import annotations

import os
import sys

import click

from agent import __version__
from agent.cli.lazy_group import LazyCommand, LazyGroup
from agent.cli.options import insecure_option, output_option, place_options
from agent.core.errors import HibernodeError
from agent.exit_codes import ExitCode, exit_of

_START = "Start"
_NODE = "One node (asks its agent)"
_FLEET = "The fleet (asks the scheduler)"

COMMANDS = {
    "demo": LazyCommand("agent.cli.demo.command:demo", "See it all work on this machine, without a GPU.", _START),
    "agent": LazyCommand("agent.cli.commands.daemons:agent", "Run the daemon of a GPU host.", _START),
    "scheduler": LazyCommand("agent.cli.commands.daemons:scheduler", "Run the central scheduler.", _START),
    "doctor": LazyCommand("agent.cli.doctor.command:doctor", "Can this host freeze instances? If not, why?", _START),
    "simulate": LazyCommand(
        "agent.cli.commands.simulate:simulate", "What would idle mode save on your traffic?", _START
    ),
    "emulated": LazyCommand("agent.cli.commands.emulated:emulated", "GPUs for machines without one.", _START),
    "node": LazyCommand("agent.cli.commands.node:node", "GPUs, memory and abilities of the node.", _NODE),
    "ps": LazyCommand("agent.cli.commands.ps:ps", "List instances.", _NODE),
    "create": LazyCommand("agent.cli.commands.create:create", "Start an instance from an s.yaml.", _NODE),
    "inspect": LazyCommand("agent.cli.commands.instances:inspect", "Everything about one instance.", _NODE),
    "freeze": LazyCommand("agent.cli.commands.instances:freeze", "Put idle instances to sleep now.", _NODE),
    "wake": LazyCommand("agent.cli.commands.instances:wake", "Wake instances before they are needed.", _NODE),
    "rm": LazyCommand("agent.cli.commands.instances:rm", "Stop and remove instances.", _NODE),
    "logs": LazyCommand("agent.cli.commands.logs_events:logs", "What an instance has printed.", _NODE),
    "exec": LazyCommand("agent.cli.commands.exec:exec_", "Run a command inside an instance.", _NODE),
    "events": LazyCommand("agent.cli.commands.logs_events:events", "What happened, and when.", _NODE),
    "deploy": LazyCommand("agent.cli.commands.deploy:deploy", "Deploy the functions of an s.yaml.", _FLEET),
    "functions": LazyCommand("agent.cli.commands.functions:functions", "List, show and remove functions.", _FLEET),
    "provision": LazyCommand("agent.cli.commands.provision:provision", "How many instances functions have.", _FLEET),
    "invoke": LazyCommand("agent.cli.commands.invoke:invoke", "Send one request to a function.", _FLEET),
    "usage": LazyCommand("agent.cli.commands.usage:usage", "Active and idle time, and what it costs.", _FLEET),
}

_EPILOG = """\b
Examples:
  hibernode demo                          the whole story, on emulated GPUs
  hibernode deploy -t s.yaml --target 3   prints the function's URL
  hibernode invoke my-function --event hello
  hibernode ps --output json | jq '.instances[] | {uid, state}'

\b
Daemons are found in HIBERNODE_HOME (or --home), default /var/lib/hibernode.
Exit codes: 0 ok, 1 unexpected, 2 usage, 3 not found, 4 precondition or
conflict, 5 unavailable or timed out, 6 memory came back changed
(doctor --selftest), 130 interrupted.
Completion: eval "$(_HIBERNODE_COMPLETE=bash_source hibernode)", or zsh_source, fish_source.
"""


@click.group(
    cls=LazyGroup,
    lazy=COMMANDS,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="hibernode")
@place_options
@insecure_option
@output_option
def cli() -> None:
    """GPU inference instances that sleep.

    An instance nobody asks for gives its GPU back, its memory kept on the host, and wakes before the next request
    reaches it. Idle and active time are metered apart.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command and exit. Every failure is one line on stderr and the exit code of its kind."""
    # The fork handlers of grpc only print warnings: whoever starts programs here does so before the first call.
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
        _say(f"{error.format_message()}{_hint(error.ctx)}")
        return ExitCode.USAGE
    except click.ClickException as error:
        _say(error.format_message())
        return ExitCode.USAGE
    except (click.Abort, KeyboardInterrupt):
        _say("interrupted")
        return ExitCode.INTERRUPTED
    except HibernodeError as error:
        _say(f"{error.message} ({error.reason})")
        return exit_of(error)
    except Exception as error:
        if os.environ.get("HIBERNODE_DEBUG"):
            raise
        _say(f"unexpected {type(error).__name__}: {error}; HIBERNODE_DEBUG=1 shows where")
        return ExitCode.UNEXPECTED
    return result if isinstance(result, int) else ExitCode.OK


def _hint(context: click.Context | None) -> str:
    return f"\nTry `{context.command_path} --help`." if context is not None else ""


def _say(text: str) -> None:
    click.echo(f"hibernode: {text}", err=True)


if __name__ == "__main__":
    main()
