"""s.yaml files: Function Compute's example, errors with their lines, warnings."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from agent.cli.fc3.load import Deployment, HttpTrigger, load_s_yaml
from agent.core.errors import ConfigError, NotFoundError
from agent.core.types import GIB, MIB, SECOND_NS, DispatchPolicy, GpuNeed, HealthCheck, Hook, Hooks, IdleMode

EXAMPLE = Path(__file__).with_name("gpu-best-practice.s.yaml")
"""From Function Compute's page on real-time inference, unchanged."""

HEAD = """\
edition: 3.0.0
name: shop
resources:
  ocr:
    component: fc3
    props:
      functionName: ocr
      runtime: custom-container
"""
IMAGE = """\
      customContainerConfig:
        image: registry.example/ocr:1
"""


def written(folder: Path, props: str = "", image: str = IMAGE) -> Path:
    path = folder / "s.yaml"
    path.write_text(HEAD + image + textwrap.indent(textwrap.dedent(props), " " * 6))
    return path


def load(folder: Path, props: str = "", image: str = IMAGE) -> Deployment:
    (found,) = load_s_yaml(written(folder, props, image), environment={"DB_PASSWORD": "hunter2"})
    return found


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_s_yaml(path, environment={})
    return caught.value.message


def test_function_computes_example_works_unchanged() -> None:
    (found,) = load_s_yaml(EXAMPLE)
    spec = found.function
    assert spec.name == "gpu-porn-detection"
    assert spec.image.endswith("/gpu-console-supervising:paddle-porn-detection")
    assert spec.region == "cn-shanghai"  # ${vars.region}
    assert spec.handler == "not-used"
    assert spec.timeout_ns == 1200 * SECOND_NS
    assert (spec.memory_bytes, spec.vcpu_millis, spec.disk_bytes) == (8 * GIB, 2000, 512 * MIB)
    assert spec.gpu == GpuNeed(1, "", "fc.gpu.tesla.1", 8 * GIB)
    assert spec.environment == (("FCGPU_RUNTIME_SHMSIZE", "8589934592"),)
    assert (spec.port, spec.instance_concurrency) == (9000, 1)
    assert spec.idle.mode is IdleMode.REQUIRE
    assert found.triggers == (HttpTrigger("httpTrigger", "anonymous", ("GET", "POST")),)
    assert found.target is None
    assert [warning.split(": ")[1].rpartition(".")[2] for warning in found.warnings] == [
        "internetAccess",
        "logConfig",
        "gpuMemorySize",
    ]


def test_defaults_are_function_computes(tmp_path: Path) -> None:
    found = load(tmp_path, "gpuConfig: {gpuType: fc.gpu.ada.1}\n")
    spec = found.function
    assert (spec.timeout_ns, spec.vcpu_millis, spec.memory_bytes) == (3 * SECOND_NS, 350, 512 * MIB)
    assert (spec.gpu.count, spec.gpu.memory_bytes) == (1, 0)
    assert (spec.hooks, spec.health_check) == (Hooks(), None)
    assert spec.idle.freeze_after_ns == 10 * SECOND_NS
    assert found.unset_fields == {"queue_length", "queue_timeout_ns", "dispatch", "wake_factor"}
    assert found.warnings == ()


@pytest.mark.parametrize("written_as", ["4090", "4090.0", "'4090'", "2080 Ti"])
def test_a_gpu_type_may_be_the_number_of_a_model(tmp_path: Path, written_as: str) -> None:
    found = load(tmp_path, f"gpuConfig: {{gpuType: {written_as}}}\n")
    assert found.function.gpu.gpu_type == written_as.strip("'")


