"""A small OCI registry on loopback: enough of the distribution API for `docker pull` and `podman pull`.

It serves images made in the test, over plain HTTP (Docker takes that from 127.0.0.0/8; Podman needs `insecure = true`
in a registries.conf), with or without basic authentication. While `hold` is closed, blobs stop after their first half,
as on a dead network.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web

MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG = "application/vnd.docker.container.image.v1+json"
LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"


def layer_tar(files: Mapping[str, bytes]) -> bytes:
    """An uncompressed layer of executable files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path, content in files.items():
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode = len(content), 0o755
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@dataclass(slots=True)
class OciRegistry:
    """`users` may pull, empty = all. `pulls` counts the manifests served by `name:tag`, `logins` the credentials that
    callers sent; `asked` is set when a blob was requested."""

    users: dict[str, str] = field(default_factory=dict)
    address: str = ""
    pulls: dict[str, int] = field(default_factory=dict)
    logins: set[str] = field(default_factory=set)
    hold: asyncio.Event = field(default_factory=asyncio.Event)
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    _manifests: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    _blobs: dict[str, bytes] = field(default_factory=dict)

    def add(
        self, name: str, tag: str, files: Mapping[str, bytes], *, architecture: str = "amd64", command: str = "/bin/sh"
    ) -> str:
        """An image of one layer; returns the reference to pull."""
        layer = layer_tar(files)
        packed = gzip.compress(layer, mtime=0)
        config = json.dumps(
            {
                "architecture": architecture,
                "os": "linux",
                "config": {"Cmd": [command], "Env": ["PATH=/bin", "LD_LIBRARY_PATH=/image/lib"]},
                "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
                "history": [{"created_by": "a test"}],
            }
        ).encode()
        manifest = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST,
                "config": {"mediaType": CONFIG, "size": len(config), "digest": _digest(config)},
                "layers": [{"mediaType": LAYER, "size": len(packed), "digest": _digest(packed)}],
            }
        ).encode()
        self._blobs |= {_digest(config): config, _digest(packed): packed}
        for reference in (tag, _digest(manifest)):
            self._manifests[f"{name}:{reference}"] = (MANIFEST, manifest)
        return f"{self.address}/{name}:{tag}"

    # ---- HTTP ---------------------------------------------------------------------------------------------------

    def _refusal(self, request: web.Request) -> web.Response | None:
        login = request.headers.get("Authorization", "")
        if login:
            self.logins.add(base64.b64decode(login.removeprefix("Basic ")).decode())
        name, _, password = base64.b64decode(login.removeprefix("Basic ")).decode().partition(":")
        if not self.users or self.users.get(name) == password:
            return None
        body = {"errors": [{"code": "UNAUTHORIZED", "message": "authentication required"}]}
        return web.json_response(body, status=401, headers={"WWW-Authenticate": 'Basic realm="test"'})

    async def base(self, request: web.Request) -> web.Response:
        return self._refusal(request) or web.json_response({})

    async def manifest(self, request: web.Request) -> web.Response:
        if refusal := self._refusal(request):
            return refusal
        key = f"{request.match_info['name']}:{request.match_info['reference']}"
        if key not in self._manifests:
            body = {"errors": [{"code": "MANIFEST_UNKNOWN", "message": "manifest unknown"}]}
            return web.json_response(body, status=404)
        kind, manifest = self._manifests[key]
        if request.method == "GET":
            self.pulls[key] = self.pulls.get(key, 0) + 1
        headers = {"Docker-Content-Digest": _digest(manifest), "Content-Type": kind}
        return web.Response(body=manifest, headers=headers)

    async def blob(self, request: web.Request) -> web.StreamResponse:
        if refusal := self._refusal(request):
            return refusal
        data = self._blobs.get(request.match_info["digest"])
        if data is None:
            return web.json_response({"errors": [{"code": "BLOB_UNKNOWN", "message": "blob unknown"}]}, status=404)
        answer = web.StreamResponse(headers={"Content-Length": str(len(data))})
        await answer.prepare(request)
        self.asked.set()
        await answer.write(data[: len(data) // 2])
        await self.hold.wait()
        await answer.write(data[len(data) // 2 :])
        return answer


@asynccontextmanager
async def oci_registry(users: Mapping[str, str] | None = None) -> AsyncIterator[OciRegistry]:
    """Serves until the block ends; its valve is open at first."""
    registry = OciRegistry(users=dict(users or {}))
    registry.hold.set()
    application = web.Application()
    application.router.add_get("/v2/", registry.base)
    application.router.add_get("/v2/{name:.+}/manifests/{reference}", registry.manifest)
    application.router.add_get("/v2/{name:.+}/blobs/{digest}", registry.blob)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    registry.address = f"127.0.0.1:{port}"
    try:
        yield registry
    finally:
        registry.hold.set()
        await runner.cleanup()
