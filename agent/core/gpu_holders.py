"""Who holds the GPU that an instance waits for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from agent.core.types import SECOND_NS, InstanceState

HOLDING = frozenset((InstanceState.STARTING, InstanceState.RUNNING, InstanceState.FREEZING, InstanceState.RESTORING))


@dataclass(frozen=True, slots=True)
class GpuUser:
    """An instance with the GPUs that it holds or is assigned to. `since_wall_ns`: when its state last changed."""

    uid: str
    function: str
    node: str
    state: InstanceState
    gpus: tuple[str, ...]
    since_wall_ns: int


def holders(users: Iterable[GpuUser]) -> dict[str, GpuUser]:
    """For the uid of each instance that waits for a GPU: the longest holder of one of its GPUs, if there is one."""
    waiting: list[GpuUser] = []
    of_gpu: dict[str, GpuUser] = {}
    for user in users:
        if user.state is InstanceState.WAITING_GPU:
            waiting.append(user)
        elif user.state in HOLDING:
            for gpu in user.gpus:
                of_gpu.setdefault(gpu, user)
    found = {}
    for one in waiting:
        holding = [of_gpu[gpu] for gpu in one.gpus if gpu in of_gpu]
        if holding:
            found[one.uid] = min(holding, key=lambda user: user.since_wall_ns)
    return found


def held_by(holder: GpuUser, now_wall_ns: int) -> str:
    """`its GPU is held by i-1 of chat, RUNNING for 75 s`."""
    for_s = max(0, now_wall_ns - holder.since_wall_ns) // SECOND_NS
    return f"its GPU is held by {holder.uid} of {holder.function}, {holder.state.name} for {for_s} s"
