"""The fleet as its agents report it: nodes, instances, and who has fallen silent.

Each agent keeps one load stream. Its messages are numbered; after a gap the agent is asked for a snapshot, and nothing
but heartbeats is believed until it comes. A node is SUSPECT when it has been silent for `suspect_ns`, when its stream
ended, or when its ingress could not be reached; it is LOST after `lost_ns` of silence. Every change goes to the
dispatcher at once, as events of `core/dispatch/events.py`.

The fleet never awaits: it is called by the stream's servicer and by one timer, on one loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from agent.core.dispatch.events import Event, InstanceGone, NodeLost, NodeSuspect
from agent.core.dispatch.model import NodeStanding
from agent.core.errors import InvalidArgumentError, PreconditionError
from agent.core.provisioning.reconcile import Scheduling
from agent.core.types import SECOND_NS
from agent.log import get_logger
from agent.ports import Clock
from agent.v1.scheduler_service_pb2 import InstanceLoad, NodeLoad, Registration, ReportLoadRequest, ReportLoadResponse
from agent.v1.types_pb2 import Gpu, Instance, Node
from agent.wire.addresses import registered_target
from agent.wire.convert_load import node_reported, reported_of_load

MAX_INSTANCES_PER_NODE = 10_000
LAST_WORDS_KEPT = 1000
UNREACHABLE_NS = SECOND_NS // 4
"""A node that could not be connected to gets nothing for so long, whatever its stream says: a dying agent's last
messages must not bring it back."""
ENDED = (Instance.STATE_STOPPED, Instance.STATE_FAILED)
SERVING = frozenset(
    {
        *(Instance.STATE_RUNNING, Instance.STATE_FREEZING, Instance.STATE_FROZEN),
        *(Instance.STATE_WAITING_GPU, Instance.STATE_RESTORING),
    }
)
"""Going to sleep and waking up: no news to provisioning, which counts instances."""

_log = get_logger()


@dataclass(slots=True, eq=False)
class NodeRecord:
    """One node. `stream` is the number of the load stream that counts, 0 for none; `peer` the machine it comes from.
    `wall_ns`: last heard.

    `seen`: instances named since the stream's snapshot; when a recovering agent is done, all others are gone.
    `idle_since`: when an instance had its last request (monotonic ns), as far as its agent has said. `opening`: streams
    that have said nothing yet, and their machines.
    """

    name: str
    standing: NodeStanding
    heard_ns: int
    peer: str = ""
    wall_ns: int = 0
    unreachable_ns: int = 0
    stream: int = 0
    epoch: int = 0
    sequence: int = 0
    synced: bool = False
    settled: bool = False
    registration: Registration = field(default_factory=Registration)
    load: NodeLoad = field(default_factory=NodeLoad)
    gpus: Sequence[Gpu] = ()
    instances: dict[str, InstanceLoad] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    idle_since: dict[str, int] = field(default_factory=dict)
    opening: dict[int, str] = field(default_factory=dict)

    @property
    def recovering(self) -> bool:
        """Its agent has not said yet that it knows all of its instances."""
        return self.load.state not in (Node.STATE_READY, Node.STATE_DRAINING)


class Fleet:
    """All nodes the scheduler knows. `tell` takes events of the dispatcher; `changed` is called after something
    happened that provisioning may have to act on."""

    def __init__(
        self,
        clock: Clock,
        tell: Callable[[Event], None],
        changed: Callable[[], None],
        suspect_ns: int,
        lost_ns: int,
        met: Callable[[str], None] = lambda _: None,
        insecure: bool = False,
    ) -> None:
        """`met` gets the name of a node at its first registration ever, to be remembered. `insecure`: addresses on
        other machines are taken although their tokens will travel in the clear."""
        self._clock = clock
        self._tell = tell
        self._changed = changed
        self._met = met
        self._insecure = insecure
        self._suspect_ns = suspect_ns
        self._lost_ns = lost_ns
        self._nodes: dict[str, NodeRecord] = {}
        self._owners: dict[str, NodeRecord] = {}
        self._last_words: dict[str, InstanceLoad] = {}
        self._scheduling: dict[str, Scheduling] = {}
        self._streams = 0

    # ---- the load stream --------------------------------------------------------------------------------------

    def expect(self, name: str) -> None:
        """A node known from before a restart of the scheduler: it has `lost_ns` to show up."""
        self._nodes.setdefault(name, NodeRecord(name, NodeStanding.SUSPECT, self._clock.monotonic_ns()))

    def opened(self, name: str, peer: str = "127.0.0.1") -> int:
        """A load stream of `name` began at the machine `peer`: with its first message it takes the place of an older
        one. Its number."""
        self._streams += 1
        node = self._nodes.get(name)
        if node is None:
            node = self._nodes[name] = NodeRecord(name, NodeStanding.SUSPECT, self._clock.monotonic_ns())
            self._met(name)
        node.opening[self._streams] = peer
        return self._streams

    def took(self, name: str, stream: int, message: ReportLoadRequest) -> ReportLoadResponse | None:
        """Take in one message. Snapshots are acknowledged; other messages are answered only to ask for one.

        Raises ConfigError or InvalidArgumentError for addresses that cannot be, or where a token would travel in the
        clear or to somebody else, PreconditionError STREAM_SUPERSEDED if the node has opened another stream since (or
        another agent of that name, of a later epoch), InvalidArgumentError for a first message without registration.
        """
        node = self._nodes[name]
        if stream != node.stream:
            self._supersede(node, stream, message.epoch)
        if message.HasField("registration"):
            self._register(node, message)
        elif not node.registration.ingress_address or message.epoch != node.epoch:
            raise InvalidArgumentError("REGISTRATION_MISSING", "the first message of a load stream must register")
        self._heard(node)
        follows = message.sequence == node.sequence + 1
        node.sequence = message.sequence
        if message.HasField("load"):
            node.load = message.load
            node.gpus = message.load.gpus or node.gpus
        if message.snapshot:
            node.synced = True
        elif not follows and node.synced:
            node.synced = False
            _log.warning("fleet.gap", node=name, sequence=message.sequence)
        if node.synced:
            self._apply(node, message)
        self._rise(node, message)
        if node.synced and not message.snapshot:
            return None
        return ReportLoadResponse(node=name, acknowledged_sequence=message.sequence, resync=not node.synced)

    def closed(self, name: str, stream: int) -> None:
        """The stream ended, for whatever reason: nothing new until the agent is heard again."""
        node = self._nodes[name]
        node.opening.pop(stream, None)
        if stream == node.stream:
            node.stream, node.synced = 0, False
            self._suspect(node, "stream ended")

    def unreachable(self, name: str) -> None:
        """The node could not be connected to: nothing new until its next message."""
        node = self._nodes.get(name)
        if node is not None:
            node.unreachable_ns = self._clock.monotonic_ns()
            self._suspect(node, "not reachable")

    def check_silence(self) -> None:
        """Called several times a second: who has been silent for too long?"""
        now = self._clock.monotonic_ns()
        for node in self._nodes.values():
            silent = now - node.heard_ns
            if silent >= self._lost_ns and node.standing is not NodeStanding.LOST:
                node.standing = NodeStanding.LOST
                _log.warning("fleet.node_lost", node=node.name, silent_ms=silent // 1_000_000)
                self._tell(NodeLost(node.name))
                self._changed()
            elif silent >= self._suspect_ns:
                self._suspect(node, "silent")

    def schedule(self, name: str, scheduling: Scheduling) -> None:
        """What an operator asks of a node is in effect from now on."""
        self._scheduling[name] = scheduling
        self._changed()

    # ---- reading ----------------------------------------------------------------------------------------------

    def settled(self) -> bool:
        """Every known node has said what it has, or is lost: what isn't in the table does not exist."""
        return all(node.settled or node.standing is NodeStanding.LOST for node in self._nodes.values())

    def scheduling(self, name: str) -> Scheduling:
        """What an operator has asked of a node."""
        return self._scheduling.get(name, Scheduling.NORMAL)

    def node(self, name: str) -> NodeRecord | None:
        return self._nodes.get(name)

    def nodes(self) -> list[NodeRecord]:
        """All nodes, by name."""
        return [self._nodes[name] for name in sorted(self._nodes)]

    def instance(self, uid: str) -> InstanceLoad | None:
        """One instance as last reported."""
        owner = self._owners.get(uid)
        return None if owner is None else owner.instances.get(uid)

    def owner(self, uid: str) -> str:
        """The node that reports an instance; "" if none does."""
        owner = self._owners.get(uid)
        return "" if owner is None else owner.name

    def last_words(self, uid: str) -> InstanceLoad | None:
        """What was last reported of an instance that its agent has removed since; the newest of them are kept."""
        return self._last_words.get(uid)

    def instances(self) -> Iterator[tuple[NodeRecord, InstanceLoad]]:
        """Every instance, those that ended lately included, as last reported."""
        for node in self._nodes.values():
            for load in node.instances.values():
                yield node, load

    # ---- inside -----------------------------------------------------------------------------------------------

    def _supersede(self, node: NodeRecord, stream: int, epoch: int) -> None:
        """Its first message: it counts from now on. Of two streams that are open the one of the later run of the agent
        does; with one alone the host's clock may have gone back since."""
        peer = node.opening.pop(stream, None)
        if peer is None or stream < node.stream or (node.stream and epoch < node.epoch):
            text = f"node {node.name} has a newer load stream; one agent per node credential"
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
            node.settled = False
        node.epoch = message.epoch
        node.load, node.gpus = NodeLoad(), registration.gpus
        _log.info(
            "fleet.node_registered",
            node=node.name,
            epoch=message.epoch,
            ingress=ingress,
            gpus=len(message.registration.gpus),
        )

    def _heard(self, node: NodeRecord) -> None:
        node.heard_ns = self._clock.monotonic_ns()
        node.wall_ns = self._clock.wall_ns()

    def _apply(self, node: NodeRecord, message: ReportLoadRequest) -> None:
        changed = False
        if message.snapshot:
            node.seen.clear()
        for load in message.instances:
            changed |= self._instance(node, load)
        for uid in message.removed_uids:
            changed |= self._remove(node, uid)
        if not node.recovering and (message.snapshot or not node.settled):
            for uid in [uid for uid in node.instances if uid not in node.seen]:
                changed |= self._remove(node, uid)
            changed |= not node.settled
            node.settled = True
        if changed:
            self._changed()

    def _instance(self, node: NodeRecord, load: InstanceLoad) -> bool:
        owner = self._owners.get(load.uid, node)
        if owner is not node:
            _log.error("fleet.foreign_instance", node=node.name, uid=load.uid, owner=owner.name)
            return False
        before = node.instances.get(load.uid)
        if before is None and len(node.instances) >= MAX_INSTANCES_PER_NODE:
            text = f"a node may report at most {MAX_INSTANCES_PER_NODE} instances"
            raise InvalidArgumentError("TOO_MANY_INSTANCES", text, node=node.name)
        event = reported_of_load(load, node.name)  # before anything is kept: it refuses what it can't read
        self._owners[load.uid] = node
        node.instances[load.uid] = load
        node.idle_since[load.uid] = node.heard_ns - load.idle_for_ns
        node.seen.add(load.uid)
        self._tell(event)
        return before is None or (before.state != load.state and not {before.state, load.state} <= SERVING)

    def _remove(self, node: NodeRecord, uid: str) -> bool:
        node.seen.discard(uid)
        node.idle_since.pop(uid, None)
        load = node.instances.pop(uid, None)
        if load is None:
            return False
        del self._owners[uid]
        self._last_words[uid] = load
        if len(self._last_words) > LAST_WORDS_KEPT:
            del self._last_words[next(iter(self._last_words))]
        self._tell(InstanceGone(uid))
        return True

    def _rise(self, node: NodeRecord, message: ReportLoadRequest) -> None:
        """A heartbeat, or anything from a node that was silent: it is back, as far as it says so itself."""
        back = node.standing in (NodeStanding.SUSPECT, NodeStanding.LOST)
        if not message.HasField("load") and not back:
            return
        if not node.load.state:
            return  # it has registered, and not yet said how it is
        if back and node.unreachable_ns and node.heard_ns - node.unreachable_ns < UNREACHABLE_NS:
            return
        node.unreachable_ns = 0
        event = node_reported(node.name, node.epoch, node.registration, node.load, node.gpus)
        standing = NodeStanding.DRAINING if event.draining else NodeStanding.READY
        if node.standing is not standing:
            node.standing = standing
            _log.info("fleet.node_heard", node=node.name, standing=standing.value)
            self._changed()
        self._tell(event)

    def _suspect(self, node: NodeRecord, why: str) -> None:
        if node.standing in (NodeStanding.SUSPECT, NodeStanding.LOST):
            return
        node.standing = NodeStanding.SUSPECT
        _log.warning("fleet.node_suspect", node=node.name, why=why)
        self._tell(NodeSuspect(node.name))
        self._changed()
