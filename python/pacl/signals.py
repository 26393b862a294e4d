"""SIGTERM and Ctrl-C during training and in videos."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

SAME = 2.0  # seconds in which a second signal is the first one again: a scheduler and torchrun may both send it


class Interrupted(BaseException):
    """A signal that came in `Signals.waiting`. Not an Exception, so that only the training loop catches it."""


class Signals:
    """Remember the first signal until the current step ends. One that comes later, after two seconds, stops at once.

    number: that of the signal, None before any.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._first = 0.0
        self._waiting = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self._old = {number: signal.signal(number, self._answer) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def waiting(self, interruptible: bool = True) -> Iterator[None]:
        """Let a signal raise Interrupted at once: nothing is lost while the process only waits, perhaps for ever."""
        self._waiting = interruptible
        try:
            if interruptible and self.number is not None:
                raise Interrupted
            yield
        finally:
            self._waiting = False
            self._defer_deaths()

    def _answer(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.number is None:
            self.number, self._first = number, now
            if self._waiting:
                raise Interrupted
        elif now - self._first > SAME:
            raise KeyboardInterrupt

    def _defer_deaths(self) -> None:
        """Keep torch from raising the death of a data reader in the midst of a step; the next wait finds out."""
        child = getattr(signal, "SIGCHLD", None)
        if child is not None and callable(handler := signal.getsignal(child)):
            self._old[child] = handler
            signal.signal(child, signal.SIG_DFL)
