"""The host process of agent/docs/functions.md, run as a reader would run it: its program, its s.yaml, its commands."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from agent.v1 import types_pb2
from tests.e2e.stack import running_stack

PAGE = Path(__file__).parents[2] / "agent" / "docs" / "functions.md"


def blocks() -> dict[str, str]:
    """The first block of each language in the section on processes of the host."""
    section = PAGE.read_text().partition("\n## Processes of the host\n")[2].partition("\n## ")[0]
    found: dict[str, str] = {}
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```", section, re.DOTALL | re.MULTILINE):
        found.setdefault(language, block)
    return found


@pytest.mark.timeout(120)
async def test_the_host_process_of_the_documentation_works_as_written() -> None:
    written = blocks()
    async with running_stack() as stack:
        folder = stack.folder / "reader"
        folder.mkdir()
        stack.folder.chmod(0o755)
        (folder / "serve.py").write_text(written["python"])
        (folder / "s.yaml").write_text(written["yaml"])
        environment = {
            **os.environ,
            "HIBERNODE_HOME": str(stack.folder),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PWD": str(folder),
        }
        done = await asyncio.to_thread(
            subprocess.run,
            ["sh", "-ec", written["sh"]],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == {"path": "/some/path", "bytes": len(written["yaml"].encode())}
        assert "warning" not in done.stderr
        await stack.wait_for_state(types_pb2.Instance.STATE_FROZEN, 1)
        await stack.remove_functions(["count"])
