"""How far the data of every process got."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist


class DataStates:
    """The states of the loaders of all processes after the last complete step, for checkpoints.

    Processes exchange them before a step rather than after it. So when a process is lost, the others know the states
    that belong to their weights, whether or not the step could be completed. A flag of each process travels along.

    group: None for one process. device: that of the tensors to exchange.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device):
        self.group, self.device = group, device
        self._complete: list[dict[str, Any]] | torch.Tensor = []
        self._coming: list[dict[str, Any]] | torch.Tensor = []
        self._workers = 0
        self._flag = 0

    def restore(self, states: list[dict[str, Any]]) -> None:
        """Continue from the states of a checkpoint, one of each process."""
        self._complete, self._workers = copy.deepcopy(states), states[0]["workers"]

    def exchange(self, state: dict[str, Any], flag: int) -> None:
        """Give all processes the state of this one after the coming step, and its flag."""
        self._workers, self._flag = state["workers"], flag
        if self.group is None:
            self._coming = [copy.deepcopy(state)]
            return
        row = torch.tensor([flag, state["batches"], *(x for place in state["places"] for x in place)])
        if self.device.type == "cuda":  # pinned, because the host must not wait for the steps before
            row = row.pin_memory().to(self.device, non_blocking=True)
        rows = [torch.empty_like(row) for _ in range(self.group.size())]
        dist.all_gather(rows, row, group=self.group)
        self._coming = torch.stack(rows)

    def complete(self) -> None:
        """Take the exchanged states for those of the last complete step."""
        self._complete = self._coming

    def flag(self) -> int:
        """Return the largest flag of the last exchange. On a GPU the host waits for it."""
        return int(self._coming[:, 0].max()) if isinstance(self._coming, torch.Tensor) else self._flag

    def of_all(self) -> list[dict[str, Any]]:
        """Return the state of each process after the last complete step."""
        if not isinstance(self._complete, torch.Tensor):
            return copy.deepcopy(self._complete)
        states = []
        for _, batches, *numbers in self._complete.tolist():
            places = [numbers[i : i + 2] for i in range(0, len(numbers), 2)]
            states.append({"batches": batches, "workers": self._workers, "places": places})
        return states
