"""Import what the tests need, then run what `forks.py` asks for, each request in a fork of this process.

A request is a line of JSON on standard input; the answer, a line on standard output, is the exit status, or null if the
time was over. Before the processes are killed then, they add the stacks of their threads to their output.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import json
import os
import signal
import sys
import time
import traceback
from typing import Any

import ranks
import torch

MODULES = ("torch.distributed", "pacl_kernels", "pacl.cli", "open_clip", "timm", "PIL.Image", "pytest")


def threads() -> int:
    return len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 1


def child(request: dict[str, Any]) -> int:
    os.setpgid(0, 0)
    out = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # forks of this process have it too
    torch.set_num_threads(1)
    torch.cuda.is_available, torch.cuda.device_count = lambda: False, lambda: 0  # for tests of several CPU processes
    status: Any = 70
    try:
        if "count" in request:
            status = ranks.launch(request["count"], request["words"])
        else:
            ranks.run(request["words"])
            status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return int(status)


def serve(request: dict[str, Any]) -> int | None:
    process = os.fork()
    if not process:
        status = 70
        try:
            status = child(request)
        finally:
            os._exit(status)
    end = time.monotonic() + request["seconds"]
    while time.monotonic() < end:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(process, signal.SIGUSR1)
    time.sleep(2)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


if __name__ == "__main__":
    for module in MODULES:
        if importlib.util.find_spec(module.split(".")[0]):
            importlib.import_module(module)
    assert threads() == 1, f"{threads()} threads, expected one, because a fork may inherit locks of the others"
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing but answers on standard output
    for line in sys.stdin:
        answers.write(json.dumps(serve(json.loads(line))) + "\n")
        answers.flush()
