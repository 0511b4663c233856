"""Streams the messages of `POST /images/create` and closes the connection when the reader leaves.

aiodocker's own stream mistakes a broken connection for the end, and stays open when its reader is cancelled: the engine
would continue a pull without a reader.
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
    """Yield each message of the pull of `image`; empty `auth` = no login. The caller closes it, which ends the pull.
    Raises exceptions of aiodocker and aiohttp, and ValueError or TypeError for a malformed message."""
    headers = {}
    if auth:
        headers["X-Registry-Auth"] = base64.urlsafe_b64encode(json.dumps(dict(auth)).encode()).decode()
    # Without a tag the engine would pull all of them.
    params = {"fromImage": image} if _has_tag(image) else {"fromImage": image, "tag": "latest"}
    async with docker._query("images/create", "POST", params=params, headers=headers, timeout=None) as response:
        try:
            async for line in response.content:
                message = json.loads(line)
                if not isinstance(message, dict):
                    raise TypeError("a message is not an object")
                if error := message.get("error"):
                    raise aiodocker.DockerError(500, str(error))
                yield message
        finally:
            response.close()


def _has_tag(image: str) -> bool:
    return any(mark in image.rpartition("/")[2] for mark in ":@")
