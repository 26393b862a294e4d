"""Queue for slow work that many threads ask for."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator


class Unwanted(Exception):
    """Raised in a thread whose turn no longer matters."""


class Gate:
    """Let at most `most` threads work at a time, and only one of each name; the others wait outside."""

    def __init__(self, most: int = 1):
        self._most = most
        self._inside: set[Hashable] = set()
        self._closed = False
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def enter(self, name: Hashable = None, wanted: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """Wait for a turn; raises Unwanted if the gate closes before, or if `wanted` then returns False."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._free(name))
            if self._closed:
                raise Unwanted("server: it ends")
            self._inside.add(name)
        try:
            if not wanted():
                raise Unwanted("request: its client has left")
            yield
        finally:
            with self._changed:
                self._inside.remove(name)
                self._changed.notify_all()

    def close(self) -> None:
        """Turn away all threads that wait or come later."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _free(self, name: Hashable) -> bool:
        return len(self._inside) < self._most and name not in self._inside
