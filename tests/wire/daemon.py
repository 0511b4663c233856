"""A small daemon: a real server on real sockets, with scripted servicers."""

# ruff: noqa: N802 - the names of servicers' methods come from the protos

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from agent.core.errors import NotFoundError, PreconditionError
from agent.v1 import instance_service_pb2 as pb
from agent.v1 import instance_service_pb2_grpc, scheduler_service_pb2, scheduler_service_pb2_grpc, types_pb2
from agent.v1.scheduler_service_pb2 import ReportLoadRequest, ReportLoadResponse
from agent.wire.interceptors import accept_stream
from agent.wire.server import GrpcServer, Services
from agent.wire.tokens import Principal, Role, TokenTable, caller, calling_node

OPERATOR_TOKEN = "operator-token-0123456789"
NODE_TOKEN = "node-seven-token-0123456789"
SECRET = "hunter2-database-password"

TOKENS = TokenTable([(OPERATOR_TOKEN, Principal("olga", Role.OPERATOR)), (NODE_TOKEN, Principal("node-7", Role.NODE))])


class Instances(instance_service_pb2_grpc.InstanceServiceServicer):
    """GetInstance's uid selects what it does; `called` is set once a call has reached the servicer."""

    def __init__(self) -> None:
        self.called = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.closed_logs = asyncio.Event()

    async def GetInstance(self, request: pb.GetInstanceRequest, context: Any) -> pb.GetInstanceResponse:
        self.called.set()
        match request.uid:
            case "whoami":
                return pb.GetInstanceResponse(instance=types_pb2.Instance(uid=caller().name))
            case "busy":
                raise PreconditionError("INSTANCE_BUSY", "i-1 has 2 requests; try again", in_flight=2, uid="i-1")
            case "broken":
                raise RuntimeError(f"cannot connect with {SECRET}")
            case "stuck":
                try:
                    await asyncio.Event().wait()
                finally:
                    self.cancelled.set()
            case "impatient":
                raise TimeoutError("an inner wait of the servicer")
            case _:
                pass
        raise NotFoundError("INSTANCE_NOT_FOUND", f"no instance {request.uid}; `hibernode ps` lists them")

    async def CreateInstance(self, request: pb.CreateInstanceRequest, context: Any) -> pb.CreateInstanceResponse:
        return pb.CreateInstanceResponse(instance=types_pb2.Instance(uid="i-1", spec=request.spec))

    async def GetInstanceLogs(
        self, request: pb.GetInstanceLogsRequest, context: Any
    ) -> AsyncIterator[pb.GetInstanceLogsResponse]:
        try:
            yield pb.GetInstanceLogsResponse(data=b"Loading model\n")
            if request.uid == "rotated":
                raise NotFoundError("LOG_NOT_FOUND", "the log of i-1 was removed")
            yield pb.GetInstanceLogsResponse(data=b"Ready\n")
            if request.follow:
                await asyncio.Event().wait()
        finally:
            self.closed_logs.set()


class Scheduler(scheduler_service_pb2_grpc.SchedulerServiceServicer):
    """Acknowledges every report; the first answer names the node; epoch 0 is refused."""

    async def ReportLoad(
        self, request_iterator: AsyncIterator[ReportLoadRequest], context: Any
    ) -> AsyncIterator[ReportLoadResponse]:
        node = calling_node()
        await accept_stream(context)
        async for report in request_iterator:
            if report.epoch == 0:
                raise PreconditionError("EPOCH_STALE", "a newer run of this agent has reported; stop this one")
            yield ReportLoadResponse(acknowledged_sequence=report.sequence, node=node)

    async def ListNodes(
        self, request: scheduler_service_pb2.ListNodesRequest, context: Any
    ) -> scheduler_service_pb2.ListNodesResponse:
        return scheduler_service_pb2.ListNodesResponse(nodes=[types_pb2.Node(name=caller().name)])


class Daemon:
    """A running daemon: its server, servicers and addresses."""

    def __init__(self, socket: Path, default_deadline_s: float) -> None:
        self.instances = Instances()  # type: ignore[abstract]  # the rest answers UNIMPLEMENTED
        scheduler = Scheduler()  # type: ignore[abstract]
        services = Services(instances=self.instances, scheduler=scheduler)
        self.server = GrpcServer(services, TOKENS, default_deadline_s)
        self.tcp = f"127.0.0.1:{self.server.bind_tcp('127.0.0.1', 0)}"
        self.socket = socket
        self.server.bind_unix(str(socket))
        self.unix = f"unix:{socket}"


@asynccontextmanager
async def running(folder: Path, default_deadline_s: float = 20.0) -> AsyncIterator[Daemon]:
    """A daemon that listens on a loopback port and on a socket in `folder`."""
    daemon = Daemon(folder / "agent.sock", default_deadline_s)
    await daemon.server.start()
    try:
        yield daemon
    finally:
        await daemon.server.stop(0)
