"""The configuration: the declared types of agent.yaml and scheduler.yaml, with their defaults.

systemd/agent.example.yaml and systemd/scheduler.example.yaml explain every key for users; a test compares them with the
types. Field names carry the unit (`_ns`, `_bytes`), keys do not (agent/config). An empty path means a default place.
"""

from agent.settings.agent import (
    DEFAULT_CAPABILITIES,
    AgentConfig,
    EngineRuntimeSettings,
    GpuSettings,
    MountSettings,
    RuntimeSettings,
    SchedulerLinkSettings,
)
from agent.settings.common import LimitSettings, ListenSettings
from agent.settings.scheduler import NodeCredential, SchedulerConfig

__all__ = [
    "DEFAULT_CAPABILITIES",
    "AgentConfig",
    "EngineRuntimeSettings",
    "GpuSettings",
    "LimitSettings",
    "ListenSettings",
    "MountSettings",
    "NodeCredential",
    "RuntimeSettings",
    "SchedulerConfig",
    "SchedulerLinkSettings",
]
