"""Calls the driver for processes that may die of it: a lock can SIGSEGV its target (NVIDIA/cuda-checkpoint issue 58).

The driver then may or may not answer. The target's pidfd shows its death, and the caller is released after a short
grace instead of the operation's long deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from agent.adapters.cuda.processes import CudaProcess
from agent.ports import Checkpointer, CudaCall, CudaFault, CudaReply

DEATH_GRACE_S = 2.0


async def run_watching(
    checkpointer: Checkpointer,
    processes: Sequence[CudaProcess],
    calls: Sequence[CudaCall],
    deadline_s: float,
    gpu_uuids: Sequence[str],
    grace_s: float = DEATH_GRACE_S,
) -> CudaReply:
    """`Checkpointer.run`; LOST with CUDA_PROCESS_DIED if a process ended and no answer came within `grace_s` (the
    worker stays busy until `deadline_s`)."""
    loop = asyncio.get_running_loop()
    bound = asyncio.timeout(None)

    def died(process: CudaProcess) -> None:
        loop.remove_reader(process.pidfd)
        bound.reschedule(loop.time() + grace_s)

    for process in processes:
        loop.add_reader(process.pidfd, died, process)
    try:
        async with bound:
            return await checkpointer.run(calls, deadline_s, gpu_uuids)
    except TimeoutError:
        return CudaReply((), CudaFault.LOST, "CUDA_PROCESS_DIED", "a process ended during a driver call")
    finally:
        for process in processes:
            loop.remove_reader(process.pidfd)
