"""Bearer tokens: who a token stands for, compared without telling by time how much of it was right.

The files they come from are read by `adapters/daemon/token_file.py`.
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
    """OPERATOR: a person or the scheduler, may do everything but speak for a node. NODE: an agent, only that."""

    OPERATOR = "OPERATOR"
    NODE = "NODE"


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls. For a NODE the name is the node's name, and the only place it comes from."""

    name: str
    role: Role


# Membership of the unix socket's group equals root (DESIGN section 10).
SOCKET_PRINCIPAL = Principal("unix-socket", Role.OPERATOR)

_caller: ContextVar[Principal | None] = ContextVar("caller", default=None)


class TokenTable:
    """Tokens of a daemon and whom they stand for. Keeps digests only, so that nothing it prints is a secret."""

    def __init__(self, tokens: Iterable[tuple[str, Principal]]) -> None:
        """`tokens` are (token, principal). Raises ConfigError for a short token or one that stands for two."""
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
        """Whom the token stands for; None if for nobody. Every entry is compared, each in constant time."""
        digest, found = _digest(token), None
        for known, principal in self._principals.items():
            if hmac.compare_digest(known, digest):
                found = principal
        return found

    def authenticate(self, metadata: Sequence[tuple[str, str | bytes]]) -> Principal:
        """Whom the call's `authorization: Bearer TOKEN` stands for. Raises UnauthenticatedError."""
        values = [value for key, value in metadata if key.lower() == AUTHORIZATION]
        if not values:
            raise UnauthenticatedError("TOKEN_MISSING", "this call needs a bearer token; name it with --token-file")
        value = values[0] if len(values) == 1 else ""
        if not isinstance(value, str) or not value.lower().startswith(_SCHEME):
            raise UnauthenticatedError("TOKEN_MALFORMED", "send exactly one `authorization: Bearer TOKEN`")
        principal = self.principal_of(value[len(_SCHEME) :].strip())
        if principal is None:
            message = (
                "the daemon does not know this token; take that of its state directory, or for a node the one that "
                "the scheduler has under `nodes`"
            )
            raise UnauthenticatedError("TOKEN_UNKNOWN", message)
        return principal


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """The call metadata that carries `token`."""
    return ((AUTHORIZATION, f"Bearer {token}"),)


def set_caller(principal: Principal) -> None:
    """Says who makes the call that the current task serves; for the interceptor only."""
    _caller.set(principal)


def caller() -> Principal:
    """Who makes the call that the current task serves. Raises UnauthenticatedError outside of a call."""
    principal = _caller.get()
    if principal is None:
        raise UnauthenticatedError("TOKEN_MISSING", "this call was not authenticated")
    return principal


def calling_node() -> str:
    """Name of the node that makes the call. Raises PermissionDeniedError if it is not a node."""
    principal = caller()
    if principal.role is not Role.NODE:
        message = f"{principal.name} is not a node; this call needs a node's own token"
        raise PermissionDeniedError("NODE_TOKEN_NEEDED", message)
    return principal.name


def node_tokens(tokens: Mapping[str, str]) -> list[tuple[str, Principal]]:
    """Entries for a TokenTable from node name -> token."""
    return [(token, Principal(name, Role.NODE)) for name, token in tokens.items()]


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
