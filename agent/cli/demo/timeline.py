"""A demo's output while it runs: one line per event."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from agent.cli.console.output import clean, console
from agent.cli.console.units import wall_ns
from agent.cli.daemon_calls import pages
from agent.core.types import SECOND_NS
from agent.v1 import instance_service_pb2, types_pb2
from agent.wire.convert_time import time_to_proto

NS_PER_MS = 1_000_000
NOTEWORTHY_WAIT_MS = 5.0

_SHOWN = {
    "STARTING": ("starting", "yellow"),
    "RUNNING": ("awake", "green"),
    "FROZEN": ("frozen", "cyan"),
    "STOPPING": ("stopping", "dim"),
    "FAILED": ("failed", "red"),
}


class Timeline:
    """Prints lines to `stream`, each with the seconds since the start."""

    PAUSE_S = 0.1

    def __init__(self, stream: TextIO) -> None:
        self._console = console(stream)
        self.began_ns = self._since_ns = wall_ns()
        """Wall time of the start. What is older in the demo's folder is of an earlier run."""
        self._aliases: dict[str, str] = {}
        self._entered: dict[str, dict[str, int]] = {}
        self._seen: set[tuple[int, str, str]] = set()
        self.wake_ms: list[float] = []
        self.freeze_ms: list[float] = []

    def alias(self, uid: str) -> str:
        """A short name of the instance: #1, #2 ..."""
        return self._aliases.setdefault(uid, f"#{len(self._aliases) + 1}")

    def step(self, text: str) -> None:
        """Prints a step of the demo."""
        self._line("", text, "")

    def trouble(self, text: str) -> None:
        self._line("!", text, "red")

    def requests(self, answers: Sequence[tuple[Path, dict[str, Any] | None]], wakes_ms: Sequence[float]) -> None:
        """Prints the answers to a round of requests."""
        good = [(path, answer) for path, answer in answers if answer is not None]
        if len(answers) == 1 and good:
            path, answer = good[0]
            text = f"{path} is {answer['label']} (score {answer['score']:.2f})"
        else:
            labels = Counter(str(answer["label"]) for _path, answer in good)
            shown = ", ".join(label for label, _count in labels.most_common(7))
            more = f" and {len(labels) - 7} more" if len(labels) > 7 else ""
            text = f"{len(good)} of {len(answers)} files identified: {shown}{more}"
        if wakes_ms:
            text += f"; woken in {max(wakes_ms):.1f} ms"
        self._line("request", text, "bold")

    async def follow(self, agent: Any) -> None:
        """Prints the node's events until cancelled."""
        while True:
            await self.catch_up(agent)
            await asyncio.sleep(self.PAUSE_S)  # the API has no stream of events

    async def catch_up(self, agent: Any) -> None:
        """Prints the events so far."""
        for event in await self._events(agent, self._since_ns):
            self._since_ns = max(self._since_ns, _wall_ns(event))
            self._show(event)

    async def _events(self, agent: Any, since: int) -> list[types_pb2.Event]:
        request = instance_service_pb2.ListEventsRequest(since=time_to_proto(since))
        listing = pages(agent, agent.instances.ListEvents, request)
        return [event async for page in listing for event in page.events]

    def _show(self, event: types_pb2.Event) -> None:
        at = _wall_ns(event)
        key = (at, event.instance_uid, event.name)
        if key in self._seen:
            return
        self._seen.add(key)
        before, state = event.attributes.get("was", ""), event.name.removeprefix("instance.").upper()
        entered = self._entered.setdefault(event.instance_uid, {})
        entered[state] = at
        if not before:
            entered["STARTING"] = at  # instance.created
            if any(word in event.name for word in ("refused", "failed", "cordoned")):
                self._line(self.alias(event.instance_uid), f"{event.name}: {event.message}", "yellow", at)
            return
        took_ms = (at - entered.get(before, at)) / NS_PER_MS
        if (before, state) == ("RESTORING", "RUNNING"):
            self.wake_ms.append(took_ms)
        elif (before, state) == ("FREEZING", "FROZEN"):
            self.freeze_ms.append(took_ms)
        if state in _SHOWN:
            self._show_state(event, before, state, took_ms)

    def _show_state(self, event: types_pb2.Event, before: str, state: str, took_ms: float) -> None:
        text, style = _SHOWN[state]
        match before, state:
            case ("RESTORING", "RUNNING") | ("FREEZING", "FROZEN"):
                text += f" in {took_ms:.1f} ms{self._waited(event.instance_uid) if state == 'RUNNING' else ''}"
            case ("STARTING", "RUNNING"):
                text += f", its model in GPU memory, {took_ms / 1000:.1f} s after its creation"
            case _, "FAILED":
                text += f": {event.attributes.get('reason', '')} {event.message}"
            case _:
                pass
        self._line(self.alias(event.instance_uid), text, style, _wall_ns(event))

    def _waited(self, uid: str) -> str:
        """The time the wake waited for a GPU, if noteworthy."""
        entered = self._entered[uid]
        waited_ms = (entered.get("RESTORING", 0) - entered.get("WAITING_GPU", 0)) / NS_PER_MS
        return f", after {waited_ms:.0f} ms of waiting for a GPU" if NOTEWORTHY_WAIT_MS < waited_ms < 1e6 else ""

    def _line(self, subject: str, text: str, style: str, at_wall_ns: int = 0) -> None:
        from rich.text import Text

        line = Text(f"{((at_wall_ns or wall_ns()) - self.began_ns) / SECOND_NS:6.1f} s  ", style="dim")
        line.append(f"{subject:<8}", style="bold")
        line.append("\n".join(clean(part) for part in text.splitlines()), style=style)
        try:
            self._console.print(line, soft_wrap=True)
        except (OSError, SystemExit):  # the reader has closed the pipe (`| head`); rich raises SystemExit
            self._console.quiet = True


def _wall_ns(event: types_pb2.Event) -> int:
    return event.time.seconds * SECOND_NS + event.time.nanos
