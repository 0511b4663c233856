"""Outcomes side by side as one self-contained SVG picture: latency, awake time and cost."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

import pygal
from pygal.style import CleanStyle

from agent.core.billing.price_book import Price
from agent.simulator.plan import RequestOutcome, percentiles_s

PERCENTS = (50, 90, 99)
# pygal's import hook for plug-in maps makes Python 3.11 warn at every later import, and newer versions ignore it.
sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != "pygal"]

_SCRIPT = re.compile(rb"<script.*?</script>", re.DOTALL)
"""pygal's settings for the script that `js=()` leaves out."""


def svg(labels: Sequence[str], outcomes: Sequence[RequestOutcome], price: Price) -> bytes:
    """Bars by outcome, on a logarithmic scale: percentiles in seconds, awake GPU hours, cost and cost always on."""
    chart = pygal.Bar(
        js=(),  # the default loads a script from the network
        style=CleanStyle(font_family="sans-serif"),
        title="hibernode simulate",
        x_labels=list(labels),
        x_label_rotation=20,
        logarithmic=True,
        width=max(900, 120 * len(labels)),
        height=560,
        print_values=True,
        value_formatter=lambda value: "" if value is None else f"{value:.3g}",
    )
    found = [percentiles_s(one.latencies_ns, PERCENTS) for one in outcomes]
    for place, percent in enumerate(PERCENTS):
        chart.add(f"latency p{percent}, s", [one[place] or None for one in found])
    chart.add("GPU hours awake", [one.awake_ns / 3.6e12 or None for one in outcomes])
    costs = [one.costs(price) for one in outcomes]
    chart.add("cost", [float(spent) or None for spent, _ in costs])
    chart.add("cost always on", [float(always) or None for _, always in costs])
    return _SCRIPT.sub(b"", chart.render())
