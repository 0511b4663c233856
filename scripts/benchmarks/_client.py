"""Blocking client of the benchmarks: calls one function through the gateway on one keep-alive connection."""

from __future__ import annotations

import http.client
import json
import time
from dataclasses import dataclass
from typing import Any

from agent.core.types import MILLISECOND_NS


@dataclass(frozen=True, slots=True)
class TimedAnswer:
    """An answer with its times (CLOCK_MONOTONIC ns) and the wake time that the gateway reports."""

    began_ns: int
    ended_ns: int
    wake_ms: float
    body: dict[str, Any]

    @property
    def took_ms(self) -> float:
        return (self.ended_ns - self.began_ns) / MILLISECOND_NS


class Client:
    """Sends GET / to an instance of `echo`."""

    def __init__(self, gateway: str, function: str) -> None:
        self._connection = http.client.HTTPConnection(gateway, timeout=60)
        self._path = f"/fn/{function}/"

    def request(self) -> TimedAnswer:
        """Sends one request. Raises RuntimeError for an answer other than 200, OSError without an answer."""
        began = time.monotonic_ns()
        self._connection.request("GET", self._path)
        answer = self._connection.getresponse()
        content = answer.read()
        ended = time.monotonic_ns()
        if answer.status != 200:
            raise RuntimeError(f"the gateway answered {answer.status}: {content[:300]!r}")
        return TimedAnswer(began, ended, float(answer.headers.get("x-hibernode-wake-ms", "0")), json.loads(content))

    def close(self) -> None:
        self._connection.close()
