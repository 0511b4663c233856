"""Metrics of a PromQL expression, by an independent parser, and samples of a scrape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import promql_parser
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

INTERVAL = "$__rate_interval"
"""A variable that Grafana replaces before Prometheus sees it."""
ONLY_OF_COUNTERS = ("_total", "_bucket", "_sum", "_count")


@dataclass(frozen=True)
class Asked:
    """One metric of an expression: labels that it must have, and whether the expression takes its rate."""

    name: str
    labels: frozenset[str]
    rate: bool


def asked(expr: str) -> list[Asked]:
    """Raises ValueError for invalid PromQL."""
    return list(_asked(promql_parser.parse(expr.replace(INTERVAL, "1m")), frozenset(), False))


def _asked(expr: promql_parser.Expr, by: frozenset[str], rate: bool) -> Iterator[Asked]:
    match expr:
        case promql_parser.VectorSelector():
            matched = {matcher.name for matcher in expr.matchers.matchers}
            yield Asked(expr.name or "", by | matched, rate)
        case promql_parser.MatrixSelector():
            yield from _asked(expr.vector_selector, by, rate)
        case promql_parser.Call():
            for argument in expr.args:
                yield from _asked(argument, by, rate or expr.func.name in ("rate", "increase"))
        case promql_parser.AggregateExpr():
            labels = frozenset(expr.modifier.labels) if expr.modifier is not None else frozenset[str]()
            yield from _asked(expr.expr, by | labels, rate)
        case promql_parser.BinaryExpr():
            yield from _asked(expr.lhs, by, rate)
            yield from _asked(expr.rhs, by, rate)
        case promql_parser.ParenExpr():
            yield from _asked(expr.expr, by, rate)
        case promql_parser.NumberLiteral() | promql_parser.StringLiteral():
            return
        case _:
            raise ValueError(f"an expression of a kind that is not expected here: {expr}")


@dataclass(frozen=True)
class Scrape:
    """The samples of one or more daemons."""

    families: tuple[Metric, ...]

    def labels(self) -> dict[str, set[str]]:
        """Labels by sample name."""
        found: dict[str, set[str]] = {}
        for family in self.families:
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
        return found

    def value(self, sample_name: str, **labels: str) -> float:
        """The sum of the samples with this name and these labels. Raises KeyError if there is none."""
        values = [
            sample.value
            for family in self.families
            for sample in family.samples
            if sample.name == sample_name and labels.items() <= sample.labels.items()
        ]
        if not values:
            raise KeyError(f"{sample_name} {labels}")
        return sum(values)


def read_scrape(*texts: str) -> Scrape:
    """Parses Prometheus text."""
    return Scrape(tuple(family for text in texts for family in text_string_to_metric_families(text)))
