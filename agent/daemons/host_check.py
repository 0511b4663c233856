"""`python -m agent.daemons.host_check [--config FILE]`: what an agent would find on this host, as one JSON object, the
last line of stdout.

The same code on the same configuration as the agent's start, so that `hibernode doctor` can't see another host than
the agent does; and a process of its own, since a sick driver hangs whoever asks it. It changes nothing. Keys: `checks`
[{name, level, reason, fix}], `gpu_memory_bytes` (sum over the GPUs).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agent import log
from agent.adapters.cuda.checkpointers import choose_checkpointer
from agent.adapters.engine.build import open_engine_api
from agent.adapters.engine.survey import look_at_engine
from agent.adapters.nvml.gpus import NvmlGpus
from agent.adapters.nvml.host_facts import host_facts, survey_gpus
from agent.config import load
from agent.core.engine_capabilities import engine_lines
from agent.core.errors import ConfigError, HibernodeError
from agent.core.gpus.capabilities import Capabilities, find_capabilities, idle_mode_lines
from agent.core.snapshots import CapabilityLine
from agent.settings import AgentConfig, GpuSettings, RuntimeSettings

START_DEADLINE_S = 10.0
"""For the checkpointer. NVML has its own: 5 s a call, and none after one that did not come back."""


async def survey(config: AgentConfig) -> dict[str, Any]:
    """The facts, the verdict on them, and a checkpointer started for proof: versions do not show a missing libcuda.
    Then the container engine."""
    sight = await survey_gpus(NvmlGpus())
    found = find_capabilities(host_facts(sight, config.gpu))
    unavailable = await _try(found, config.gpu) if found.idle_mode else ""
    engine = await _engine_lines(config.runtime, config.gpu, [gpu.uuid for gpu in sight.gpus])
    return {
        "checks": [asdict(line) for line in (*found.lines, *idle_mode_lines(found, unavailable), *engine)],
        "gpu_memory_bytes": sum(gpu.memory_bytes for gpu in sight.gpus),
    }


async def _engine_lines(runtime: RuntimeSettings, gpu: GpuSettings, gpu_uuids: list[str]) -> Sequence[CapabilityLine]:
    api = open_engine_api(runtime)
    try:
        return engine_lines(await look_at_engine(api, runtime, gpu, gpu_uuids))
    finally:
        await api.close()


async def _try(found: Capabilities, settings: GpuSettings) -> str:
    """Why the checkpointer can't be started; "" if it can."""
    checkpointer = choose_checkpointer(found, settings)
    try:
        async with asyncio.timeout(START_DEADLINE_S):
            await checkpointer.start()
            await checkpointer.close()
    except TimeoutError:
        return f"the driver's checkpoint functions can't be reached within {START_DEADLINE_S:g} s"
    except HibernodeError as error:
        return error.message
    return ""


def _settings(path: Path | None) -> tuple[AgentConfig, list[CapabilityLine]]:
    """The agent's, or the defaults where there is no file; a file that is wrong is a check that failed."""
    if path is None:
        return AgentConfig(), []
    try:
        return load(path, AgentConfig), [CapabilityLine("config", "OK", str(path), "")]
    except ConfigError as error:
        fix = f"correct {path}; the checks below are made with the defaults"
        return AgentConfig(), [CapabilityLine("config", "FAIL", error.message, fix)]


def main() -> None:
    """Prints, and ends at once: a call that hangs in the driver's library is not waited for."""
    parser = argparse.ArgumentParser(prog="host_check", description="What an agent would find on this host.")
    parser.add_argument("--config", type=Path)
    settings, lines = _settings(parser.parse_args().config)
    log.configure("error", "console")
    document = asyncio.run(survey(settings))
    document["checks"] = [*(asdict(line) for line in lines), *document["checks"]]
    sys.stdout.write(f"\n{json.dumps(document)}\n")  # a line of its own: libraries may have said something before
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
