"""Act as `torchrun --standalone --nproc-per-node N`, with processes forked from one that has already done the imports.

Run `python ranks.py MODULE,MODULE N script.py ...` or `python ranks.py MODULE,MODULE N -m module ...`. If a process
fails, the others have ten seconds to end by themselves, and the exit status is 1. `TORCHRUN` and `forked()` give the
beginning of torchrun's and of this command, to be followed by N.
"""

import importlib
import os
import random
import runpy
import signal
import socket
import sys

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def forked(*modules: str) -> list[str]:
    """Return a replacement for `TORCHRUN` that starts sooner, because `modules` are imported before the fork."""
    return [sys.executable, os.path.abspath(__file__), ",".join(modules)]


def be(rank: int, world: int, port: int, command: list[str]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    random.seed()  # forked processes would otherwise draw the same numbers
    if torch := sys.modules.get("torch"):
        # A fork must renew PyTorch's thread pool. Later two threads may do it at once, and then the process aborts.
        torch.set_num_threads(torch.get_num_threads())
    run(command)


def run(command: list[str]) -> None:
    """Run `script.py ...` or `-m module ...` in this process, as Python does."""
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path[0] = os.path.dirname(os.path.abspath(command[0]))
        runpy.run_path(sys.argv[0], run_name="__main__")


def launch(world: int, command: list[str]) -> int:
    """Run `command` in `world` processes forked from this one; return 1 if any of them fails, otherwise 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = set()
    for rank in range(world):
        process = os.fork()
        if process == 0:
            be(rank, world, port, command)
            sys.exit()  # end like any program: print an error's traceback and flush the buffers
        running.add(process)
    failed = False
    signal.signal(signal.SIGALRM, lambda *_: [os.kill(process, signal.SIGKILL) for process in running])
    while running:
        process, status = os.wait()
        running.discard(process)
        if status and not failed:
            failed = True
            signal.alarm(10)
    return int(failed)


if __name__ == "__main__":
    for module in sys.argv[1].split(","):
        importlib.import_module(module)
    sys.exit(launch(int(sys.argv[2]), sys.argv[3:]))
