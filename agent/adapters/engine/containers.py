"""Creates, starts, inspects, lists and removes the agent's containers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiodocker

from agent.adapters.engine.api import EngineApi, EngineError
from agent.adapters.engine.container_config import INSTANCE_LABEL, STATE_LABEL, container_name
from agent.adapters.engine.container_config_libpod import CREATE_PATH, libpod_config
from agent.adapters.runtime.bundles import UID_PATTERN
from agent.core.errors import InstanceError

LIST_DEADLINE_S = 20.0
REMOVE_DEADLINE_S = 30.0
INIT_PATH = "v4.0.0/libpod/containers/{}/init"
REMOVE_PAUSES_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True, slots=True)
class ListedContainer:
    """A container that this agent created: its label holds our state directory's UUID and its name is ours."""

    id: str
    uid: str
    running: bool


class EngineContainers:
    """`state_uuid` marks this agent's containers; no other container is ever removed."""

    def __init__(self, api: EngineApi, state_uuid: str) -> None:
        self._api = api
        self._state_uuid = state_uuid

    async def create(self, uid: str, config: Mapping[str, Any], devices: Sequence[str] = ()) -> str:
        """Create the container and return its id. Removes one of the same name that an earlier attempt left behind.
        `devices`: CDI names, which only Podman's own API takes. Raises EngineError if the engine refuses it."""
        name = container_name(uid)

        async def create_once(docker: aiodocker.Docker) -> str:
            if not devices:
                return (await docker.containers.create(dict(config), name=name)).id
            answer = await docker._query_json(
                CREATE_PATH.lstrip("/"), "POST", data=libpod_config(config, name, devices), versioned_api=False
            )
            return str(answer["Id"])

        try:
            return await self._api.call(create_once)
        except EngineError as error:
            if not _name_taken(error):
                raise
        await self.remove_by_name(uid)
        return await self._api.call(create_once)

    async def initialize(self, container_id: str) -> None:
        """Set up a Podman container's network before any of its code runs, so that it can be isolated first."""
        path = INIT_PATH.format(container_id)
        await self._api.call(lambda docker: docker._query_json(path, "POST", versioned_api=False))

    async def start(self, container_id: str) -> None:
        await self._api.call(lambda docker: docker.containers.container(container_id).start())

    async def inspect(self, container_id: str) -> Mapping[str, Any]:
        """`GET /containers/ID/json`, by id or name. Raises EngineError 404 if there is none."""
        return await self._api.call(lambda docker: docker.containers.container(container_id).show())

    async def list(self) -> Sequence[ListedContainer]:
        """All containers of this agent, including ended ones. The label alone is no proof: an image can carry it into a
        container that was started by hand."""
        filters = json.dumps({"label": [f"{STATE_LABEL}={self._state_uuid}"]})
        found = await self._api.call(lambda docker: docker.containers.list(all=True, filters=filters), LIST_DEADLINE_S)
        return [
            ListedContainer(entry.id, uid, entry["State"] in ("running", "paused"))
            for entry in found
            if (uid := _uid(entry["Labels"] or {})) and f"/{container_name(uid)}" in (entry["Names"] or ())
        ]

    async def remove(self, container_id: str) -> None:
        """Kill and remove the container and its anonymous volumes. Idempotent.

        Raises InstanceError REMOVE_FAILED, and what `EngineApi.call` raises."""
        refusal: EngineError | None = None
        for pause_s in (*REMOVE_PAUSES_S, None):
            try:
                await self._api.call(
                    lambda docker: docker.containers.container(container_id).delete(force=True, v=True),
                    REMOVE_DEADLINE_S,
                )
            except EngineError as error:
                if error.not_found:
                    return
                refusal = error  # 409: already being removed; 500: a mount is still busy
            else:
                return
            if pause_s is not None:
                await asyncio.sleep(pause_s)
        assert refusal is not None
        raise InstanceError(
            "REMOVE_FAILED", f"the container engine can't remove container {container_id[:12]}: {refusal.text}"
        ) from refusal

    async def remove_by_name(self, uid: str) -> None:
        """Remove this instance's container, if there is one. Raises InstanceError START_FAILED if the name belongs to a
        container of another owner."""
        name = container_name(uid)
        try:
            found = await self.inspect(name)
        except EngineError as error:
            if error.not_found:
                return
            raise
        labels = (found.get("Config") or {}).get("Labels") or {}
        if labels.get(STATE_LABEL) != self._state_uuid:
            raise InstanceError("START_FAILED", f"another owner's container is named {name}; remove it", uid=uid)
        await self.remove(str(found["Id"]))


def _uid(labels: Mapping[str, Any]) -> str:
    """The instance's uid, or "" if the label is not a valid uid (uids name folders)."""
    uid = str(labels.get(INSTANCE_LABEL) or "")
    return uid if UID_PATTERN.fullmatch(uid) else ""


def _name_taken(error: EngineError) -> bool:
    return error.status in (409, 500) and "already in use" in error.text
