"""Notices instances that something else paused (docker pause): their gate closes until they are resumed.

The agent's own freezes pass through FREEZING and FROZEN; a RUNNING instance that stands still was paused by others.
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
    """Check every running instance once a period; runs until cancelled."""
    while True:
        check_pauses(node, freezer)
        await asyncio.sleep(period_s)


def check_pauses(node: Node, freezer: Freezer) -> None:
    """Check once: reads one small file per running instance."""
    for actor in list(node.actors.values()):
        handle = actor.handle_of_container
        if handle is None or actor.state is not InstanceState.RUNNING:
            continue
        try:
            paused = freezer.paused(handle)
        except (HibernodeError, OSError) as error:  # it is ending, or no descriptor is free: next time
            _log.debug("pause.unknown", instance=actor.uid, message=str(error))
            continue
        if paused is not actor.instance.paused:
            actor.handle(ev.Paused(paused))


def paused_by_others(uid: str) -> PreconditionError:
    """The error for a call that needs a paused instance to run."""
    text = f"instance {uid} was paused by another program; resume it first (docker unpause)"
    return PreconditionError("EXTERNALLY_FROZEN", text)