def test_every_supported_key(tmp_path: Path) -> None:
    props = """\
    cpu: 1.5
    instanceConcurrency: 20
    environmentVariables: {LANG: C, FLAG: on, COUNT: 08, PASSWORD: "${env('DB_PASSWORD')}"}
    instanceLifecycleConfig:
      initializer: {handler: index.initialize, timeout: 300}
      preFreeze: {handler: index.preFreeze}
      preStop: {handler: index.preStop, timeout: 90}
    provisionConfig: {defaultTarget: 3, alwaysAllocateGPU: false}
    triggers:
      - {triggerName: web, triggerType: http, triggerConfig: {authType: jwt}}
    hibernode:
      freezeAfter: 2.5
      minAwake: 1m30s
      idle: prefer
      dispatch: spread
      wakeFactor: 1.5
      queueLength: 7
      queueTimeout: 30s
      gpus: 2
    """
    image = """\
      customContainerConfig:
        image: registry.example/ocr:1
        port: 8080
        entrypoint: [python3, -m, ocr]
        command: ["--port", "8080"]
        healthCheckConfig: {httpGetUrl: /health, initialDelaySeconds: 5, failureThreshold: 2}
"""
    found = load(tmp_path, props, image)
    spec = found.function
    assert (spec.vcpu_millis, spec.instance_concurrency, spec.port) == (1500, 20, 8080)
    assert (spec.entrypoint, spec.command) == (("python3", "-m", "ocr"), ("--port", "8080"))
    assert dict(spec.environment) == {"LANG": "C", "FLAG": "on", "COUNT": "08", "PASSWORD": "hunter2"}
    assert spec.hooks == Hooks(Hook(300 * SECOND_NS), Hook(3 * SECOND_NS), Hook(90 * SECOND_NS))
    assert spec.health_check == HealthCheck("/health", initial_delay_ns=5 * SECOND_NS, failure_threshold=2)
    assert (spec.idle.mode, spec.idle.freeze_after_ns) == (IdleMode.PREFER, 2_500_000_000)
    assert spec.idle.min_awake_ns == 90 * SECOND_NS
    assert (spec.dispatch, spec.wake_factor) == (DispatchPolicy.SPREAD, 1.5)
    assert (spec.queue_length, spec.queue_timeout_ns, spec.gpu.count) == (7, 30 * SECOND_NS, 2)
    assert found.triggers == (HttpTrigger("web", "jwt", ()),)
    assert (found.target, found.unset_fields, found.warnings) == (3, frozenset(), ())
    assert "hunter2" not in repr(found)


@pytest.mark.parametrize(
    ("props", "mode"),
    [
        ("gpuConfig: {}\n", IdleMode.REQUIRE),
        ("gpuConfig: {}\nprovisionConfig: {alwaysAllocateGPU: true}\n", IdleMode.NEVER),
        ("gpuConfig: {}\nalwaysAllocateGPU: true\n", IdleMode.NEVER),
        ("gpuConfig: {}\nalwaysAllocateGPU: true\nhibernode: {idle: prefer}\n", IdleMode.PREFER),
        ("cpu: 1\n", IdleMode.NEVER),  # there is no GPU to release
    ],
)
def test_when_an_instance_may_freeze(tmp_path: Path, props: str, mode: IdleMode) -> None:
    assert load(tmp_path, props).function.idle.mode is mode


@pytest.mark.parametrize(
    ("props", "count", "gib"),
    [
        ("gpuMemorySize: 4096\n", 1, 4),
        ("gpuMemorySize: 4096\ngpuConfig: {gpuMemorySize: 8192}\n", 1, 8),
        ("gpuMemorySize: 4096\ngpuConfig: {gpuType: fc.gpu.ada.1}\n", 1, 4),
        ("gpuConfig: {gpuMemorySize: 81920}\n", 1, 80),
        ("hibernode: {gpus: 4}\n", 4, 0),
        ("gpuConfig: {}\nhibernode: {gpus: 0}\n", 0, 0),
    ],
)
def test_how_many_gpus_and_what_is_billed(tmp_path: Path, props: str, count: int, gib: int) -> None:
    gpu = load(tmp_path, props).function.gpu
    assert (gpu.count, gpu.memory_bytes) == (count, gib * GIB)


