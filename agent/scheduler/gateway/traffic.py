"""The traffic counters of every deployed function (core/traffic.py), dropped when it is deleted."""

from __future__ import annotations

from collections.abc import Callable, Collection

from agent.core.traffic import Traffic


class TrafficTable:
    """`of` is for the request path. `deployed` returns the names of all deployed functions."""

    def __init__(self, deployed: Callable[[], Collection[str]]) -> None:
        self._deployed = deployed
        self._traffic: dict[str, Traffic] = {}

    def of(self, function: str) -> Traffic:
        found = self._traffic.get(function)
        if found is None:
            self._prune(self._deployed())
            found = self._traffic[function] = Traffic()
        return found

    def all(self) -> dict[str, Traffic]:
        """The counters of every deployed function, which are 0 before its first request."""
        names = self._deployed()
        self._prune(names)
        return {name: self._traffic.setdefault(name, Traffic()) for name in sorted(names)}

    def _prune(self, names: Collection[str]) -> None:
        """Drop the counters of functions that are not deployed any more."""
        for name in self._traffic.keys() - set(names):
            del self._traffic[name]
