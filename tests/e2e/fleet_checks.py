"""What must be true of every request of a fleet, and of everybody's bill, whatever happened to whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from agent.core.types import MILLISECOND_NS, SECOND_NS
from agent.v1 import usage_service_pb2 as usage_pb
from tests.e2e.fleet_load import Run, Told
from tests.e2e.load import union_ns

BOUND = 1_000
"""DESIGN section 11: metered time differs from the instances' own by at most 1 / BOUND ..."""
LOST_NS = SECOND_NS
"""... and, on a node whose agent was killed, by what of each instance was not written yet."""
EDGE_NS = 20 * MILLISECOND_NS
"""Nothing of the sort for a single request: a gross error shows all the same in instances that had few of them."""


@dataclass
class Kills:
    """Who was killed when (CLOCK_MONOTONIC ns)."""

    scheduler: list[int] = field(default_factory=list)
    agents: dict[str, list[int]] = field(default_factory=dict)

    def agent(self, node: str, at_ns: int) -> None:
        self.agents.setdefault(node, []).append(at_ns)


def check_answers(
    told: Sequence[Told], runs: Mapping[str, list[Run]], owners: Mapping[str, str], kills: Kills
) -> tuple[int, int]:
    """Every request has its one right answer, but for those that were inside a killed process at its kill. Returns how
    many were lost inside agents, and inside the scheduler."""
    inside_agents = inside_scheduler = 0
    for one in told:
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
            assert there, f"nobody was killed while it was under way: {one}"
            assert where <= set(there), f"executed on {where}, killed was {there}: {one}"
            inside_agents += 1
    ids = [one.request_id for one in told if one.request_id]
    assert len(ids) == len(set(ids)), "an id for each request"
    twice = {number: found for number, found in runs.items() if len(found) > 1}
    assert not twice, f"executed more than once: {twice}"
    return inside_agents, inside_scheduler


def check_bill(
    rows: Mapping[str, usage_pb.UsageRow], told: Sequence[Told], runs: Mapping[str, list[Run]], kills: Kills
) -> dict[str, float]:
    """For each instance app union <= metered <= client union, less a second at most for each kill of its agent; what
    metering adds to the instances' own time is at most 0.1 % of it. Returns the figures.

    A request that a kill has cut is over then: nobody waits for it, although the instance may still be at it.
    """
    answered = {one.request_id: one for one in told if one.request_id}
    broken = [one for one in told if not one.request_id]
    apps: dict[str, list[tuple[int, int]]] = {uid: [] for uid in rows}
    clients: dict[str, list[tuple[int, int]]] = {uid: [] for uid in rows}
    for number, found in runs.items():
        for run in found:
            one = answered.get(number)
            if one is not None and one.served:
                apps[run.instance].append((run.start_ns, run.end_ns))
                clients[run.instance].append((one.began_ns, one.ended_ns))
                continue
            # Its client had 502, or was one of those whose connection broke with the scheduler and who know no id.
            function = rows[run.instance].function
            asked = [one] if one else [each for each in broken if each.during(run.start_ns)]
            asked = [each for each in asked if each.function == function]
            assert asked, f"nobody asked for {number}: {run}"
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
