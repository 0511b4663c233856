"""Checks this host as an agent would: `python -m agent.daemons.host_check [--config FILE]`.

Prints one JSON object as the last line of stdout, with `checks` [{name, level, reason, fix}] and `gpu_memory_bytes`
(sum over the GPUs). Runs the agent's own start-up code, so `hibernode doctor` and the agent agree; as a separate
process, because a broken driver can hang its callers. Changes nothing.
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
from agent.adapters.engine.survey import survey_engine
from agent.adapters.nvml.gpus import NvmlGpus
from agent.adapters.nvml.host_facts import host_facts, survey_gpus
from agent.config import load
from agent.core.engine_capabilities import engine_lines
from agent.core.errors import ConfigError, HibernodeError
from agent.core.gpus.capabilities import Capabilities, find_capabilities, idle_mode_lines
from agent.core.snapshots import CapabilityLine
from agent.settings import AgentConfig, GpuSettings, RuntimeSettings

START_DEADLINE_S = 10.0
"""Deadline of the checkpointer. NVML calls have their own: 5 s each, and no more calls after one that hung."""


async def check_host(config: AgentConfig) -> dict[str, Any]:
    """Check the driver, then the engine. Starts a checkpointer as proof: driver versions do not show a missing
    libcuda."""
    survey = await survey_gpus(NvmlGpus())
    found = find_capabilities(host_facts(survey, config.gpu))
    unavailable = await _start_problem(found, config.gpu) if found.idle_mode else ""
    engine = await _engine_lines(config.runtime, config.gpu, [gpu.uuid for gpu in survey.gpus])
    return {
        "checks": [asdict(line) for line in (*found.lines, *idle_mode_lines(found, unavailable), *engine)],
        "gpu_memory_bytes": sum(gpu.memory_bytes for gpu in survey.gpus),
    }


async def _engine_lines(runtime: RuntimeSettings, gpu: GpuSettings, gpu_uuids: list[str]) -> Sequence[CapabilityLine]:
    api = open_engine_api(runtime)
    try:
        return engine_lines(await survey_engine(api, runtime, gpu, gpu_uuids))
    finally:
        await api.close()


async def _start_problem(found: Capabilities, settings: GpuSettings) -> str:
    """Why the checkpointer can't start; "" if it can."""
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
    """The agent's configuration, or the defaults without a file. An invalid file is a failed check."""
    if path is None:
        return AgentConfig(), []
    try:
        return load(path, AgentConfig), [CapabilityLine("config", "OK", str(path), "")]
    except ConfigError as error:
        fix = f"correct {path}; the checks below use the defaults"
        return AgentConfig(), [CapabilityLine("config", "FAIL", error.message, fix)]


def main() -> None:
    """Print the result and exit at once, without waiting for a call that hangs in the driver's library."""
    parser = argparse.ArgumentParser(prog="host_check", description="Check this host as an agent would.")
    parser.add_argument("--config", type=Path)
    settings, lines = _settings(parser.parse_args().config)
    log.configure("error", "console")
    document = asyncio.run(check_host(settings))
    document["checks"] = [*(asdict(line) for line in lines), *document["checks"]]
    sys.stdout.write(f"\n{json.dumps(document)}\n")  # on its own line: libraries may print without a newline
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
