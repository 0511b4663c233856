"""The dashboard's format. e2e/test_metrics.py checks its metrics against real scrapes."""

from __future__ import annotations

import json

import pytest

from agent.api.dashboard import ROWS, dashboard, render
from tests.api.promql import asked


def test_panels_have_unique_numbers_and_do_not_overlap() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) == len(ROWS) + sum(map(len, ROWS.values()))
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells


def test_it_names_no_data_source() -> None:
    text = render().decode()
    assert json.loads(text) == dashboard()
    sources = [panel["datasource"]["uid"] for panel in dashboard()["panels"] if "datasource" in panel]
    assert set(sources) == {"${datasource}"}


@pytest.mark.parametrize("expr", ["rate(x[1m]", "sum by (a) b", "", "x{a=b}"])
def test_promql_parser_refuses_invalid_expressions(expr: str) -> None:
    with pytest.raises(ValueError):
        asked(expr)


def test_promql_parser_finds_names_labels_and_rates() -> None:
    found = asked('sum by (f) (rate(a_total{k="v"}[$__rate_interval])) / sum by (f) (b)')
    assert [(one.name, sorted(one.labels), one.rate) for one in found] == [
        ("a_total", ["f", "k"], True),
        ("b", ["f"], False),
    ]
