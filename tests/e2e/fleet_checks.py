"""Checks of every request of a fleet and of the usage of every instance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from agent.core.types import MILLISECOND_NS, SECOND_NS
from agent.v1 import usage_service_pb2 as usage_pb
from tests.e2e.fleet_load import Execution, RequestRecord
from tests.e2e.load import union_ns

BOUND = 1_000
"""Metered time differs from the instances' own by at most 1 / BOUND (agent/docs/specification.md) ..."""
LOST_NS = SECOND_NS
"""... and, on a node whose agent was killed, by what was not yet written of each instance."""
EDGE_NS = 20 * MILLISECOND_NS
"""No such limit for a single request; a gross error still shows in instances with few requests."""


@dataclass
class Kills:
    """Times of kills (CLOCK_MONOTONIC ns)."""

    scheduler: list[int] = field(default_factory=list)
    agents: dict[str, list[int]] = field(default_factory=dict)

    def agent(self, node: str, at_ns: int) -> None:
        self.agents.setdefault(node, []).append(at_ns)


def check_answers(
    records: Sequence[RequestRecord], runs: Mapping[str, list[Execution]], owners: Mapping[str, str], kills: Kills
) -> tuple[int, int]:
    """Every request has one right answer, except those inside a process when it was killed. Returns how many were lost
    in agents and in the scheduler."""
    inside_agents = inside_scheduler = 0
    for one in records:
        mine = runs.get(one.request_id, [])
        assert len(mine) <= 1, f"executed {len(mine)} times: {one} {mine}"
        if one.served:
            assert [run.instance for run in mine] == [one.instance], f"{one} {mine}"
        elif one.status == 0:
            assert any(one.during(at_ns) for at_ns in kills.scheduler), f"the scheduler lived: {one}"
            inside_scheduler += 1
        else:
            where = {owners[run.instance] for run in mine}
            there = [node for node, times in kills.agents.items() if any(one.during(at_ns) for at_ns in times)]
            assert one.status == 502, one
            assert there, f"no kill while it was running: {one}"
            assert where <= set(there), f"executed on {where}, killed was {there}: {one}"
            inside_agents += 1
    ids = [one.request_id for one in records if one.request_id]
    assert len(ids) == len(set(ids)), "an id for each request"
    twice = {number: found for number, found in runs.items() if len(found) > 1}
    assert not twice, f"executed more than once: {twice}"
    return inside_agents, inside_scheduler


def check_bill(
    rows: Mapping[str, usage_pb.UsageRow],
    records: Sequence[RequestRecord],
    runs: Mapping[str, list[Execution]],
    kills: Kills,
) -> dict[str, float]:
    """Check app union <= metered <= client union for each instance, minus at most a second per kill of its agent;
    metering adds at most 0.1 % to the instances' own time. Returns the figures.

    A request cut by a kill counts as over, although the instance may still work on it."""
    answered = {one.request_id: one for one in records if one.request_id}
    broken = [one for one in records if not one.request_id]
    apps: dict[str, list[tuple[int, int]]] = {uid: [] for uid in rows}
    clients: dict[str, list[tuple[int, int]]] = {uid: [] for uid in rows}
    for number, found in runs.items():
        for run in found:
            one = answered.get(number)
            if one is not None and one.served:
                apps[run.instance].append((run.start_ns, run.end_ns))
                clients[run.instance].append((one.began_ns, one.ended_ns))
                continue
            # Its client got 502, or lost its connection with the scheduler and knows no request id.
            function = rows[run.instance].function
            asked = [one] if one else [each for each in broken if each.during(run.start_ns)]
            asked = [each for each in asked if each.function == function]
            assert asked, f"no client requested {number}: {run}"
            cuts = [*kills.scheduler, *kills.agents.get(rows[run.instance].node, [])]
            end_ns = min([run.end_ns, *(at_ns for at_ns in cuts if at_ns >= run.start_ns)])
            apps[run.instance].append((run.start_ns, end_ns))
            clients[run.instance].extend((each.began_ns, each.ended_ns) for each in asked)
    sums = {"app": 0, "over": 0, "lost": 0, "allowed": 0}
    worst = 0.0
    for uid, row in rows.items():
        allowed_ns = LOST_NS * len(kills.agents.get(row.node, []))
        app_ns, client_ns = union_ns(apps[uid]), union_ns(clients[uid])
        text = f"{uid} on {row.node}: {app_ns} ns of work, {row.active_ns} ns metered, {client_ns} ns by its clients"
        assert app_ns - allowed_ns <= row.active_ns <= client_ns, text
        over_ns = row.active_ns - app_ns
        assert over_ns <= app_ns / BOUND + EDGE_NS * len(apps[uid]), text
        sums["app"] += app_ns
        sums["over"] += max(over_ns, 0)
        sums["lost"] += max(-over_ns, 0)
        sums["allowed"] += allowed_ns
        if app_ns and over_ns > 0:
            worst = max(worst, over_ns / app_ns)
    assert sums["over"] <= sums["app"] / BOUND, sums
    assert sums["lost"] <= sums["allowed"], sums
    return {
        "app_s": round(sums["app"] / SECOND_NS, 2),
        "added_percent": round(100 * sums["over"] / sums["app"], 4),
        "added_worst_instance_percent": round(100 * worst, 4),
        "lost_by_the_kill_s": round(sums["lost"] / SECOND_NS, 3),
    }