@pytest.mark.parametrize(
    ("props", "problem"),
    [
        (
            "timeout: 86401",
            "s.yaml:11: resources.ocr.props.timeout: expected a whole number from 1 to 86400, got 86401",
        ),
        ("timeout: 0", "timeout: expected a whole number from 1 to 86400, got 0"),
        ("timeout: soon", "timeout: expected a whole number from 1 to 86400, got 'soon'"),
        ("timeout: 010", "timeout: expected a whole number from 1 to 86400, got '010'"),  # YAML 1.1: 8
        ("timeout: 1:30", "timeout: expected a whole number from 1 to 86400, got '1:30'"),  # YAML 1.1: 90
        ("memorySize: 500", "memorySize: expected a multiple of 64 from 128 to 67108864, got 500"),
        ("cpu: 0.01", "cpu: expected a number from 0.05 to 1024, got 0.01"),
        ("cpu: .inf", "cpu: expected a number from 0.05 to 1024, got"),
        ("cpu: .nan", "cpu: expected a number from 0.05 to 1024, got"),
        ("memorySize: 640000000000", "memorySize: expected a multiple of 64 from 128 to 67108864"),
        ("diskSize: 100", "diskSize: expected a whole number from 512 to 67108864, got 100"),
        ("instanceConcurrency: 201", "instanceConcurrency: expected a whole number from 1 to 200, got 201"),
        (
            "gpuConfig: {gpuMemorySize: 1000}",
            "gpuConfig.gpuMemorySize: expected a multiple of 1024 from 1024 to 67108864, got 1000",
        ),
        ("gpuConfig: 8192", "gpuConfig: expected"),
        ("enviromentVariables: {A: b}", ":11: resources.ocr.props.enviromentVariables: unknown key; did you mean"),
        ("environmentVariables: {FC_REGION: x}", "environmentVariables.FC_REGION: names that begin with FC_"),
        ("environmentVariables: {A: [1]}", "environmentVariables.A: must be text"),
        ("instanceLifecycleConfig: {preStop: {timeout: 91}}", "preStop.timeout: must be at most 90 s"),
        ("instanceLifecycleConfig: {initializer: {timeout: 301}}", "initializer.timeout: expected"),
        ("provisionConfig: {defaultTarget: 10001}", "provisionConfig.defaultTarget: expected"),
        ("hibernode: {freezeAfter: 10x}", "hibernode.freezeAfter: expected a duration"),
        ("hibernode: {freezeAfter: true}", "hibernode.freezeAfter: expected a duration"),
        ("hibernode: {freezeafter: 10s}", "hibernode.freezeafter: unknown key; did you mean freezeAfter?"),
        ("hibernode: {idle: maybe}", "hibernode.idle:"),
        ("hibernode: {queueTimeout: 0}", "hibernode.queueTimeout: must be greater than 0"),
        (
            "triggers:\n  - {triggerName: a, triggerConfig: {authType: secret}}",
            ":12: resources.ocr.props.triggers[0].triggerConfig.authType",
        ),
        (
            "triggers:\n  - {triggerName: a, triggerConfig: {methods: [BREW]}}",
            "triggers[0].triggerConfig.methods[0]: expected DELETE, GET, HEAD, OPTIONS, PATCH, POST or PUT, got 'BREW'",
        ),
        ("timeout: 5\ntimeout: 6", "s.yaml:12: resources.ocr.props.timeout: is written twice"),
        ("timeout: ${vars.time}", ":11: resources.ocr.props.timeout: unknown variable ${vars.time}; defined: none"),
        ("region: ${env('NOWHERE')}", "the environment has no variable NOWHERE; export it"),
        ("region: ${config('AccountID')}", "unknown expression ${config('AccountID')}; use ${vars.NAME} or"),
        ("region: 'a ${vars.x'", "`${` has no `}`"),
        ("region: [", "not YAML"),
    ],
)
def test_errors_name_line_and_key(tmp_path: Path, props: str, problem: str) -> None:
    assert problem in refusal(written(tmp_path, props + "\n"))


