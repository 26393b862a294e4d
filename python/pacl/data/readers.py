"""Processes that read data: a loader that says which of them died, and their answers to signals."""

from __future__ import annotations

import atexit
import functools
import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing.connection import wait
from types import FrameType, TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..failures import StoreError
from ..formats import one_line


class ReaderLoader(DataLoader):
    """A DataLoader whose dataset has a `name`, and whose workers (see worker_options) may die or be killed."""

    dataset: Any

    def watched(self) -> Iterator[Any]:
        """Yield the batches of DataLoader; raise ChildProcessError, which says how, if a worker died."""
        try:
            yield from super().__iter__()
        except StoreError as error:  # from a worker with its traceback
            raise StoreError(one_line(error)) from error
        except Exception as error:  # what reading from a dead worker raises depends on the moment
            told = "in DataLoader worker process" in str(error)  # by a worker that lives
            # A connection may break a moment before the worker at its other end is seen to be dead.
            if not told and (death := self._death(patience=2)):
                raise ChildProcessError(death) from error
            raise

    def _death(self, patience: float) -> str | None:
        """Say which worker died, if one did or does in the next `patience` seconds."""
        workers = getattr(self._iterator, "_workers", [])
        ended = wait([worker.sentinel for worker in workers], patience) if workers else []
        for number, worker in enumerate(workers):
            if worker.sentinel in ended:
                worker.join()  # the sentinel tells of its end a moment before the system does
                code = worker.exitcode or 0
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
                hint = {-9: ", as when memory runs out; fewer --workers take less", -7: ", as when /dev/shm is full"}
                return f"data reader {number} of {self.dataset.name} {how}{hint.get(code, '')}"
        return None

    def kill(self) -> None:
        """Kill the workers, for a process that is to end: it would wait for one that hangs.

        The loader gives no more batches then.
        """
        iterator: Any = self._iterator
        workers = getattr(iterator, "_workers", [])
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join(1)
        if workers:
            iterator._shutdown = True  # torch would wait for locks that the dead may hold


def worker_options(workers: int) -> dict[str, Any]:
    """Return the arguments of DataLoader for so many workers, 0 for none."""
    started = {"persistent_workers": True, "worker_init_fn": functools.partial(_outlive_signals, _leaving())}
    return {"num_workers": workers, **(started if workers else {})}


@functools.cache
def _leaving() -> torch.Tensor:
    """Return a shared flag for the workers of all loaders, set when this process exits, before they are terminated."""
    flag = torch.zeros((), dtype=torch.bool).share_memory_()
    atexit.register(flag.fill_, True)
    return flag


def _outlive_signals(leaving: torch.Tensor, worker: int) -> None:
    """Let a worker ignore SIGTERM and Ctrl-C until the main process exits.

    torchrun, schedulers and terminals signal whole groups of processes, and the main one needs its workers to finish
    its step.
    """

    def answer(number: int, frame: FrameType | None) -> None:
        if leaving:
            os._exit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, answer)
    sys.excepthook = _unless_disconnected


def _unless_disconnected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an uncaught error, unless it says that the other process has left: a signal may end a wait for a batch."""
    if not isinstance(error, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)
