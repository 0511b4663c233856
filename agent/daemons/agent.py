"""Composition root of the agent daemon: builds every component in order and closes them in reverse.

`python -m agent.daemons.agent --config FILE` (or `hibernode agent --config FILE`). It locks the state directory and the
GPUs, opens the store, binds, recovers, reports READY and serves. On SIGTERM: health NOT_SERVING, running requests
finish, instances stay.
"""

from __future__ import annotations

import asyncio
import platform
import random
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import psutil

from agent import __version__
from agent.adapters.daemon.scheduler_link import SchedulerLink
from agent.adapters.daemon.sd_notify import notify
from agent.adapters.daemon.state_dir import StateDir
from agent.adapters.daemon.token_file import ensure_token, read_token
from agent.adapters.engine.survey import survey_engine
from agent.adapters.kernel import process_table
from agent.adapters.kernel.cgroup import CgroupSlice, open_slice
from agent.adapters.kernel.clock import SystemClock
from agent.adapters.kernel.host_memory import ProcHostMemory
from agent.adapters.kernel.usage_reader import ProcUsageReader
from agent.adapters.nvml.gpus import NvmlGpus
from agent.adapters.nvml.xid_events import NvmlEvents
from agent.adapters.store.node_store import NodeStore
from agent.api.admin_http import AdminServer
from agent.api.agent_metrics import AgentHealth, AgentMetrics
from agent.api.instance_logs import InstanceLogs
from agent.api.instance_servicer import InstanceServicer
from agent.api.node_ledger import NodeLedger
from agent.api.node_servicer import NodeServicer
from agent.core.billing.meter import BilledAs, BillingPolicy
from agent.core.engine_capabilities import engine_lines
from agent.core.errors import UnavailableError
from agent.core.gpus.capabilities import host_lines
from agent.core.types import SECOND_NS
from agent.daemons.engine_layer import open_runtimes
from agent.daemons.gpu_layer import HostView, open_gpu_layer, survey_node_gpus
from agent.daemons.process import daemon_main, run_until_signal
from agent.event_log import EventLog
from agent.host.billing.billing import Billing, BillingOptions
from agent.host.billing.pruning import LedgerPruner
from agent.host.gpus.gpu_isolation import GpuIsolation
from agent.host.gpus.monitor import GpuMonitor
from agent.host.ingress.ingress import FULL, Ingress
from agent.host.instance.context import InstanceContext
from agent.host.instance.memory_reservations import MemoryReservations
from agent.host.node.engine_watch import EngineWatch
from agent.host.node.exec_sessions import ExecSessions
from agent.host.node.gauges import Gauges
from agent.host.node.node import Node, NodeSettings
from agent.host.node.observer import NodeIdentity, Observer
from agent.host.node.pauses import watch_pauses
from agent.host.node.recovery import Recovery
from agent.http.limits import Limits
from agent.http.request_ids import RequestIds
from agent.http.server import serve
from agent.log import get_logger
from agent.settings import AgentConfig, ListenSettings
from agent.wire.addresses import join
from agent.wire.clients import DaemonChannel
from agent.wire.server import GrpcServer, Services
from agent.wire.tokens import Principal, Role, TokenTable

GRACE_S = 30.0
GRPC_GRACE_S = 2.0
LAME_DUCK_S = 0.1
"""Requests are refused for this long before their connections close: a refusal sends a request to another node, a
closed connection does not. By then the load stream has ended, so the scheduler sends no more."""
LEAVE_S = 120.0
"""Upper bound for the work after the stop of all instances: kills, clean-up, the last usage windows."""
GATEWAY_HEADER_ROOM_BYTES = 4096


