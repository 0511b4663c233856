"""The environment variables that the agent gives an instance: the same for host processes and containers."""

from __future__ import annotations

from agent.adapters.kernel.cgroup_freezer import INSTANCE_VARIABLE
from agent.core.function_rules import PORT_VARIABLE
from agent.ports import StartSpec

LIBRARIES = "LD_LIBRARY_PATH"


def instance_environment(
    spec: StartSpec, *, port: int, state_uuid: str, visible_devices: str, inherited_libraries: str = ""
) -> dict[str, str]:
    """The function's variables, overlaid by ours.

    `FC_CUSTOM_LISTEN_PORT` and `PORT` are the port to listen on. CUDA_VISIBLE_DEVICES names the granted GPUs (none for
    a function without), NVIDIA_VISIBLE_DEVICES is `visible_devices`; `spec.environment` can change both, a function
    can't. Our LD_LIBRARY_PATH precedes the function's, or else `inherited_libraries` (the image's own), and does not
    replace it (agent/docs/facts/emulated-driver.md, pitfall 15).
    """
    function = dict(spec.instance.function.environment)
    environment = {
        **function,
        "CUDA_VISIBLE_DEVICES": ",".join(spec.gpu_uuids),
        "NVIDIA_VISIBLE_DEVICES": visible_devices,
        **spec.environment,
        PORT_VARIABLE: str(port),
        "PORT": str(port),
        INSTANCE_VARIABLE: f"{state_uuid}/{spec.instance.uid}",
    }
    if LIBRARIES in spec.environment:
        parts = (spec.environment[LIBRARIES], function.get(LIBRARIES, inherited_libraries))
        environment[LIBRARIES] = ":".join(part for part in parts if part)
    return environment
