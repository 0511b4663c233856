"""What a simulation assumes about functions and hosts, and what came of it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from enum import Enum

from agent.core.billing.price_book import Price
from agent.core.billing.pricing import always_on_cost, cost, rounded
from agent.core.types import GIB, SECOND_NS


class SimulatedPolicy(Enum):
    """How requests are dispatched: ours (`pack`, `spread`) or as others do (`simulator/rival_policies.py`)."""

    PACK = "pack"
    SPREAD = "spread"
    ROUND_ROBIN = "round_robin"
    RANDOM = "random"
    TWO_CHOICES = "two_choices"
    LEAST_OUTSTANDING = "least_outstanding"


@dataclass(frozen=True, slots=True)
class SimulationPlan:
    """One run. Every function of the trace has `instances`; all of them share one host with `gpus` GPUs (0: one each).

    `freeze_after_ns` None: never. `wake_ns`, `freeze_ns`: how long it takes.
    """

    policy: SimulatedPolicy = SimulatedPolicy.PACK
    instances: int = 1
    concurrency: int = 1
    gpus: int = 0
    freeze_after_ns: int | None = 10 * SECOND_NS
    wake_ns: int = SECOND_NS
    freeze_ns: int = SECOND_NS // 2
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
    """Billable time summed over instances of the same sizes (`core/pricing.Billable`)."""

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
    """Latencies in ns by request in the order of their ends; `awake_ns`: GPUs held, summed; `span_ns`: from the first
    arrival to the last end."""

    plan: SimulationPlan
    spent: Spent
    instances: int = 0
    latencies_ns: array[int] = field(default_factory=lambda: array("q"))
    refused: dict[str, int] = field(default_factory=dict)
    wakes: int = 0
    awake_ns: int = 0
    span_ns: int = 0

    def percentile_s(self, percent: float) -> float | None:
        """Nearest rank, in seconds; None where nothing was answered."""
        return percentiles_s(self.latencies_ns, (percent,))[0]

    @property
    def awake_share(self) -> float:
        """Of the time that all instances together could have held a GPU."""
        return self.awake_ns / (self.span_ns * self.instances) if self.span_ns and self.instances else 0.0

    def costs(self, price: Price) -> tuple[Decimal, Decimal]:
        """What it costs at `price`, and the same instances always on."""
        return rounded(cost(self.spent, price).total), rounded(always_on_cost(self.spent, price).total)


def percentiles_s(latencies_ns: Sequence[int], percents: Sequence[float]) -> list[float | None]:
    """Nearest rank, in seconds; None where there is nothing."""
    ordered = sorted(latencies_ns)
    if not ordered:
        return [None for _ in percents]
    ranks = (max(0, int(-(-len(ordered) * percent // 100)) - 1) for percent in percents)
    return [ordered[rank] / SECOND_NS for rank in ranks]
