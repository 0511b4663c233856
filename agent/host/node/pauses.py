"""Notices instances that somebody else stopped (docker pause): their gate closes until they go on (DESIGN section 3).

Our own freezes pass through FREEZING and FROZEN; an instance that is RUNNING and stopped was stopped by others.
"""

from __future__ import annotations

import asyncio

from agent.core.errors import HibernodeError, PreconditionError
from agent.core.lifecycle import events as ev
from agent.core.types import InstanceState
from agent.host.node.node import Node
from agent.log import get_logger
from agent.ports import Freezer

PERIOD_S = 1.0

_log = get_logger()


async def watch_pauses(node: Node, freezer: Freezer, period_s: float = PERIOD_S) -> None:
    """Look at every running instance once a period; runs until cancelled."""
    while True:
        look_for_pauses(node, freezer)
        await asyncio.sleep(period_s)


def look_for_pauses(node: Node, freezer: Freezer) -> None:
    """One round: a file read for each running instance."""
    for actor in list(node.actors.values()):
        handle = actor.handle_of_container
        if handle is None or actor.state is not InstanceState.RUNNING:
            continue
        try:
            paused = freezer.paused(handle)
        except (HibernodeError, OSError) as error:  # one that is just ending, or no descriptor left: looked at again
            _log.debug("pause.unknown", instance=actor.uid, message=str(error))
            continue
        if paused is not actor.instance.paused:
            actor.handle(ev.Paused(paused))


def paused_by_others(uid: str) -> PreconditionError:
    """What whoever wants something of a paused instance is told."""
    text = f"instance {uid} was paused by somebody else; let it go on first (docker unpause)"
    return PreconditionError("EXTERNALLY_FROZEN", text)
