"""What a run says as it trains: console line, metrics.jsonl, curves, and the stop at a loss that is not finite."""

from __future__ import annotations

import contextlib
import json
import math
from typing import TYPE_CHECKING

from torch import Tensor

from ..files import write_bytes

if TYPE_CHECKING:
    from .run import Run


class Log:
    """Losses as they come: checked to be finite, printed and written to the run's files, by the first process."""

    def __init__(self, run: Run):
        self.run, self.config = run, run.config
        self.pending: list[tuple[int, Tensor, list[str]]] = []
        self.mean, self.seconds, self.waited = _Mean(), 0.0, 0.0
        self.steps = 0
        self.file = self.board = None

    def __enter__(self) -> Log:
        if self.run.rank == 0:
            self.config.folder.mkdir(parents=True, exist_ok=True)
            self.file = open(self.config.folder / "metrics.jsonl", "a")
            if self.config.tensorboard:
                with contextlib.suppress(ImportError):
                    from torch.utils.tensorboard import SummaryWriter

                    self.board = SummaryWriter(self.config.folder / "tensorboard", purge_step=self.run.step)
        return self

    def __exit__(self, *_) -> None:
        for sink in (self.file, self.board):
            if sink is not None:
                sink.close()

    def step(self, loss: Tensor, keys: list[str], waited: float, seconds: float) -> None:
        self.pending.append((self.run.step, loss, keys))
        self.steps, self.waited, self.seconds = self.steps + 1, self.waited + waited, self.seconds + waited + seconds
        due = self.run.step % self.config.log_every_n_steps == 0 or self.run.step == self.run.steps
        if due or self.run.device.type == "cpu":  # reading a loss makes the host wait for a GPU
            self.check()
        if due and self.run.rank == 0:
            self._write()
        if due:
            self.steps, self.waited, self.seconds = 0, 0.0, 0.0

    def check(self) -> None:
        """Read the losses since the last time; one that is not finite ends the run."""
        for step, loss, keys in self.pending:
            self.mean.add(loss.item())
            if not math.isfinite(self.mean.last):
                path = self.config.folder / f"not_finite_rank{self.run.rank}.json"
                write_bytes(path, json.dumps({"step": step, "loss": str(self.mean.last), "keys": keys}).encode())
                raise FloatingPointError(
                    f"the loss of step {step} is {self.mean.last}; the keys of its samples are in {path}, and the last "
                    "checkpoint is of an earlier step"
                )
        self.pending.clear()

    def _write(self) -> None:
        run, batch = self.run, self.run.global_batch
        data, seconds = self.waited / self.steps, self.seconds / self.steps
        scale = run.model.log_scale.exp().item()
        done = run.step % run.epoch_steps * batch
        print(
            f"Train Epoch: {run.step // run.epoch_steps} [{done}/{run.samples} ({100 * done / run.samples:.0f}%)] "
            f"Data (t): {data:.3f} Batch (t): {seconds:.3f}, {batch / seconds:.1f}/s, "
            f"{batch / seconds / run.world:.1f}/s/process LR: {run.lr:.6f} Logit Scale: {scale:.3f} "
            f"Contrastive_loss: {self.mean.last:.5g} ({self.mean.value:.5g})",
            flush=True,
        )
        values = {
            "train/loss": self.mean.last,
            "train/contrastive_loss": self.mean.last,
            "train/data_time": data,
            "train/batch_time": seconds,
            "train/samples_per_second": batch / seconds,
            "train/scale": scale,
            "train/attn_temperature": run.temperature,
            "train/lr": run.lr,
            "train/skipped": sum(run.data.skipped.values()),
        }
        self.file.write(json.dumps({"step": run.step, **values}) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, run.step)


class _Mean:
    def __init__(self):
        self.total, self.count, self.last = 0.0, 0, math.nan

    def add(self, value: float) -> None:
        self.total, self.count, self.last = self.total + value, self.count + 1, value

    @property
    def value(self) -> float:
        return self.total / self.count
