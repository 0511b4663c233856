"""Checks of all answers during chaos, and of the host after it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psutil

from agent.adapters.kernel import cgroup
from agent.core.types import MILLISECOND_NS, SECOND_NS
from agent.emulated.control import EmulatedDriver
from agent.v1 import types_pb2
from tests.e2e.chaos_faults import Chaos
from tests.e2e.ledger import check_contiguous
from tests.e2e.load import Interval, Traffic
from tests.e2e.stack import Answer, Stack, until

LOOK_AGAIN_S = 0.01
NOTICED_S = 0.5
"""How long after its death an instance may still be sent a request."""
FOUND_OUT_S = 3.0
"""How long after a late call an instance may sit on another's GPU: two isolation checks and the kill."""
CODES = {
    429: {"ResourceExhausted"},
    502: {"InstanceCrashed", "FunctionNotStarted", "InitializationError"},
    503: {"NoCapacity"},
    504: {"QueueTimeout", "FunctionTimeout"},
}
"""The errors of agent/docs/fc-contract.md, except those for malformed requests."""
FROZEN = types_pb2.Instance.STATE_FROZEN


@dataclass
class GpuObserver:
    """Watches the driver's table: which instance is on which GPU, and which have died."""

    driver: EmulatedDriver
    overlaps: dict[tuple[str, frozenset[str]], list[tuple[int, str]]] = field(default_factory=dict)
    """By GPU and instances: when they were seen there together, and how."""
    ended: set[str] = field(default_factory=set)
    deaths: dict[str, list[Interval]] = field(default_factory=dict)
    """By function: from when an instance was last seen alive to when the agent must have noticed its death."""
    looks: int = 0
    _known: dict[int, tuple[str, str, int]] = field(default_factory=dict)

    async def run(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(LOOK_AGAIN_S)

    def look(self) -> None:
        processes = self.driver.processes()
        now_ns = time.monotonic_ns()
        self.looks += 1
        for process in processes:
            known = self._known.get(process.pid)
            function, uid = known[:2] if known is not None else _who(process.pid)
            self._known[process.pid] = (function, uid, now_ns)
        alive = {process.pid for process in processes}
        for pid in [pid for pid in self._known if pid not in alive]:
            function, uid, seen_ns = self._known.pop(pid)
            self.ended.add(uid)
            self.deaths.setdefault(function, []).append((seen_ns, now_ns + round(NOTICED_S * SECOND_NS)))
        for uuid in {uuid for process in processes for uuid in process.vram_bytes}:
            on_it = {self._known[p.pid][1]: p for p in processes if p.vram_bytes.get(uuid)}
            if len(on_it) > 1:
                states = {uid[-6:]: (p.pid, p.state, p.operation, p.hung) for uid, p in on_it.items()}
                seen = f"{now_ns / MILLISECOND_NS:.0f} ms: {uuid} has {states}"
                self.overlaps.setdefault((uuid, frozenset(on_it)), []).append((now_ns, seen))

    def shared(self) -> list[str]:
        """Forbidden overlaps. A call lost by an earlier agent's worker may run at the next thaw, with its old map. The
        instance on the wrong GPU is found and killed; until then two may be there."""
        return [
            seen[0][1] + f", for {(seen[-1][0] - seen[0][0]) / SECOND_NS:.2f} s"
            for (_, uids), seen in self.overlaps.items()
            if not uids & self.ended or seen[-1][0] - seen[0][0] > FOUND_OUT_S * SECOND_NS
        ]


def _who(pid: int) -> tuple[str, str]:
    """Function and instance of a process."""
    with suppress(psutil.Error):
        environment = psutil.Process(pid).environ()
        return environment.get("FC_FUNCTION_NAME", ""), environment.get("FC_INSTANCE_ID", str(pid))
    return "", str(pid)


# ---- answers -------------------------------------------------------------------------------------------------------


def check_answers(traffics: Sequence[Traffic], chaos: Chaos, observer: GpuObserver, longest_s: float) -> None:
    """Every answer is right or a documented error, within `longest_s`; 502 only if the agent or an instance died."""
    for traffic in traffics:
        assert not traffic.wrong, traffic.wrong[:5]
        assert not traffic.broken, traffic.broken[:5]
        for answer in traffic.answers:
            took_s = (answer.ended_ns - answer.began_ns) / SECOND_NS
            assert took_s < longest_s, f"{traffic.function}: answered after {took_s} s"
        for answer in traffic.failed:
            _check_error(traffic.function, answer, chaos, observer)
    answered = sum(answer.status == 200 for traffic in traffics for answer in traffic.answers)
    assert answered > 100, f"{answered} answers are hardly a load"


def _check_error(name: str, answer: Answer, chaos: Chaos, observer: GpuObserver) -> None:
    span = " to ".join(f"{(at - chaos.began_ns) / SECOND_NS:.3f}" for at in (answer.began_ns, answer.ended_ns))
    text = f"{name} {answer.status} {answer.body[:300]!r} {answer.headers} from {span}"
    body: dict[str, Any] = json.loads(answer.body)
    assert body.keys() == {"RequestId", "Code", "Message"}, text
    assert body["Code"] in CODES.get(answer.status, ()), text
    if answer.status == 502:
        ends = [(kill, kill) for kill in chaos.kills] + observer.deaths.get(name, [])
        during = any(answer.began_ns <= until_ns and since_ns <= answer.ended_ns for since_ns, until_ns in ends)
        assert during, f"no death while it was running: {text}"


# ---- final state ---------------------------------------------------------------------------------------------------


async def check_all_frozen(stack: Stack, chaos: Chaos, functions: Mapping[str, int], deadline_s: float) -> None:
    """Once no request arrives: check processes, cgroups, the driver's table, GPUs, host memory and the ledger."""
    count = sum(functions.values())

    async def all_asleep() -> bool:
        return [one.state for one in await stack.instances()] == [FROZEN] * count

    async def all_free() -> bool:
        return not any(gpu.holder_uids or gpu.cordoned_reason for gpu in (await stack.node()).gpus)

    await until("all instances are frozen", all_asleep, deadline_s)
    await until("every GPU is free, and none cordoned", all_free, deadline_s)
    instances = await stack.instances()
    check_processes(stack, chaos, {one.uid: one.pid for one in instances})
    node = await stack.node()
    assert len(node.gpus) == len(chaos.driver.devices())
    # An image of unknown size (after an agent restart) counts with its whole reservation.
    pledged = sum(one.spec.gpu.memory_bytes - one.frozen_bytes for one in instances if one.frozen_bytes)
    assert node.host_memory.reserved_bytes == pledged, [one.frozen_bytes for one in instances]
    check_contiguous(await stack.windows())


def check_processes(stack: Stack, chaos: Chaos, pids: Mapping[str, int]) -> None:
    """Exactly these instances (uid -> pid) have a process, a cgroup and a checkpoint; no call hit a frozen process."""
    left = stack.leftovers()
    assert sum(each.startswith("process") for each in left) == len(pids), left
    slice_ = cgroup.open_slice((stack.folder / "agent" / "uuid").read_text().strip())
    assert slice_ is not None
    assert set(slice_.uids()) == set(pids)
    processes = chaos.driver.processes()
    assert {process.pid: process.state for process in processes} == dict.fromkeys(pids.values(), "CHECKPOINTED")
    assert not any(process.hung or process.operation for process in processes), processes
    for call in chaos.driver.take_frozen_calls():
        assert chaos.paused(call.pid, call.at_ns), f"a call on a process that the agent itself had frozen: {call}"
