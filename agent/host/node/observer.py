"""Takes snapshots of the node. It only reads, on the loop's thread, so each snapshot is of one moment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from agent.core.lifecycle.events import Operation
from agent.core.lifecycle.machine import PAUSED
from agent.core.snapshots import CapabilityLine, GpuSnapshot, InstanceReading, InstanceSnapshot, NodeSnapshot
from agent.core.types import GpuSample, InstanceState
from agent.host.instance.actor import Actor
from agent.host.node.gauges import Gauges
from agent.host.node.node import Node
from agent.ports import Clock, DriverInfo


@dataclass(frozen=True, slots=True)
class NodeIdentity:
    """What does not change while the agent runs."""

    name: str
    boot_id: str
    version: str
    epoch: int
    driver: DriverInfo | None
    capabilities: tuple[CapabilityLine, ...]
    runtimes: tuple[str, ...]
    instances_per_gpu: int
    start_wall_ns: int
    host_total_bytes: int
    labels: Mapping[str, str] = field(default_factory=dict)
    gpu_types: Mapping[str, str] = field(default_factory=dict)


class Observer:
    """Snapshots for the API and the load stream. The daemon sets the addresses once it has bound its ports, and
    `engine_lines` whenever the container engine goes down or comes back."""

    def __init__(
        self,
        node: Node,
        identity: NodeIdentity,
        clock: Clock,
        *,
        totals: Callable[[str], tuple[int, int, int]],
        gpu_samples: Callable[[], Mapping[str, GpuSample]] = dict,
        gauges: Gauges | None = None,
        peak: Callable[[str], int] = lambda _: 0,
    ) -> None:
        """`totals`: (active, idle, unbilled) ns of an instance; `gpu_samples`: the last sample per GPU; `peak`: the
        most requests that were inside an instance at once in the last minutes."""
        self.identity = identity
        self.ready = False
        self.ingress_address = ""
        self.grpc_address = ""
        self.engine_lines: tuple[CapabilityLine, ...] = ()
        self._node = node
        self._clock = clock
        self._totals = totals
        self._gpu_samples = gpu_samples
        self._gauges = gauges
        self._peak = peak

    def monotonic_ns(self) -> int:
        """The clock that dates usage windows."""
        return self._clock.monotonic_ns()

    def instance(self, actor: Actor) -> InstanceSnapshot:
        """One instance, now."""
        instance, figures, gate = actor.instance, actor.figures, actor.gate
        handle = actor.handle_of_container
        idle = instance.state is InstanceState.RUNNING and not instance.busy
        active_ns, idle_ns, unbilled_ns = self._totals(actor.uid)
        return InstanceSnapshot(
            uid=actor.uid,
            function=actor.function,
            request_id=actor.spec.request_id,
            state=instance.state,
            reason=instance.reason or (PAUSED if instance.paused else instance.refusal.partition(":")[0]),
            message=instance.message or (instance.refusal and f"the last freeze was refused: {instance.refusal}"),
            gpu_uuids=actor.gpu_uuids,
            in_flight=gate.in_flight,
            waiting=gate.waiting,
            healthy=actor.healthy and not instance.paused,
            vram_bytes=self._vram_bytes(actor),
            frozen_bytes=figures.image_bytes,
            pid=handle.process.pid if handle is not None else 0,
            address=f"{handle.host}:{handle.port}" if handle is not None else "",
            create_wall_ns=figures.create_wall_ns,
            state_wall_ns=figures.state_wall_ns,
            wakes=figures.wakes,
            freezes=figures.freezes,
            last_wake_ns=figures.last_wake_ns,
            last_wake_driver_ns=figures.last_wake_driver_ns,
            wake_estimate_ns=figures.wake_estimate_ns,
            idle_for_ns=max(0, self._clock.monotonic_ns() - figures.idle_since_ns) if idle else 0,
            freeze_cancellable=instance.state is InstanceState.FREEZING
            and instance.op is Operation.LOCK
            and not instance.ordered,
            active_ns=active_ns,
            idle_ns=idle_ns,
            unbilled_ns=unbilled_ns,
            container_id=handle.container_id if handle is not None else "",
            progress=figures.progress if instance.state is InstanceState.STARTING else "",
            usage=InstanceReading() if self._gauges is None else self._gauges.of(actor.uid),
            vram_limit_bytes=self._vram_limit_bytes(actor),
            peak_in_flight=self._peak(actor.uid),
        )

    def _vram_bytes(self, actor: Actor) -> int:
        """VRAM as NVML shows it now if the instance is awake, else as last measured."""
        now = self._gauges.vram_of(actor.uid) if self._gauges and actor.state is InstanceState.RUNNING else None
        return actor.figures.vram_bytes if now is None else now

    def _vram_limit_bytes(self, actor: Actor) -> int:
        """The VRAM that its function is billed for: as declared, else all the memory of its GPUs."""
        need, inventory = actor.function.gpu, self._node.broker.inventory
        if need.memory_bytes:
            return need.memory_bytes * need.count
        return sum(inventory[uuid].memory_bytes for uuid in actor.gpu_uuids if uuid in inventory)

    def awake(self) -> list[InstanceSnapshot]:
        """The RUNNING instances: the heartbeat reports their gauges."""
        return [self.instance(actor) for actor in self._node.actors.values() if actor.state is InstanceState.RUNNING]

    def instances(self, *, include_ended: bool = False) -> list[InstanceSnapshot]:
        """All instances, oldest first."""
        actors = [*(self._node.ended.values() if include_ended else ()), *self._node.actors.values()]
        return [self.instance(actor) for actor in sorted(actors, key=lambda a: (a.figures.create_wall_ns, a.uid))]

    def node(self) -> NodeSnapshot:
        """The node now; its GPUs as of the last sample."""
        me, node = self.identity, self._node
        cuda = me.driver.cuda if me.driver is not None else 0
        return NodeSnapshot(
            name=me.name,
            boot_id=me.boot_id,
            agent_version=me.version,
            epoch=me.epoch,
            driver_version=me.driver.version if me.driver is not None else "",
            cuda_version=f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else "",
            gpus=tuple(self._gpus()),
            host_total_bytes=me.host_total_bytes,
            host_available_bytes=node.memory.available_bytes(),
            host_reserved_bytes=node.memory.ledger.outstanding_bytes,
            capabilities=(*me.capabilities, *self.engine_lines),
            ready=self.ready,
            draining=node.draining,
            ingress_address=self.ingress_address,
            grpc_address=self.grpc_address,
            instances_per_gpu=me.instances_per_gpu,
            runtimes=me.runtimes,
            instance_count=len(node.actors),
            start_wall_ns=me.start_wall_ns,
            labels=me.labels,
            migrates=node.broker.allocator.migrate,
            gpu_types=me.gpu_types,
        )

    def _gpus(self) -> list[GpuSnapshot]:
        allocator, samples = self._node.broker.allocator, self._gpu_samples()
        return [
            GpuSnapshot(
                gpu=gpu,
                figures=samples.get(uuid),
                holder=allocator.devices[uuid].holder,
                waiters=tuple(waiter.uid for waiter in allocator.queue if uuid in waiter.allowed),
                cordoned=allocator.devices[uuid].cordoned,
            )
            for uuid, gpu in self._node.broker.inventory.items()
        ]
