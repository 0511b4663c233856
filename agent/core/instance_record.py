"""The record of an instance: what the next agent must find on disk."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from agent.core.types import Handle, InstanceSpec


class RecordPhase(Enum):
    """How far an instance got. CREATED: intent only. STARTED: handle known, /initialize not done."""

    CREATED = "CREATED"
    STARTED = "STARTED"
    READY = "READY"
    STOPPING = "STOPPING"
    ENDED = "ENDED"


@dataclass(frozen=True, slots=True)
class InstanceRecord:
    """What must survive the agent: the spec, then the handle, then how far the instance got."""

    spec: InstanceSpec
    phase: RecordPhase
    handle: Handle | None
    gpu_uuids: tuple[str, ...]
    create_wall_ns: int


@dataclass(frozen=True, slots=True)
class UnreadableRecord:
    """A record that this version can't read: damaged, or of a newer version. `gpu_uuids`, `handle`: as far as it tells
    them."""

    uid: str
    gpu_uuids: tuple[str, ...]
    problem: str
    handle: Handle | None = None
