"""Clients of a private world: they send requests through the gateway, and count and compare the answers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from agent.cli.demo.files import Sample, difference
from agent.core.errors import HibernodeError
from agent.http import hop_headers
from agent.http.limits import UpstreamLimits
from agent.http.message import lookup
from agent.http.pool import Pool, Response

REQUEST_S = 60.0


@dataclass(slots=True)
class Tally:
    """The client's counts and times.

    - `failed`: requests without an answer or with a status other than 200
    - `different`: answers that differ from those of an instance that was never frozen, or by the wrong instance
    """

    requests: int = 0
    failed: int = 0
    different: int = 0
    wake_request_ms: list[float] = field(default_factory=list)
    latency_ms: list[float] = field(default_factory=list)


class GatewayClient:
    """Calls one function at `gateway` (host:port), on one event loop. `trouble` receives error messages."""

    def __init__(
        self, gateway: str, function: str, tally: Tally, trouble: Callable[[str], None], alias: Callable[[str], str]
    ) -> None:
        host, _, port = gateway.rpartition(":")
        self._pool = Pool(host, int(port), UpstreamLimits())
        self._base = f"/fn/{function}"
        self._tally = tally
        self._trouble = trouble
        self._alias = alias

    def close(self) -> None:
        self._pool.close()

    async def call(self, what: str, method: bytes, path: str, body: bytes = b"") -> Response | None:
        """Sends one request and counts it, with its delay by a wake. None unless the answer is 200."""
        self._tally.requests += 1
        try:
            target = f"{self._base}{path}".encode()
            response = await self._pool.request(method, target, [], body, timeout_s=REQUEST_S)
        except HibernodeError as error:
            self._failed(f"{what}: {error}")
            return None
        if response.status != 200:
            self._failed(f"{what}: HTTP {response.status}: {response.body[:200].decode(errors='replace')}")
            return None
        wake_ms = lookup(response.headers, hop_headers.WAKE_MS)
        if wake_ms:
            self._tally.wake_request_ms.append(float(wake_ms))
        return response

    def count_different(self, text: str) -> None:
        """Counts an answer that is not the expected one."""
        self._tally.different += 1
        self._trouble(text)

    def _failed(self, text: str) -> None:
        self._tally.failed += 1
        self._trouble(text)


class DemoClient(GatewayClient):
    """Calls the demo's example."""

    async def identify(self, sample: Sample, *, by: str = "") -> dict[str, Any] | None:
        """The function's answer; None if it failed. `by`: the instance that must answer."""
        began = time.monotonic_ns()
        found = await self._call(sample.path.name, b"POST", "/", sample.content)
        if found is None:
            return None
        response, answer = found
        self._tally.latency_ms.append((time.monotonic_ns() - began) / 1e6)
        if answer != sample.expected:
            name, unlike = sample.path.name, difference(answer, sample)
            self.count_different(f"{name} differs from the answer without freezing: {unlike}")
        self._check_instance(response, by)
        return answer

    async def verify(self, *, by: str) -> bool:
        """Whether the pattern in the instance's GPU memory is unchanged."""
        found = await self._call("/verify", b"GET", "/verify", b"")
        if found is None:
            return False
        self._check_instance(found[0], by)
        return True

    async def _call(self, what: str, method: bytes, path: str, body: bytes) -> tuple[Response, dict[str, Any]] | None:
        response = await self.call(what, method, path, body)
        if response is None:
            return None
        try:
            return response, json.loads(response.body)
        except ValueError as error:
            self._failed(f"{what}: {error}")
            return None

    def _check_instance(self, response: Response, by: str) -> None:
        """Counts an answer of an instance other than `by` as different."""
        answered = (lookup(response.headers, b"x-fc-instance-id") or b"").decode("latin-1")
        if by and answered != by:
            self.count_different(f"only {self._alias(by)} was awake, but {self._alias(answered)} answered")
