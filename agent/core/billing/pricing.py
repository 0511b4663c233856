"""The exact cost of usage, in integers and Fractions that are rounded once, for the report.

The cost of a window covers its active and idle time, at the price valid when it began:

    GPU         seconds x gpu_count x gpu_memory (GiB) x factor(model, kind)
    vCPU        seconds x vCPU x factor(kind)
    memory      seconds x GiB x factor, active and idle alike;  disk likewise
    invocations number x factor

Unbilled time costs nothing. The **always-on** cost prices all time as active: the same instances, each awake on its
GPUs from start to end. Where frozen instances shared a GPU, always-on would need that many more GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction
from typing import Protocol

from agent.core.billing.price_book import Price, Rate
from agent.core.types import GIB, SECOND_NS

COST_DECIMALS = 6
_NOTHING = Rate(Fraction(0), Fraction(0))
_EXACT = Context(prec=80)


class Billable(Protocol):
    """A `UsageWindow`, or the sum of windows with the same sizes and GPU model under one price."""

    @property
    def gpu_model(self) -> str: ...
    @property
    def gpu_count(self) -> int: ...
    @property
    def gpu_memory_bytes(self) -> int: ...
    @property
    def vcpu_millis(self) -> int: ...
    @property
    def memory_bytes(self) -> int: ...
    @property
    def disk_bytes(self) -> int: ...
    @property
    def active_ns(self) -> int: ...
    @property
    def idle_ns(self) -> int: ...
    @property
    def unbilled_ns(self) -> int: ...
    @property
    def invocations(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Quantities:
    """Exact resource-time: GiB x s of GPU memory, memory and disk, vCPU x s; and invocations."""

    gpu_active_gib_s: Fraction = Fraction(0)
    gpu_idle_gib_s: Fraction = Fraction(0)
    vcpu_active_s: Fraction = Fraction(0)
    vcpu_idle_s: Fraction = Fraction(0)
    memory_gib_s: Fraction = Fraction(0)
    disk_gib_s: Fraction = Fraction(0)
    invocations: int = 0


@dataclass(frozen=True, slots=True)
class Cost:
    """Exact amounts in the price book's currency. `gpu_unpriced`: the GPU model has no factors, so the total lacks
    its GPU part."""

    gpu: Fraction = Fraction(0)
    vcpu: Fraction = Fraction(0)
    memory: Fraction = Fraction(0)
    disk: Fraction = Fraction(0)
    invocations: Fraction = Fraction(0)
    gpu_unpriced: bool = False

    @property
    def total(self) -> Fraction:
        return self.gpu + self.vcpu + self.memory + self.disk + self.invocations

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.gpu + other.gpu,
            self.vcpu + other.vcpu,
            self.memory + other.memory,
            self.disk + other.disk,
            self.invocations + other.invocations,
            self.gpu_unpriced or other.gpu_unpriced,
        )


def quantities(usage: Billable) -> Quantities:
    """The resource-time of `usage`, without its unbilled time."""
    return _quantities(usage, usage.active_ns, usage.idle_ns)


def cost(usage: Billable, price: Price) -> Cost:
    """The cost of `usage` at `price`."""
    return _cost(usage, price, usage.active_ns, usage.idle_ns)


def always_on_cost(usage: Billable, price: Price) -> Cost:
    """The always-on cost of `usage` at `price`."""
    return _cost(usage, price, usage.active_ns + usage.idle_ns + usage.unbilled_ns, 0)


def rounded(amount: Fraction, decimals: int = COST_DECIMALS) -> Decimal:
    """`amount` rounded half to even at `decimals` places: the one rounding of a report."""
    scaled = round(amount * 10**decimals)
    return Decimal(scaled).scaleb(-decimals, _EXACT)


def exact_text(amount: Fraction, decimals: int = 18) -> str:
    """`amount` as a plain decimal number without trailing zeros, rounded half to even at `decimals` places. Factors
    and resource-time of whole GiB stay exact."""
    text = format(rounded(amount, decimals), "f")
    return text.rstrip("0").rstrip(".")


def _quantities(usage: Billable, active_ns: int, idle_ns: int) -> Quantities:
    gpu = Fraction(usage.gpu_count * usage.gpu_memory_bytes, GIB * SECOND_NS)
    vcpu = Fraction(usage.vcpu_millis, 1000 * SECOND_NS)
    billed_ns = active_ns + idle_ns
    return Quantities(
        gpu_active_gib_s=gpu * active_ns,
        gpu_idle_gib_s=gpu * idle_ns,
        vcpu_active_s=vcpu * active_ns,
        vcpu_idle_s=vcpu * idle_ns,
        memory_gib_s=Fraction(usage.memory_bytes * billed_ns, GIB * SECOND_NS),
        disk_gib_s=Fraction(usage.disk_bytes * billed_ns, GIB * SECOND_NS),
        invocations=usage.invocations,
    )


def _cost(usage: Billable, price: Price, active_ns: int, idle_ns: int) -> Cost:
    amount = _quantities(usage, active_ns, idle_ns)
    rate = price.gpu_rate(usage.gpu_model) if usage.gpu_count else _NOTHING
    gpu = rate or _NOTHING
    unit = price.unit_price
    return Cost(
        gpu=unit * (amount.gpu_active_gib_s * gpu.active + amount.gpu_idle_gib_s * gpu.idle),
        vcpu=unit * (amount.vcpu_active_s * price.vcpu.active + amount.vcpu_idle_s * price.vcpu.idle),
        memory=unit * price.memory * amount.memory_gib_s,
        disk=unit * price.disk * amount.disk_gib_s,
        invocations=unit * price.invocation * amount.invocations,
        gpu_unpriced=rate is None,
    )
