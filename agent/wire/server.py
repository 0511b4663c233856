"""A daemon's gRPC server: services, health, reflection, the call guard, and listening addresses."""

from __future__ import annotations

import grp
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from agent.core.errors import UnavailableError
from agent.v1 import (
    function_service_pb2_grpc,
    instance_service_pb2_grpc,
    node_service_pb2_grpc,
    scheduler_service_pb2_grpc,
    usage_service_pb2_grpc,
)
from agent.wire.addresses import check_bind, join, unix_target
from agent.wire.interceptors import CallGuard
from agent.wire.limits import DEFAULT_DEADLINE_S, MAX_MESSAGE_BYTES
from agent.wire.tokens import TokenTable

MAX_CONCURRENT_CALLS = 2000
SOCKET_GROUP = "hibernode"

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    # With SO_REUSEPORT two daemons on one port would each get half of the calls.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Below the clients' keepalive interval; pings that come sooner are answered by GOAWAY.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)


@dataclass(frozen=True, slots=True)
class Services:
    """The servicers of one daemon; None for services that it does not have."""

    instances: instance_service_pb2_grpc.InstanceServiceServicer | None = None
    nodes: node_service_pb2_grpc.NodeServiceServicer | None = None
    scheduler: scheduler_service_pb2_grpc.SchedulerServiceServicer | None = None
    functions: function_service_pb2_grpc.FunctionServiceServicer | None = None
    usage: usage_service_pb2_grpc.UsageServiceServicer | None = None


class GrpcServer:
    """One grpc.aio server, for one running event loop. In order: bind, start, set_serving(True), stop."""

    def __init__(self, services: Services, tokens: TokenTable, default_deadline_s: float = DEFAULT_DEADLINE_S) -> None:
        self._server = aio.server(
            interceptors=[CallGuard(tokens, default_deadline_s)],
            options=SERVER_OPTIONS,
            maximum_concurrent_rpcs=MAX_CONCURRENT_CALLS,
        )
        self._names = _register(services, self._server)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # the stubs are older
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        described = (*self._names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
        reflection.enable_server_reflection((*described, reflection.SERVICE_NAME), self._server)

    def bind_tcp(self, host: str, port: int, insecure: bool = False) -> int:
        """Listens on `host`:`port` (0: any port) and returns the port. Call before `start`.

        Raises ConfigError BIND_INSECURE (see `check_bind`), UnavailableError BIND_FAILED if the address is in use.
        """
        check_bind(host, tls=False, insecure=insecure)
        return self._bind(join(host, port))

    def bind_unix(self, path: str) -> None:
        """Listens on a unix socket of mode 0660 and group `hibernode` if this process may set that group. Call before
        `start`.

        Without that group the mode is 0600, because every peer is trusted like the owner. A stale socket at the path is
        replaced; the caller holds the state directory's lock.
        """
        target = unix_target(path)
        with _private_umask():
            self._bind(target)
        group = _socket_group()
        if group is not None:
            os.chown(path, -1, group)
            os.chmod(path, 0o660)

    async def start(self) -> None:
        """Starts answering; health is NOT_SERVING until `set_serving`."""
        await self.set_serving(False)
        await self._server.start()

    async def set_serving(self, serving: bool) -> None:
        """Sets the health of the daemon and of each service."""
        status = health_pb2.HealthCheckResponse.ServingStatus
        for name in ("", *self._names):
            await self._health.set(name, status.SERVING if serving else status.NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        """Sets health to NOT_SERVING for good, refuses new calls, and cancels those in flight after `grace_s`."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)

    def _bind(self, target: str) -> int:
        try:
            port: int = self._server.add_insecure_port(target)
        except RuntimeError as error:
            message = f"cannot listen on {target}: it is in use, or not an address of this host; choose another"
            raise UnavailableError("BIND_FAILED", message, target=target) from error
        return port


def _register(services: Services, server: aio.Server) -> tuple[str, ...]:
    """Adds the servicers; returns the full names of their services."""
    names: list[str] = []

    def add(servicer: object | None, register: Any, name: str) -> None:
        if servicer is not None:
            register(servicer, server)
            names.append(f"agent.v1.{name}")

    add(services.instances, instance_service_pb2_grpc.add_InstanceServiceServicer_to_server, "InstanceService")
    add(services.nodes, node_service_pb2_grpc.add_NodeServiceServicer_to_server, "NodeService")
    add(services.scheduler, scheduler_service_pb2_grpc.add_SchedulerServiceServicer_to_server, "SchedulerService")
    add(services.functions, function_service_pb2_grpc.add_FunctionServiceServicer_to_server, "FunctionService")
    add(services.usage, usage_service_pb2_grpc.add_UsageServiceServicer_to_server, "UsageService")
    return tuple(names)


@contextmanager
def _private_umask() -> Iterator[None]:
    """Sets the umask so that gRPC, which creates the socket itself, creates it with mode 0600."""
    previous = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(previous)


def _socket_group() -> int | None:
    """The socket's group: `hibernode`, or root's own if there is none; None if this process may not set it."""
    try:
        group = grp.getgrnam(SOCKET_GROUP).gr_gid
    except KeyError:
        return 0 if os.geteuid() == 0 else None
    return group if os.geteuid() == 0 or group in os.getgroups() else None
