"""A program that uses libcuda like an application or a checkpoint tool, controlled by JSON lines on stdin.

Started by harness.CudaProgram. Imports nothing of the project, so that it sees only what any program sees.
"""

import ctypes
import hashlib
import json
import os
import random
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

Answer = dict[str, Any]

LOCK_ARGS = ctypes.c_uint * 16


class Cuda:
    """One method per command; each returns a dict. `rc` is always a CUresult."""

    def __init__(self) -> None:
        self.cuda = ctypes.CDLL("libcuda.so.1")
        self.cuda.cuMemAlloc_v2.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.cuda.cuMemFree_v2.argtypes = [ctypes.c_uint64]
        self.cuda.cuMemcpyHtoD_v2.argtypes = [ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t]
        self.cuda.cuMemcpyDtoH_v2.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t]
        self.cuda.cuMemcpyDtoD_v2.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t]
        self.cuda.cuMemsetD8_v2.argtypes = [ctypes.c_uint64, ctypes.c_ubyte, ctypes.c_size_t]
        self.cuda.cuMemsetD32_v2.argtypes = [ctypes.c_uint64, ctypes.c_uint, ctypes.c_size_t]
        self.host_function: object = None

    def init(self) -> Answer:
        return {"rc": self.cuda.cuInit(0)}

    def context(self, device: int = 0) -> Answer:
        context = ctypes.c_void_p()
        rc = self.cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
        return {"rc": rc or self.cuda.cuCtxSetCurrent(context)}

    def release_context(self, device: int = 0) -> Answer:
        return {"rc": self.cuda.cuDevicePrimaryCtxRelease_v2(device)}

    def alloc(self, size: int) -> Answer:
        address = ctypes.c_uint64()
        rc = self.cuda.cuMemAlloc_v2(ctypes.byref(address), size)
        return {"rc": rc, "address": address.value}

    def free(self, address: int) -> Answer:
        return {"rc": self.cuda.cuMemFree_v2(address)}

    def write(self, address: int, size: int, seed: int) -> Answer:
        data = random.Random(seed).randbytes(size)
        return {"rc": self.cuda.cuMemcpyHtoD_v2(address, data, size), "digest": hashlib.sha256(data).hexdigest()}

    def fill(self, address: int, size: int, value: int, width: int = 1) -> Answer:
        memset = self.cuda.cuMemsetD8_v2 if width == 1 else self.cuda.cuMemsetD32_v2
        return {"rc": memset(address, value, size // width)}

    def copy(self, to: int, source: int, size: int) -> Answer:
        return {"rc": self.cuda.cuMemcpyDtoD_v2(to, source, size)}

    def read(self, address: int, size: int, raw: bool = False) -> Answer:
        buffer = ctypes.create_string_buffer(size)
        rc = self.cuda.cuMemcpyDtoH_v2(buffer, address, size)
        answer = {"rc": rc, "digest": hashlib.sha256(buffer.raw).hexdigest(), "zero": not any(buffer.raw)}
        return {**answer, "hex": buffer.raw.hex()} if raw else answer

    def pinned(self, size: int) -> Answer:
        """Allocate page-locked host memory."""
        address = ctypes.c_void_p()
        rc = self.cuda.cuMemAllocHost_v2(ctypes.byref(address), ctypes.c_size_t(size))
        return {"rc": rc, "address": address.value}

    def free_pinned(self, address: int) -> Answer:
        return {"rc": self.cuda.cuMemFreeHost(ctypes.c_void_p(address))}

    def round_trip(self, address: int, pinned: int, size: int, seed: int) -> Answer:
        """Copy through pinned memory to the device and back, in a stream."""
        stream = ctypes.c_void_p()
        rc = self.cuda.cuStreamCreate(ctypes.byref(stream), 1)
        data = random.Random(seed).randbytes(size)
        ctypes.memmove(pinned, data, size)
        device, host, length = ctypes.c_uint64(address), ctypes.c_void_p(pinned), ctypes.c_size_t(size)
        rc = rc or self.cuda.cuMemcpyHtoDAsync_v2(device, host, length, stream)
        rc = rc or self.cuda.cuStreamSynchronize(stream)
        ctypes.memset(pinned, 0, size)
        rc = rc or self.cuda.cuMemcpyDtoHAsync_v2(host, device, length, stream)
        rc = rc or self.cuda.cuStreamSynchronize(stream)
        same = ctypes.string_at(pinned, size) == data
        return {"rc": rc or self.cuda.cuStreamDestroy_v2(stream), "same": same}

    def keep_busy(self, address: int, size: int, seconds: float) -> Answer:
        """Fill repeatedly for that time."""
        end, rc = time.monotonic() + seconds, 0
        while not rc and time.monotonic() < end:
            rc = self.cuda.cuMemsetD8_v2(address, 5, size)
        return {"rc": rc}

    def own_device(self) -> Answer:
        """The properties of the program's GPU."""
        device, uuid = ctypes.c_int(-1), ctypes.create_string_buffer(16)
        rc = self.cuda.cuCtxGetDevice(ctypes.byref(device)) or self.cuda.cuDeviceGetUuid_v2(uuid, device)
        values = {}
        for name, attribute in {"multiprocessors": 16, "compute_mode": 20, "unified": 41, "major": 75}.items():
            value = ctypes.c_int(-1)
            rc = rc or self.cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            values[name] = value.value
        return {"rc": rc, "device": device.value, "uuid": uuid.raw.hex(), **values}

    def exports(self, symbol: str) -> Answer:
        return {"rc": 0, "found": hasattr(self.cuda, symbol)}

    def export_table(self) -> Answer:
        """Request an export table that does not exist."""
        table = ctypes.c_void_p(1)
        return {"rc": self.cuda.cuGetExportTable(ctypes.byref(table), b"x" * 16), "table": table.value}

    def synchronize(self) -> Answer:
        return {"rc": self.cuda.cuCtxSynchronize()}

    def memory(self) -> Answer:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        rc = self.cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        return {"rc": rc, "free": free.value, "total": total.value}

    def devices(self) -> Answer:
        count = ctypes.c_int()
        rc = self.cuda.cuDeviceGetCount(ctypes.byref(count))
        found = []
        for index in range(count.value):
            uuid, name = ctypes.create_string_buffer(16), ctypes.create_string_buffer(100)
            self.cuda.cuDeviceGetUuid_v2(uuid, index)
            self.cuda.cuDeviceGetName(name, 100, index)
            found.append({"uuid": uuid.raw.hex(), "name": name.value.decode()})
        return {"rc": rc, "devices": found}

    def resident_bytes(self) -> Answer:
        with open("/proc/self/statm") as statm:
            words = [int(word) for word in statm.read().split()]
        return {"rc": 0, "private": (words[1] - words[2]) * 4096, "shared": words[2] * 4096}

    def begin_work(self) -> Answer:
        """Start work in a stream that runs until end_work, and for which a lock must wait."""
        started, self.end = threading.Event(), threading.Event()

        def work(_data: object) -> None:
            started.set()
            self.end.wait(30)

        self.host_function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(work)

        context = ctypes.c_void_p()
        self.cuda.cuCtxGetCurrent(ctypes.byref(context))

        def run() -> None:
            self.cuda.cuCtxSetCurrent(context)
            self.cuda.cuLaunchHostFunc(None, self.host_function, None)

        self.worker = threading.Thread(target=run, daemon=True)
        self.worker.start()
        return {"rc": 0 if started.wait(10) else 999}

    def end_work(self) -> Answer:
        self.end.set()
        self.worker.join(10)
        return {"rc": 0}

    def fork(self) -> Answer:
        """What CUDA answers in a child forked after cuInit, and the sockets and device mappings that it kept."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            with open("/proc/self/maps") as maps:
                mapped = sum("emulated" in line for line in maps)
            links = [
                os.readlink(f"/proc/self/fd/{fd}")
                for fd in os.listdir("/proc/self/fd")
                if fd != "3" and os.path.lexists(f"/proc/self/fd/{fd}")
            ]
            said = {
                "rc": self.cuda.cuCtxSynchronize(),
                "init": self.cuda.cuInit(0),
                "sockets": sum(link.startswith("socket:") for link in links),
                "memfds": sum("memfd:" in link for link in links),
                "mapped": mapped,
            }
            os.write(writer, json.dumps(said).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as answers:
            answer: Answer = json.loads(answers.read())
        os.waitpid(child, 0)
        return answer

    def fork_sleeper(self) -> Answer:
        """Fork a child that outlives its parent and uses no CUDA."""
        child = os.fork()
        if child == 0:
            os.setsid()
            while True:
                threading.Event().wait(60)
        return {"rc": 0, "pid": child}

    def become(self, uid: int) -> Answer:
        os.setuid(uid)
        return {"rc": 0}

    def exec_sleeper(self) -> None:
        """Exec another program under the same pid."""
        say({"rc": 0})
        os.execv(sys.executable, [sys.executable, __file__])

    # ---- the checkpoint API ---------------------------------------------------------------------------------------

    def state(self, pid: int) -> Answer:
        value = ctypes.c_int(-1)
        rc = self.cuda.cuCheckpointProcessGetState(pid, ctypes.byref(value))
        return {"rc": rc, "state": value.value}

    def restore_thread(self, pid: int) -> Answer:
        value = ctypes.c_int(-1)
        rc = self.cuda.cuCheckpointProcessGetRestoreThreadId(pid, ctypes.byref(value))
        return {"rc": rc, "tid": value.value}

    def lock(self, pid: int, timeout_ms: int = 0) -> Answer:
        return {"rc": self.cuda.cuCheckpointProcessLock(pid, LOCK_ARGS(timeout_ms))}

    def checkpoint(self, pid: int) -> Answer:
        return {"rc": self.cuda.cuCheckpointProcessCheckpoint(pid, None)}

    def restore(self, pid: int, pairs: Sequence[Sequence[str]] = ()) -> Answer:
        raw = b"".join(bytes.fromhex(old) + bytes.fromhex(new) for old, new in pairs)
        buffer = ctypes.create_string_buffer(raw, max(1, len(raw)))
        args = (ctypes.c_uint64 * 8)(ctypes.addressof(buffer) if pairs else 0, len(pairs))
        return {"rc": self.cuda.cuCheckpointProcessRestore(pid, args)}

    def unlock(self, pid: int) -> Answer:
        return {"rc": self.cuda.cuCheckpointProcessUnlock(pid, None)}

    def get_proc_address(self, symbol: str, version: int) -> Answer:
        function, status = ctypes.c_void_p(1), ctypes.c_int(-1)
        rc = self.cuda.cuGetProcAddress_v2(
            symbol.encode(), ctypes.byref(function), version, ctypes.c_uint64(0), ctypes.byref(status)
        )
        return {"rc": rc, "found": function.value is not None, "status": status.value}

    def driver_version(self) -> Answer:
        value = ctypes.c_int()
        return {"rc": self.cuda.cuDriverGetVersion(ctypes.byref(value)), "version": value.value}


def say(answer: Answer) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main() -> None:
    cuda = Cuda()
    say({"pid": os.getpid()})
    for line in sys.stdin:
        request = json.loads(line)
        say(getattr(cuda, request.pop("command"))(**request))


if __name__ == "__main__":
    main()
