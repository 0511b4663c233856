"""A click group that imports a command only when it is called, so that `hibernode --help` does not load gRPC."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple

import click


class LazyCommand(NamedTuple):
    """A command's location (`module:attribute`), its line in the help, and its section there."""

    location: str
    summary: str
    section: str


class LazyGroup(click.Group):
    """A group of `LazyCommand`s by name. `--help` prints their summaries without importing them."""

    def __init__(self, *args: Any, lazy: Mapping[str, LazyCommand], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lazy = dict(lazy)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = self._lazy.get(cmd_name)
        if found is None:
            return None
        module, _, attribute = found.location.partition(":")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in self._lazy and not name.startswith("-") and not ctx.resilient_parsing:
            raise click.UsageError(f"there is no command {name!r}; {suggestion(name, list(self._lazy))}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for section in dict.fromkeys(command.section for command in self._lazy.values()):
            rows = [(name, command.summary) for name, command in self._lazy.items() if command.section == section]
            with formatter.section(section):
                formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # `hibernode ps | head -1`: the reader has closed the pipe. Discard what is still buffered.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return None
        return result


def suggestion(name: str, known: list[str]) -> str:
    """The hint at the end of an error about an unknown name."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else "`hibernode --help` lists them"
