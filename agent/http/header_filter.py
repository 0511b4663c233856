"""Which headers pass from one hop to the next, by the rules of agent/docs/design.md, section 6.

Names are compared after folding case and `_` to `-`: many application frameworks map `X_FC_Request_Id` and
`x-fc-request-id` to the same variable. Headers that a message's `Connection` lists are dropped, too; callers add their
own headers after stripping, so a client cannot remove them.

Framing (`content-length`, `transfer-encoding`) and `expect` never pass: each sender frames its own messages. Verdicts
on names are cached, because real traffic uses few; the cache is bounded, because clients choose the names.
"""

from __future__ import annotations

from collections.abc import Callable

from agent.http import hop_headers
from agent.http.message import Header

_HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"content-length")
)
_RESERVED = (b"x-fc-", hop_headers.PREFIX)
_CACHE_SIZE = 512
_NOT_REMOVABLE = frozenset((b"host", b"close"))
_USUAL_CONNECTION = frozenset((b"keep-alive", b"close"))  # values that list no header


def folded(name: bytes) -> bytes:
    """`name` as frameworks see it: lower case, `_` as `-`."""
    return name.lower().replace(b"_", b"-")


def is_reserved(name: bytes) -> bool:
    """True for `x-fc-*` and `x-hibernode-*` in any spelling: clients and instances cannot set them."""
    return folded(name).startswith(_RESERVED)


def _hop_by_hop(name: bytes) -> bool:
    name = folded(name)
    return name in _HOP_BY_HOP or name.startswith(b"proxy-")


def _request_passes(name: bytes) -> bool:
    return not (_hop_by_hop(name) or is_reserved(name) or folded(name) == b"expect")


def _instance_answer_passes(name: bytes) -> bool:
    if name == b"x-fc-status":
        return True
    return not (_hop_by_hop(name) or is_reserved(name) or folded(name) in (b"date", b"server"))


def _hop_answer_passes(name: bytes) -> bool:
    return not (_hop_by_hop(name) or folded(name) == b"date")


class _Verdicts(dict[bytes, bool]):
    """Name -> whether it passes. Computes the verdict on a new name, and keeps up to `_CACHE_SIZE` of them."""

    def __init__(self, rule: Callable[[bytes], bool]) -> None:
        super().__init__()
        self._rule = rule

    def __missing__(self, name: bytes) -> bool:
        verdict = self._rule(name)
        if len(self) < _CACHE_SIZE:
            self[name] = verdict
        return verdict


_REQUEST = _Verdicts(_request_passes)
_INSTANCE_ANSWER = _Verdicts(_instance_answer_passes)
_HOP_ANSWER = _Verdicts(_hop_answer_passes)


def _strip(headers: list[Header], passes: _Verdicts) -> list[Header]:
    kept = [header for header in headers if passes[header[0]]]
    if len(kept) != len(headers):
        listed = _listed_by_connection(headers)
        if listed:
            return [header for header in kept if folded(header[0]) not in listed]
    return kept


def _listed_by_connection(headers: list[Header]) -> set[bytes] | None:
    listed: set[bytes] | None = None
    for name, value in headers:
        if name == b"connection" and value not in _USUAL_CONNECTION:
            listed = listed or set()
            listed.update(folded(token.strip(b" \t")) for token in value.split(b","))
    return listed - _NOT_REMOVABLE if listed else None


def request_headers(headers: list[Header]) -> list[Header]:
    """The request headers that pass: end-to-end ones that are not reserved, in their order.

    `headers` as parsed, with lower-case names. Callers read `x-fc-invocation-type`, `x-fc-log-type` and, behind a
    verified token, the gateway's `x-hibernode-*` first.
    """
    return _strip(headers, _REQUEST)


def instance_answer_headers(headers: list[Header]) -> list[Header]:
    """The headers of an instance's answer that pass: no reserved ones but `x-fc-status`, no `date` or `server`, no
    hop-by-hop ones."""
    return _strip(headers, _INSTANCE_ANSWER)


def hop_answer_headers(headers: list[Header]) -> list[Header]:
    """The headers of an ingress's answer that pass the gateway: all but hop-by-hop ones and `date`, which the gateway
    sets. Reserved ones pass, because the ingress has set them."""
    return _strip(headers, _HOP_ANSWER)
