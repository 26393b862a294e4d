"""What a run says as it trains: console, metrics.jsonl, curves, and the stop at a loss that is not finite."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import sys
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.samples import Samples
from ..files import write_bytes
from .config import TrainConfig, reporters
from .model import Trainable

PAIRS = 1024  # of a batch that pair_statistics looks at


class Logged(Protocol):
    """A run as its log sees it. `data`, `model`, `step`, `lr` and `temperature` are read anew for each line."""

    config: TrainConfig
    rank: int
    world: int
    device: torch.device
    samples: int
    global_batch: int
    epoch_steps: int
    data: Samples
    model: Trainable
    step: int

    @property
    def lr(self) -> float: ...

    @property
    def temperature(self) -> float: ...

    def due(self, every: int) -> bool:
        """True at the steps at which something is done every so many steps."""


class Log:
    """Losses as they come: checked to be finite, printed and written to the run's files, by the first process."""

    def __init__(self, run: Logged):
        self.run, self.config = run, run.config
        self.pending: list[tuple[int, Tensor, list[str]]] = []
        self.mean, self.seconds, self.waited = _Mean(), 0.0, 0.0
        self.steps = 0
        self.file, self.boards = None, []
        self.statistics: dict[str, Tensor] = {}  # what the step under way found, see pair_statistics

    def __enter__(self) -> Log:
        if self.run.rank == 0:
            self.config.folder.mkdir(parents=True, exist_ok=True)
            self.file = open(self.config.folder / "metrics.jsonl", "a")
            self.boards = [_board(name, self.config, self.run.step) for name in reporters(self.config.report_to)]
        return self

    def __exit__(self, *_) -> None:
        for board in self.boards:
            board.finish()
        if self.file is not None:
            self.file.close()

    def step(self, loss: Tensor, keys: list[str], waited: float, seconds: float) -> None:
        self.pending.append((self.run.step, loss, keys))
        self.steps, self.waited, self.seconds = self.steps + 1, self.waited + waited, self.seconds + waited + seconds
        due = self.run.due(self.config.log_every_n_steps)
        if due or self.run.device.type == "cpu":  # reading a loss makes the host wait for a GPU
            self.check()
        if due and self.run.rank == 0:
            self._write()
        if due:
            self.steps, self.waited, self.seconds = 0, 0.0, 0.0

    def watch(self, patches: Tensor, texts: Tensor, temperature: Tensor | float) -> None:
        """Keep the statistics of a step's pairs for its line."""
        self.statistics = pair_statistics(patches, texts, temperature, self.config.form)

    def validated(self, values: dict[str, float]) -> dict[str, float | None]:
        """Print and keep what a validation found; returns the line of results.jsonl, which has open_clip's names."""
        step, epoch = self.run.step, self.run.step // self.run.epoch_steps
        row = {"step": step, "epoch": epoch, **{k: v if math.isfinite(v) else None for k, v in values.items()}}
        if self.run.rank != 0:
            return row
        say(f"Eval Epoch: {epoch} Step: {step} " + "\t".join(f"{k}: {v:.4f}" for k, v in values.items()), self.config)
        with open(self.config.folder / "results.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        self._report({f"val/{name}": value for name, value in values.items()})
        return row

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
        say(
            f"Train Epoch: {run.step // run.epoch_steps} [{done}/{run.samples} ({100 * done / run.samples:.0f}%)] "
            f"Data (t): {data:.3f} Batch (t): {seconds:.3f}, {batch / seconds:.1f}/s, "
            f"{batch / seconds / run.world:.1f}/s/process LR: {run.lr:.6f} Logit Scale: {scale:.3f} "
            f"Contrastive_loss: {self.mean.last:.5g} ({self.mean.value:.5g})",
            self.config,
        )
        values = {
            "train/loss": self.mean.last,
            "train/contrastive_loss": self.mean.last,
            "train/data_time": data,
            "train/data_share": data / seconds,
            "train/batch_time": seconds,
            "train/samples_per_second": batch / seconds,
            "train/samples_per_second_per_gpu": batch / seconds / run.world,  # open_clip's name, on a CPU too
            "train/scale": scale,
            "train/attn_temperature": run.temperature,
            **{f"train/{name}": value.item() for name, value in self.statistics.items()},
            "train/peak_memory_mib": _peak_memory(run.device) / 2**20,
            "train/lr": run.lr,
            "train/skipped": sum(run.data.skipped.values()),
        }
        self.file.write(json.dumps({"step": run.step, **values}) + "\n")
        self.file.flush()
        self._report(values)

    def _report(self, values: dict[str, float]) -> None:
        for board in self.boards:
            board.log(values, step=self.run.step)


@torch.no_grad()
def pair_statistics(patches: Tensor, texts: Tensor, temperature: float | Tensor, form: str) -> dict[str, Tensor]:
    """Of patches [B, N, D] against their own texts [B, D], no other pair: `similarity`, the mean of the cosines s,
    `similarity_p99`, their 99th percentile, and `attention_entropy`, that of the softmax over patches as a share of
    log N, the mean over images (none for form "max", which has no softmax). 0-D float32; of the first 1,024 pairs."""
    patches, texts = patches[:PAIRS], texts[:PAIRS]
    norms = torch.linalg.vector_norm(patches, dim=-1, dtype=torch.float32)
    s = torch.bmm(patches, F.normalize(texts, dim=-1)[..., None])[..., 0].float() / norms.clamp_min(1e-12)
    found = {"similarity": s.mean(), "similarity_p99": s.flatten().kthvalue(math.ceil(0.99 * s.numel())).values}
    if form != "max" and s.shape[1] > 1:
        logs = (s / temperature).log_softmax(1)
        found["attention_entropy"] = -(logs.exp() * logs).sum(1).mean() / math.log(s.shape[1])
    return found


def say(text: str, config: TrainConfig | None = None) -> None:
    """Print a line, and append it to out.log in the folder of a run."""
    print(text, flush=True)
    if config is not None:
        config.folder.mkdir(parents=True, exist_ok=True)
        with open(config.folder / "out.log", "a") as file:
            file.write(text + "\n")


class _Tensorboard:
    def __init__(self, config: TrainConfig, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(config.folder / "tensorboard", purge_step=step)
        self.finish = self.writer.close

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)


def _board(name: str, config: TrainConfig, step: int):
    """Something with `log(values, step=...)` and `finish()`."""
    if name == "tensorboard":
        return _Tensorboard(config, step)
    module = importlib.import_module(name)  # wandb's calls, which trackio has too
    values = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return module.init(project="pacl", name=config.name, config=values)


def _peak_memory(device: torch.device) -> int:
    """Bytes: what PyTorch has taken of a GPU, or the process of the machine's memory; 0 where nobody says."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class _Mean:
    def __init__(self):
        self.total, self.count, self.last = 0.0, 0, math.nan

    def add(self, value: float) -> None:
        self.total, self.count, self.last = self.total + value, self.count + 1, value

    @property
    def value(self) -> float:
        return self.total / self.count
