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
            self._prune(self._deployed())
            found = self._traffic[function] = Traffic()
        return found

    def all(self) -> dict[str, Traffic]:
        """Of every function there is, asked for or not: zeros from the start."""
        names = self._deployed()
        self._prune(names)
        return {name: self._traffic.setdefault(name, Traffic()) for name in sorted(names)}

    def _prune(self, names: Collection[str]) -> None:
        """Only when somebody looks or something is new: bounded by the functions there are."""
        for name in self._traffic.keys() - set(names):
            del self._traffic[name]
