"""The log of a run: console, metrics.jsonl, curves, and the stop at a loss that is not finite."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from torch.nn import functional as F

from ..files import named_if_full, write_bytes
from .config import TrainConfig, reporters

PAIRS = 1024  # pairs of a batch that pair_statistics reads
FILES = ("out.log", "config.yaml", "metrics.jsonl", "results.jsonl", "not_finite_rank*.json", "tensorboard", "embedder")


class Log:
    """Check that losses are finite; print them and write them to the run's files in the first process.

    global_batch: pairs in a step of all `world` processes. epoch_steps: steps in an epoch.
    """

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        *,
        global_batch: int,
        epoch_steps: int,
        rank: int = 0,
        world: int = 1,
    ):
        self.config, self.device, self.rank, self.world = config, device, rank, world
        self.global_batch, self.epoch_steps = global_batch, epoch_steps
        self.pending: list[tuple[int, Tensor, list[str]]] = []
        self.mean, self.seconds, self.waited = _Mean(), 0.0, 0.0
        self.steps = 0
        self.file: TextIO | None = None
        self.boards: list[Any] = []
        self.statistics: dict[str, Tensor] = {}  # pair_statistics of the current step

    @contextlib.contextmanager
    def opened(self, step: int) -> Iterator[None]:
        """Keep the run's files open, to continue from `step`."""
        if self.rank == 0:
            self.config.folder.mkdir(parents=True, exist_ok=True)
            for name in ("metrics.jsonl", "results.jsonl"):
                _end_line(self.config.folder / name)
            self.file = open(self.config.folder / "metrics.jsonl", "a")
            self.boards = [_board(name, self.config, step) for name in reporters(self.config.report_to)]
        try:
            yield
        finally:
            for board in self.boards:
                board.finish()
            if self.file is not None:
                with named_if_full(self.file.name):  # closing writes what could not be written before
                    self.file.close()

    def step(
        self,
        step: int,
        loss: Tensor,
        keys: list[str],
        waited: float,
        seconds: float,
        values: Callable[[], dict[str, float]] | None,
    ) -> None:
        """Record step `step`, counted from 1.

        loss: its loss, 0-D. keys: those of its samples. waited, seconds: the time for the batch and for the step.
        values: returns lr, scale, attn_temperature, skipped and perhaps kept_share and coherence_loss, if the step is
            to be logged; None: it is not.
        """
        self.pending.append((step, loss, keys))
        self.steps, self.waited, self.seconds = self.steps + 1, self.waited + waited, self.seconds + waited + seconds
        if values is not None or self.device.type == "cpu":  # on a GPU, reading a loss makes the host wait
            self.check()
        if values is not None and self.rank == 0:
            self._write(step, values())
        if values is not None:
            self.steps, self.waited, self.seconds = 0, 0.0, 0.0

    def watch(self, patches: Tensor, texts: Tensor, temperature: Tensor | float, lengths: Tensor | None = None) -> None:
        """Keep the statistics of a step's pairs for its line in the log."""
        self.statistics = pair_statistics(patches, texts, temperature, self.config.form, lengths)

    def validated(self, step: int, values: dict[str, float]) -> dict[str, float | None]:
        """Print the results of a validation and append them to results.jsonl, by open_clip's names; return the line."""
        epoch = step // self.epoch_steps
        row = {"step": step, "epoch": epoch, **{k: v if math.isfinite(v) else None for k, v in values.items()}}
        if self.rank != 0:
            return row
        say(f"Eval Epoch: {epoch} Step: {step} " + "\t".join(f"{k}: {v:.4f}" for k, v in values.items()), self.config)
        path = self.config.folder / "results.jsonl"
        with named_if_full(path), open(path, "a") as file:
            file.write(json.dumps(row) + "\n")
        self._report(step, {f"val/{name}": value for name, value in values.items()})
        return row

    def last_result(self, step: int) -> dict[str, float | None]:
        """Return the last line of results.jsonl of a validation up to `step`; {} without one."""
        found: dict[str, Any] = {}
        with contextlib.suppress(FileNotFoundError):
            for line in (self.config.folder / "results.jsonl").read_text().splitlines():
                # A power cut leaves half a line.
                with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                    row = json.loads(line)
                    if found.get("step", 0) <= row["step"] <= step:
                        found = row
        return found

    def check(self) -> None:
        """Read the losses since the last call; raise FloatingPointError for one that is not finite."""
        for step, loss, keys in self.pending:
            self.mean.add(loss.item())
            if not math.isfinite(self.mean.last):
                path = self.config.folder / f"not_finite_rank{self.rank}.json"
                write_bytes(path, json.dumps({"step": step, "loss": str(self.mean.last), "keys": keys}).encode())
                raise FloatingPointError(
                    f"the loss of step {step} is {self.mean.last}; {path} has the keys of its samples, and the last "
                    "checkpoint is of an earlier step"
                )
        self.pending.clear()

    def _write(self, step: int, now: dict[str, float]) -> None:
        batch, data, seconds = self.global_batch, self.waited / self.steps, self.seconds / self.steps
        epoch, before = divmod(step - 1, self.epoch_steps)
        done, total = (before + 1) * batch, self.epoch_steps * batch
        coherence = now.get("coherence_loss")
        contrastive = self.mean.last - self.config.coherence_loss * (coherence or 0.0)
        name = "Contrastive_loss" if coherence is None else f"Coherence_loss: {coherence:.5g} Loss"
        say(
            f"Train Epoch: {epoch} [{done}/{total} ({100 * done / total:.0f}%)] "
            f"Data (t): {data:.3f} Batch (t): {seconds:.3f}, {batch / seconds:.1f}/s, "
            f"{batch / seconds / self.world:.1f}/s/process LR: {now['lr']:.6f} Logit Scale: {now['scale']:.3f} "
            f"{name}: {self.mean.last:.5g} ({self.mean.value:.5g})",
            self.config,
        )
        values = {
            "train/loss": self.mean.last,
            "train/contrastive_loss": contrastive,
            "train/data_time": data,
            "train/data_share": data / seconds,
            "train/batch_time": seconds,
            "train/samples_per_second": batch / seconds,
            "train/samples_per_second_per_gpu": batch / seconds / self.world,  # open_clip's name, on a CPU too
            "train/scale": now["scale"],
            "train/attn_temperature": now["attn_temperature"],
            **{f"train/{name}": value.item() for name, value in self.statistics.items()},
            "train/peak_memory_mib": _peak_memory(self.device) / 2**20,
            "train/lr": now["lr"],
            "train/skipped": now["skipped"],
            **{f"train/{name}": now[name] for name in ("kept_share", "coherence_loss") if name in now},
        }
        assert self.file is not None  # lines are written inside `opened`
        with named_if_full(self.file.name):
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            self.file.flush()
        self._report(step, values)

    def _report(self, step: int, values: dict[str, float]) -> None:
        for board in self.boards:
            board.log(values, step=step)


