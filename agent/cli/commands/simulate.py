"""`hibernode simulate`: replays an access log to estimate latency and cost of idle mode."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import click

from agent.cli.console.output import note, show_json, show_table
from agent.cli.console.progress import blocking_progress
from agent.cli.options import bytes_of, cli_options, output_option, seconds_of
from agent.core.errors import ConfigError
from agent.core.gpus.speeds import CARDS, DEFAULT_CARD
from agent.core.types import SECOND_NS

MAX_RUNS = 64
NEVER = "never"
POLICIES = ("pack", "spread", "round_robin", "random", "two_choices", "least_outstanding")
_FILE = click.Path(path_type=Path, dir_okay=False)
_MOST_S = 86_400.0


class FreezeAfter(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions only
    """A duration in seconds; None for never."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | None:
        if value == NEVER:
            return None
        seconds = seconds_of(str(value))
        if not 0 <= seconds <= _MOST_S:
            self.fail(f"must be {NEVER}, or 0 to 24h, got {value!r}", param, ctx)
        return seconds


def _number(context: click.Context, param: click.Parameter, value: float) -> float:
    """Refuses NaN, which ranges accept."""
    if math.isnan(value):
        raise click.BadParameter("must be a number, got nan", context, param)
    return value


@click.command()
@click.argument("trace", type=click.Path(path_type=Path))
@click.option(
    "--policy", "policies", type=click.Choice(POLICIES), multiple=True, default=("pack", "round_robin"),
    show_default=True, metavar="POLICY", help=f"One of {', '.join(POLICIES)}; may be repeated.",
)  # fmt: skip
@click.option(
    "--freeze-after", "freezes", type=FreezeAfter(), multiple=True, default=("10s", NEVER), metavar="TIME",
    show_default=True, help="Idle time after which an instance freezes, or never; may be repeated.",
)  # fmt: skip
@click.option("--instances", type=click.IntRange(1, 1000), default=1, show_default=True, help="Per function.")
@click.option(
    "--concurrency", type=click.IntRange(1, 200), default=1, show_default=True, help="Requests at once per instance."
)
@click.option(
    "--gpus", type=click.IntRange(0, 10_000), default=0, help="GPUs shared by all instances; default: one per instance."
)
@click.option(
    "--card", type=click.Choice(tuple(CARDS)), default=DEFAULT_CARD, show_default=True,
    help="Freeze and wake as fast as this card's driver moves --gpu-memory.",
)  # fmt: skip
@click.option("--wake", type=seconds_of, metavar="TIME", help="Duration of a wake; default: the card's.")
@click.option("--freeze", type=seconds_of, metavar="TIME", help="Duration of a freeze; default: the card's.")
@click.option(
    "--wake-factor", type=click.FloatRange(0, 1_000_000), default=0.0, show_default=True, callback=_number,
    help="Wake another instance only if waiting takes longer than this many wakes (pack, spread).",
)  # fmt: skip
@click.option("--queue-length", type=click.IntRange(1, 100_000), default=1000, show_default=True)
@click.option("--queue-timeout", type=seconds_of, default="60s", show_default=True, metavar="TIME")
@click.option("--gpu-model", default="L40S", show_default=True, metavar="MODEL", help="For the price.")
@click.option(
    "--gpu-memory", type=bytes_of, default="16GiB", show_default=True, metavar="SIZE",
    help="Of an instance: for the price, and for the duration of its freezes and wakes.",
)  # fmt: skip
@click.option("--price-book", type=_FILE, metavar="FILE", help="Default: the one included with Hibernode.")
@click.option("--svg", "picture", type=_FILE, metavar="FILE", help="Also draw the results.")
@click.option("--seed", type=int, default=1, show_default=True, help="For random, two_choices and least_outstanding.")
@output_option
def simulate(
    trace: Path,
    policies: tuple[str, ...],
    freezes: tuple[float | None, ...],
    instances: int,
    concurrency: int,
    gpus: int,
    card: str,
    wake: float | None,
    freeze: float | None,
    wake_factor: float,
    queue_length: int,
    queue_timeout: float,
    gpu_model: str,
    gpu_memory: int,
    price_book: Path | None,
    picture: Path | None,
    seed: int,
) -> None:
    """Replay an access log and show what freezing idle instances would cost and save.

    TRACE is a CSV file with the columns time, function and duration, ordered by time: when each request arrived (ISO
    8601 or seconds) and how long the model worked on it (0.35, 350ms). The simulation runs the code of the scheduler
    and the agent for dispatch, concurrency, life cycle, GPUs and metering on a simulated clock.

    A request's latency is its wait, wakes included, plus its duration. AWAKE is the time in which GPUs were held;
    ALWAYS ON is the cost of the same instances awake and active all the time.

    Without --wake and --freeze each takes as long as others measured with the driver's own copies on the card, for
    instances that use all of --gpu-memory: 9.5 s to freeze and 4.7 s to wake 16 GiB on an A10G. Better is what
    `hibernode doctor --selftest` measures on your own.

    \b
    Examples:
      hibernode simulate access.csv
      hibernode simulate access.csv --freeze-after 5s --freeze-after 60s --freeze-after never
      hibernode simulate access.csv --policy pack --policy round_robin --instances 4 --gpus 2 --wake 2s
      hibernode simulate access.csv --svg savings.svg -o json | jq '.runs[] | {policy, p99_s, cost}'
    """
    from agent.simulator.plan import SimulatedPolicy, SimulationPlan  # imported here to keep --help fast
    from agent.simulator.simulation import Simulation
    from agent.simulator.trace import read_trace

    if len(policies) * len(freezes) > MAX_RUNS:
        raise click.UsageError(f"{len(policies) * len(freezes)} runs are more than {MAX_RUNS}; choose fewer")
    price = _price(price_book)
    if price.gpu_rate(gpu_model) is None:
        known = ", ".join(model for family in price.gpu for model in family.models)
        text = f"{gpu_model!r} has no price; the price book has {known}"
        raise click.BadParameter(text, param_hint="'--gpu-model'")
    with blocking_progress(f"reading {trace.name}"):
        functions = sorted({call.function for call in read_trace(trace)})  # finds broken lines before the first run
    plans = [
        SimulationPlan(
            policy=SimulatedPolicy(policy),
            instances=instances,
            concurrency=concurrency,
            gpus=gpus,
            freeze_after_ns=None if after is None else _ns(after),
            wake_ns=CARDS[card].wake_ns(gpu_memory) if wake is None else _ns(wake),
            freeze_ns=CARDS[card].freeze_ns(gpu_memory) if freeze is None else _ns(freeze),
            wake_factor=wake_factor,
            queue_length=queue_length,
            queue_timeout_ns=_ns(queue_timeout),
            gpu_model=gpu_model,
            gpu_memory_bytes=gpu_memory,
            seed=seed,
        )
        for policy in policies
        for after in freezes
    ]
    began, outcomes = time.monotonic(), []
    for number, plan in enumerate(plans, 1):
        with blocking_progress(f"run {number} of {len(plans)}: {_label(plan)}"):
            outcomes.append(Simulation(plan).run(functions, read_trace(trace)))
    took_s = time.monotonic() - began
    if picture is not None:
        from agent.simulator.plot import svg

        try:
            picture.write_bytes(svg([_label(plan) for plan in plans], outcomes, price))
        except OSError as error:
            raise ConfigError("SVG_UNWRITABLE", f"cannot write {picture}: {error.strerror or error}") from error
    _show(outcomes, price, took_s)


