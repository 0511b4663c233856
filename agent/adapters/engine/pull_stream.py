"""`POST /images/create` as a stream of messages that is closed when its reader leaves.

aiodocker's own takes a connection that breaks for the end, and leaves it open when its reader is cancelled: the engine
would pull on for nobody.
"""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import aiodocker


async def pull_messages(
    docker: aiodocker.Docker, image: str, auth: Mapping[str, str]
) -> AsyncGenerator[dict[str, Any], None]:
    """Each message of the pull of `image`; `auth` empty = without a login. To be closed by the caller, which ends the
    pull. Raises what aiodocker and aiohttp raise, ValueError and TypeError for what is no message."""
    headers = {}
    if auth:
        headers["X-Registry-Auth"] = base64.urlsafe_b64encode(json.dumps(dict(auth)).encode()).decode()
    # Without a tag an engine would pull them all.
    params = {"fromImage": image} if _has_tag(image) else {"fromImage": image, "tag": "latest"}
    async with docker._query("images/create", "POST", params=params, headers=headers, timeout=None) as response:
        try:
            async for line in response.content:
                message = json.loads(line)
                if not isinstance(message, dict):
                    raise TypeError("a message that is no object")
                if error := message.get("error"):
                    raise aiodocker.DockerError(500, str(error))
                yield message
        finally:
            response.close()


def _has_tag(image: str) -> bool:
    return any(mark in image.rpartition("/")[2] for mark in ":@")
