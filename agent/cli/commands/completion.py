"""`hibernode completion`: the script with which a shell completes commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from agent.cli.console.output import show_text

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the script that completes commands and options in a shell.

    \b
    Examples:
      eval "$(hibernode completion bash)"        # in ~/.bashrc; zsh likewise in ~/.zshrc
      hibernode completion fish | source         # in ~/.config/fish/config.fish
      hibernode completion bash | sudo tee /etc/bash_completion.d/hibernode
    """
    kind = get_completion_class(shell)
    assert kind is not None, "click has all of SHELLS"
    root = click.get_current_context().find_root().command
    show_text(kind(root, {}, "hibernode", "_HIBERNODE_COMPLETE").source() + "\n")
