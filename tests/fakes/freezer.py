"""A fake `Freezer`. It checks the order of operations."""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from agent.core.errors import PreconditionError
from agent.core.types import MIB, Handle
from agent.ports import Condition, FreezeResult, Outcome


class IllegalOrderError(AssertionError):
    """The caller broke the driver's order of operations: a bug in the tested code, never a result."""


@dataclass
class FakeFreezer:
    """Knobs, by operation ("lock", "unlock", "checkpoint", "wake", "finish_freeze"):

    - `results["wake"].append(FreezeResult(...))`: what the next ones give; without one, OK.
    - `hold("wake")`: they wait until `release("wake")`; `entered("wake")` waits until one has begun.
    - `image_bytes`, `driver_ns`: what an OK carries. `states[uid]`: what `condition` finds; set it for recovery.

    `calls` records (operation, uid), `maps` the GPU map of each wake. A REFUSED checkpoint leaves the instance
    AWAKE, a REFUSED wake leaves it FROZEN, as the port promises.
    """

    image_bytes: int = 16 * MIB
    driver_ns: int = 1_000_000
    states: dict[str, Condition] = field(default_factory=dict)
    results: dict[str, deque[FreezeResult]] = field(default_factory=lambda: defaultdict(deque))
    calls: list[tuple[str, str]] = field(default_factory=list)
    maps: list[dict[str, str]] = field(default_factory=list)
    _gates: dict[str, asyncio.Event] = field(default_factory=dict)
    _begun: dict[str, asyncio.Event] = field(default_factory=lambda: defaultdict(asyncio.Event))
    _busy: set[str] = field(default_factory=set)

    def hold(self, operation: str) -> None:
        """Calls of `operation` wait from now on."""
        self._gates[operation] = asyncio.Event()
        self._begun[operation].clear()

    def release(self, operation: str) -> None:
        """Release the waiting operations."""
        self._gates.pop(operation).set()

    async def entered(self, operation: str, deadline_s: float = 5.0) -> None:
        """Wait until `operation` has been called (since the last `hold`)."""
        await asyncio.wait_for(self._begun[operation].wait(), deadline_s)

    async def lock(self, handle: Handle) -> FreezeResult:
        state = self.states.get(handle.uid, Condition.AWAKE)
        if state is Condition.PAUSED_BY_OTHERS:
            return FreezeResult(Outcome.REFUSED, "EXTERNALLY_FROZEN", "paused by somebody else (fake)")
        return await self._operate("lock", handle, {Condition.AWAKE}, Condition.LOCKED, Condition.AWAKE)

    async def unlock(self, handle: Handle) -> FreezeResult:
        legal = {Condition.LOCKED, Condition.AWAKE}
        return await self._operate("unlock", handle, legal, Condition.AWAKE, Condition.LOCKED)

    async def checkpoint(self, handle: Handle) -> FreezeResult:
        if self.states.get(handle.uid, Condition.AWAKE) is Condition.AWAKE:
            raise PreconditionError("NOT_LOCKED", "lock the instance before its checkpoint", uid=handle.uid)
        return await self._operate("checkpoint", handle, {Condition.LOCKED}, Condition.FROZEN, Condition.AWAKE)

    async def wake(self, handle: Handle, gpu_map: Mapping[str, str], gpu_uuids: Sequence[str] = ()) -> FreezeResult:
        self.maps.append(dict(gpu_map))
        legal = {Condition.FROZEN, Condition.CHECKPOINTED}
        return await self._operate("wake", handle, legal, Condition.AWAKE, Condition.FROZEN)

    async def finish_freeze(self, handle: Handle) -> FreezeResult:
        return await self._operate("finish_freeze", handle, {Condition.CHECKPOINTED}, Condition.FROZEN, Condition.AWAKE)

    def paused(self, handle: Handle) -> bool:
        return self.states.get(handle.uid) is Condition.PAUSED_BY_OTHERS

    async def prepare_kill(self, handle: Handle) -> None:
        self.calls.append(("prepare_kill", handle.uid))

    async def condition(self, handle: Handle) -> Condition:
        self.calls.append(("condition", handle.uid))
        return self.states.get(handle.uid, Condition.AWAKE)

    async def thaw(self, handle: Handle) -> None:
        self.calls.append(("thaw", handle.uid))
        if self.states.get(handle.uid) is Condition.PAUSED_BY_OTHERS:
            self.states[handle.uid] = Condition.AWAKE
        elif self.states.get(handle.uid) is Condition.FROZEN:
            self.states[handle.uid] = Condition.CHECKPOINTED

    async def vram_bytes(self, handle: Handle) -> int:
        awake = self.states.get(handle.uid, Condition.AWAKE) not in (Condition.FROZEN, Condition.CHECKPOINTED)
        return self.image_bytes if awake else 0

    def forget(self, handle: Handle) -> None:
        self.calls.append(("forget", handle.uid))
        self.states.pop(handle.uid, None)

    async def _operate(
        self, operation: str, handle: Handle, legal: set[Condition], reached: Condition, refused: Condition
    ) -> FreezeResult:
        self.calls.append((operation, handle.uid))
        state = self.states.get(handle.uid, Condition.AWAKE)
        if state not in legal:
            raise IllegalOrderError(f"{operation} of {handle.uid}, which is {state.value}; history: {self.calls}")
        if handle.uid in self._busy:
            raise IllegalOrderError(f"{operation} of {handle.uid} while another operation runs: {self.calls}")
        self._busy.add(handle.uid)
        try:
            self._begun[operation].set()
            gate = self._gates.get(operation)
            if gate is not None:
                await gate.wait()
            image_bytes = self.image_bytes if reached is Condition.FROZEN else 0
            ok = FreezeResult(Outcome.OK, driver_ns=self.driver_ns, image_bytes=image_bytes)
            result = self.results[operation].popleft() if self.results[operation] else ok
            by_outcome = {Outcome.OK: reached, Outcome.REFUSED: refused, Outcome.BROKEN: Condition.BROKEN}
            self.states[handle.uid] = by_outcome[result.outcome]
            return result
        finally:
            self._busy.discard(handle.uid)