def test_error_has_the_line_of_the_value(tmp_path: Path) -> None:
    path = written(tmp_path, "triggers:\n  - triggerName: a\n    triggerConfig:\n      authType: anonymous\n  - 5\n")
    assert refusal(path).startswith("s.yaml:15: resources.ocr.props.triggers[1]: expected a mapping")


def test_environment_variables_have_at_most_four_kilobytes(tmp_path: Path) -> None:
    assert load(tmp_path, f"environmentVariables: {{A: {'x' * 4095}}}\n").function.environment
    assert "has 4097 bytes in total" in refusal(written(tmp_path, f"environmentVariables: {{A: {'x' * 4096}}}\n"))


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        ("functionName: ocr", "functionName: o c r", "functionName: must be 1 to 64 letters"),
        ("functionName: ocr", "functionName: " + "a" * 65, "functionName: must be 1 to 64 letters"),
        ("functionName: ocr", "description: x", "functionName: required, but not there"),
        ("runtime: custom-container", "runtime: python3.12", "props.runtime:"),
        ("image: registry.example/ocr:1", "image: host", "customContainerConfig.entrypoint: is required"),
        ("image: registry.example/ocr:1", "port: 9000", "customContainerConfig.image: required"),
        ("component: fc3", "component: fc", "no resource has `component: fc3`"),
        ("component: fc3", "compnent: fc3", "ocr.component: is required"),
        ("edition: 3.0.0", "edition: 1.0.0", "s.yaml:1: edition: must be 3.0.0"),
        ("resources:", "resuorces:", "resuorces: unknown key; did you mean resources?"),
        ("    props:", "    props: 5\n    x:", "ocr.props: is required: a mapping"),
    ],
)
def test_errors_outside_the_props(tmp_path: Path, before: str, after: str, problem: str) -> None:
    path = written(tmp_path)
    path.write_text(path.read_text().replace(before, after))
    assert problem in refusal(path)


@pytest.mark.parametrize(
    ("props", "problem"),
    [
        ("vpcConfig: {vpcId: v}\n", "s.yaml:11: resources.ocr.props.vpcConfig: is configured on your hosts"),
        ("role: acs:ram::1:role/x\n", "props.role: has no effect: instances get no cloud credentials"),
        ("nasConfig: auto\n", "props.nasConfig: is not supported yet"),
        ("somethingNew: 1\n", "props.somethingNew: unknown key, has no effect"),
        ("memorySize: 65536\n", "props.memorySize: exceeds Function Compute's 32768"),
        ("instanceLifecycleConfig: {preStop: {command: [sh]}}\n", "preStop.command: is not run"),
        ("triggers:\n  - {triggerName: t, triggerType: timer, triggerConfig: {payload: x}}\n", "type 'timer'"),
        ("timeout: 3\n", "has no gpuConfig: the instances get no GPU"),
        (
            "gpuMemorySize: 1024\nenvironmentVariables: {CUDA_VISIBLE_DEVICES: '0'}\n",
            "CUDA_VISIBLE_DEVICES: is replaced",
        ),
        (
            "environmentVariables:\n  NVIDIA_VISIBLE_DEVICES: all\n",
            "s.yaml:12: resources.ocr.props.environmentVariables",
        ),
        ("environmentVariables: {PORT: '80'}\n", "environmentVariables.PORT: is not customContainerConfig.port"),
    ],
)
def test_keys_without_effect_give_warnings(tmp_path: Path, props: str, problem: str) -> None:
    assert any(problem in warning for warning in load(tmp_path, props).warnings), load(tmp_path, props).warnings


