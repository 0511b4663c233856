"""Bearer tokens and their principals. Tokens are compared in constant time.

`adapters/daemon/token_file.py` reads their files.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum

from agent.core.errors import ConfigError, PermissionDeniedError, UnauthenticatedError

AUTHORIZATION = "authorization"
_SCHEME = "bearer "
MIN_TOKEN_CHARS = 16


class Role(Enum):
    """OPERATOR: a person or the scheduler; may do all but report for a node. NODE: an agent; may only do that."""

    OPERATOR = "OPERATOR"
    NODE = "NODE"


@dataclass(frozen=True, slots=True)
class Principal:
    """A caller. For a NODE `name` is the node's name; the scheduler takes it from no other source."""

    name: str
    role: Role


# Members of the unix socket's group have the rights of root (agent/docs/design.md, section 10).
SOCKET_PRINCIPAL = Principal("unix-socket", Role.OPERATOR)

_caller: ContextVar[Principal | None] = ContextVar("caller", default=None)


class TokenTable:
    """The tokens that a daemon accepts, with their principals. Keeps only digests, so that its repr holds no secret."""

    def __init__(self, tokens: Iterable[tuple[str, Principal]]) -> None:
        """`tokens`: (token, principal) pairs. Raises ConfigError for a short token or one of two principals."""
        self._principals: dict[bytes, Principal] = {}
        for token, principal in tokens:
            if len(token) < MIN_TOKEN_CHARS:
                message = f"the token of {principal.name} is shorter than {MIN_TOKEN_CHARS} characters; make a new one"
                raise ConfigError("TOKEN_TOO_SHORT", message, principal=principal.name)
            digest = _digest(token)
            if self._principals.get(digest, principal) != principal:
                message = f"{principal.name} has the token of {self._principals[digest].name}; give each its own"
                raise ConfigError("TOKEN_NOT_UNIQUE", message, principal=principal.name)
            self._principals[digest] = principal

    def __repr__(self) -> str:
        return f"TokenTable({sorted(p.name for p in self._principals.values())})"

    def principal_of(self, token: str) -> Principal | None:
        """The principal of the token, or None. Compares every entry, each in constant time."""
        digest, found = _digest(token), None
        for known, principal in self._principals.items():
            if hmac.compare_digest(known, digest):
                found = principal
        return found

    def authenticate(self, metadata: Sequence[tuple[str, str | bytes]]) -> Principal:
        """The principal of the call's `authorization: Bearer TOKEN`. Raises UnauthenticatedError."""
        values = [value for key, value in metadata if key.lower() == AUTHORIZATION]
        if not values:
            raise UnauthenticatedError("TOKEN_MISSING", "this call needs a bearer token; name it with --token-file")
        value = values[0] if len(values) == 1 else ""
        if not isinstance(value, str) or not value.lower().startswith(_SCHEME):
            raise UnauthenticatedError("TOKEN_MALFORMED", "send exactly one `authorization: Bearer TOKEN`")
        principal = self.principal_of(value[len(_SCHEME) :].strip())
        if principal is None:
            message = (
                "the daemon does not know this token; use the one in its state directory, or for a node the one under "
                "`nodes` in the scheduler's configuration"
            )
            raise UnauthenticatedError("TOKEN_UNKNOWN", message)
        return principal


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """The call metadata that carries `token`."""
    return ((AUTHORIZATION, f"Bearer {token}"),)


def set_caller(principal: Principal) -> None:
    """Sets the caller of the call that the current task serves; for the interceptor only."""
    _caller.set(principal)


def caller() -> Principal:
    """The caller of the call that the current task serves. Raises UnauthenticatedError outside of a call."""
    principal = _caller.get()
    if principal is None:
        raise UnauthenticatedError("TOKEN_MISSING", "this call was not authenticated")
    return principal


def calling_node() -> str:
    """The name of the calling node. Raises PermissionDeniedError if the caller is not a node."""
    principal = caller()
    if principal.role is not Role.NODE:
        message = f"{principal.name} is not a node; this call needs a node's own token"
        raise PermissionDeniedError("NODE_TOKEN_NEEDED", message)
    return principal.name


def node_tokens(tokens: Mapping[str, str]) -> list[tuple[str, Principal]]:
    """The entries of a TokenTable for tokens by node name."""
    return [(token, Principal(name, Role.NODE)) for name, token in tokens.items()]


def usable_tokens(tokens: Mapping[str, str], operator: str) -> tuple[dict[str, str], list[ConfigError]]:
    """The tokens by node that a TokenTable takes beside the operator's, and what is wrong with each other one. Of nodes
    with the same token none may use it: the scheduler could not tell which one calls."""
    nodes = node_tokens(tokens)
    good: dict[str, str] = {}
    wrong: list[ConfigError] = []
    for token, node in nodes:
        others = [(other, principal) for other, principal in nodes if other == token and principal != node]
        try:
            TokenTable([(operator, Principal("operator", Role.OPERATOR)), *others, (token, node)])
            good[node.name] = token
        except ConfigError as error:
            wrong.append(error)
    return good, wrong


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
