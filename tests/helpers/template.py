"""Import what the tests need, then run what `forks.py` asks for, each request in a fork of this process.

A request is a line of JSON on standard input; the answer, a line on standard output, is the exit status, or null if the
time was over. Before the processes are killed then, they add the stacks of their threads to their output.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import ranks
from forks import fork, status

MODULES = ("torch.distributed", "pacl_kernels", "pacl.cli", "open_clip", "timm", "PIL.Image", "pytest")


def threads() -> int:
    return len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 1


def run(request: dict[str, Any]) -> int | None:
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    if "count" in request:
        return ranks.launch(request["count"], request["words"])
    ranks.run(request["words"])
    return None


def serve(request: dict[str, Any]) -> int | None:
    process = fork(lambda: run(request), Path(request["output"]))
    try:
        return status(process, request["seconds"])
    except TimeoutError:
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
