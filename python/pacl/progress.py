"""Progress on standard error: a bar with loss and rate at a terminal, ten plain lines elsewhere."""

from __future__ import annotations

import contextlib
import contextvars
import sys
import time
from collections.abc import Iterator
from typing import SupportsFloat

from tqdm import tqdm

_QUIET = contextvars.ContextVar("quiet", default=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide every Progress that begins in this context, for parts that share one bar."""
    token = _QUIET.set(True)
    try:
        yield
    finally:
        _QUIET.reset(token)


class Progress:
    """Count `total` steps of `label` on standard error. As a context manager it closes its bar, also on an interrupt.

    total: None if it is unknown; then only a terminal shows progress.
    """

    def __init__(self, label: str, total: int | None, unit: str = "step"):
        self.label, self.total, self.unit = label, total, unit
        self.done = 0
        self._loss = ""
        self._start = time.perf_counter()
        self._bar, self._quiet = None, _QUIET.get()
        if not self._quiet and sys.stderr.isatty():
            self._bar = tqdm(total=total, desc=label, unit=unit, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def step(self, loss: SupportsFloat | None = None, count: int = 1) -> None:
        """Count `count` more steps. `loss` (number or tensor) is read only when it is shown."""
        before, self.done = self.done, self.done + count
        due = self.total is not None and self.done * 10 // self.total > before * 10 // self.total
        if loss is not None and (due or (self._bar is not None and self.done % 10 == 0)):
            self._loss = f"loss {float(loss):.3f}"
        if self._bar is not None:
            self._bar.set_postfix_str(self._loss, refresh=False)
            self._bar.update(count)
        elif due and not self._quiet:
            rate = self.done / (time.perf_counter() - self._start)
            line = f"{self.label}: {self.done}/{self.total}, {rate:.1f} {self.unit}/s, {self._loss}"
            print(line.rstrip(", "), file=sys.stderr, flush=True)
