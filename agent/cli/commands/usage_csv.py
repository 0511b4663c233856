"""Formats usage rows as CSV, with the names and exact numbers of the JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from typing import Any

from agent.cli.console.output import clean
from agent.v1 import usage_service_pb2 as pb
from agent.wire.json_view import to_json

_FACTORS = [field.name for field in pb.PriceFactors.DESCRIPTOR.fields]
COLUMNS = (
    *(field.name for field in pb.UsageRow.DESCRIPTOR.fields if field.name != "factors"),
    *(f"factors.{name}" for name in _FACTORS),
    "unit",
)
"""All columns in their order; a value that a row lacks is empty."""
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def usage_csv(rows: Iterable[pb.UsageRow], unit: str) -> str:
    """A header and the rows, as in RFC 4180 (CRLF, quotes where needed).

    Text that a spreadsheet would take for a formula is prefixed with `'`: names come from nodes and users.
    """
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    for row in rows:
        values = to_json(row)
        factors = values.pop("factors") or {}
        values |= {f"factors.{name}": value for name, value in factors.items()}
        writer.writerow([_cell(name, values.get(name)) for name in COLUMNS[:-1]] + [_text(unit)])
    return written.getvalue()


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return _text(value) if name in ("function", "instance_uid", "node", "gpu_model") else str(value)


def _text(value: str) -> str:
    return clean(f"'{value}" if value.startswith(_FORMULA) else value)
