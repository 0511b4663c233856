"""The end of a session on an engine that records facts late, which a real one does rarely."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest
from aiodocker.execs import Exec
from aiodocker.stream import Stream

from agent.adapters.engine import exec as engine_exec
from agent.adapters.engine.api import EngineApi
from agent.adapters.engine.exec import EngineExecSession


class LateEngine:
    """Gives these inspect answers in turn and repeats the last one. API, exec and stream in one."""

    def __init__(self, *answers: dict[str, Any]) -> None:
        self._answers = list(answers)
        self.closed = 0

    async def call(self, ask: Callable[[object], Awaitable[Any]], _deadline_s: float = 0.0) -> Any:
        return await ask(self)

    async def inspect(self) -> dict[str, Any]:
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]

    async def close(self) -> None:
        self.closed += 1

    def session(self) -> EngineExecSession:
        return EngineExecSession(cast("EngineApi", self), cast("Exec", self), cast("Stream", self), Path("box"))


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Leaders of the killed sessions."""
    leaders: list[int] = []
    monkeypatch.setattr(engine_exec, "INSPECT_PAUSE_S", 0.0)
    monkeypatch.setattr(engine_exec, "_kill_session", lambda _cgroup, leader: leaders.append(leader))
    return leaders


async def test_command_with_a_late_pid_is_killed(killed: list[int]) -> None:
    no_pid = {"Running": True, "Pid": 0}
    engine = LateEngine(no_pid, no_pid, {"Running": True, "Pid": 4711})
    session = engine.session()
    await session.close()
    await session.close()
    assert (killed, engine.closed) == ([4711], 1)


async def test_ended_command_is_not_killed_by_its_old_pid(killed: list[int]) -> None:
    engine = LateEngine({"Running": False, "Pid": 4711})
    await engine.session().close()
    assert (killed, engine.closed) == ([], 1)


async def test_missing_pid_is_logged(killed: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    engine = LateEngine({"Running": True, "Pid": 0})
    await engine.session().close()
    assert (killed, engine.closed) == ([], 1), "the connection is closed in any case"
    told = capsys.readouterr()
    assert "exec.close_failed" in told.out + told.err
