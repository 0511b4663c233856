"""A program that queries NVML with unmodified nvidia-ml-py, controlled by JSON lines on stdin.

Started by harness.CudaProgram. Imports nothing of the project.
"""

import ctypes
import json
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any

import pynvml as nvml

Answer = dict[str, Any]


def plain(value: Any) -> Any:
    """A JSON value; a structure becomes the list of its fields."""
    if isinstance(value, ctypes.Structure):
        return [plain(getattr(value, field[0])) for field in value._fields_]
    if isinstance(value, nvml.nvmlFriendlyObject):
        return list(vars(value).values())
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def address_of(handle: Any) -> int | None:
    return ctypes.cast(handle, ctypes.c_void_p).value


class Nvml:
    """One method per command; `rc` is always an nvmlReturn_t."""

    def __init__(self) -> None:
        nvml.nvmlInit()
        self.handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        # Query them in time: a lost GPU does not return its uuid.
        self.uuids = {address_of(handle): nvml.nvmlDeviceGetUUID(handle) for handle in self.handles}
        self.sets: list[Any] = []
        self.thread: threading.Thread | None = None
        self.later: Answer = {}

    def ask(self, name: str, gpu: int = 0, arguments: Sequence[Any] = ()) -> Answer:
        """Call a device function by its name without `nvmlDevice`."""
        try:
            value = getattr(nvml, f"nvmlDevice{name}")(self.handles[gpu], *arguments)
        except nvml.NVMLError as error:
            return {"rc": error.value, "text": str(error)}
        return {"rc": 0, "value": plain(value)}

    def handle(self, gpu: int, uuid: str = "") -> Answer:
        """Look the device up again."""
        try:
            nvml.nvmlDeviceGetHandleByUUID(uuid) if uuid else nvml.nvmlDeviceGetHandleByIndex(gpu)
        except nvml.NVMLError as error:
            return {"rc": error.value}
        return {"rc": 0}

    def begin(self, **asked: Any) -> Answer:
        """Run `ask` in a separate thread, which may hang."""

        def work() -> None:
            self.later = self.ask(**asked)

        self.later = {}
        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()
        return {"rc": 0}

    def end(self, timeout_s: float) -> Answer:
        """The result of `begin`; no `rc` if it hangs."""
        assert self.thread is not None
        self.thread.join(timeout_s)
        return self.later

    def watch(self, gpus: Sequence[int]) -> Answer:
        """Create an event set for these devices; `set` is its number."""
        events = nvml.nvmlEventSetCreate()
        self.sets.append(events)
        try:
            for gpu in gpus:
                nvml.nvmlDeviceRegisterEvents(self.handles[gpu], nvml.nvmlEventTypeXidCriticalError, events)
        except nvml.NVMLError as error:
            return {"rc": error.value}
        return {"rc": 0, "set": len(self.sets) - 1}

    def wait(self, number: int, timeout_ms: int) -> Answer:
        try:
            event = nvml.nvmlEventSetWait(self.sets[number], timeout_ms)
        except nvml.NVMLError as error:
            return {"rc": error.value}
        return {
            "rc": 0,
            "gpu": self.uuids[address_of(event.device)],
            "type": event.eventType,
            "data": event.eventData,
        }


def say(answer: Answer) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main() -> None:
    program = Nvml()
    say({"pid": os.getpid()})
    for line in sys.stdin:
        request = json.loads(line)
        say(getattr(program, request.pop("command"))(**request))


if __name__ == "__main__":
    main()
