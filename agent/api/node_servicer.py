"""NodeService of the agent: the node, and its part of the usage ledger. Read-only."""

from __future__ import annotations

from typing import Protocol

from agent.api.paging import page
from agent.core.billing.window import UsageWindow
from agent.host.node.observer import Observer
from agent.v1 import node_service_pb2 as pb
from agent.v1 import node_service_pb2_grpc
from agent.wire.convert_snapshot import node_to_proto
from agent.wire.convert_usage import window_to_proto


class Ledger(Protocol):
    """The source of usage windows."""

    async def windows(self, *, instance_uid: str, function: str, include_open: bool) -> list[UsageWindow]:
        """Windows, oldest first per instance."""


class NodeServicer(node_service_pb2_grpc.NodeServiceServicer):
    """Delegates to the observer and the ledger."""

    def __init__(self, observer: Observer, ledger: Ledger) -> None:
        self._observer = observer
        self._ledger = ledger

    async def GetNode(self, request: pb.GetNodeRequest, context: object) -> pb.GetNodeResponse:
        """This node and its GPUs, with their holders and waiters."""
        return pb.GetNodeResponse(node=node_to_proto(self._observer.node()))

    async def ListUsageWindows(
        self, request: pb.ListUsageWindowsRequest, context: object
    ) -> pb.ListUsageWindowsResponse:
        """The windows that this node has not pruned, and with `include_open` the open ones."""
        found = await self._ledger.windows(
            instance_uid=request.instance_uid, function=request.function, include_open=request.include_open
        )
        shown, token = page(found, request.page_size, request.page_token)
        return pb.ListUsageWindowsResponse(windows=[window_to_proto(w) for w in shown], next_page_token=token)