def _show(outcomes: list[Any], price: Any, took_s: float) -> None:
    rows = [_figures(one, price) for one in outcomes]
    if cli_options().json:
        show_json({"runs": rows, "price_valid_from_ns": price.valid_from_wall_ns, "took_s": round(took_s, 3)})
        return
    numbers = (
        "REQUESTS", "REFUSED", "P50 S", "P90 S", "P99 S", "MAX S", "WAKES", "AWAKE GPU S", "AWAKE %", "ACTIVE S",
        "IDLE S", "COST", "ALWAYS ON",
    )  # fmt: skip
    show_table(
        ("POLICY", "FREEZE AFTER", *numbers, ""),
        (
            (
                row["policy"],
                NEVER if row["freeze_after_s"] is None else f"{row['freeze_after_s']:g}s",
                str(row["requests"]),
                str(sum(row["refused"].values())),
                *("-" if row[key] is None else f"{row[key]:.3f}" for key in ("p50_s", "p90_s", "p99_s", "max_s")),
                str(row["wakes"]),
                f"{row['awake_gpu_s']:.1f}",
                f"{100 * row['awake_share']:.1f}",
                f"{row['active_s']:.1f}",
                f"{row['idle_s']:.1f}",
                row["cost"],
                row["always_on_cost"],
                f"{row['saved_percent']:.1f} % saved",
            )
            for row in rows
        ),
        right=numbers,
    )
    span_s = sum(row["span_s"] for row in rows)
    requests = sum(row["requests"] for row in rows)
    if took_s:
        note(f"{requests} requests in {took_s:.1f} s, {span_s / took_s:.0f} times faster than real time")


def _figures(found: Any, price: Any) -> dict[str, Any]:
    from agent.simulator.plan import percentiles_s

    p50, p90, p99, most = percentiles_s(found.latencies_ns, (50, 90, 99, 100))
    spent, always_on = found.costs(price)
    answered = len(found.latencies_ns)
    after = found.plan.freeze_after_ns
    return {
        "policy": found.plan.policy.value,
        "freeze_after_s": None if after is None else after / SECOND_NS,
        "instances": found.instances,
        "requests": answered,
        "refused": found.refused,
        "p50_s": p50,
        "p90_s": p90,
        "p99_s": p99,
        "max_s": most,
        "wakes": found.wakes,
        "wakes_per_request": round(found.wakes / answered, 6) if answered else 0.0,
        "awake_gpu_s": found.awake_ns / SECOND_NS,
        "awake_share": round(found.awake_share, 6),
        "active_s": found.spent.active_ns / SECOND_NS,
        "idle_s": found.spent.idle_ns / SECOND_NS,
        "span_s": found.span_ns / SECOND_NS,
        "cost": str(spent),
        "always_on_cost": str(always_on),
        "saved_percent": round(100 * (1 - float(spent) / float(always_on)), 3) if always_on else 0.0,
    }


def _label(plan: Any) -> str:
    after = plan.freeze_after_ns
    return f"{plan.policy.value}, {NEVER if after is None else f'{after / SECOND_NS:g}s'}"


def _ns(seconds: float) -> int:
    return round(seconds * SECOND_NS)


def _price(path: Path | None) -> Any:
    """The newest price of the book. Raises ConfigError."""
    import agent
    from agent.settings.prices import read_price_book

    path = path or Path(agent.__file__).with_name("scheduler") / "price-book.yaml"
    return read_price_book(path).prices[-1]
