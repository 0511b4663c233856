"""scheduler.yaml: the central daemon."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from agent.config import Duration, Section, bad_key
from agent.core.function_rules import MAX_QUEUE_LENGTH, MAX_QUEUE_TIMEOUT_NS, MAX_WAKE_FACTOR
from agent.core.types import SECOND_NS
from agent.settings.common import (
    LimitSettings,
    ListenSettings,
    LogFormat,
    LogLevel,
    Port,
    absolute,
    positive,
    refuse_open_bind,
)

MAX_HOLD_NS = 600 * SECOND_NS
"""The longest `hold_ns` that an agent's WakeInstance accepts."""
MIN_PERIOD_NS, MAX_PERIOD_NS = SECOND_NS, 3600 * SECOND_NS
MIN_KEEP_NS = 24 * 3600 * SECOND_NS
_DOMAIN = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*", re.ASCII)
_NODE_NAME = re.compile(r"[A-Za-z0-9._-]{1,255}", re.ASCII)


class GatewaySettings(Section, frozen=True):
    """Where clients' requests arrive; functions are `<name>.<domain>` and `/fn/<name>/`."""

    host: str = "127.0.0.1"
    port: Port = 8600
    domain: str = "localhost"

    def __post_init__(self) -> None:
        if not _DOMAIN.fullmatch(self.domain):
            raise bad_key("domain", f"must be a host name such as functions.example.com, got {self.domain[:80]!r}")


class NodeCredential(Section, frozen=True):
    """A node that may register, and the file with the token that proves its name."""

    name: str
    token_file: str

    def __post_init__(self) -> None:
        if not _NODE_NAME.fullmatch(self.name):
            raise bad_key("name", f"must be 1 to 255 letters, digits, `.`, `_` or `-`, got {self.name[:80]!r}")
        if not self.token_file:
            raise bad_key("token_file", "must not be empty")
        absolute("token_file", self.token_file)


class ReportSettings(Section, frozen=True):
    """A silent node: once suspect it gets no new work, once lost it loses its leases."""

    suspect_ns: Duration = Duration(3 * SECOND_NS)
    lost_ns: Duration = Duration(10 * SECOND_NS)

    def __post_init__(self) -> None:
        positive(suspect=self.suspect_ns)
        if self.lost_ns <= self.suspect_ns:
            raise bad_key("lost", "must be longer than suspect")


class DispatchSettings(Section, frozen=True):
    """Defaults for functions whose s.yaml does not set these."""

    policy: Literal["pack", "spread"] = "pack"
    wake_factor: Annotated[float, msgspec.Meta(ge=0, le=MAX_WAKE_FACTOR)] = 0.0
    queue_length: Annotated[int, msgspec.Meta(ge=1, le=MAX_QUEUE_LENGTH)] = 1000
    queue_timeout_ns: Duration = Duration(60 * SECOND_NS)
    hold_ns: Duration = Duration(2 * SECOND_NS)

    def __post_init__(self) -> None:
        """Refuse defaults that a deploy or an agent's Wake would refuse: every one of them would fail."""
        positive(queue_timeout=self.queue_timeout_ns)
        if self.queue_timeout_ns > MAX_QUEUE_TIMEOUT_NS:
            raise bad_key("queue_timeout", "must be at most 1h")
        if self.hold_ns > MAX_HOLD_NS:
            raise bad_key("hold", "must be at most 10m")


class ScalingSettings(Section, frozen=True):
    """How target tracking policies measure, and how fast they act (agent/docs/facts/function-compute.md)."""

    period_ns: Duration = Duration(60 * SECOND_NS)
    periods: Annotated[int, msgspec.Meta(ge=1, le=60)] = 3
    scale_in_factor: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.5

    def __post_init__(self) -> None:
        if not MIN_PERIOD_NS <= self.period_ns <= MAX_PERIOD_NS:
            raise bad_key("period", "must be 1s to 1h")


class UsageSettings(Section, frozen=True):
    """How long usage windows are kept; 0 = for ever."""

    keep_ns: Duration = Duration(0)

    def __post_init__(self) -> None:
        """Keep windows for a day at least: an agent may be offline overnight and upload them again."""
        if 0 < self.keep_ns < MIN_KEEP_NS:
            raise bad_key("keep", "must be 0 (for ever) or at least 24h")


class SchedulerConfig(Section, frozen=True):
    """scheduler.yaml: the central daemon."""

    state_dir: str = "/var/lib/hibernode/scheduler"
    log_level: LogLevel = "info"
    log_format: LogFormat = "json"
    insecure: bool = False
    token_file: str = ""
    gateway: GatewaySettings = GatewaySettings()
    grpc: ListenSettings = ListenSettings(port=8601)
    admin: ListenSettings = ListenSettings(port=8602)
    nodes: tuple[NodeCredential, ...] = ()
    database: str = ""
    price_book: str = ""
    report: ReportSettings = ReportSettings()
    dispatch: DispatchSettings = DispatchSettings()
    scaling: ScalingSettings = ScalingSettings()
    usage: UsageSettings = UsageSettings()
    limits: LimitSettings = LimitSettings()

    def __post_init__(self) -> None:
        absolute("state_dir", self.state_dir)
        if not self.state_dir:
            raise bad_key("state_dir", "must not be empty")
        absolute("token_file", self.token_file)
        absolute("price_book", self.price_book)
        refuse_open_bind(self.insecure, gateway=self.gateway.host, grpc=self.grpc.host, admin=self.admin.host)
        names = [node.name for node in self.nodes]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise bad_key(f"nodes[{index}].name", f"{name!r} is there twice; each node has a credential of its own")

    @property
    def token_path(self) -> Path:
        """The bearer token of the API; default <state_dir>/token."""
        return Path(self.token_file or f"{self.state_dir}/token")

    @property
    def database_url(self) -> str:
        """SQLAlchemy URL; default SQLite at <state_dir>/scheduler.db. May hold a password: never log it."""
        return self.database or f"sqlite:///{self.state_dir}/scheduler.db"
