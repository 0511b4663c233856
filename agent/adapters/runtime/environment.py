"""The environment variables that the agent gives an instance: the same for host processes and containers."""

from __future__ import annotations

from agent.core.instance_variables import (
    INSTANCE_VARIABLE,
    LISTEN_PORT,
    NVIDIA_DEVICES,
    PORT,
    gpu_variables,
    replaced_variables,
)
from agent.log import get_logger
from agent.ports import StartSpec

LIBRARIES = "LD_LIBRARY_PATH"

log = get_logger()


def instance_environment(
    spec: StartSpec,
    *,
    port: int,
    state_uuid: str,
    visible_devices: str,
    sees_all_gpus: bool,
    inherited_libraries: str = "",
) -> dict[str, str]:
    """Ours, overlaid by the function's variables, except those of `replaced_variables`, then by `spec.environment`.

    `port` is the one to listen on, `visible_devices` NVIDIA_VISIBLE_DEVICES. `sees_all_gpus`: nothing but
    CUDA_VISIBLE_DEVICES keeps the instance to its own. The LD_LIBRARY_PATH of `spec.environment` precedes the
    function's, or else `inherited_libraries` (the image's own), and does not replace it
    (agent/docs/facts/emulated-driver.md, pitfall 15).
    """
    function = dict(spec.instance.function.environment)
    ours = {
        **gpu_variables(spec.instance.function, spec.gpu_uuids, spec.gpu_numbers, sees_all_gpus=sees_all_gpus),
        NVIDIA_DEVICES: visible_devices,
        PORT: str(port),
        INSTANCE_VARIABLE: f"{state_uuid}/{spec.instance.uid}",
    }
    replaced = ours.keys() & replaced_variables(spec.instance.function, sees_all_gpus=sees_all_gpus).keys()
    environment = {
        **ours,
        **{name: value for name, value in function.items() if name not in replaced},
        **spec.environment,
        LISTEN_PORT: str(port),
    }
    if LIBRARIES in spec.environment:
        parts = (spec.environment[LIBRARIES], function.get(LIBRARIES, inherited_libraries))
        environment[LIBRARIES] = ":".join(part for part in parts if part)
    if names := sorted(name for name in function if name != LIBRARIES and environment[name] != function[name]):
        log.warning("runtime.variables_replaced", uid=spec.instance.uid, names=",".join(names))
    return environment
