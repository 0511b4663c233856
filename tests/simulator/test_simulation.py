"""The simulation agrees with queueing theory, with facts measured by other means, and with itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent.core.types import MILLISECOND_NS, SECOND_NS
from agent.simulator.plan import SimulatedPolicy, SimulationPlan, percentiles_s
from agent.simulator.simulation import Simulation
from agent.simulator.trace import Call
from tests.simulator.queueing import FUNCTION, SERVERS, latencies, with_freezing

FACTS = {
    (SimulatedPolicy.ROUND_ROBIN, 0.3, 0.7): (1.05, 2.54),
    (SimulatedPolicy.LEAST_OUTSTANDING, 0.3, 0.7): (1.03, 2.49),
    (SimulatedPolicy.PACK, 0.3, 0.7): (1.01, 2.11),
    (SimulatedPolicy.ROUND_ROBIN, 1.0, 0.7): (1.25, 11.4),
    (SimulatedPolicy.LEAST_OUTSTANDING, 1.0, 0.7): (0.84, 5.89),
    (SimulatedPolicy.PACK, 1.0, 0.7): (0.81, 5.04),
    (SimulatedPolicy.PACK, 1.0, 0.9): (1.36, 6.52),
}
"""p50 and p99 in seconds of another simulation (8 servers, Poisson arrivals, lognormal work, mean 1 s)."""


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize(("policy", "cv", "load"), FACTS)
def test_the_measured_facts_are_reproduced(policy: SimulatedPolicy, cv: float, load: float) -> None:
    p50, p99 = latencies(policy, cv, load, 60_000, 2)
    known50, known99 = FACTS[policy, cv, load]
    assert p50 == pytest.approx(known50, rel=0.05)
    assert p99 == pytest.approx(known99, rel=0.15)


@pytest.mark.parametrize("policy", list(SimulatedPolicy))
def test_every_policy_answers_all_requests_and_is_repeatable(policy: SimulatedPolicy) -> None:
    plan = SimulationPlan(policy, SERVERS, freeze_after_ns=SECOND_NS, wake_ns=2 * SECOND_NS, freeze_ns=SECOND_NS)
    first, again = with_freezing(plan, 0.2, 2_000, 7), with_freezing(plan, 0.2, 2_000, 7)
    assert len(first.latencies_ns) == 2_000
    assert not first.refused
    assert first.latencies_ns == again.latencies_ns
    assert (first.wakes, first.awake_ns, first.spent) == (again.wakes, again.awake_ns, again.spent)


def test_freezing_frees_gpus_and_the_wake_factor_frees_more() -> None:
    """As in the second table of agent/docs/facts/dispatch.md: load 0.1, freezeAfter ten seconds."""
    plan = SimulationPlan(SimulatedPolicy.PACK, SERVERS, wake_ns=2 * SECOND_NS, freeze_ns=SECOND_NS)
    robin = with_freezing(replace(plan, policy=SimulatedPolicy.ROUND_ROBIN), 0.1, 6_000, 3)
    pack = with_freezing(plan, 0.1, 6_000, 3)
    patient = with_freezing(replace(plan, wake_factor=1.0), 0.1, 6_000, 3)
    assert robin.awake_share > 0.85
    assert pack.awake_share < 0.5 * robin.awake_share
    assert patient.awake_share < 0.8 * pack.awake_share
    assert patient.wakes < 0.5 * pack.wakes
    robin_s, pack_s, patient_s = (percentiles_s(one.latencies_ns, (99,))[0] or 0 for one in (robin, pack, patient))
    assert pack_s < robin_s
    assert patient_s < 1.5 * pack_s


def test_one_request_to_a_frozen_instance_by_hand() -> None:
    """Frozen after a second, woken in two: every nanosecond is accounted for."""
    plan = SimulationPlan(freeze_after_ns=SECOND_NS, wake_ns=2 * SECOND_NS, freeze_ns=SECOND_NS // 2)
    calls = [Call(0, FUNCTION, 100 * MILLISECOND_NS), Call(10 * SECOND_NS, FUNCTION, 100 * MILLISECOND_NS)]
    found = Simulation(plan).run([FUNCTION], calls)
    assert list(found.latencies_ns) == [100 * MILLISECOND_NS, 2_100 * MILLISECOND_NS]
    assert found.wakes == 1
    assert found.span_ns == 12_100 * MILLISECOND_NS
    assert found.spent.active_ns == 200 * MILLISECOND_NS
    assert found.spent.active_ns + found.spent.idle_ns + found.spent.unbilled_ns == found.span_ns
    # Awake: 0.1 s of work, 1 s of freezeAfter, 0.5 s of freezing; then 2 s of waking and 0.1 s of work.
    assert found.awake_ns == 3_700 * MILLISECOND_NS
    assert found.spent.invocations == 2


def test_two_functions_share_a_gpu_and_take_turns() -> None:
    plan = SimulationPlan(gpus=1, freeze_after_ns=5 * SECOND_NS, wake_ns=SECOND_NS, freeze_ns=SECOND_NS)
    calls = [Call(n * 4 * SECOND_NS, "ab"[n % 2], SECOND_NS) for n in range(20)]
    found = Simulation(plan).run(["a", "b"], calls)
    assert len(found.latencies_ns) == 20
    assert found.awake_ns <= found.span_ns, "never both at once"
    assert found.wakes >= 18


def test_a_full_queue_and_a_passed_deadline_are_refusals() -> None:
    plan = SimulationPlan(freeze_after_ns=None, queue_length=2, queue_timeout_ns=SECOND_NS)
    calls = [Call(0, FUNCTION, 10 * SECOND_NS) for _ in range(5)]
    found = Simulation(plan).run([FUNCTION], calls)
    assert len(found.latencies_ns) == 1
    assert found.refused == {"QUEUE_FULL": 2, "QUEUE_TIMEOUT": 2}