class AgentDaemon:
    """Owns everything that lives as long as the daemon. `run` returns after a clean stop."""

    def __init__(self, config: AgentConfig, stack: AsyncExitStack) -> None:
        self._config = config
        self._stack = stack
        self._log = get_logger()
        self.clock = SystemClock()
        self.events = EventLog(self.clock)
        stack.callback(self.events.flush)
        self.request_ids = RequestIds(lambda: self.clock.wall_ns() // SECOND_NS, random.Random().getrandbits)
        self.boot_id = process_table.boot_id()
        self.state = stack.enter_context(StateDir(Path(config.state_dir), passable=True))
        own = ensure_token(config.token_path)
        # The scheduler and its node call each other with the same credential (agent/docs/design.md).
        self.credential = read_token(Path(config.scheduler.token_file)) if config.scheduler is not None else own
        self.tokens = [own] if self.credential == own else [own, self.credential]
        self.name = config.node_name or platform.node()

    async def run(self) -> None:
        """Build, bind and recover; then serve until a signal."""
        await self._build()
        await self._bind()
        recovered = await Recovery(self.node, frozenset(self.node.broker.inventory)).run()
        await self._become_ready()
        self._log.info(
            "agent.ready",
            node=self.name,
            ingress=self.observer.ingress_address,
            grpc=self.observer.grpc_address,
            running=recovered.running,
            frozen=recovered.frozen,
            restarted=recovered.restarted,
        )
        services = [
            self.gpu_monitor.run(),
            self.gauges.run(),
            watch_pauses(self.node, self.gpu.freezer),
            LedgerPruner(self.store, self.clock).run(),
        ]
        if self.runtime.engine is not None:
            watch = EngineWatch(self.runtime.engine, self.runtime, self.node, self.events, self._survey_engine)
            services.append(watch.run())
        if self.link is not None:
            services.append(self.link.run())
        try:
            await run_until_signal(services)
        finally:
            await self._leave()

    # ---- build ----------------------------------------------------------------------------------------------------

    async def _build(self) -> None:
        """Build, in order: GPU survey, store and billing, runtimes, GPU layer, node, monitors, scheduler link."""
        config = self._config
        gpus = NvmlGpus()
        self._stack.push_async_callback(gpus.close)
        survey = await survey_node_gpus(gpus)
        slice_ = open_slice(self.state.uuid)
        self.store = await NodeStore.open(Path(config.state_dir))
        self._stack.push_async_callback(self.store.close)
        self.billing = Billing(
            self.clock,
            self.store,
            node=self.name,
            boot_id=self.boot_id,
            settings=_billing(config),
            card_bytes={gpu.uuid: gpu.memory_bytes for gpu in survey.gpus},
        )
        await self.billing.load()
        self.runtime, self.engine_api = open_runtimes(self._stack, config, self.state.uuid, slice_, self.clock)
        host = HostView(slice_, self.state.uuid, self.boot_id, self.runtime.pids)
        self.gpu = await open_gpu_layer(self._stack, config.gpu, host, gpus, survey, self._cordon)
        memory = MemoryReservations(
            ProcHostMemory(limits=Path(config.state_dir) / "limits", images=Path(config.state_dir) / "images"),
            limit_bytes=config.gpu.frozen_memory_limit_bytes,
            reserve_bytes=config.gpu.host_memory_reserve_bytes,
        )
        self.node = Node(
            NodeSettings(
                per_gpu=config.gpu.instances_per_gpu,
                max_hold_ns=config.gpu.max_hold_ns,
                release_timeout_ns=config.gpu.release_timeout_ns,
                max_waiting=config.queue.max_waiting,
                types=config.gpu.types,
                migrate=config.gpu.migrate and self.gpu.migrates,
                freeze_unavailable=self.gpu.unavailable,
            ),
            survey.gpus,
            self._context(memory),
            gpus=gpus,
            meters=self.billing,
            new_uid=lambda: f"i-{uuid.uuid4().hex[:20]}",
        )
        self.gpu_monitor = self._build_gpu_monitor(gpus)
        reader = ProcUsageReader(self.boot_id)
        self._stack.callback(reader.close)
        self.gauges = Gauges(reader, self.node.actors, self._vram_now)
        self.observer = Observer(
            self.node,
            self._identity(slice_),
            self.clock,
            totals=self.billing.totals,
            gpu_samples=self.gpu_monitor.samples,
            gauges=self.gauges,
            peak=self.billing.peak,
        )
        self.link = self._link()

    def _cordon(self, gpu_uuids: Sequence[str]) -> None:
        """Keep new work off these GPUs: a driver call survived SIGKILL."""
        self.node.broker.cordon(
            "", gpu_uuids, "DRIVER_STUCK: a driver call survived SIGKILL", source="driver", lasting=True
        )

    def _build_gpu_monitor(self, gpus: NvmlGpus) -> GpuMonitor:
        xid_events = NvmlEvents()
        self._stack.callback(xid_events.close)
        self.gpu_isolation = GpuIsolation(gpus, self.runtime, self.node.broker, self.node.actors, self.events)
        return GpuMonitor(
            gpus,
            xid_events,
            self.node.broker,
            self.events,
            self.clock,
            after_sample=self.gpu_isolation.check,
            persistence_is_off=self.gpu.checkpointer.on_persistence_off,
        )

    def _vram_now(self) -> Mapping[str, int]:
        """GPU memory of each instance; empty while NVML does not answer."""
        return self.gpu_isolation.vram_bytes if self.gpu_monitor.samples() else {}

    def _gpu_numbers(self, gpu_uuids: Sequence[str]) -> tuple[int, ...]:
        return self.node.broker.cuda_numbers(gpu_uuids)

    def _context(self, memory: MemoryReservations) -> InstanceContext:
        runtime = self._config.runtime
        return InstanceContext(
            clock=self.clock,
            runtime=self.runtime,
            freezer=self.gpu.freezer,
            memory=memory,
            store=self.store,
            events=self.events,
            request_ids=self.request_ids,
            ready_timeout_s=runtime.ready_timeout_ns / SECOND_NS,
            stop_timeout_s=runtime.stop_timeout_ns / SECOND_NS,
            environment=self._config.gpu.mounts.environment,
            gpu_models={gpu.uuid: gpu.model for gpu in self.gpu.survey.gpus},
            gpu_numbers=self._gpu_numbers,
            store_problem=lambda: self.store.health.message,
        )

    async def _survey_engine(self) -> None:
        """Refresh what the node reports about its container engine."""
        config, uuids = self._config, [gpu.uuid for gpu in self.gpu.survey.gpus]
        survey = await survey_engine(self.engine_api, config.runtime, config.gpu, uuids)
        self.observer.engine_lines = tuple(engine_lines(survey))

    def _identity(self, slice_: CgroupSlice | None) -> NodeIdentity:
        cgroup = "" if slice_ is None else str(slice_.path_of(""))
        return NodeIdentity(
            name=self.name,
            boot_id=self.boot_id,
            version=__version__,
            epoch=self.clock.wall_ns(),
            driver=self.gpu.survey.driver,
            capabilities=host_lines(self.gpu.capabilities, cgroup, self.gpu.unavailable),
            runtimes=self.runtime.offered,
            instances_per_gpu=self._config.gpu.instances_per_gpu,
            start_wall_ns=self.clock.wall_ns(),
            host_total_bytes=psutil.virtual_memory().total,
            gpu_types=self._config.gpu.types,
        )

    def _link(self) -> SchedulerLink | None:
        link = self._config.scheduler
        if link is None:
            return None
        channel = DaemonChannel(link.address, self.credential, self._config.insecure)
        self._stack.push_async_callback(channel.close)
        scheduler_link = SchedulerLink(
            channel, self.observer, self.node.actors, self.store, link.upload_interval_ns / SECOND_NS
        )
        self.node.listeners.append(scheduler_link)
        return scheduler_link

    # ---- serve ----------------------------------------------------------------------------------------------------

    async def _bind(self) -> None:
        """Listen on all addresses, admit no request yet, and record the bound addresses."""
        config = self._config
        self.ingress = Ingress(self.node, self.clock, self.tokens, self.request_ids)
        limits = Limits(
            header_bytes=config.limits.header_bytes + GATEWAY_HEADER_ROOM_BYTES,
            target_bytes=config.limits.path_bytes,
            body_bytes=config.limits.body_bytes,
            max_connections=config.limits.connections,
        )
        with _bind_errors("ingress", config.ingress):
            self.http = await serve(
                self.ingress,
                config.ingress.host,
                config.ingress.port,
                limits,
                request_ids=self.request_ids,
                on_fault=lambda error, request_id: self._log.error(
                    "ingress.fault", request_id=request_id, error=type(error).__name__, exc_info=error
                ),
                when_full=FULL,
            )
        self._stack.push_async_callback(self.http.close, 0.0)
        self.logs = InstanceLogs(self.runtime)
        self.execs = ExecSessions(self.node, self.runtime, self.events, self.clock)
        services = Services(
            instances=InstanceServicer(
                self.node,
                self.observer,
                self.events,
                self.clock,
                logs=self.logs,
                execs=self.execs,
                queue_timeout_ns=config.queue.timeout_ns,
            ),
            nodes=NodeServicer(self.observer, NodeLedger(self.store, self.billing.unwritten)),
        )
        self.grpc = GrpcServer(
            services, TokenTable([(token, Principal("operator", Role.OPERATOR)) for token in self.tokens])
        )
        port = self.grpc.bind_tcp(config.grpc.host, config.grpc.port, config.insecure)
        self.grpc.bind_unix(str(config.socket_path))
        await self.grpc.start()
        self._stack.push_async_callback(self.grpc.stop, 0.0)
        self.observer.ingress_address = join(config.ingress.host, self.http.port)
        self.observer.grpc_address = join(config.grpc.host, port)
        self.admin = AdminServer(
            AgentMetrics(self.observer, self._health, self.gpu_monitor.xids).render, lambda: self.observer.ready
        )
        with _bind_errors("admin", config.admin):
            admin_port = await self.admin.start(config.admin.host, config.admin.port)
        self._stack.push_async_callback(self.admin.stop)
        self.state.write_endpoints(
            {
                "ingress": self.observer.ingress_address,
                "grpc": self.observer.grpc_address,
                "socket": str(config.socket_path),
                "admin": join(config.admin.host, admin_port),
                "token_file": str(config.token_path),
            }
        )

    def _health(self) -> AgentHealth:
        ledger = self.billing.health
        return AgentHealth(
            store_ok=self.store.health.ok and ledger.healthy,
            pending_windows=ledger.pending,
            merged_windows=ledger.merged,
            unmatched_ends=ledger.unmatched_ends,
            scheduler_connected=self.link.connected if self.link is not None else None,
        )

    async def _become_ready(self) -> None:
        """Complete and store the billing of the time before the restart, then open ingress and gRPC."""
        self.billing.complete_ended()
        await self.billing.flush()  # on disk before new work: another kill must not widen the gap
        self.billing.start()
        self.ingress.open = self.observer.ready = True
        await self.grpc.set_serving(True)

    async def _leave(self) -> None:
        """Finish running requests, refuse waiting ones (the gateway retries them), keep instances or stop them
        (`on_stop`)."""
        self._log.info("agent.stopping", on_stop=self._config.on_stop)
        self.ingress.open = self.observer.ready = False
        self.ingress.leaving = True
        await self.grpc.set_serving(False)
        self.node.draining = True
        await asyncio.gather(self.execs.close(), self.logs.close())
        if self._config.on_stop == "stop":
            limit_s = GRACE_S + self._config.runtime.stop_timeout_ns / SECOND_NS
            notify(f"EXTEND_TIMEOUT_USEC={int((limit_s + LEAVE_S) * 1e6)}")
            await self.node.stop_all(int(GRACE_S * SECOND_NS), limit_s)
        for actor in self.node.actors.values():
            actor.close()
        await asyncio.sleep(LAME_DUCK_S)
        await self.http.close(GRACE_S)
        await self.grpc.stop(GRPC_GRACE_S)
        await self.node.close()
        await self.billing.stop()
        self._log.info("agent.stopped")


def _billing(config: AgentConfig) -> BillingOptions:
    policy = BillingPolicy(starting=BilledAs(config.billing.starting), restoring=BilledAs(config.billing.restoring))
    return BillingOptions(policy, config.billing.window_ns, config.billing.flush_interval_ns)


@contextmanager
def _bind_errors(key: str, listen: ListenSettings) -> Iterator[None]:
    """Turn an OSError into UnavailableError BIND_FAILED."""
    try:
        yield
    except OSError as error:
        where = join(listen.host, listen.port)
        text = f"cannot listen on {where} ({error.strerror or error}); stop what uses it, or set another {key}.port"
        raise UnavailableError("BIND_FAILED", text) from error


async def run(config: AgentConfig) -> None:
    """Run the daemon until SIGTERM or SIGINT. Raises HibernodeError if it can't start."""
    async with AsyncExitStack() as stack:
        await AgentDaemon(config, stack).run()


if __name__ == "__main__":
    daemon_main("agent", AgentConfig, run)
