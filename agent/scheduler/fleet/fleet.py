"""The fleet as its agents report it: nodes, their instances, and which nodes are silent.

Each agent keeps one load stream with numbered messages. After a gap it is asked for a snapshot, and until that comes
only its heartbeats count. A node is SUSPECT after `suspect_ns` of silence, when its stream ends, or when its ingress is
unreachable; it is LOST after `lost_ns` of silence. Every change goes to the dispatcher at once, as an event
(core/dispatch/events.py). All callers of the fleet run on one loop, and it never awaits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from agent.core.billing.absence import Absence
from agent.core.dispatch.events import Event, InstanceGone, NodeLost, NodeSuspect
from agent.core.dispatch.model import NodeStanding
from agent.core.errors import InvalidArgumentError, PreconditionError
from agent.core.natural_order import natural_key
from agent.core.provisioning.model import Scheduling
from agent.core.types import SECOND_NS
from agent.event_log import EventLog
from agent.ports import Clock
from agent.scheduler.fleet.away import Away
from agent.v1.scheduler_service_pb2 import InstanceLoad, NodeLoad, Registration, ReportLoadRequest, ReportLoadResponse
from agent.v1.types_pb2 import Gpu, Instance, Node
from agent.wire.addresses import registered_target
from agent.wire.convert_load import node_reported, reported_of_load

MAX_INSTANCES_PER_NODE = 10_000
ENDED_KEPT = 1000
UNREACHABLE_NS = SECOND_NS // 4
"""An unreachable node gets nothing for this long, whatever its stream says: an agent's last messages before it dies
must not bring it back."""
ENDED = (Instance.STATE_STOPPED, Instance.STATE_FAILED)
SERVING = frozenset(
    {
        *(Instance.STATE_RUNNING, Instance.STATE_FREEZING, Instance.STATE_FROZEN),
        *(Instance.STATE_WAITING_GPU, Instance.STATE_RESTORING),
    }
)
"""Provisioning counts instances: a change between these states does not concern it."""


@dataclass(slots=True, eq=False)
class NodeRecord:
    """A node.

    - `stream`: number of its load stream, 0 for none; `peer`: the machine that it comes from. `opening`: streams
      without a message yet, and their machines.
    - `synced`: no message of the stream has been missed since its last snapshot.
    - `all_reported`: its agent has reported all of its instances. `seen`: those named since the stream's last snapshot.
    - `load`: its last heartbeat; `load_ns`: when that came (monotonic ns).
    - `ahead_ns`: how far its clock (CLOCK_MONOTONIC) is ahead of the scheduler's, by its last message; None: unknown.
    - `away`: the time for which it is given up, until that is measured (away.py). `giving_up`: it is being noted that
      the node is given up; it is LOST after that.
    - `idle_since`: by uid, when the instance had its last request (monotonic ns), as its agent reported.
    """

    name: str
    standing: NodeStanding
    last_heard_ns: int
    peer: str = ""
    last_heard_wall_ns: int = 0
    unreachable_ns: int = 0
    stream: int = 0
    epoch: int = 0
    sequence: int = 0
    synced: bool = False
    all_reported: bool = False
    registration: Registration = field(default_factory=Registration)
    load: NodeLoad = field(default_factory=NodeLoad)
    load_ns: int = 0
    gpus: Sequence[Gpu] = ()
    instances: dict[str, InstanceLoad] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    idle_since: dict[str, int] = field(default_factory=dict)
    opening: dict[int, str] = field(default_factory=dict)
    ahead_ns: int | None = None
    away: Away | None = None
    giving_up: bool = False

    @property
    def recovering(self) -> bool:
        """Whether its agent does not know all of its instances yet."""
        return self.load.state not in (Node.STATE_READY, Node.STATE_DRAINING)


class Fleet:
    def __init__(
        self,
        clock: Clock,
        events: EventLog,
        apply_event: Callable[[Event], None],
        changed: Callable[[], None],
        suspect_ns: int,
        lost_ns: int,
        first_seen: Callable[[str], None] = lambda _: None,
        insecure: bool = False,
        note_absence: Callable[[str, Absence | None], None] | None = None,
        returned: Callable[[str, Absence | None], None] = lambda name, absence: None,
    ) -> None:
        """
        - `apply_event`: sends an event to the dispatcher. `changed`: called after a change that concerns provisioning.
        - `first_seen`: gets the name of a node at its first registration ever, to store it.
        - `note_absence`: is asked to make durable that a node is given up, with the absence in the boot in which it was
          last heard, and to call `give_up` then; None gives it up at once. `returned` gets the absence
          once the node is back, None if it cannot be dated.
        - `insecure`: accept addresses on other machines, although tokens travel there in clear text.
        """
        self._clock = clock
        self._events = events
        self._apply_event = apply_event
        self._changed = changed
        self._first_seen = first_seen
        self._insecure = insecure
        self._note_absence = note_absence or (lambda name, absence: self.give_up(name))
        self._returned = returned
        self._suspect_ns = suspect_ns
        self._lost_ns = lost_ns
        self._nodes: dict[str, NodeRecord] = {}
        self._owners: dict[str, NodeRecord] = {}
        self._last_reports: dict[str, InstanceLoad] = {}
        self._scheduling: dict[str, Scheduling] = {}
        self._streams = 0

    # ---- the load stream --------------------------------------------------------------------------------------

    def expect(self, name: str, away_ns: int | None = None) -> None:
        """Add a node known from before a restart of the scheduler; it is LOST unless it reports within `lost_ns`.
        `away_ns`: for how long it was given up already."""
        now = self._clock.monotonic_ns()
        node = self._nodes.setdefault(name, NodeRecord(name, NodeStanding.SUSPECT, now))
        node.away = None if away_ns is None else Away(now - away_ns)

    def stream_opened(self, name: str, peer: str = "127.0.0.1") -> int:
        """Begin a load stream of `name` from the machine `peer`; its first message supersedes an older stream.
        Returns its number."""
        self._streams += 1
        node = self._nodes.get(name)
        if node is None:
            node = self._nodes[name] = NodeRecord(name, NodeStanding.SUSPECT, self._clock.monotonic_ns())
            self._first_seen(name)
        node.opening[self._streams] = peer
        return self._streams

    def receive(self, name: str, stream: int, message: ReportLoadRequest) -> ReportLoadResponse | None:
        """Apply a message. Returns the answer: a snapshot is acknowledged, else None or a request for a snapshot.

        Raises ConfigError or InvalidArgumentError for invalid addresses, or if a token would travel in clear text or to
        another machine; PreconditionError STREAM_SUPERSEDED if the node, or another agent of its name with a later
        epoch, has opened a newer stream; InvalidArgumentError for a missing registration or an unreadable report.
        """
        node = self._nodes[name]
        if stream != node.stream:
            self._supersede(node, stream, message.epoch)
        if message.HasField("registration"):
            self._register(node, message)
        elif not node.registration.ingress_address or message.epoch != node.epoch:
            raise InvalidArgumentError("REGISTRATION_MISSING", "the first message of a load stream must register")
        node.last_heard_ns, node.last_heard_wall_ns = self._clock.monotonic_ns(), self._clock.wall_ns()
        node.ahead_ns = message.monotonic_ns - node.last_heard_ns if message.monotonic_ns else None
        if node.away is not None and node.away.heard(node.last_heard_ns, message.monotonic_ns):
            absence, node.away = node.away.absence(node.registration.boot_id), None
            self._returned(name, absence)
        follows = message.sequence == node.sequence + 1
        node.sequence = message.sequence
        if message.HasField("load"):
            node.load, node.load_ns = message.load, node.last_heard_ns
            node.gpus = message.load.gpus or node.gpus
        if message.snapshot:
            node.synced = True
        elif not follows and node.synced:
            node.synced = False
            self._events.warning("fleet.gap", node=name, sequence=message.sequence)
        if node.synced:
            self._apply(node, message)
        self._update_standing(node, message)
        if node.synced and not message.snapshot:
            return None
        return ReportLoadResponse(node=name, acknowledged_sequence=message.sequence, resync=not node.synced)

    def stream_closed(self, name: str, stream: int) -> None:
        """End a stream: the node is SUSPECT until its agent reports again."""
        node = self._nodes[name]
        node.opening.pop(stream, None)
        if stream == node.stream:
            node.stream, node.synced = 0, False
            self._suspect(node, "stream ended")

    def unreachable(self, name: str) -> None:
        """A connection to the node failed: it is SUSPECT until its next message."""
        node = self._nodes.get(name)
        if node is not None:
            node.unreachable_ns = self._clock.monotonic_ns()
            self._suspect(node, "not reachable")

    def check_silence(self) -> None:
        """Mark silent nodes SUSPECT or LOST; called several times a second."""
        now = self._clock.monotonic_ns()
        for node in self._nodes.values():
            silent = now - node.last_heard_ns
            if silent >= self._lost_ns and node.standing is not NodeStanding.LOST:
                if not node.giving_up:
                    node.giving_up = True
                    self._begin_absence(node, now)
            elif silent >= self._suspect_ns:
                self._suspect(node, "silent")

    def _begin_absence(self, node: NodeRecord, now: int) -> None:
        if node.away is None:
            node.away = Away(now)
        else:
            node.away.silent_again()
        self._note_absence(node.name, node.away.heard_nothing_since(node.registration.boot_id, node.ahead_ns))

    def give_up(self, name: str) -> None:
        """Mark a silent node LOST: its instances are replaced. Nothing happens if it was heard meanwhile."""
        node = self._nodes[name]
        node.giving_up = False
        silent = self._clock.monotonic_ns() - node.last_heard_ns
        if silent < self._lost_ns:
            return
        node.standing = NodeStanding.LOST
        self._events.warning("fleet.node_lost", node=node.name, silent_ms=silent // 1_000_000)
        self._apply_event(NodeLost(node.name))
        self._changed()

    def set_scheduling(self, name: str, scheduling: Scheduling) -> None:
        self._scheduling[name] = scheduling
        self._changed()

    # ---- reading ----------------------------------------------------------------------------------------------

    def all_reported(self) -> bool:
        """Whether every known node has reported all of its instances or is lost: only lost nodes may have others."""
        return all(node.all_reported or node.standing is NodeStanding.LOST for node in self._nodes.values())

    def scheduling(self, name: str) -> Scheduling:
        return self._scheduling.get(name, Scheduling.NORMAL)

    def node(self, name: str) -> NodeRecord | None:
        return self._nodes.get(name)

    def nodes(self) -> list[NodeRecord]:
        return [self._nodes[name] for name in sorted(self._nodes, key=natural_key)]

    def instance(self, uid: str) -> InstanceLoad | None:
        owner = self._owners.get(uid)
        return None if owner is None else owner.instances.get(uid)

    def owner(self, uid: str) -> str:
        """The node that reports an instance; "" if none does."""
        owner = self._owners.get(uid)
        return "" if owner is None else owner.name

    def last_report(self, uid: str) -> InstanceLoad | None:
        """The last report of an instance that its agent has removed since; the newest `ENDED_KEPT` are kept."""
        return self._last_reports.get(uid)

    def instances(self) -> Iterator[tuple[NodeRecord, InstanceLoad]]:
        """Every instance as last reported, recently ended ones included."""
        for node in self._nodes.values():
            for load in node.instances.values():
                yield node, load

    # ---- messages ---------------------------------------------------------------------------------------------

    def _supersede(self, node: NodeRecord, stream: int, epoch: int) -> None:
        """Switch to the stream at its first message. Of two open streams the one with the later epoch counts; if no
        other is open, the epoch may be earlier, as the host's clock may have gone back."""
        peer = node.opening.pop(stream, None)
        if peer is None or stream < node.stream or (node.stream and epoch < node.epoch):
            text = f"node {node.name} has a newer load stream; give each agent its own credential"
            raise PreconditionError("STREAM_SUPERSEDED", text, node=node.name)
        node.stream, node.sequence, node.synced = stream, 0, False
        node.unreachable_ns, node.peer = 0, peer

    def _register(self, node: NodeRecord, message: ReportLoadRequest) -> None:
        registration = message.registration
        if not registration.ingress_address or not registration.grpc_address:
            raise InvalidArgumentError("ADDRESS_MISSING", "a registration needs ingress_address and grpc_address")
        ingress = registered_target(registration.ingress_address, node.peer, self._insecure)
        grpc = registered_target(registration.grpc_address, node.peer, self._insecure)
        registration.ingress_address, registration.grpc_address = ingress, grpc
        node.registration = registration
        if message.epoch != node.epoch:
            node.all_reported = False
        node.epoch = message.epoch
        node.load, node.gpus = NodeLoad(), registration.gpus
        self._events.info(
            "fleet.node_registered",
            node=node.name,
            epoch=message.epoch,
            ingress=ingress,
            gpus=len(message.registration.gpus),
        )

    def _apply(self, node: NodeRecord, message: ReportLoadRequest) -> None:
        changed = False
        if message.snapshot:
            node.seen.clear()
        for load in message.instances:
            changed |= self._instance(node, load)
        for uid in message.removed_uids:
            changed |= self._remove(node, uid)
        if not node.recovering and (message.snapshot or not node.all_reported):
            for uid in [uid for uid in node.instances if uid not in node.seen]:
                changed |= self._remove(node, uid)
            changed |= not node.all_reported
            node.all_reported = True
        if changed:
            self._changed()

    def _instance(self, node: NodeRecord, load: InstanceLoad) -> bool:
        owner = self._owners.get(load.uid, node)
        if owner is not node:
            self._events.error("fleet.foreign_instance", node=node.name, uid=load.uid, owner=owner.name)
            return False
        before = node.instances.get(load.uid)
        if before is None and len(node.instances) >= MAX_INSTANCES_PER_NODE:
            text = f"a node may report at most {MAX_INSTANCES_PER_NODE} instances"
            raise InvalidArgumentError("TOO_MANY_INSTANCES", text, node=node.name)
        event = reported_of_load(load, node.name)  # raises for an unreadable report, before anything is stored
        self._owners[load.uid] = node
        node.instances[load.uid] = load
        node.idle_since[load.uid] = node.last_heard_ns - load.idle_for_ns
        node.seen.add(load.uid)
        self._apply_event(event)
        return before is None or (before.state != load.state and not {before.state, load.state} <= SERVING)

    def _remove(self, node: NodeRecord, uid: str) -> bool:
        node.seen.discard(uid)
        node.idle_since.pop(uid, None)
        load = node.instances.pop(uid, None)
        if load is None:
            return False
        del self._owners[uid]
        self._last_reports[uid] = load
        if len(self._last_reports) > ENDED_KEPT:
            del self._last_reports[next(iter(self._last_reports))]
        self._apply_event(InstanceGone(uid))
        return True

    def _update_standing(self, node: NodeRecord, message: ReportLoadRequest) -> None:
        """Update the standing and tell the dispatcher, on a heartbeat or any message of a SUSPECT or LOST node."""
        back = node.standing in (NodeStanding.SUSPECT, NodeStanding.LOST)
        if not message.HasField("load") and not back:
            return
        if not node.load.state:
            return  # it has registered but has sent no load yet
        if back and node.unreachable_ns and node.last_heard_ns - node.unreachable_ns < UNREACHABLE_NS:
            return
        node.unreachable_ns = 0
        event = node_reported(node.name, node.epoch, node.registration, node.load, node.gpus)
        standing = NodeStanding.DRAINING if event.draining else NodeStanding.READY
        if node.standing is not standing:
            node.standing = standing
            self._events.info("fleet.node_heard", node=node.name, standing=standing.value)
            self._changed()
        self._apply_event(event)

    def _suspect(self, node: NodeRecord, why: str) -> None:
        if node.standing in (NodeStanding.SUSPECT, NodeStanding.LOST):
            return
        node.standing = NodeStanding.SUSPECT
        self._events.warning("fleet.node_suspect", node=node.name, why=why)
        self._apply_event(NodeSuspect(node.name))
        self._changed()
