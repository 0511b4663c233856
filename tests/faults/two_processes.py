"""The example `echo` with a second CUDA process: from the start ($SECOND=1), or once the file $SECOND exists."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

from agent.examples.echo.__main__ import main

TARGET = Path(__file__).parents[1] / "fakes" / "cuda_target.py"


def second() -> None:
    """Start the second process and wait until it has filled its memory."""
    process = subprocess.Popen([sys.executable, str(TARGET)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.readline()
    process.stdin.write("fill 1048576 7\n")
    process.stdin.flush()
    process.stdout.readline()


def when_told(path: Path) -> None:
    pause = threading.Event()
    while not path.exists():
        pause.wait(0.005)
    second()


if __name__ == "__main__":
    told = os.environ["SECOND"]
    if told == "1":
        second()
    else:
        threading.Thread(target=when_told, args=(Path(told),), daemon=True).start()
    main()
