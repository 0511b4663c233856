"""One gRPC channel per agent, to the address it registered, with the node's own token."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from agent.core.errors import UnavailableError
from agent.wire.clients import DaemonChannel


class AgentChannels:
    """Channels by node. `address_of` gives a node's registered gRPC address, "" while unknown."""

    def __init__(self, tokens: Mapping[str, str], address_of: Callable[[str], str], insecure: bool = False) -> None:
        self._tokens = tokens
        self._address_of = address_of
        self._insecure = insecure
        self._channels: dict[str, DaemonChannel] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"AgentChannels({sorted(self._channels)})"

    def channel(self, node: str) -> DaemonChannel:
        """The channel to the node's agent; a new one once it has registered another address.

        Raises UnavailableError NODE_UNKNOWN before its first registration, or if the node has no token.
        """
        address, token = self._address_of(node), self._tokens.get(node, "")
        if not address or not token:
            raise UnavailableError("NODE_UNKNOWN", f"node {node} has not registered with this scheduler", node=node)
        channel = self._channels.get(node)
        if channel is None or channel.target != address:
            if channel is not None:
                task = asyncio.get_running_loop().create_task(channel.close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)
            channel = self._channels[node] = DaemonChannel(address, token, self._insecure)
        return channel

    async def close(self) -> None:
        """Close all channels; calls in progress are cancelled."""
        channels, self._channels = self._channels, {}
        await asyncio.gather(*self._closing, *(channel.close() for channel in channels.values()))
