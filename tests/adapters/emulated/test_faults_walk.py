"""Random calls and faults: every caller is answered (a hung one after a clear), and no VRAM is lost."""

from __future__ import annotations

import random
import signal
from dataclasses import dataclass, field

import pytest

from agent.emulated.faults import KINDS, OPERATIONS, RESULTS, SLOW, UNDER_WAY
from tests.adapters.emulated.harness import MIB, CudaProgram, RunningDriver, eventually

STEPS = 60
CALLERS = 4
CODES = {0, 3, 1, 304, 401, *RESULTS.values()}


@dataclass
class Walk:
    """Two applications, four callers that may hang, and a fault plan."""

    driver: RunningDriver
    dice: random.Random
    idle: list[CudaProgram] = field(default_factory=list)
    hanging: list[CudaProgram] = field(default_factory=list)
    apps: list[CudaProgram] = field(default_factory=list)
    story: list[str] = field(default_factory=list)

    def begin(self) -> None:
        self.idle = [self.driver.tool() for _ in range(CALLERS)]
        self.apps = [self.new_application() for _ in range(2)]

    def new_application(self) -> CudaProgram:
        app = self.driver.application(device=self.dice.randrange(2))
        for size in (self.dice.randint(1, 3 * MIB), 2 * MIB):
            app.must("alloc", size=size)
        return app

    def plan(self) -> None:
        kind = self.dice.choice(KINDS)
        after = kind not in ("STALE", "FAILED", SLOW, *UNDER_WAY) and self.dice.random() < 0.3
        pid = self.dice.choice([None, self.dice.choice(self.apps).pid])
        operation = "state" if kind in UNDER_WAY else self.dice.choice(list(OPERATIONS))
        delay_ms = 3 if kind == SLOW else 0
        self.driver.control.fault(
            operation, kind, pid=pid, after=after, times=self.dice.randint(1, 2), delay_ms=delay_ms
        )
        self.story.append(f"planned {operation} {kind} after={after} pid={pid}")

    def call(self) -> None:
        """Make one call on one application; it is answered or hangs."""
        app, caller = self.dice.choice(self.apps), self.idle.pop()
        operation = self.dice.choice(["lock", "checkpoint", "restore", "unlock", "state"])
        caller.send(operation, pid=app.pid)
        hung = len(self.hanging)
        eventually(lambda: not caller.is_waiting() or self.hung_calls() > hung, f"{operation} is answered or hangs")
        if caller.is_waiting():
            self.hanging.append(caller)
            self.story.append(f"{operation} of {app.pid} hangs")
            return
        answer = caller.receive()
        self.story.append(f"{operation} of {app.pid}: {answer['rc']}")
        assert answer["rc"] in CODES
        self.idle.append(caller)

    def hung_calls(self) -> int:
        return sum(len(one.hung) for one in self.driver.control.processes())

    def clear(self) -> None:
        self.driver.control.clear_faults()
        self.story.append("cleared")
        for caller in self.hanging:
            assert caller.receive()["rc"] in CODES
        self.idle += self.hanging
        self.hanging = []

    def replace_dead(self) -> None:
        """Replace dead applications; callers that hung on them have been answered."""
        for at, app in enumerate(self.apps):
            if app.process.poll() is None and app.pid in [one.pid for one in self.driver.control.processes()]:
                continue
            assert app.process.wait(10) in (-signal.SIGSEGV, -signal.SIGKILL)
            self.apps[at] = self.new_application()
        answered = [caller for caller in self.hanging if not caller.is_waiting()]
        for caller in answered:
            assert caller.receive()["rc"] == 304
            self.hanging.remove(caller)
            self.idle.append(caller)

    def check_memory(self) -> None:
        """Check that all used VRAM belongs to a process: operations have freed what they took."""
        held = self.driver.control.processes()
        for device in self.driver.control.devices():
            assert device.used_bytes == sum(one.vram_bytes.get(device.uuid, 0) for one in held), device.index


@pytest.mark.parametrize("seed", range(6))
def test_random_calls_and_faults(driver: RunningDriver, seed: int) -> None:
    walk = Walk(driver, random.Random(seed))
    walk.begin()
    try:
        for _ in range(STEPS):
            if walk.dice.random() < 0.2:
                walk.plan()
            elif not walk.idle or walk.dice.random() < 0.05:
                walk.clear()
            else:
                walk.call()
            walk.replace_dead()
            walk.check_memory()
        walk.clear()
    except AssertionError as error:
        raise AssertionError("\n".join([str(error), *walk.story])) from error
    driver.close_programs()
    eventually(lambda: not driver.control.processes(), "all processes are released")
    assert [one.used_bytes for one in driver.control.devices()] == [0, 0]
