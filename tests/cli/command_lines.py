"""Command lines in documents, help texts and messages: found, and checked without being run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import click

from agent.cli.main import cli

PROGRAMS = frozenset((
    "apt-get", "cat", "cd", "chmod", "chown", "cp", "cuda-checkpoint", "curl", "docker", "echo", "export", "grep",
    "head", "install", "jq", "kill", "ls", "mkdir", "nvidia-ctk", "openssl", "pip", "podman", "printf", "ps", "python3",
    "seq", "sh", "source", "systemctl", "tee", "umask", "uvicorn", "wait",
))  # fmt: skip
"""What a document may tell its reader to run, besides scripts/ and findings/."""
_KEYWORDS = frozenset(("do", "done", "else", "fi", "if", "sudo", "then", "time", "while", "!", "{", "}"))
_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.*", re.DOTALL)
_OPERATOR = re.compile(r"[;&|()]+")
_REDIRECT = re.compile(r"[<>]+&?")
_COMMENT = re.compile(r"""((?:[^'"#\s]|\\.|'[^']*'|"(?:\\.|[^"\\])*"|(?<=\S)#|\s)*?)(?:(?<=\s)|^)#.*""")
_VARIABLE = re.compile(r"\b_?HIBERNODE_[A-Z_]+\b")


@dataclass(frozen=True)
class Wrong:
    """A command line that does not work as it is written."""

    command: str
    why: str

    def __str__(self) -> str:
        return f"`{self.command}`: {self.why}"


def sh_blocks(text: str) -> list[str]:
    """The shell blocks of a Markdown text."""
    return re.findall(r"^ *```sh\n(.*?)```", text, re.DOTALL | re.MULTILINE)


def examples_of(help_text: str) -> Iterator[str]:
    """The lines below `Example:` or `Examples:` in a help text, each without the explanation in its second column."""
    for paragraph in re.split(r"\n\s*\n", help_text):
        head, _, rest = paragraph.replace("\b", "").strip().partition("\n")
        if head in ("Example:", "Examples:"):
            for line in rest.splitlines():
                yield re.split(r"\s{2,}", line.strip())[0]


def commands_in(script: str) -> Iterator[list[str]]:
    """The words of every simple command of a shell text, those of `$(...)` too, without assignments, redirections and
    keywords. Raises ValueError for quotes that do not end."""
    for line in script.replace("\\\n", " ").splitlines():
        if found := _COMMENT.fullmatch(line):
            line = found[1]
        while "$(" in line:
            start = line.rindex("$(")
            end = line.index(")", start)
            yield from commands_in(line[start + 2 : end])
            line = f"{line[:start]}RESULT{line[end + 1 :]}"
        yield from _simple_commands(line)


def _simple_commands(line: str) -> Iterator[list[str]]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|()<>")
    lexer.whitespace_split = True
    lexer.commenters = ""
    words: list[str] = []
    skip = False
    for word in [*lexer, ";"]:
        if skip:
            skip = False
        elif _REDIRECT.fullmatch(word):
            skip = True
            if words and words[-1].isdecimal():
                words.pop()
        elif _OPERATOR.fullmatch(word):
            while words and (words[0] in _KEYWORDS or _ASSIGNMENT.fullmatch(words[0])):
                words.pop(0)
            if words and words[0] != "for":
                yield words
            words = []
        else:
            words.append(word)


def wrong_in(script: str, root: Path) -> Iterator[Wrong]:
    """What does not work in a shell text: unknown programs, commands, arguments, options, values, variables."""
    for words in commands_in(script):
        shown = shlex.join(words)
        program, *arguments = words
        if program == "hibernode":
            problem = problem_of(arguments)
        elif program.startswith(("scripts/", "findings/")):
            problem = _script_problem(root / program, arguments)
        elif program == "eval":
            problem = ""  # what it evaluates is a command of its own
        else:
            problem = "" if program in PROGRAMS else "is not a program that these texts may tell to run"
        if problem:
            yield Wrong(shown, problem)
    for name in sorted(set(_VARIABLE.findall(script)) - variables_of(root)):
        yield Wrong(name, "no code reads this variable")


@cache
def variables_of(root: Path) -> frozenset[str]:
    """The HIBERNODE_... variables that code or scripts read."""
    files = [*(root / "agent").rglob("*.py"), *(path for path in (root / "scripts").iterdir() if path.is_file())]
    return frozenset(name for path in files for name in _VARIABLE.findall(path.read_text(encoding="utf-8")))


def problem_of(arguments: list[str], *, is_excerpt: bool = False) -> str:
    """Why `hibernode ARGUMENTS` is no proper call; "" if it is. Nothing is executed. An excerpt, such as one within a
    sentence, may leave out required arguments."""
    try:
        with ExitStack() as contexts:
            command: click.Command = cli
            name, parent = "hibernode", None
            while True:
                context = contexts.enter_context(
                    command.make_context(name, list(arguments), parent=parent, resilient_parsing=False)
                )
                left = [*context._protected_args, *context.args]
                if not isinstance(command, click.Group) or not left:
                    return ""
                found, inner, arguments = command.resolve_command(context, left)
                assert found is not None
                assert inner is not None
                name, command, parent = found, inner, context
    except (click.exceptions.Exit, click.exceptions.NoArgsIsHelpError):
        return ""
    except click.MissingParameter as error:
        return "" if is_excerpt else error.format_message()
    except click.ClickException as error:
        is_absent_file = isinstance(error, click.BadParameter) and "No such file or directory" in error.format_message()
        return "" if is_absent_file else error.format_message()


def _script_problem(script: Path, arguments: list[str]) -> str:
    if not script.is_file():
        return "there is no such script"
    text = script.read_text(encoding="utf-8")
    if script.name == "demo":
        return problem_of(["demo", *arguments])
    if script.name == "bench":
        modules = {path.stem for path in (script.parent / "benchmarks").glob("*.py")}
        if arguments and not arguments[0].startswith("-") and arguments[0] not in {*modules, "NAME"}:
            return f"there is no benchmark {arguments[0]}"
        text += "".join(path.read_text(encoding="utf-8") for path in (script.parent / "benchmarks").glob("*.py"))
    unknown = [word for word in arguments if word.startswith("--") and word.partition("=")[0] not in text]
    return f"{unknown[0]} is not an option of this script" if unknown else ""


def all_commands(group: click.Group = cli, parent: click.Context | None = None) -> Iterator[tuple[str, click.Command]]:
    """Every command with its path (`node drain`), the program itself included."""
    context = click.Context(group, parent=parent, info_name=group.name if parent else "")
    yield context.command_path.strip(), group
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            command.name = name
            yield from all_commands(command, context)
        else:
            yield f"{context.command_path} {name}".strip(), command
