"""Composition root of the scheduler daemon: builds every component in order and closes them in reverse.

`python -m agent.daemons.scheduler --config FILE` (or `hibernode scheduler --config FILE`). The store holds what must
survive a restart; the agents' load streams restore the rest, so a SIGKILL loses only the requests in the gateway. On
SIGTERM: health NOT_SERVING, no new connections, running and queued requests finish.

Of several schedulers on one PostgreSQL one is active. A standby serves only the admin pages until the database session
of the active one ends. One that loses its lock exits with LEAD_LOST, and systemd restarts it as a standby.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

import agent.scheduler
from agent.adapters.daemon import socket_activation
from agent.adapters.daemon.state_dir import StateDir
from agent.adapters.daemon.token_file import ensure_token, read_token
from agent.adapters.kernel.clock import SystemClock
from agent.api import dashboard, status_page
from agent.api.admin_http import AdminServer, Page
from agent.api.function_metrics import FunctionMetrics
from agent.api.function_servicer import FunctionServicer
from agent.api.scheduler_metrics import SchedulerMetrics
from agent.api.scheduler_servicer import SchedulerServicer
from agent.api.status_page import StatusPage
from agent.api.usage_servicer import UsageServicer
from agent.core.billing.absence import Absence
from agent.core.billing.price_book import PriceBook
from agent.core.dispatch.dispatcher import Dispatcher
from agent.core.dispatch.events import Wake
from agent.core.errors import ConfigError, HibernodeError, UnavailableError
from agent.core.provisioning.autoscaling import Patience
from agent.core.types import SECOND_NS, DispatchPolicy
from agent.daemons.process import daemon_main, run_until_signal, stand_by
from agent.event_log import REPEAT_NS, EventLog
from agent.http.limits import Limits
from agent.http.request_ids import RequestIds
from agent.http.server import BACKLOG, DateHeader, serve
from agent.log import get_logger
from agent.scheduler.database.leader_lock import LeaderLock
from agent.scheduler.database.store import Store
from agent.scheduler.fleet.agent_channels import AgentChannels
from agent.scheduler.fleet.fleet import Fleet
from agent.scheduler.fleet.gpu_waits import GpuWaits
from agent.scheduler.fleet.node_scheduling import NodeScheduling
from agent.scheduler.functions.autoscaler import Autoscaler
from agent.scheduler.functions.catalog import Catalog
from agent.scheduler.functions.deploy_rules import Defaults
from agent.scheduler.functions.gpu_check import GpuCheck
from agent.scheduler.functions.last_targets import LastTargets
from agent.scheduler.functions.provisioner import Provisioner
from agent.scheduler.gateway.dispatching import DispatchLoop
from agent.scheduler.gateway.gateway import Gateway
from agent.scheduler.gateway.ingress_pools import IngressPools
from agent.scheduler.gateway.routes import Router
from agent.scheduler.gateway.wake_calls import WakeCalls
from agent.scheduler.usage.absences import Absences
from agent.scheduler.usage.collector import UsageCollector, UsageDatabase
from agent.scheduler.usage.reports import UsageReports
from agent.scheduler.usage.retention import UsageRetention
from agent.scheduler.usage.totals import UsageTotals
from agent.settings import SchedulerConfig
from agent.settings.prices import read_price_book
from agent.wire.addresses import join
from agent.wire.server import GrpcServer, Services
from agent.wire.tokens import Principal, Role, TokenTable, node_tokens, usable_tokens

PRICE_BOOK = Path(agent.scheduler.__file__).with_name("price-book.yaml")
GRACE_S = 30.0
QUEUE_GRACE_S = 10.0
"""On shutdown, requests still queued after this time are answered 503; running ones have `GRACE_S`."""
GRPC_GRACE_S = 1.0
SILENCE_CHECK_S = 0.25
NOTE_ABSENCE_S = 1.0


class SchedulerDaemon:
    """Owns everything that lives as long as the daemon. `run` returns after a clean stop."""

    def __init__(self, config: SchedulerConfig, stack: AsyncExitStack) -> None:
        self._config = config
        self._stack = stack
        self._log = get_logger()
        self._ready = False
        self.admin_address = ""
        self._background: set[asyncio.Task[None]] = set()
        self.clock = SystemClock()
        self.events = EventLog(self.clock, repeat_ns=REPEAT_NS)
        stack.callback(self.events.flush)
        self.request_ids = RequestIds(lambda: self.clock.wall_ns() // SECOND_NS, random.Random().getrandbits)
        self.state = stack.enter_context(StateDir(Path(config.state_dir)))
        self.token = ensure_token(config.token_path)
        self.prices = self._price_book()
        self.node_tokens = self._node_tokens()

    async def run(self) -> None:
        """Build, wait for leadership, load, bind; then serve until a signal."""
        await self._build()
        if not await self._lead():
            return
        await self._load()
        await self._bind()
        await self.grpc.set_serving(True)
        self._ready = True
        self._log.info("scheduler.ready", gateway=self.gateway_address, grpc=self.grpc_address)
        rounds = [self.provisioner.run(), self.autoscaler.run(), self.last_targets.run(), self.retention.run()]
        await run_until_signal([*rounds, self._watch_silence(), self.lead.watch()])
        await self._leave()

    def _node_tokens(self) -> dict[str, str]:
        """The tokens of the nodes that have a good one. A bad one keeps its node out, not the fleet down."""
        found: dict[str, str] = {}
        wrong: list[ConfigError] = []
        for node in self._config.nodes:
            try:
                found[node.name] = read_token(Path(node.token_file))
            except ConfigError as error:
                wrong.append(error)
        good, unusable = usable_tokens(found, self.token)
        out = [node.name for node in self._config.nodes if node.name not in good]
        for problem in (*wrong, *unusable):
            self.events.error("node.token_unusable", reason=problem.reason, message=problem.message, nodes_out=out)
        return good

    def _price_book(self) -> PriceBook | ConfigError:
        """The price book, or why there is none: usage is collected without one."""
        try:
            return _price_book(self._config)
        except ConfigError as error:
            self._log.error("usage.price_book_invalid", message=error.message)
            return error

    # ---- build ------------------------------------------------------------------------------------------------

    async def _build(self) -> None:
        """Build, in order: database, dispatcher, fleet, catalog, provisioner and autoscaler, gateway."""
        config = self._config
        self.store = Store(config.database_url)
        self._stack.push_async_callback(self.store.close)
        self.usage = UsageDatabase.at(config.database_url)
        self._stack.callback(self.usage.close)
        self.absences = Absences(self.usage)
        self.retention = UsageRetention(self.usage, self.clock, config.usage.keep_ns)
        self.lead = LeaderLock(config.database_url)
        self._stack.callback(self.lead.close)
        self.dispatcher = Dispatcher(early_dispatch=True)
        self.dispatch_loop = DispatchLoop(self.clock, self.dispatcher, self._wake)
        self.fleet = Fleet(
            self.clock,
            self.events,
            self.dispatch_loop.apply,
            self._fleet_changed,
            suspect_ns=config.report.suspect_ns,
            lost_ns=config.report.lost_ns,
            first_seen=self._first_seen,
            insecure=config.insecure,
            note_absence=lambda name, absence: self._spawn(self._note_absence(name, absence)),
            returned=lambda name, absence: self._spawn(self.absences.end(name, self.clock.wall_ns(), absence)),
        )
        self.node_scheduling = NodeScheduling(self.store, self.fleet, self.events)
        self.channels = AgentChannels(self.node_tokens, self._grpc_address_of, config.insecure)
        self._stack.push_async_callback(self.channels.close)
        apply_event = self.dispatch_loop.apply
        self.catalog = Catalog(
            self.clock,
            self.events,
            self.store,
            apply_event,
            self._catalog_changed,
            _defaults(config),
            GpuCheck(self.fleet),
        )
        self.provisioner = Provisioner(self.clock, self.events, self.catalog, self.fleet, self.channels, apply_event)
        self.last_targets = LastTargets(self.store)
        self.autoscaler = Autoscaler(
            self.clock,
            self.events,
            self.catalog,
            self.fleet,
            self.dispatcher,
            config.scaling.period_ns,
            Patience(config.scaling.periods, Fraction(repr(config.scaling.scale_in_factor))),
            self.provisioner.poke,
            self.last_targets,
        )
        self.usage_totals = UsageTotals(lambda: [function.spec.name for function in self.catalog.all()])
        self.ingresses = IngressPools(self._ingress_address_of)
        self._stack.callback(self.ingresses.close)
        tokens = {name: token.encode() for name, token in self.node_tokens.items()}
        self.wakes = WakeCalls(
            self.ingresses.pool,
            tokens.__getitem__,
            self.dispatch_loop.apply,
            self.fleet.unreachable,
            config.dispatch.hold_ns,
        )
        self._stack.push_async_callback(self.wakes.close)
        self.gateway = Gateway(
            self.clock,
            Router(config.gateway.domain),
            self.catalog,
            self.dispatch_loop,
            self.ingresses.pool,
            tokens.__getitem__,
            self.fleet.unreachable,
            self.request_ids,
            GpuWaits(self.fleet, self.clock).why,
        )

    async def _lead(self) -> bool:
        """Become the active scheduler, or stand by until the active one's database session ends. False: a signal came
        first."""
        if await self.lead.take():
            return True
        socket_activation.release("gateway")
        await self._serve_admin()
        self.state.write_endpoints({"admin": self.admin_address, "token_file": str(self._config.token_path)})
        self._log.info("scheduler.standby", admin=self.admin_address)
        return await stand_by(self.lead.wait(), "standing by: another scheduler is active on this database")

    async def _load(self) -> None:
        """Load nodes, functions and policies. Known nodes have `report.lost` to reconnect."""
        await self.store.open()
        await self.usage.open()
        away_since, now = await self.absences.unfinished(), self.clock.wall_ns()
        configured = {node.name for node in self._config.nodes}
        # A node that is given up is known, even if it could not be stored when it was first seen.
        for name in {**dict.fromkeys(await self.store.nodes()), **away_since}:
            if name in configured:
                self.fleet.expect(name, max(0, now - away_since[name]) if name in away_since else None)
        await self.node_scheduling.load()
        await self.catalog.load()
        await self.last_targets.load()
        self.autoscaler.check()

    def _wake(self, wake: Wake) -> None:
        self.wakes.start(wake)

    def _catalog_changed(self) -> None:
        self.autoscaler.check()
        self.provisioner.poke()

    def _fleet_changed(self) -> None:
        """Check the autoscaler first: a policy that waits for the fleet starts before the provisioner acts on its
        function."""
        if self.autoscaler.waiting:
            self.autoscaler.check()
        self.provisioner.poke()

    def _grpc_address_of(self, name: str) -> str:
        node = self.fleet.node(name)
        return "" if node is None else node.registration.grpc_address

    def _ingress_address_of(self, name: str) -> str:
        node = self.fleet.node(name)
        return "" if node is None else node.registration.ingress_address

    def _first_seen(self, name: str) -> None:
        """Store a node that registered for the first time, without delaying its stream."""

        async def remember() -> None:
            try:
                await self.store.put_node(name, self.clock.wall_ns())
            except HibernodeError as error:
                self._log.error("store.failed", node=name, reason=error.reason, message=error.message)

        self._spawn(remember())

    async def _note_absence(self, name: str, absence: Absence | None) -> None:
        """Note durably that a node is given up, then replace its instances. A database that fails delays that only by
        `NOTE_ABSENCE_S`; it is tried again."""
        noting = asyncio.get_running_loop().create_task(self.absences.begin(name, self.clock.wall_ns(), absence))
        self._background.add(noting)
        noting.add_done_callback(self._background.discard)
        await asyncio.wait({noting}, timeout=NOTE_ABSENCE_S)
        self.fleet.give_up(name)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # ---- serve ------------------------------------------------------------------------------------------------

    async def _bind(self) -> None:
        """Listen on all addresses and record them."""
        config = self._config
        limits = Limits(
            header_bytes=config.limits.header_bytes,
            target_bytes=config.limits.path_bytes,
            body_bytes=config.limits.body_bytes,
            max_connections=config.limits.connections,
        )
        try:
            kept = socket_activation.open_listener("gateway", config.gateway.host, config.gateway.port, BACKLOG)
            self.http = await serve(
                self.gateway,
                config.gateway.host,
                config.gateway.port,
                limits,
                inherited=kept,
                request_ids=self.request_ids,
                on_fault=lambda error, request_id: self._log.error(
                    "gateway.fault", request_id=request_id, error=type(error).__name__, exc_info=error
                ),
                date_header=DateHeader(lambda: self.clock.wall_ns() // SECOND_NS),
            )
            self._stack.push_async_callback(self.http.close, 0)
            self.gateway_address = join(config.gateway.host, self.http.port)
        except OSError as error:
            raise _bind_failed(error) from error
        await self._serve_admin()
        operator = Principal("operator", Role.OPERATOR)
        collector = UsageCollector(self.usage, self.clock, self.fleet.owner, self.usage_totals.add)
        services = Services(
            scheduler=SchedulerServicer(
                self.fleet, self.node_scheduling, self.events, config.report.lost_ns / SECOND_NS
            ),
            functions=FunctionServicer(
                self.clock,
                self.catalog,
                self.fleet,
                self.dispatcher,
                self.autoscaler,
                f"http://{self.gateway_address}",
            ),
            usage=UsageServicer(collector, UsageReports(self.usage), self.prices),
        )
        self.grpc = GrpcServer(services, TokenTable([(self.token, operator), *node_tokens(self.node_tokens)]))
        self._stack.push_async_callback(self.grpc.stop, 0)
        self.grpc_address = join(
            config.grpc.host, self.grpc.bind_tcp(config.grpc.host, config.grpc.port, config.insecure)
        )
        await self.grpc.start()
        self.state.write_endpoints(
            {
                "gateway": self.gateway_address,
                "grpc": self.grpc_address,
                "admin": self.admin_address,
                "token_file": str(config.token_path),
            }
        )

    async def _serve_admin(self) -> None:
        """Serve the admin pages, unless the standby phase already does."""
        if self.admin_address:
            return
        listen = self._config.admin
        self.admin = AdminServer(self._metrics().render, lambda: self._ready, self._pages())
        self._stack.push_async_callback(self.admin.stop)
        try:
            self.admin_address = join(listen.host, await self.admin.start(listen.host, listen.port))
        except OSError as error:
            raise _bind_failed(error) from error

    def _pages(self) -> dict[str, Page]:
        status = StatusPage(self.clock, self.catalog, self.fleet, self.dispatcher)
        return {
            "/": Page(status_page.CONTENT_TYPE, status.render, status_page.HEADERS),
            "/grafana.json": Page("application/json", dashboard.render),
        }

    def _metrics(self) -> SchedulerMetrics:
        traffic, usage = self.gateway.traffic, self.usage_totals
        functions = FunctionMetrics(self.clock, self.catalog, self.fleet, self.dispatcher, traffic, usage)
        return SchedulerMetrics(functions, self.fleet, self.gateway.counts, self.wakes.counts)

    async def _watch_silence(self) -> None:
        while True:
            self.fleet.check_silence()
            await asyncio.sleep(SILENCE_CHECK_S)

    def _refuse_waiting(self) -> None:
        waited = self.dispatch_loop.close()
        self._log.info("scheduler.queue_closed", refused=waited)

    async def _leave(self) -> None:
        """Refuse new work and finish the accepted: queued requests get 503 after `QUEUE_GRACE_S`, running ones are cut
        off after `GRACE_S`."""
        self._log.info("scheduler.stopping", open_requests=self.dispatch_loop.open_requests)
        self._ready = False
        await self.grpc.set_serving(False)
        silence = asyncio.get_running_loop().create_task(self._watch_silence())
        closing = asyncio.get_running_loop().call_later(QUEUE_GRACE_S, self._refuse_waiting)
        cut = await self.http.close(GRACE_S)
        closing.cancel()
        silence.cancel()
        await self.grpc.stop(GRPC_GRACE_S)
        await asyncio.gather(silence, return_exceptions=True)
        if self._background:
            _, late = await asyncio.wait(self._background, timeout=GRPC_GRACE_S)
            for task in late:  # its database fails; what it would write follows from the next reports
                task.cancel()
        self._log.info("scheduler.stopped", cut=cut)


def _bind_failed(error: OSError) -> UnavailableError:
    text = f"cannot listen: {error.strerror}; set another port for gateway or admin, or stop what uses it"
    return UnavailableError("BIND_FAILED", text)


def _defaults(config: SchedulerConfig) -> Defaults:
    dispatch = config.dispatch
    policy = DispatchPolicy.PACK if dispatch.policy == "pack" else DispatchPolicy.SPREAD
    return Defaults(policy, dispatch.wake_factor, dispatch.queue_length, dispatch.queue_timeout_ns)


def _price_book(config: SchedulerConfig) -> PriceBook:
    """The configured price book, or the one shipped with Hibernode. Raises ConfigError."""
    path = Path(config.price_book) if config.price_book else PRICE_BOOK
    return read_price_book(path)


async def run(config: SchedulerConfig) -> None:
    """Run the daemon until SIGTERM or SIGINT. Raises HibernodeError if it can't start."""
    async with AsyncExitStack() as stack:
        await SchedulerDaemon(config, stack).run()


if __name__ == "__main__":
    daemon_main("scheduler", SchedulerConfig, run)
