"""What may travel from one hop to the next (DESIGN section 6; facts: the Function Compute contract).

Names are compared after folding case and `_` to `-`: to many application frameworks `X_FC_Request_Id` and
`x-fc-request-id` are the same variable. Names that a message's `Connection` header lists are dropped too;
since the caller adds its own headers after stripping, a client can never remove ours.

Framing (`content-length`, `transfer-encoding`) and `expect` never pass: whoever sends a message frames it
himself. The verdict on a name is cached, for real traffic uses few names; the cache is bounded, for a client
chooses them.
"""

from __future__ import annotations

from collections.abc import Callable

from agent.http import hop_headers
from agent.http.message import Header

_HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"content-length",
    )
)
_OURS = (b"x-fc-", hop_headers.PREFIX)
_CACHE_SIZE = 512
_UNREMOVABLE = frozenset((b"host", b"close"))
_LISTS_NOTHING = frozenset((b"keep-alive", b"close"))  # what Connection says nearly always


def folded(name: bytes) -> bytes:
    """`name` as frameworks see it: lower case, `_` as `-`."""
    return name.lower().replace(b"_", b"-")


def is_ours(name: bytes) -> bool:
    """True for `x-fc-*` and `x-hibernode-*`, however written."""
    return folded(name).startswith(_OURS)


def _hop_by_hop(name: bytes) -> bool:
    name = folded(name)
    return name in _HOP_BY_HOP or name.startswith(b"proxy-")


def _request_passes(name: bytes) -> bool:
    return not (_hop_by_hop(name) or is_ours(name) or folded(name) == b"expect")


def _instance_answer_passes(name: bytes) -> bool:
    if name == b"x-fc-status":
        return True
    return not (_hop_by_hop(name) or is_ours(name) or folded(name) in (b"date", b"server"))


def _hop_answer_passes(name: bytes) -> bool:
    return not (_hop_by_hop(name) or folded(name) == b"date")


class _Verdicts(dict[bytes, bool]):
    """name -> may it pass; computes what it hasn't seen, remembers a bounded number."""

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
        if name == b"connection" and value not in _LISTS_NOTHING:
            listed = listed or set()
            listed.update(folded(token.strip(b" \t")) for token in value.split(b","))
    return listed - _UNREMOVABLE if listed else None


def request_headers(headers: list[Header]) -> list[Header]:
    """A client's (or the gateway's) request headers that may go on: end-to-end ones that are not ours to set.

    `headers` as parsed (lower-case names), order kept. Read `x-fc-invocation-type`, `x-fc-log-type`,
    `x-fc-async-task-id` and, behind a verified token, the gateway's `x-hibernode-*` before calling.
    """
    return _strip(headers, _REQUEST)


def instance_answer_headers(headers: list[Header]) -> list[Header]:
    """An instance's answer headers that may leave the ingress: not `x-fc-*` (but `x-fc-status`), not
    `x-hibernode-*`, no `connection`, `keep-alive`, `date`, `server`, nothing hop-by-hop."""
    return _strip(headers, _INSTANCE_ANSWER)


def hop_answer_headers(headers: list[Header]) -> list[Header]:
    """An ingress's answer headers at the gateway: everything but hop-by-hop and `date`, which the gateway sets; ours
    pass, for an ingress set them."""
    return _strip(headers, _HOP_ANSWER)
