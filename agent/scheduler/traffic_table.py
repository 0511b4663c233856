"""The traffic of every deployed function (core/traffic.py). What is deleted goes with its counters."""

from __future__ import annotations

from collections.abc import Callable, Collection

from agent.core.traffic import Traffic


class TrafficTable:
    """`of` is for the request path. `deployed` gives the names of all functions there are now."""

    def __init__(self, deployed: Callable[[], Collection[str]]) -> None:
        self._deployed = deployed
        self._traffic: dict[str, Traffic] = {}

    def of(self, function: str) -> Traffic:
        """The counters of a deployed function."""
        found = self._traffic.get(function)
        if found is None:
            self._prune()
            found = self._traffic[function] = Traffic()
        return found

    def all(self) -> dict[str, Traffic]:
        """Of every function there is, asked for or not: zeros from the start."""
        self._prune()
        return {name: self.of(name) for name in sorted(self._deployed())}

    def _prune(self) -> None:
        """Only when somebody looks or something is new: bounded by the functions there are."""
        names = set(self._deployed())
        for name in self._traffic.keys() - names:
            del self._traffic[name]
