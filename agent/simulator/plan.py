"""The plan of a simulation, and its outcome."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from enum import Enum

from agent.core.billing.price_book import Price
from agent.core.billing.pricing import always_on_cost, cost, rounded
from agent.core.gpus.speeds import CARDS, DEFAULT_CARD
from agent.core.types import GIB, SECOND_NS


class SimulatedPolicy(Enum):
    """How requests are dispatched: Hibernode's policies (`pack`, `spread`), or others (rival_policies.py)."""

    PACK = "pack"
    SPREAD = "spread"
    ROUND_ROBIN = "round_robin"
    RANDOM = "random"
    TWO_CHOICES = "two_choices"
    LEAST_OUTSTANDING = "least_outstanding"


@dataclass(frozen=True, slots=True)
class SimulationPlan:
    """One run. Every function of the trace has `instances`; all of them share one host.

    - `gpus`: of the host; 0 for one per instance.
    - `freeze_after_ns`: None for never. `wake_ns`, `freeze_ns`: duration of a wake and a freeze.
    """

    policy: SimulatedPolicy = SimulatedPolicy.PACK
    instances: int = 1
    concurrency: int = 1
    gpus: int = 0
    freeze_after_ns: int | None = 10 * SECOND_NS
    wake_ns: int = CARDS[DEFAULT_CARD].wake_ns(16 * GIB)
    freeze_ns: int = CARDS[DEFAULT_CARD].freeze_ns(16 * GIB)
    wake_factor: float = 0.0
    queue_length: int = 1000
    queue_timeout_ns: int = 60 * SECOND_NS
    gpu_model: str = ""
    gpu_memory_bytes: int = 16 * GIB
    vcpu_millis: int = 350
    memory_bytes: int = GIB // 2
    disk_bytes: int = GIB // 2
    seed: int = 1


@dataclass(slots=True)
class Spent:
    """Billable time summed over instances of the same sizes (core/billing/pricing.py, `Billable`)."""

    gpu_model: str
    gpu_memory_bytes: int
    vcpu_millis: int
    memory_bytes: int
    disk_bytes: int
    gpu_count: int = 1
    active_ns: int = 0
    idle_ns: int = 0
    unbilled_ns: int = 0
    invocations: int = 0


@dataclass(slots=True)
class RequestOutcome:
    """The outcome of a run. `latencies_ns`: in the order of the requests' ends; `awake_ns`: time that GPUs were held,
    summed over instances; `span_ns`: from the first arrival to the last end."""

    plan: SimulationPlan
    spent: Spent
    instances: int = 0
    latencies_ns: array[int] = field(default_factory=lambda: array("q"))
    refused: dict[str, int] = field(default_factory=dict)
    wakes: int = 0
    awake_ns: int = 0
    span_ns: int = 0

    @property
    def awake_share(self) -> float:
        """Share of the time in which instances held a GPU."""
        return self.awake_ns / (self.span_ns * self.instances) if self.span_ns and self.instances else 0.0

    def costs(self, price: Price) -> tuple[Decimal, Decimal]:
        """The cost at `price`, and that of the same instances always on."""
        return rounded(cost(self.spent, price).total), rounded(always_on_cost(self.spent, price).total)


def percentiles_s(latencies_ns: Sequence[int], percents: Sequence[float]) -> list[float | None]:
    """Percentiles by nearest rank, in seconds; None without latencies."""
    ordered = sorted(latencies_ns)
    if not ordered:
        return [None for _ in percents]
    ranks = (max(0, int(-(-len(ordered) * percent // 100)) - 1) for percent in percents)
    return [ordered[rank] / SECOND_NS for rank in ranks]
