"""The CUDA program that `hibernode doctor --selftest` freezes and wakes. Stand-alone: imports nothing of the agent, and
loads only `libcuda.so.1` of CUDA.

`target_process.py` starts it as `python -I -S target.py <socket fd> <parent pid> <cgroup or "">`, on the GPU of
CUDA_VISIBLE_DEVICES. The socket is SOCK_SEQPACKET with one JSON message each way: {"do": ...} -> {...}, or {"error":
text, "code": CUresult}. Verbs:

    allocate {"bytes"}          -> {"allocations": n, "first_address": a}
    fill     {"round"}          -> {}                   writes every byte with the `Pattern` of that round
    verify   {"round"}          -> {"wrong_pages": n, "first": text}     n 0 = every byte is as written
    copy     {"chunk"}          -> {"to_host_us", "to_device_us", "chunk"} or {"unavailable": why}: copies all memory
                                   through a pinned buffer of at most `chunk` bytes and back, leaving it unchanged
    quit                        -> frees the memory and ends the program
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from typing import Any

PR_SET_PDEATHSIG = 1
MAX_MESSAGE_BYTES = 1 << 16
PAGE = 4096
BLOCK = 4 << 20
STAMPS = struct.Struct(f"<{BLOCK // PAGE}Q")
ODD = 2654435761  # any odd number: its multiples differ modulo BLOCK
SMALL = (1, 13, 4099, 65_537, 100_003)  # bytes: real programs mix small and large allocations
LARGE_UNIT = 2 << 20  # the driver maps memory in 2 MiB units: all large allocations but one are multiples of it
NOT_FOUND = 500


class CudaError(Exception):
    """A failed call; `code` is its CUresult (0 if there was no call)."""

    def __init__(self, text: str, code: int = 0) -> None:
        super().__init__(text)
        self.code = code


class Pattern:
    """The expected bytes of device memory. Each 4 MiB block is one random block, rotated by an amount that differs for
    every block and round; each 4 KiB page starts with its number and the round. Swapped pages, swapped blocks and data
    of an earlier round all show. Computed anew for every comparison, so no copy is needed."""

    def __init__(self) -> None:
        once = hashlib.shake_128(b"hibernode selftest").digest(BLOCK)
        self._twice = memoryview(once + once)
        self.bytes = bytearray(BLOCK)
        self.address = ctypes.addressof((ctypes.c_char * BLOCK).from_buffer(self.bytes))

    def fill(self, round_: int, block: int) -> None:
        """Write block `block` of round `round_` to `address`."""
        turn = (block + round_ * 997) * ODD % BLOCK
        self.bytes[:] = self._twice[turn : turn + BLOCK]
        first = (round_ << 48) + block * (BLOCK // PAGE)
        stamps = STAMPS.pack(*range(first, first + BLOCK // PAGE))
        for index in range(8):
            self.bytes[index::PAGE] = stamps[index::8]


class CudaDevice:
    """A context on the first visible GPU, with the memory under test."""

    def __init__(self) -> None:
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise CudaError(f"libcuda.so.1 can't be loaded ({error})") from error
        self._call("cuInit", ctypes.c_uint(0))
        device, context = ctypes.c_int(0), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(0))
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        self._compare = ctypes.CDLL(None).memcmp
        self._compare.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
        self._pattern = Pattern()
        self._allocations: list[tuple[int, int]] = []  # address, bytes
        self._read = bytearray(BLOCK)
        self._read_address = ctypes.addressof((ctypes.c_char * BLOCK).from_buffer(self._read))

    def allocate(self, total: int) -> dict[str, Any]:
        for size in sizes(total):
            address = ctypes.c_uint64(0)
            self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
            self._allocations.append((address.value, size))
        return {"allocations": len(self._allocations), "first_address": self._allocations[0][0]}

    def fill(self, round_: int) -> dict[str, Any]:
        for index, address, size, _offset in self._blocks():
            self._pattern.fill(round_, index)
            self._to_device(address, self._pattern.address, size)
        return {}

    def verify(self, round_: int) -> dict[str, Any]:
        """Read back at the addresses of `allocate`."""
        wrong, first = 0, ""
        for index, address, size, offset in self._blocks():
            self._pattern.fill(round_, index)
            self._to_host(self._read_address, address, size)
            if self._compare(self._read_address, self._pattern.address, size) == 0:
                continue
            pages = [
                page
                for page in range(0, size, PAGE)
                if self._read[page : min(page + PAGE, size)] != self._pattern.bytes[page : min(page + PAGE, size)]
            ]
            if not first:
                at = next(at for at in range(pages[0], size) if self._read[at] != self._pattern.bytes[at])
                first = (
                    f"byte {offset + at} of the allocation at {address - offset:#x} is {self._read[at]:#04x} and was "
                    f"{self._pattern.bytes[at]:#04x}"
                )
            wrong += len(pages)
        return {"wrong_pages": wrong, "first": first}

    def copy(self, chunk: int) -> dict[str, Any]:
        buffer = ctypes.c_void_p()
        chunk = min(chunk, max(size for _, size in self._allocations))
        try:
            self._call("cuMemHostAlloc", ctypes.byref(buffer), ctypes.c_size_t(chunk), ctypes.c_uint(0))
        except CudaError as error:
            return {"unavailable": str(error)}
        assert buffer.value is not None
        try:
            ctypes.memset(buffer.value, 0, chunk)  # keep the first touch of the buffer out of the timing
            to_host = to_device = 0
            for address, size in self._allocations:
                for offset in range(0, size, chunk):
                    length = min(chunk, size - offset)
                    begin = _now_ns()
                    self._to_host(buffer.value, address + offset, length)
                    middle = _now_ns()
                    self._to_device(address + offset, buffer.value, length)
                    to_host += middle - begin
                    to_device += _now_ns() - middle
        finally:
            self._call("cuMemFreeHost", buffer)
        return {"to_host_us": to_host // 1000, "to_device_us": to_device // 1000, "chunk": chunk}

    def close(self) -> None:
        """Free the memory before exit: a program that dies with driver work pending can hang its host
        (NVIDIA/cuda-checkpoint issue 53)."""
        for address, _size in self._allocations:
            self._call("cuMemFree_v2", ctypes.c_uint64(address))
        self._allocations.clear()

    def _blocks(self) -> Iterator[tuple[int, int, int, int]]:
        """Number, address, bytes and offset in its allocation, for every block."""
        index = 0
        for start, size in self._allocations:
            for offset in range(0, size, BLOCK):
                yield index, start + offset, min(BLOCK, size - offset), offset
                index += 1

    def _to_device(self, address: int, source: int, size: int) -> None:
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), ctypes.c_void_p(source), ctypes.c_size_t(size))

    def _to_host(self, target: int, address: int, size: int) -> None:
        self._call("cuMemcpyDtoH_v2", ctypes.c_void_p(target), ctypes.c_uint64(address), ctypes.c_size_t(size))

    def _call(self, name: str, *arguments: object) -> None:
        try:
            function = getattr(self._cuda, name)
        except AttributeError:
            raise CudaError(f"this driver has no {name}", NOT_FOUND) from None
        code = int(function(*arguments))
        if code != 0:
            raise CudaError(f"{name} answered CUDA error {code}{self._text(code)}", code)

    def _text(self, code: int) -> str:
        text = ctypes.c_char_p()
        try:
            self._cuda.cuGetErrorString(ctypes.c_int(code), ctypes.byref(text))
        except AttributeError:
            return ""
        return f" ({text.value.decode(errors='replace')})" if text.value else ""


def sizes(total: int) -> list[int]:
    """Split `total` bytes as a real program would: a few small allocations, then halves of the remainder."""
    remaining = total
    chunks = [size for size in SMALL if size < total // 16]
    remaining -= sum(chunks)
    while remaining > 8 * LARGE_UNIT and len(chunks) < 16:
        chunks.append(remaining // 2 // LARGE_UNIT * LARGE_UNIT)
        remaining -= chunks[-1]
    return [*chunks, remaining]


def answer(device: CudaDevice | None, request: dict[str, Any]) -> tuple[CudaDevice, dict[str, Any]]:
    """Run one verb. The first one calls the driver, so that its answer can carry the error."""
    device = device or CudaDevice()
    verb = request["do"]
    if verb == "allocate":
        return device, device.allocate(request["bytes"])
    if verb == "fill":
        return device, device.fill(request["round"])
    if verb == "verify":
        return device, device.verify(request["round"])
    if verb == "copy":
        return device, device.copy(request["chunk"])
    device.close()
    return device, {}


def serve(channel: socket.socket) -> int:
    """Answer until `quit` or until the parent closes the socket."""
    device = None
    while message := channel.recv(MAX_MESSAGE_BYTES):
        request = json.loads(message)
        try:
            device, done = answer(device, request)
        except CudaError as error:
            done = {"error": str(error), "code": error.code}
        channel.send(json.dumps(done).encode())
        if request["do"] == "quit":
            return 0
    return 0


def main(arguments: list[str]) -> int:
    """Die with the parent, even while frozen: SIGKILL reaches a frozen cgroup. Compares the parent after prctl, as it
    may have died before."""
    descriptor, parent, cgroup = int(arguments[0]), int(arguments[1]), arguments[2]
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        return 1
    if cgroup:  # join before the driver starts threads
        with open(os.path.join(cgroup, "cgroup.procs"), "w", encoding="ascii") as procs:
            procs.write("0")
    channel = socket.socket(fileno=descriptor)
    try:
        channel.send(b'{"hello": true}')
        return serve(channel)
    except (BrokenPipeError, ConnectionResetError):
        return 0


def _now_ns() -> int:
    return time.perf_counter_ns()  # noqa: TID251 - a process of its own, which times its own copies


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
