"""Our containers as the engine has them: create, start, inspect, list, remove. Nothing here decides."""

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
class Listed:
    """A container that we have made: it carries our state directory's UUID, and the name that we gave it."""

    id: str
    uid: str
    running: bool


class EngineContainers:
    """`state_uuid` marks what is ours; nothing else is ever removed."""

    def __init__(self, api: EngineApi, state_uuid: str) -> None:
        self._api = api
        self._state_uuid = state_uuid

    async def create(self, uid: str, config: Mapping[str, Any], devices: Sequence[str] = ()) -> str:
        """Its id. A container of ours with the same name, left by an earlier attempt, is removed first. `devices`: CDI
        names that only Podman's own API takes. `EngineError` as the engine refuses it."""
        name = container_name(uid)

        async def make(docker: aiodocker.Docker) -> str:
            if not devices:
                return (await docker.containers.create(dict(config), name=name)).id
            answer = await docker._query_json(
                CREATE_PATH.lstrip("/"), "POST", data=libpod_config(config, name, devices), versioned_api=False
            )
            return str(answer["Id"])

        try:
            return await self._api.call(make)
        except EngineError as error:
            if not _name_taken(error):
                raise
        await self.remove_by_name(uid)
        return await self._api.call(make)

    async def plug_in(self, container_id: str) -> None:
        """Podman alone: have its network before anything runs in it, so that it can be fenced off first."""
        path = INIT_PATH.format(container_id)
        await self._api.call(lambda docker: docker._query_json(path, "POST", versioned_api=False))

    async def start(self, container_id: str) -> None:
        await self._api.call(lambda docker: docker.containers.container(container_id).start())

    async def inspect(self, container_id: str) -> Mapping[str, Any]:
        """`GET /containers/ID/json`; also takes a name. `EngineError` 404 if there is none."""
        return await self._api.call(lambda docker: docker.containers.container(container_id).show())

    async def list(self) -> Sequence[Listed]:
        """All of ours, ended ones too. Labels alone make none: an image carries labels as well, and whoever runs it by
        hand lends them to a container that is his."""
        filters = json.dumps({"label": [f"{STATE_LABEL}={self._state_uuid}"]})
        found = await self._api.call(lambda docker: docker.containers.list(all=True, filters=filters), LIST_DEADLINE_S)
        return [
            Listed(one.id, uid, one["State"] in ("running", "paused"))
            for one in found
            if (uid := _uid(one["Labels"] or {})) and f"/{container_name(uid)}" in (one["Names"] or ())
        ]

    async def remove(self, container_id: str) -> None:
        """Gone when this returns, with its anonymous volumes; what runs in it is killed. Idempotent.

        Raises InstanceError REMOVE_FAILED, and as `EngineApi.call` does."""
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
                refusal = error  # 409: being removed already; 500: a mount that is busy for a moment
            else:
                return
            if pause_s is not None:
                await asyncio.sleep(pause_s)
        assert refusal is not None
        raise InstanceError(
            "REMOVE_FAILED", f"the container engine can't remove container {container_id[:12]}: {refusal.text}"
        ) from refusal

    async def remove_by_name(self, uid: str) -> None:
        """The container of this instance, if there is one and it is ours. InstanceError START_FAILED if somebody else's
        has the name."""
        name = container_name(uid)
        try:
            found = await self.inspect(name)
        except EngineError as error:
            if error.not_found:
                return
            raise
        labels = (found.get("Config") or {}).get("Labels") or {}
        if labels.get(STATE_LABEL) != self._state_uuid:
            raise InstanceError("START_FAILED", f"somebody else's container is named {name}; remove it", uid=uid)
        await self.remove(str(found["Id"]))


def _uid(labels: Mapping[str, Any]) -> str:
    """What names folders must be a uid; "" if it is none."""
    uid = str(labels.get(INSTANCE_LABEL) or "")
    return uid if UID_PATTERN.fullmatch(uid) else ""


def _name_taken(error: EngineError) -> bool:
    return error.status in (409, 500) and "already in use" in error.text