@torch.no_grad()
def pair_statistics(
    patches: Tensor, texts: Tensor, temperature: float | Tensor, form: str, lengths: Tensor | None = None
) -> dict[str, Tensor]:
    """Return statistics of patches [B, N, D] against their own texts [B, D], over the first 1,024 pairs, 0-D float32.

    With lengths, int64 [B] on the CPU, patches are packed, [sum of N, D], and images of one patch have no entropy.

    similarity: mean of the cosines s. similarity_p99: their 99th percentile. attention_entropy: entropy of the softmax
    over patches as a share of log N, mean over images; absent for form "max", which has no softmax.
    """
    if lengths is not None:
        return _packed_statistics(patches, texts[:PAIRS], temperature, form, lengths[:PAIRS].to(patches.device))
    patches, texts = patches[:PAIRS], texts[:PAIRS]
    norms = torch.linalg.vector_norm(patches, dim=-1, dtype=torch.float32)
    s = torch.bmm(patches, F.normalize(texts, dim=-1)[..., None])[..., 0].float() / norms.clamp_min(1e-12)
    found = {"similarity": s.mean(), "similarity_p99": s.flatten().kthvalue(math.ceil(0.99 * s.numel())).values}
    if form != "max" and s.shape[1] > 1:
        logs = (s / temperature).log_softmax(1)
        found["attention_entropy"] = -(logs.exp() * logs).sum(1).mean() / math.log(s.shape[1])
    return found


def _packed_statistics(
    patches: Tensor, texts: Tensor, temperature: float | Tensor, form: str, lengths: Tensor
) -> dict[str, Tensor]:
    """Return pair_statistics of packed patches, whose first rows are those of the images of `lengths`."""
    owners = torch.arange(len(lengths), device=patches.device).repeat_interleave(lengths)
    rows = patches[: len(owners)]
    norms = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32)
    s = (rows * F.normalize(texts, dim=-1)[owners]).sum(-1, dtype=torch.float32) / norms.clamp_min(1e-12)
    found = {"similarity": s.mean(), "similarity_p99": s.kthvalue(math.ceil(0.99 * len(s))).values}
    if form != "max" and (several := lengths > 1).any():
        starts = lengths.cumsum(0) - lengths
        padded = s.new_full((len(lengths), int(lengths.max())), -torch.inf)
        padded[owners, torch.arange(len(s), device=s.device) - starts[owners]] = s / temperature
        entropies = torch.special.entr(padded[several].softmax(1)).sum(1)
        found["attention_entropy"] = (entropies / lengths[several].log()).mean()
    return found


def say(text: str, config: TrainConfig | None = None) -> None:
    """Print a line; with `config`, also append it to out.log in the folder of the run."""
    print(text, flush=True)
    if config is not None:
        config.folder.mkdir(parents=True, exist_ok=True)
        path = config.folder / "out.log"
        with named_if_full(path), open(path, "a") as file:
            file.write(text + "\n")


def _end_line(path: Path) -> None:
    """End the last line of a file, of which a full disk or a power cut may have left a half."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")


def set_aside(folder: Path) -> Path | None:
    """Move the files that a run wrote to `folder`, checkpoints excepted, to `folder`/earlier-1, or -2, and so on.

    Return that folder, or None if there are no such files.
    """
    found = [path for name in FILES for path in sorted(folder.glob(name))]
    if not found:
        return None
    place = next(path for i in itertools.count(1) if not (path := folder / f"earlier-{i}").exists())
    place.mkdir()
    for path in found:
        path.rename(place / path.name)
    return place


class _Tensorboard:
    def __init__(self, config: TrainConfig, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(config.folder / "tensorboard", purge_step=step)
        self.finish = self.writer.close

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)


def _board(name: str, config: TrainConfig, step: int) -> Any:
    """Return a tracker: an object with `log(values, step=...)` and `finish()`."""
    if name == "tensorboard":
        return _Tensorboard(config, step)
    module = importlib.import_module(name)  # trackio has wandb's interface
    values = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return module.init(project="pacl", name=config.name, config=values)


def _peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: PyTorch's on a GPU, or the process's; 0 if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class _Mean:
    def __init__(self) -> None:
        self.total, self.count, self.last = 0.0, 0, math.nan

    def add(self, value: float) -> None:
        self.total, self.count, self.last = self.total + value, self.count + 1, value

    @property
    def value(self) -> float:
        return self.total / self.count
