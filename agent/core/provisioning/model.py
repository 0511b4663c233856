"""What provisioning knows of an instance: its create, its node, and what its agent reports."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

from agent.core.types import InstanceState


@dataclass(frozen=True, slots=True)
class RequestId:
    """The request_id of a create: function/revision/ordinal/attempt."""

    function: str
    revision: str
    ordinal: int
    attempt: int

    def __str__(self) -> str:
        return f"{self.function}/{self.revision}/{self.ordinal}/{self.attempt}"


@lru_cache(maxsize=16_384)  # a round of provisioning parses the id of every instance
def parse_request_id(text: str) -> RequestId | None:
    """The parts of a scheduler's request_id; None for any other (an instance created by hand)."""
    parts = text.split("/")
    if len(parts) != 4 or not (parts[2].isdecimal() and parts[3].isdecimal()):
        return None
    return RequestId(parts[0], parts[1], int(parts[2]), int(parts[3]))


class Scheduling(Enum):
    """What an operator has asked of a node. CORDONED: it gets no new instances. DRAINED: its instances are replaced
    elsewhere, then drained. EMPTIED: they are drained even if nothing can replace them."""

    NORMAL = "NORMAL"
    CORDONED = "CORDONED"
    DRAINED = "DRAINED"
    EMPTIED = "EMPTIED"

    @property
    def drains(self) -> bool:
        return self in (Scheduling.DRAINED, Scheduling.EMPTIED)

    def shown(self, instances: int) -> str:
        """The word for people, of a node that has that many instances: it is not DRAINED before the last has ended."""
        if not self.drains:
            return self.value
        return "DRAINING" if instances else "DRAINED"


@dataclass(frozen=True, slots=True)
class ObservedInstance:
    """An instance that a scheduler created; `plan` takes only those that have not ended.

    - `on_lost_node`, `scheduling`: of its node.
    - `unsteady`: its node is silent, its agent is shutting down, or it fails its health check.
    - `requests`: those it executes and those that wait for it; `idle_ns`: how long it has had none.
    - `gpus`: those it is assigned to.
    """

    uid: str
    node: str
    made_by: RequestId
    state: InstanceState
    on_lost_node: bool = False
    scheduling: Scheduling = Scheduling.NORMAL
    unsteady: bool = False
    requests: int = 0
    idle_ns: int = 0
    gpus: tuple[str, ...] = ()

    @property
    def serving(self) -> bool:
        """It has come up: it can replace an instance of an older revision."""
        return not self.on_lost_node and self.state not in (InstanceState.STARTING, InstanceState.STOPPING)
