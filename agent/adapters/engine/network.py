"""Manages the agent's bridge network: the host reaches containers by address, no port is published, and containers
can't reach each other.

Docker drops traffic between containers by iptables (enable_icc). On both engines, whatever the firewall does, every
bridge port is also isolated (bridge(8), `isolated on`): the kernel forwards nothing between isolated ports.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiodocker

from agent.adapters.engine.api import EngineApi, EngineError
from agent.adapters.engine.container_config import STATE_LABEL
from agent.core.errors import InstanceError
from agent.log import get_logger

BRIDGES = Path("/sys/class/net")
ISOLATE_DEADLINE_S = 5.0

log = get_logger()


class EngineNetwork:
    """One network per agent: `hibernode-<12 digits of the state UUID>`, on bridge `hib-<8 digits>`."""

    def __init__(self, api: EngineApi, state_uuid: str, bridges: Path = BRIDGES) -> None:
        digits = state_uuid.replace("-", "")
        self.name = f"hibernode-{digits[:12]}"
        self.bridge = f"hib-{digits[:8]}"
        self._api = api
        self._state_uuid = state_uuid
        self._bridges = bridges
        self._lock = asyncio.Lock()
        self._ensured = False

    async def ensure(self) -> None:
        """Create the network if needed; free once it is known to exist. Raises InstanceError ADDRESSES_EXHAUSTED,
        NETWORK_FAILED, and what `EngineApi.call` raises."""
        async with self._lock:
            if not self._ensured:
                if not await self._exists():
                    await self._create()
                self._ensured = True

    def forget(self) -> None:
        """Make the next `ensure` check again: the network may have been removed from outside."""
        self._ensured = False

    async def remove_if_unused(self) -> str:
        """Remove the network. Returns why it stays (a container, even one being removed, still uses it, or the engine
        fails), or "" once it is gone; a later start creates it again. Raises UnavailableError ENGINE_UNAVAILABLE."""
        async with self._lock:
            self._ensured = False
            try:
                await self._api.call(self._delete)
            except InstanceError as error:
                return "" if isinstance(error, EngineError) and error.not_found else error.message
            return ""

    async def isolate_ports(self) -> None:
        """Isolate every port of the bridge. Needed after each start: engines add ports at any time.

        Raises InstanceError NETWORK_FAILED: a container that is not isolated must not run."""
        try:
            async with asyncio.timeout(ISOLATE_DEADLINE_S):
                # In a thread: the kernel takes its global network configuration lock (RTNL).
                isolated = await asyncio.to_thread(_isolate, self._bridges / self.bridge / "brif")
        except TimeoutError:
            raise self._failed("isolating its ports took too long") from None
        except OSError as error:
            raise self._failed(
                f"its ports can't be isolated from each other: {error.strerror} ({error.filename}); the agent needs "
                "the engine's network namespace, a writable /sys and CAP_NET_ADMIN"
            ) from error
        if not isolated:
            raise self._failed("the bridge has no port; does the engine use another kind of network?")

    def address(self, inspected: Mapping[str, Any]) -> str:
        """The container's address on this network, from its inspect answer; "" if it has none."""
        networks = (inspected.get("NetworkSettings") or {}).get("Networks") or {}
        return str((networks.get(self.name) or {}).get("IPAddress") or "")

    async def _exists(self) -> bool:
        try:
            found = await self._api.call(self._inspect)
        except EngineError as error:
            if error.not_found:
                return False
            raise
        if (found.get("Labels") or {}).get(STATE_LABEL) != self._state_uuid:
            raise self._failed("a network of that name exists and belongs to another owner; remove it")
        return True

    async def _inspect(self, docker: aiodocker.Docker) -> Mapping[str, Any]:
        return await (await docker.networks.get(self.name)).show()

    async def _delete(self, docker: aiodocker.Docker) -> None:
        await (await docker.networks.get(self.name)).delete()

    async def _create(self) -> None:
        options = {"com.docker.network.bridge.name": self.bridge}
        if self._api.kind == "docker":
            options["com.docker.network.bridge.enable_icc"] = "false"
        config = {
            "Name": self.name,
            "Driver": "bridge",
            "CheckDuplicate": True,
            "Options": options,
            "Labels": {STATE_LABEL: self._state_uuid},
        }
        try:
            await self._api.call(lambda docker: docker.networks.create(config))
        except EngineError as error:
            if error.status == 409 and await self._exists():  # created by an earlier call that seemed lost
                return
            if addresses_exhausted(error.text):
                raise exhausted(error.text) from error
            raise self._failed(error.text) from error
        log.info("engine.network_created", network=self.name, bridge=self.bridge)

    def _failed(self, why: str) -> InstanceError:
        return InstanceError("NETWORK_FAILED", f"network {self.name} can't be used: {why}", network=self.name)


def addresses_exhausted(text: str) -> bool:
    """Whether Docker or Podman reports that no subnet, or no address in it, is left."""
    text = text.lower()
    return any(
        phrase in text
        for phrase in (
            "non-overlapping ipv4 address pool",
            "no available ipv4 addresses",
            "all predefined address pools",
            "could not find free subnet",
            "failed to find free ip",
            "no free ip",
        )
    )


def exhausted(text: str) -> InstanceError:
    return InstanceError(
        "ADDRESSES_EXHAUSTED",
        "the container engine has no address left; remove unused networks (`docker network prune`), or give it more "
        f"(default-address-pools in daemon.json, default_subnet_pools in containers.conf): {text}",
    )


def _isolate(ports: Path) -> int:
    """Isolate every port of the bridge; returns their number. Raises OSError if one stays open."""
    count = 0
    for port in os.listdir(ports):
        try:
            (ports / port / "isolated").write_text("1", encoding="ascii")
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENODEV):  # another container ended and its port is gone
                continue
            raise
        count += 1
    return count
