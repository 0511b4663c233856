"""The libraries' interface: cuda.h's layout, cuGetProcAddress, error names, protocol.h."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from agent.emulated import protocol
from agent.emulated.build import SOURCES
from tests.adapters.emulated.conftest import StartDriver
from tests.adapters.emulated.harness import RunningDriver

LAYOUT = """
#include <cuda.h>
#include "cuda_abi.h"
#define SAME_SIZE(theirs, ours) _Static_assert(sizeof(theirs) == sizeof(ours), #theirs)
#define SAME_PLACE(theirs, a, ours, b) _Static_assert(offsetof(theirs, a) == offsetof(ours, b), #theirs "." #a)
SAME_SIZE(CUcheckpointLockArgs, struct emu_lock_args);
SAME_SIZE(CUcheckpointCheckpointArgs, struct emu_checkpoint_args);
SAME_SIZE(CUcheckpointRestoreArgs, struct emu_restore_args);
SAME_SIZE(CUcheckpointUnlockArgs, struct emu_unlock_args);
SAME_SIZE(CUcheckpointGpuPair, struct emu_gpu_pair);
SAME_SIZE(CUuuid, struct emu_uuid);
SAME_SIZE(CUdeviceptr, emu_devptr);
SAME_SIZE(CUdevice, emu_devno);
SAME_SIZE(CUresult, emu_result);
SAME_PLACE(CUcheckpointLockArgs, timeoutMs, struct emu_lock_args, timeout_ms);
SAME_PLACE(CUcheckpointRestoreArgs, gpuPairs, struct emu_restore_args, pairs);
SAME_PLACE(CUcheckpointRestoreArgs, gpuPairsCount, struct emu_restore_args, count);
SAME_PLACE(CUcheckpointRestoreArgs, reserved, struct emu_restore_args, reserved);
SAME_PLACE(CUcheckpointRestoreArgs, reserved1, struct emu_restore_args, reserved1);
SAME_PLACE(CUcheckpointGpuPair, newUuid, struct emu_gpu_pair, new_uuid);
"""
STATES = "".join(
    f'_Static_assert((int)CU_PROCESS_STATE_{name} == (int)EMU_{name}, "{name}");\n'
    for name in ("RUNNING", "LOCKED", "CHECKPOINTED", "FAILED")
)
RESULTS = "".join(
    f'_Static_assert((int)CUDA_ERROR_{name} == (int)EMU_{name}, "{name}");\n'
    for name in (
        *("INVALID_VALUE", "OUT_OF_MEMORY", "NOT_INITIALIZED", "NO_DEVICE", "INVALID_DEVICE", "INVALID_CONTEXT"),
        "DEVICE_UNAVAILABLE",
        *("OPERATING_SYSTEM", "INVALID_HANDLE", "ILLEGAL_STATE", "NOT_FOUND", "NOT_READY", "CONTEXT_IS_DESTROYED"),
        *("NOT_PERMITTED", "NOT_SUPPORTED", "UNKNOWN"),
    )
)


def cuda_headers() -> Path | None:
    """The folder of cuda.h: next to nvcc, or below /usr/local."""
    nvcc = shutil.which("nvcc")
    folders = [Path(nvcc).resolve().parents[1] / "include"] if nvcc else []
    folders += sorted(Path("/usr/local").glob("cuda*/include"), reverse=True)
    return next((folder for folder in folders if (folder / "cuda.h").exists()), None)


def test_structs_and_codes_match_cuda_h(build_cache: Path, tmp_path: Path) -> None:
    headers = cuda_headers()
    if headers is None:
        pytest.skip("cuda.h is not installed here (CUDA toolkit 13.0 or later)")
    if "CUcheckpointGpuPair" not in (headers / "cuda.h").read_text():
        pytest.skip(f"the cuda.h in {headers} is older than CUDA 13.0")
    source = tmp_path / "layout.c"
    source.write_text(LAYOUT + STATES + RESULTS)
    done = subprocess.run(
        ["cc", "-std=gnu11", "-fsyntax-only", "-I", str(headers), "-I", str(SOURCES), str(source)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_protocol_h_matches_protocol_py() -> None:
    header = (SOURCES / "protocol.h").read_text()
    operations = dict(re.findall(r"^\s+EMU_(\w+) = (\d+)", header, re.MULTILINE))
    assert {name: int(value) for name, value in operations.items()} == {op.name: op.value for op in protocol.MessageOp}
    for name in (
        *("PROTOCOL", "MAX_DEVICES", "MAX_ALLOCATIONS", "MAX_PAYLOAD"),
        *("ACTIVITY_BUCKETS", "ACTIVITY_NS"),
    ):
        assert f"#define EMU_{name} {getattr(protocol, name)}\n" in header


def test_struct_sizes_match_protocol_py(build_cache: Path, tmp_path: Path) -> None:
    source = tmp_path / "sizes.c"
    checks = {
        "emu_msg": protocol.HEADER_BYTES,
        "emu_device": protocol.DEVICE.size,
        "emu_device_status": protocol.DEVICE_STATUS.size,
        "emu_gpu_process": protocol.GPU_PROCESS.size,
    }
    asserts = [f'_Static_assert(sizeof(struct {name}) == {size}, "{name}");' for name, size in checks.items()]
    source.write_text('#include "protocol.h"\n' + "\n".join(asserts))
    subprocess.run(["cc", "-fsyntax-only", "-I", str(SOURCES), str(source)], timeout=60, check=True)


def test_get_proc_address_behaves_like_the_real_driver(driver: RunningDriver) -> None:
    program = driver.program()
    found = {"rc": 0, "found": True, "status": 0}
    unknown = {"rc": 0, "found": False, "status": 1}
    assert program.ask("get_proc_address", symbol="cuMemAlloc", version=12000) == found
    assert program.ask("get_proc_address", symbol="cuMemAlloc_v2", version=12000) == unknown
    assert program.ask("get_proc_address", symbol="cuNoSuchThing", version=12000) == unknown
    assert program.ask("get_proc_address", symbol="cuCheckpointProcessLock", version=12080) == found
    assert program.ask("get_proc_address", symbol="cuCheckpointProcessLock", version=13000) == found
    assert program.ask("get_proc_address", symbol="cuMemAlloc", version=99000) == found
    too_old = program.ask("get_proc_address", symbol="cuCheckpointProcessLock", version=12000)
    assert too_old == {"rc": 0, "found": False, "status": 2}


@pytest.mark.parametrize(("profile", "rc", "status"), [("555", 0, 1), ("580", 1, -1)])
def test_a_newer_checkpoint_function_than_the_drivers(
    start_driver: StartDriver, profile: str, rc: int, status: int
) -> None:
    """Old drivers do not know the name; newer ones know it, and refuse the version."""
    program = start_driver("--profile", profile).program()
    answer = program.ask("get_proc_address", symbol="cuCheckpointProcessCheckpoint", version=13040)
    assert answer == {"rc": rc, "found": False, "status": status}


def test_versions_by_profile(start_driver: StartDriver) -> None:
    for profile, version in (("570", 12080), ("580", 13000)):
        assert start_driver("--profile", profile).program().must("driver_version")["version"] == version


def test_exported_names(driver: RunningDriver) -> None:
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", str(driver.directory / "lib" / "libcuda.so.1")],
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    ).stdout
    names = {line.split()[-1] for line in listed.splitlines()}
    assert all(name.startswith("cu") for name in names), names
    assert {"cuMemAlloc", "cuMemAlloc_v2", "cuGetProcAddress", "cuGetProcAddress_v2", "cuDeviceGetUuid_v2"} <= names