def test_command_hook_is_not_called(tmp_path: Path) -> None:
    spec = load(tmp_path, "instanceLifecycleConfig: {initializer: {command: [sh, warm.sh]}}\n").function
    assert spec.hooks.initializer is None


def test_variables_nest_keep_their_type_and_can_be_escaped(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(
        """\
edition: 3.0.0
vars:
  base: {registry: registry.example, tag: 1.10}
  image: ${vars.base.registry}/ocr:${vars.base.tag}
  words: [serve, --all]
  seconds: 60
resources:
  ocr:
    component: fc3
    props: &props
      functionName: ocr
      runtime: custom-container
      timeout: ${vars.seconds}
      gpuConfig: {}
      region: ${ env('REGION', 'here') }
      customContainerConfig:
        image: ${vars.image}
        command: ${vars.words}
        entrypoint: [sh, -c, 'exec serve $${PORT} \\${HOME}']
  two:
    component: fc3
    props:
      <<: *props
      functionName: ocr-two
"""
    )
    first, second = load_s_yaml(path, environment={})
    spec = first.function
    assert spec.image == "registry.example/ocr:1.10"  # as written, not the number 1.1
    assert (spec.timeout_ns, spec.region, spec.command) == (60 * SECOND_NS, "here", ("serve", "--all"))
    assert spec.entrypoint[2] == "exec serve ${PORT} ${HOME}"
    assert (second.resource, second.function.name, second.function.image) == ("two", "ocr-two", spec.image)


def test_variable_that_refers_to_itself_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "region: ${vars.a}\n")
    path.write_text("vars: {a: '${vars.b}', b: 'x${vars.a}'}\n" + path.read_text())
    assert refusal(path) == "s.yaml:1: vars.a: vars.b refers to itself"


def test_file_that_expands_without_limit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    levels = "".join(f"  l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, 9))
    path.write_text("vars:\n  l0: &l0 [x]\n" + levels)
    assert "too many values" in refusal(path)
    texts = "".join(f"  t{n}: '{f'${{vars.t{n - 1}}}' * 9}'\n" for n in range(1, 9))
    path.write_text(written(tmp_path, "region: ${vars.t8}\n").read_text() + "vars:\n  t0: xxxxxxxx\n" + texts)
    assert "the variables expand to too many values" in refusal(path)


def test_one_resource_of_several(tmp_path: Path) -> None:
    path = written(tmp_path)
    other = HEAD.partition("resources:\n")[2].replace("ocr", "chat") + IMAGE
    path.write_text(path.read_text() + other + "  dns:\n    component: fc3-domain\n    props: {}\n")
    assert [one.function.name for one in load_s_yaml(path)] == ["ocr", "chat"]
    assert any("'fc3-domain' is not fc3: skipped" in warning for warning in load_s_yaml(path)[0].warnings)
    assert [one.resource for one in load_s_yaml(path, "chat")] == ["chat"]
    with pytest.raises(NotFoundError, match="no resource 'tts'; it has: ocr, chat, dns"):
        load_s_yaml(path, "tts")
    with pytest.raises(ConfigError, match="must be fc3, got 'fc3-domain'"):
        load_s_yaml(path, "dns")


def test_repeated_function_name_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    again = HEAD.partition("resources:\n")[2].replace("  ocr:", "  again:") + IMAGE
    path.write_text(path.read_text() + again)
    assert "'ocr' is repeated; function names must be unique" in refusal(path)


@pytest.mark.parametrize("content", [b"", b"[]", b"5", b"\xff\xfe\x00", b"a: !!python/object:os.system x", b"- - - -"])
def test_file_that_is_not_an_s_yaml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "s.yaml"
    path.write_bytes(content)
    assert refusal(path).startswith("s.yaml")


def test_missing_file(tmp_path: Path) -> None:
    assert "No such file or directory; name the file with -t" in refusal(tmp_path / "nowhere.yaml")
