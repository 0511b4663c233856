"""What the README and the pages in agent/docs promise and a program can check: s.yaml files, commands, links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from agent.cli.fc3.load import load_s_yaml
from agent.cli.main import COMMANDS
from agent.core.types import SECOND_NS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "agent" / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), ROOT / "agent" / "emulated" / "README.md"]


def _blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)```", page.read_text(), re.DOTALL | re.MULTILINE)


def test_the_s_yaml_of_functions_is_taken_without_a_warning(tmp_path: Path) -> None:
    (block,) = _blocks(DOCS / "functions.md", "yaml")
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
