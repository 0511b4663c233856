"""The README's promises that a program can check: its s.yaml, its commands, its links."""

from __future__ import annotations

import re
from pathlib import Path

from agent.cli.fc3.load import load_s_yaml
from agent.cli.main import COMMANDS
from agent.core.types import SECOND_NS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_its_s_yaml_is_taken_without_a_warning(tmp_path: Path) -> None:
    (block,) = _blocks("yaml")
    (tmp_path / "s.yaml").write_text(block)
    (deployment,) = load_s_yaml(tmp_path / "s.yaml")
    assert deployment.warnings == ()
    assert deployment.target == 2
    assert deployment.function.image == "registry.example.com/models/ocr:3"
    assert deployment.function.container.volumes[0].read_only
    assert deployment.function.idle.freeze_after_ns == 30 * SECOND_NS
    assert deployment.function.hooks.initializer is not None


def test_every_command_it_names_exists_and_none_is_left_out() -> None:
    used = set(re.findall(r"^\s*hibernode ([a-z]+)", "\n".join(_blocks("sh")), re.MULTILINE))
    used |= set(re.findall(r"`hibernode ([a-z]+)", README))
    table = README.partition("## Commands")[2].partition("##")[0]
    listed = set(re.findall(r"`([a-z]+)`", table))
    assert used <= set(COMMANDS)
    assert set(COMMANDS) <= listed


def test_every_file_it_leads_to_is_there() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert [link for link in links if not (ROOT / link).exists()] == []
    for script in re.findall(r"scripts/([a-z-]+)", README):
        assert (ROOT / "scripts" / script).exists(), script
