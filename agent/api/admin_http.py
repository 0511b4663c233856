"""Admin HTTP of a daemon: /metrics, /healthz, /readyz, and pages of its own. Read-only; the Host header is checked
against rebinding."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from aiohttp import web

from agent.wire.addresses import is_loopback

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_REQUEST_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Page:
    """Something to show beside the metrics, made anew each time."""

    content_type: str
    render: Callable[[], bytes]
    headers: Mapping[str, str] = field(default_factory=dict)

    async def answer(self, _: web.Request) -> web.Response:
        return web.Response(body=self.render(), headers={"content-type": self.content_type, **self.headers})


class AdminServer:
    """`render` gives the metrics as Prometheus text, `ready` what /readyz says, `pages` are others by path."""

    def __init__(
        self, render: Callable[[], bytes], ready: Callable[[], bool], pages: Mapping[str, Page] | None = None
    ) -> None:
        self._render = render
        self._ready = ready
        self._names: set[str] = set()
        app = web.Application(middlewares=[self._check_host], client_max_size=MAX_REQUEST_BYTES)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        for path, page in (pages or {}).items():
            app.router.add_get(path, page.answer)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False)

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the bound port. Raises OSError if the address can't be had."""
        self._names = {host.lower(), socket.gethostname().lower()}
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port).start()
        except BaseException:
            await self._runner.cleanup()
            raise
        bound: int = self._runner.addresses[0][1]
        return bound

    async def stop(self) -> None:
        """Stop listening and end what is under way."""
        await self._runner.cleanup()

    @web.middleware
    async def _check_host(self, request: web.Request, handler: Callable[[web.Request], object]) -> web.StreamResponse:
        """A browser that was tricked into resolving a foreign name to us sends that name: refuse it. An address can't
        be a foreign name, so scrapers that come by address are welcome wherever we listen."""
        name = (request.url.host or "").lower()
        if not (is_loopback(name) or name in self._names or _is_address(name)):
            raise web.HTTPForbidden(text="this Host is not served here\n")
        response = await handler(request)  # type: ignore[misc]
        assert isinstance(response, web.StreamResponse)
        return response

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=self._render(), headers={"content-type": CONTENT_TYPE})

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, _: web.Request) -> web.Response:
        ready = self._ready()
        return web.Response(text="ready\n" if ready else "not ready\n", status=200 if ready else 503)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
