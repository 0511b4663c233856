"""Settings: the example files hold every key with its real default; daemons refuse values that can't work."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from agent.config import Section, key_paths, load, read_yaml
from agent.core.errors import ConfigError
from agent.settings import AgentConfig, NodeCredential, SchedulerConfig, SchedulerLinkSettings

SYSTEMD = Path(__file__).parents[2] / "systemd"
EXAMPLES = [(SYSTEMD / "agent.example.yaml", AgentConfig), (SYSTEMD / "scheduler.example.yaml", SchedulerConfig)]


def paths_in(document: object, prefix: str = "") -> set[str]:
    if isinstance(document, dict):
        found: set[str] = set()
        for key, value in document.items():
            path = f"{prefix}.{key}" if prefix else str(key)
            found |= {path} | paths_in(value, path)
        return found
    if isinstance(document, list):
        return set().union(*(paths_in(item, f"{prefix}[]") for item in document))
    return set()


@pytest.mark.parametrize(("path", "kind"), EXAMPLES, ids=["agent", "scheduler"])
def test_the_example_holds_every_key(path: Path, kind: type[Section]) -> None:
    missing = set(key_paths(msgspec.inspect.type_info(kind))) - paths_in(read_yaml(path))
    assert not missing, f"explain in {path.name}: {', '.join(sorted(missing))}"


@pytest.mark.parametrize(("path", "kind"), EXAMPLES, ids=["agent", "scheduler"])
def test_every_key_of_the_example_is_explained(path: Path, kind: type[Section]) -> None:
    """A key has a comment above it, above its section, or above the neighbours it stands with."""
    explained = False
    bare: list[str] = []
    for line in path.read_text().splitlines():
        text = line.strip()
        if text.startswith("#"):
            explained = True
        elif not text:
            explained = False
        elif not explained:
            bare.append(text)
    assert not bare or all(text.endswith(":") for text in bare), bare


def test_the_agent_example_shows_the_defaults() -> None:
    example = load(SYSTEMD / "agent.example.yaml", AgentConfig)
    assert example.scheduler == SchedulerLinkSettings("127.0.0.1:8601", "/etc/hibernode/node.token")
    assert msgspec.structs.replace(example, scheduler=None) == AgentConfig()


def test_the_scheduler_example_shows_the_defaults() -> None:
    example = load(SYSTEMD / "scheduler.example.yaml", SchedulerConfig)
    assert example.nodes == (NodeCredential("gpu-1", "/etc/hibernode/nodes/gpu-1.token"),)
    assert msgspec.structs.replace(example, nodes=()) == SchedulerConfig()


def test_ports_are_those_of_the_design() -> None:
    agent, scheduler = AgentConfig(), SchedulerConfig()
    assert (scheduler.gateway.port, scheduler.grpc.port, scheduler.admin.port) == (8600, 8601, 8602)
    assert (agent.ingress.port, agent.grpc.port, agent.admin.port) == (8610, 8611, 8612)


def test_default_paths_lie_in_the_state_directory() -> None:
    agent = load({"state_dir": "/srv/agent"}, AgentConfig)
    assert agent.token_path == Path("/srv/agent/token")
    assert agent.socket_path == Path("/srv/agent/agent.sock")
    scheduler = load({"state_dir": "/srv/scheduler"}, SchedulerConfig)
    assert scheduler.database_url == "sqlite:////srv/scheduler/scheduler.db"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_loopback_needs_no_permission(host: str) -> None:
    assert load({"ingress": {"host": host}}, AgentConfig).ingress.host == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "gpu-1.example", "localhost.example"])
@pytest.mark.parametrize(
    ("section", "kind"),
    [("ingress", AgentConfig), ("grpc", AgentConfig), ("admin", AgentConfig), ("gateway", SchedulerConfig)],
)
def test_an_open_address_needs_insecure(host: str, section: str, kind: type[Section]) -> None:
    with pytest.raises(ConfigError, match=rf"{section}\.host: .* can be reached from other machines"):
        load({section: {"host": host}}, kind)
    load({section: {"host": host}, "insecure": True}, kind)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"state_dir": "var"}, "state_dir: must be an absolute path, got 'var'"),
        ({"state_dir": ""}, "state_dir: must not be empty"),
        ({"ingress": {"host": ""}}, "ingress.host: must not be empty"),
        ({"ingress": {"port": 65536}}, "ingress.port: expected a whole number from 0 to 65535, got 65536"),
        ({"log_level": "verbose"}, "log_level: expected debug, error, info or warning, got 'verbose'"),
        ({"scheduler": {"address": "x"}}, "scheduler.token_file: required, but not there"),
        ({"scheduler": {"address": "x", "token_file": "/t"}}, "scheduler.address: must be host:port"),
        ({"gpu": {"lock_timeout": 0}}, "gpu.lock_timeout: must be more than zero"),
        ({"gpu": {"lock_timeout": "10us"}}, "gpu.lock_timeout: must be at least 1ms"),
        ({"gpu": {"lock_timeout": "3m"}}, "gpu.operation_timeout: must be longer than lock_timeout"),
        ({"gpu": {"driver_workers": 0}}, "gpu.driver_workers: expected a whole number from 1 to 16, got 0"),
        ({"gpu": {"mounts": {"binds": ["/a"]}}}, "gpu.mounts.binds[0]: must be /host/path:/container/path"),
        ({"runtime": {"process": {"ports": {"first": 9000}}}}, "runtime.process.ports.last: must not be below first"),
        ({"gpu": {"checkpointer": "toggle"}}, "gpu.checkpointer: "),
        (
            {"gpu": {"migrate": True}},
            "gpu.migrate: lets every instance see all GPUs of this host",
        ),
        ({"gpu": {"mounts": {"binds": ["/a:/b"]}}}, "gpu.mounts: is used with attach: mounts only"),
        ({"gpu": {"attach": "by hand"}}, "gpu.attach: expected auto, cdi, mounts or nvidia-runtime, got 'by hand'"),
        ({"runtime": {"engine": {"socket": "docker.sock"}}}, "runtime.engine.socket: must be an absolute path"),
        ({"runtime": {"engine": {"socket": "unix:///run/docker.sock"}}}, "socket: is a path: leave out unix://, as in"),
        ({"runtime": {"engine": {"capabilities": ["SYS_ADMIN"]}}}, "runtime.engine.capabilities[0]: SYS_ADMIN would"),
        ({"runtime": {"engine": {"capabilities": ["cap_kill"]}}}, "runtime.engine.capabilities[0]: must be a name"),
        ({"runtime": {"engine": {"pull_timeout": "0s"}}}, "runtime.engine.pull_timeout: must be more than zero"),
        ({"runtime": {"volumes_allowed": ["data"]}}, "runtime.volumes_allowed[0]: must be an absolute path"),
        ({"gpu": {"mounts": {"environment": {"A": "b"}}}}, "gpu.mounts: is used with attach: mounts only"),
        ({"billing": {"starting": "free"}}, "billing.starting: expected active, idle or unbilled, got 'free'"),
        ({"billing": {"flush_interval": "2m"}}, "billing.flush_interval: must not be longer than window"),
    ],
)
def test_the_agent_refuses(document: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(document, AgentConfig)
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"report": {"lost": "1s"}}, "report.lost: must be longer than suspect"),
        ({"usage": {"keep": "23h"}}, "usage.keep: must be 0 (for ever) or at least 24h"),
        ({"dispatch": {"wake_factor": -1}}, "dispatch.wake_factor: expected"),
        ({"nodes": [{"name": "a", "token_file": "t"}]}, "nodes[0].token_file: must be an absolute path"),
        (
            {"nodes": [{"name": "a", "token_file": "/t"}, {"name": "a", "token_file": "/u"}]},
            "nodes[1].name: 'a' is there twice",
        ),
    ],
)
def test_the_scheduler_refuses(document: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(document, SchedulerConfig)
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("document", "key"),
    [
        ({"dispatch": {"hold": "11m"}}, "dispatch.hold"),
        ({"dispatch": {"queue_timeout": "2h"}}, "dispatch.queue_timeout"),
        ({"dispatch": {"queue_length": 0}}, "dispatch.queue_length"),
        ({"dispatch": {"wake_factor": float("inf")}}, "dispatch.wake_factor"),
        ({"gateway": {"domain": ""}}, "gateway.domain"),
        ({"gateway": {"domain": "a b"}}, "gateway.domain"),
        ({"nodes": [{"name": "a/b", "token_file": "/t"}]}, "nodes[0].name"),
    ],
)
def test_scheduler_defaults_that_every_deploy_or_wake_refuses_are_refused(
    document: dict[str, object], key: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(document, SchedulerConfig)
    assert key in caught.value.message
