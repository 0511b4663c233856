"""What can be configured: the declared types of agent.yaml and scheduler.yaml, with their defaults.

Every key is explained where users look for it, in systemd/agent.example.yaml and systemd/scheduler.example.yaml; a test
holds the two together. Field names carry the unit (`_ns`, `_bytes`), keys do not (agent/config.py). An empty path means
the place named beside it.
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
