"""The variables an instance gets from us: one rule for processes of the host and for containers."""

from __future__ import annotations

from agent.adapters.kernel.cgroup_freezer import INSTANCE_VARIABLE
from agent.ports import StartSpec

LIBRARIES = "LD_LIBRARY_PATH"


def instance_environment(
    spec: StartSpec, *, port: int, state_uuid: str, visible_devices: str, inherited_libraries: str = ""
) -> dict[str, str]:
    """The function's variables, then ours on top.

    `FC_CUSTOM_LISTEN_PORT` and `PORT` say where to listen. CUDA_VISIBLE_DEVICES names the granted GPUs, none for a
    function without; NVIDIA_VISIBLE_DEVICES is `visible_devices`. A function can't change either, the attachment
    (`spec.environment`) can. Our LD_LIBRARY_PATH is put before the function's, or else before `inherited_libraries`
    (the image's own), not in their place (facts/emulated-driver.md, pitfall 15).
    """
    function = dict(spec.instance.function.environment)
    environment = {
        **function,
        "CUDA_VISIBLE_DEVICES": ",".join(spec.gpu_uuids),
        "NVIDIA_VISIBLE_DEVICES": visible_devices,
        **spec.environment,
        "FC_CUSTOM_LISTEN_PORT": str(port),
        "PORT": str(port),
        INSTANCE_VARIABLE: f"{state_uuid}/{spec.instance.uid}",
    }
    if LIBRARIES in spec.environment:
        parts = (spec.environment[LIBRARIES], function.get(LIBRARIES, inherited_libraries))
        environment[LIBRARIES] = ":".join(part for part in parts if part)
    return environment
