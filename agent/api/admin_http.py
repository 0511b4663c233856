"""Read-only admin HTTP of a daemon: /metrics, /healthz, /readyz and further pages. Checks the Host header against DNS
rebinding."""

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
    """A page besides the metrics, rendered for each request."""

    content_type: str
    render: Callable[[], bytes]
    headers: Mapping[str, str] = field(default_factory=dict)

    async def answer(self, _: web.Request) -> web.Response:
        return web.Response(body=self.render(), headers={"content-type": self.content_type, **self.headers})


class AdminServer:
    """The server. `render`: the metrics as Prometheus text. `ready`: the answer of /readyz. `pages`: by path."""

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
        """Listens; returns the bound port. Raises OSError if the address cannot be bound."""
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
        """Stops listening and ends requests in flight."""
        await self._runner.cleanup()

    @web.middleware
    async def _check_host(self, request: web.Request, handler: Callable[[web.Request], object]) -> web.StreamResponse:
        """Refuses names other than this host's: after DNS rebinding a browser sends the attacker's name. Addresses are
        accepted, because they cannot be rebound and scrapers use them."""
        name = (request.url.host or "").lower()
        if not (is_loopback(name) or name in self._names or _is_address(name)):
            raise web.HTTPForbidden(text="this server does not answer for that Host\n")
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
