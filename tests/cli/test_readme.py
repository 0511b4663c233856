"""What the README and the pages in agent/docs promise and a program can check: files in YAML and JSON, links, and that
no command is left out. test_command_lines.py checks the commands themselves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from agent.cli.commands.provision import put
from agent.cli.fc3.load import load_s_yaml
from agent.cli.fc3.provision import read_provision
from agent.cli.main import COMMANDS
from agent.config import load
from agent.core.errors import ConfigError
from agent.core.types import SECOND_NS
from agent.settings import AgentConfig, SchedulerConfig
from agent.settings.prices import read_price_book

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "agent" / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), ROOT / "agent" / "emulated" / "README.md"]


def _blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)```", page.read_text(), re.DOTALL | re.MULTILINE)


def read_as_its_reader_does(text: str, folder: Path) -> None:
    """Take a YAML or JSON text as the program does that reads such a file. Raises ConfigError, also for a warning."""
    path = folder / "s.yaml"
    path.write_text(text)
    keys = yaml.safe_load(text).keys()
    if "resources" in keys:
        for deployment in load_s_yaml(path):
            if deployment.warnings:
                raise ConfigError("WARNED", "; ".join(deployment.warnings))
    elif "prices" in keys:
        read_price_book(path)
    elif keys & {"scheduledActions", "targetTrackingPolicies"}:
        read_provision(path)
    else:
        load(path, SchedulerConfig if keys & {"gateway", "nodes", "dispatch", "scaling", "database"} else AgentConfig)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_file_that_a_page_shows_is_taken(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWD", str(ROOT))
    for block in [*_blocks(page, "yaml"), *_blocks(page, "json")]:
        read_as_its_reader_does(block, tmp_path)


def test_the_file_in_the_help_of_provision_put_is_taken(tmp_path: Path) -> None:
    text = (put.help or "").partition("A file in the format of Function Compute:\n")[2].partition("\n\n")[0]
    assert "scheduleExpression" in text
    read_as_its_reader_does(text, tmp_path)


PROPS = "functionName: a, runtime: custom-container, customContainerConfig: {image: a/b:1}"


@pytest.mark.parametrize(
    "text",
    [
        "gpu: {max_holds: 1s}",
        "dispatch: {policy: packed}",
        "prices: []",
        '{"scheduledActions": [{"name": "a"}]}',
        "resources: {a: {component: fc3, props: {runtime: custom-container}}}",
        f"resources: {{a: {{component: fc3, props: {{{PROPS}, role: r}}}}}}",
    ],
)
def test_a_planted_error_in_a_file_is_found(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        read_as_its_reader_does(text, tmp_path)


def test_the_s_yaml_of_functions_is_taken_without_a_warning(tmp_path: Path) -> None:
    block = _blocks(DOCS / "functions.md", "yaml")[0]
    (tmp_path / "s.yaml").write_text(block)
    (deployment,) = load_s_yaml(tmp_path / "s.yaml")
    assert deployment.warnings == ()
    assert deployment.target == 2
    assert deployment.function.image == "registry.example.com/models/ocr:3"
    assert deployment.function.container.volumes[0].read_only
    assert deployment.function.idle.freeze_after_ns == 30 * SECOND_NS
    assert deployment.function.hooks.initializer is not None


def test_the_first_function_of_the_readme_is_taken_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = _blocks(ROOT / "README.md", "yaml")
    (tmp_path / "s.yaml").write_text(block)
    monkeypatch.setenv("PWD", str(ROOT))
    (deployment,) = load_s_yaml(tmp_path / "s.yaml")
    assert deployment.warnings == ()
    assert deployment.function.image == "host"
    assert deployment.function.entrypoint == (f"{ROOT}/.venv/bin/python", "-m", "agent.examples.echo")
    assert deployment.function.hooks.initializer is not None


@pytest.mark.parametrize("word", ["CU", "qualifier", "lease", "window", "pack"])
def test_a_word_of_ours_is_explained(word: str) -> None:
    """Commands and pages use it; the README links to the glossary."""
    assert re.search(rf"^\| (\w+, )*{word}(, \w+)* \|", (DOCS / "glossary.md").read_text(), re.MULTILINE)
    assert "(agent/docs/glossary.md)" in (ROOT / "README.md").read_text()


def test_every_command_they_name_exists_and_none_is_left_out() -> None:
    used: set[str] = set()
    for page in PAGES:
        shell = "\n".join(_blocks(page, "sh"))
        used |= set(re.findall(r"(?:^\s*|sudo |[(;&|] *)hibernode ([a-z]+)", shell, re.MULTILINE))
        used |= set(re.findall(r"`(?:sudo )?hibernode ([a-z]+)", page.read_text()))
    table = (DOCS / "cli.md").read_text().partition("## Commands")[2].partition("##")[0]
    listed = set(re.findall(r"`([a-z]+)`", table))
    assert used <= set(COMMANDS)
    assert set(COMMANDS) <= listed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_file_a_page_leads_to_is_there(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    for script in re.findall(r"scripts/([a-z-]+)", page.read_text()):
        assert (ROOT / "scripts" / script).exists(), script
