"""Every command line that a document, a help text or a message shows is one that the program takes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import click
import pytest

from tests.cli.command_lines import Wrong, all_commands, commands_in, examples_of, problem_of, sh_blocks, wrong_in

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "agent" / "ARCHITECTURE.md",
    ROOT / "agent" / "emulated" / "README.md",
    ROOT / "findings" / "README.md",
    *sorted((ROOT / "agent" / "docs").rglob("*.md")),
    *sorted((ROOT / "agent" / "examples").rglob("*.md")),
]
COMMANDS = list(all_commands())
SPAN = re.compile(r"`(?:sudo )?((?:hibernode|scripts/[a-z-]+)(?: [^`\n]*)?)`")
PLACEHOLDER = re.compile(r"\{[^{}]*\}")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [page for page in PAGES if sh_blocks(page.read_text())], ids=name_of)
def test_each_command_of_a_page_is_taken(page: Path) -> None:
    wrong = [str(one) for block in sh_blocks(page.read_text()) for one in wrong_in(block, ROOT)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("path", "command"), COMMANDS, ids=[path or "hibernode" for path, _ in COMMANDS])
def test_each_example_of_a_help_text_is_taken(path: str, command: click.Command) -> None:
    texts = f"{command.help or ''}\n\n{command.epilog or ''}"
    wrong = [str(one) for line in examples_of(texts) for one in wrong_in(line, ROOT)]
    assert not wrong, "\n".join(wrong)


def test_the_examples_of_help_texts_are_found() -> None:
    found = {path: list(examples_of(f"{one.help or ''}\n\n{one.epilog or ''}")) for path, one in COMMANDS}
    assert "hibernode ps --fleet --function ocr" in found["ps"]
    assert "hibernode demo" in found[""]
    assert sum(map(len, found.values())) > 50


SCRIPTS = [path for path in sorted((ROOT / "scripts").iterdir()) if path.is_file() and path.suffix != ".sh"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_each_command_in_the_help_of_a_script_is_taken(script: Path) -> None:
    done = subprocess.run([str(script), "--help"], capture_output=True, text=True, timeout=20, check=True)
    lines = re.findall(r"^ +((?:scripts/|hibernode |systemctl )\S.*?)(?:  .*)?$", done.stdout, re.MULTILINE)
    wrong = [str(one) for line in lines for one in wrong_in(line, ROOT)]
    assert not wrong, "\n".join(wrong)


def messages() -> list[tuple[str, str]]:
    """The commands between backticks in pages and in the messages and comments of the code."""
    files = [*PAGES, *sorted((ROOT / "agent").rglob("*.py")), *sorted((ROOT / "systemd").glob("*.yaml"))]
    return [
        (name_of(path), found)
        for path in files
        if not name_of(path).startswith("agent/v1/")
        for found in SPAN.findall(re.sub(r"\"\n\s*f?\"", "", path.read_text(encoding="utf-8")))
    ]


def test_each_command_in_a_sentence_is_taken() -> None:
    wrong = []
    for where, text in messages():
        plain = PLACEHOLDER.sub("X", text.replace("...", "")).partition(" | ")[0]
        words = next(commands_in(plain))
        if words[1:2] == ["X"]:
            continue  # the daemon's name is put in
        if words[0] == "hibernode":
            problem = problem_of(words[1:], is_excerpt=True)
            wrong += [f"{where}: {Wrong(text, problem)}"] if problem else []
        else:
            wrong += [f"{where}: {one}" for one in wrong_in(plain, ROOT)]
    assert not wrong, "\n".join(wrong)


def test_commands_in_sentences_are_found() -> None:
    found = {text for _, text in messages()}
    assert {"hibernode doctor --selftest", "scripts/test --all"} <= found
    assert len(found) > 40


# ---- each case is an error planted in a text -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("hibernode deploy -t s.yaml --waits", "No such option '--waits'"),
        ("hibernode deplay -t s.yaml", "there is no command 'deplay'"),
        ("hibernode node drian gpu-1", "No such command 'drian'"),
        ("hibernode node drain", "Missing argument 'NAME'"),
        ("hibernode ps one", "unexpected extra argument (one)"),
        ("hibernode ps --output xml", "'xml' is not one of"),
        ("hibernode logs i-1 --tail many", "Invalid value for '--tail'"),
        ("url=$(hibernode deploy --non)", "No such option '--non'"),
        ("hibernode ps | hibernode logs --non", "No such option '--non'"),
        ("(cd /etc && sudo hibernode ps --non) # x", "No such option '--non'"),
        ("for name in a b; do hibernode rm --non; done", "No such option '--non'"),
        ("HIBERNODE_HOME=/x hibernode ps --non >out 2>&1", "No such option '--non'"),
        ("hibernode deploy \\\n  --non", "No such option '--non'"),
        ("export HIBERNODE_HOUSE=/x", "no code reads this variable"),
        ("scripts/none", "there is no such script"),
        ("scripts/install --dry", ""),
        ("scripts/install --non", "--non is not an option of this script"),
        ("scripts/demo --non", "No such option '--non'"),
        ("scripts/bench none", "there is no benchmark none"),
        ("rm -rf /", "is not a program that these texts may tell to run"),
    ],
)
def test_a_planted_error_is_found(script: str, problem: str) -> None:
    found = [str(one) for one in wrong_in(script, ROOT)]
    if problem:
        (one,) = found
        assert problem in one
    else:
        assert not found


def test_an_unfinished_quote_is_an_error() -> None:
    with pytest.raises(ValueError, match="quotation"):
        list(commands_in("curl 'http://x"))


def test_a_script_is_taken_apart_as_a_shell_does() -> None:
    script = """
    (umask 077; openssl rand -hex 32 | tee node.token >nodes/x)   # secret
    eval "$(hibernode emulated env --dir /tmp/x)"  # it's "quoted"
    for n in a b; do cp "$n" x && echo '$n # no' ; done
    A=b curl "${url}a?n=7#x" 2>/dev/null
    """
    assert list(commands_in(script)) == [
        ["umask", "077"],
        ["openssl", "rand", "-hex", "32"],
        ["tee", "node.token"],
        ["hibernode", "emulated", "env", "--dir", "/tmp/x"],
        ["eval", "RESULT"],
        ["cp", "$n", "x"],
        ["echo", "$n # no"],
        ["curl", "${url}a?n=7#x"],
    ]
