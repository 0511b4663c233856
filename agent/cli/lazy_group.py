"""A click group whose commands are imported when they are called: `hibernode --help` must not load gRPC."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple

import click


class LazyCommand(NamedTuple):
    """Where a command is (`module:attribute`), its line in the help, and the section it stands in."""

    where: str
    summary: str
    section: str


class LazyGroup(click.Group):
    """`commands` by name. Help shows the summaries of the table without importing anything."""

    def __init__(self, *args: Any, lazy: Mapping[str, LazyCommand], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lazy = dict(lazy)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = self._lazy.get(cmd_name)
        if found is None:
            return None
        module, _, attribute = found.where.partition(":")
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
            rows = [(name, one.summary) for name, one in self._lazy.items() if one.section == section]
            with formatter.section(section):
                formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # `hibernode ps | head -1`: the reader has what it wanted. What is still buffered has nowhere to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return None
        return result


def suggestion(name: str, known: list[str]) -> str:
    """The end of an error about an unknown name."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else "`hibernode --help` lists them"
