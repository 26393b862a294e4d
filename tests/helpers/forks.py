"""Processes that start in milliseconds instead of seconds, because they are forked from one that has done the imports.

`fork` forks the test's own process. What runs in several processes comes from `template.py`, a process with a single
thread: a fork of the test's process may inherit a lock that one of its other threads held at that moment, and then it
waits for ever.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

_outputs: dict[int, Path | None] = {}  # of forked processes


def fork(run: Callable[[], int | None], output: Path | None = None) -> int:
    """Run `run` in a forked process in a process group of its own, with `output` as its standard output and error.

    Returns the process's number; its exit status is what `run` returns, 0 for None, or that of SystemExit.
    """
    sys.stdout.flush()
    process = os.fork()
    if process:
        with contextlib.suppress(OSError):  # the child has done it
            os.setpgid(process, process)  # here too, so that the group exists when this function returns
        _outputs[process] = output
        return process
    status = 70
    try:
        os.setpgid(0, 0)
        out = os.open(output or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # pytest has its own
        faulthandler.register(signal.SIGUSR1, all_threads=True)  # prints the stacks
        torch.set_num_threads(1)
        torch.cuda.is_available, torch.cuda.device_count = lambda: False, lambda: 0  # a fork cannot use its parent's
        status = run() or 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = 1 if isinstance(end.code, str) else int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def status(process: int, seconds: float = 300) -> int:
    """Wait for a forked process and return its exit status, -9 after kill -9; kill it after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        ended, code = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(code)
        if time.monotonic() > end:
            os.killpg(process, signal.SIGUSR1)
            time.sleep(2)
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            output = _outputs.get(process)
            printed = "nothing" if output is None or not output.exists() else output.read_text()[-20000:]
            raise TimeoutError(f"the process did not end in {seconds} s; it printed, with all stacks:\n{printed}")
        time.sleep(0.01)


def wait_for(text: str, output: Path, seconds: float = 120) -> None:
    """Wait until a forked process has printed `text` to `output`."""
    end = time.monotonic() + seconds
    while not (output.exists() and text in output.read_text()):
        assert time.monotonic() < end, output.read_text() if output.exists() else "it printed nothing"
        time.sleep(0.01)


def run_ranks(command: Sequence[object], count: int, output: Path, seconds: float = 300) -> tuple[int, str]:
    """Run `command` (`script.py ...` or `-m module ...`) in `count` processes as torchrun does.

    Returns the exit status, 0 if every process has ended well, and all that they printed, which `output` keeps.
    """
    return _run(command, output, seconds=seconds, count=count)


def run_script(command: Sequence[object], output: Path, folder: Path | None = None) -> tuple[int, str]:
    """Run `script.py ...` in `folder` as Python does; return its exit status, and what it printed, kept in `output`."""
    return _run(command, output, folder=str(folder or "."))


def _run(command: Sequence[object], output: Path, seconds: float = 300, **how: object) -> tuple[int, str]:
    template = _template()
    assert template.stdin and template.stdout
    request = {
        "words": [str(word) for word in command],
        "output": str(output.absolute()),
        "seconds": seconds,
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        **how,
    }
    template.stdin.write(json.dumps(request) + "\n")
    template.stdin.flush()
    answer = template.stdout.readline()
    assert answer, "the template has died"
    ended, printed = json.loads(answer), output.read_text()
    if ended is None:
        raise TimeoutError(f"the process did not end in {seconds} s; it printed, with all stacks:\n{printed[-20000:]}")
    return ended, printed


@functools.cache
def _template() -> subprocess.Popen[str]:
    """Start the template, which ends when this process does."""
    return subprocess.Popen(
        [sys.executable, Path(__file__).with_name("template.py")],
        env=os.environ | {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
