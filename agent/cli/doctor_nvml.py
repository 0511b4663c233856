"""`python -m agent.cli.doctor_nvml`: what NVML says, as one JSON object on stdout.

A process of its own: a sick driver hangs whoever asks it, and `hibernode doctor` must not hang with it.
Keys: driver_version ("" = no driver), gpus [{uuid, index, model, memory_bytes, persistence, mig}],
problem (a sentence, "" = none).
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from typing import Any

import pynvml


def survey() -> dict[str, Any]:
    """The facts. NVML errors end up in `problem`."""
    found: dict[str, Any] = {"driver_version": "", "gpus": [], "problem": ""}
    try:
        pynvml.nvmlInit()
        found["driver_version"] = pynvml.nvmlSystemGetDriverVersion()
        for index in range(pynvml.nvmlDeviceGetCount()):
            found["gpus"].append(_device(index))
    except pynvml.NVMLError as error:
        found["problem"] = str(error)
    return found


def _device(index: int) -> dict[str, Any]:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    persistence, mig = True, False
    with suppress(pynvml.NVMLError):
        persistence = pynvml.nvmlDeviceGetPersistenceMode(handle) == pynvml.NVML_FEATURE_ENABLED
    with suppress(pynvml.NVMLError):
        mig = pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE
    return {
        "uuid": pynvml.nvmlDeviceGetUUID(handle),
        "index": index,
        "model": pynvml.nvmlDeviceGetName(handle),
        "memory_bytes": pynvml.nvmlDeviceGetMemoryInfo(handle).total,
        "persistence": persistence,
        "mig": mig,
    }


if __name__ == "__main__":
    json.dump(survey(), sys.stdout)
