"""The end of a session against an engine that notes things late, which a real one does only now and then."""

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
    """Gives these answers to one look after the other, the last one for ever. API, exec and stream in one."""

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
    """Leaders whose sessions were killed."""
    leaders: list[int] = []
    monkeypatch.setattr(engine_exec, "INSPECT_PAUSE_S", 0.0)
    monkeypatch.setattr(engine_exec, "_kill_session", lambda _cgroup, leader: leaders.append(leader))
    return leaders


async def test_a_command_whose_pid_is_not_noted_yet_is_killed_all_the_same(killed: list[int]) -> None:
    no_pid = {"Running": True, "Pid": 0}
    engine = LateEngine(no_pid, no_pid, {"Running": True, "Pid": 4711})
    session = engine.session()
    await session.close()
    await session.close()
    assert (killed, engine.closed) == ([4711], 1)


async def test_one_that_has_ended_is_not_killed_by_its_old_number(killed: list[int]) -> None:
    engine = LateEngine({"Running": False, "Pid": 4711})
    await engine.session().close()
    assert (killed, engine.closed) == ([], 1)


async def test_a_pid_that_never_comes_is_told_of(killed: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    engine = LateEngine({"Running": True, "Pid": 0})
    await engine.session().close()
    assert (killed, engine.closed) == ([], 1), "the connection is closed in any case"
    told = capsys.readouterr()
    assert "exec.close_failed" in told.out + told.err
