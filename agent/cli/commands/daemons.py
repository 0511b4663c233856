"""`hibernode agent` and `hibernode scheduler`: replace this process by the daemon."""

from __future__ import annotations

import os
import sys

import click

from agent.core.errors import ConfigError


def _become(daemon: str, config: str) -> None:
    """Replaces this process, so that signals and the service manager's notifications reach the daemon itself."""
    if not os.access(config, os.R_OK):
        known = f"systemd/{daemon}.example.yaml in the sources explains every key"
        raise ConfigError("CONFIG_UNREADABLE", f"{config} can't be read; name a file with --config ({known})")
    # -P: never import a folder `agent` of the working directory as root. -X is for `ps aux | grep hibernode`.
    flags = ("-P", "-X", f"hibernode={daemon}")
    arguments = [sys.executable, *flags, "-m", f"agent.daemons.{daemon}", "--config", config]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, arguments)


def _config(daemon: str) -> str:
    return f"/etc/hibernode/{daemon}.yaml"


@click.command()
@click.option("--config", "-c", default=_config("agent"), show_default=True, metavar="FILE", help="Configuration file.")
def agent(config: str) -> None:
    """Run the daemon of a GPU host in the foreground until SIGTERM or SIGINT.

    Instances keep running when it ends, and the next start adopts them.

    \b
    Examples:
      hibernode agent
      hibernode agent --config ./agent.yaml
    """
    _become("agent", config)


@click.command()
@click.option(
    "--config", "-c", default=_config("scheduler"), show_default=True, metavar="FILE", help="Configuration file."
)
def scheduler(config: str) -> None:
    """Run the central scheduler and its gateway in the foreground until SIGTERM or SIGINT.

    \b
    Examples:
      hibernode scheduler
      hibernode scheduler --config ./scheduler.yaml
    """
    _become("scheduler", config)
