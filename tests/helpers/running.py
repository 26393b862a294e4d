"""Runs of `pacl train` (flags, one or several processes, their log lines), and an untrained embedder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from forks import run_ranks
from pacl.cli import main
from pacl.embedder import VisionEmbedder, save_embedder
from pacl.sharing import describe_towers
from pacl.towers import load_towers
from pacl.training.checkpoints import checkpoints, load_checkpoint
from ranks import TORCHRUN


def flags(world: Path, logs: Path, **changes) -> list[str]:
    values = {
        "train_data": world / "scenes/train-{000..002}.tar",
        "model": f"local-dir:{world / 'clip'}",
        "log_dir": logs,
        "batch_size": 12,
        "max_steps": 6,
        "workers": 0,
        "log_every_n_steps": 2,
        "report_to": "none",
    }
    words = []
    for name, value in (values | changes).items():
        words += [f"--{name}"] if value is None else [f"--{name}", str(value)]
    return words


def train(world: Path, logs: Path, **changes) -> int:
    return main(["train", *flags(world, logs, **changes)])


def train_in(
    processes: int, world: Path, logs: Path, program: Sequence[str | Path] = ("-m", "pacl", "train"), **changes
) -> tuple[int, str]:
    """Train in several forked processes; return the exit status and what they printed."""
    logs.mkdir(parents=True, exist_ok=True)
    return run_ranks([*program, *flags(world, logs, **changes)], processes, logs / "printed")


def start(world: Path, logs: Path, processes: int = 1, **changes) -> subprocess.Popen:
    """Start a run in a process group of its own, as a terminal or a scheduler does; torchrun starts several."""
    launcher = [*TORCHRUN, str(processes)] if processes > 1 else [sys.executable]
    return subprocess.Popen(
        [*launcher, "-m", "pacl", "train", *flags(world, logs, **changes)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def final(logs: Path) -> dict:
    return load_checkpoint(checkpoints(logs / "pacl/checkpoints")[-1])


def assert_same_state(a, b, path: str = "checkpoint"):
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same_state(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_state(x, y, f"{path}.{i}")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, path


def write_embedder(folder: Path, clip: Path, **notes) -> None:
    """Write an untrained embedder for the CLIP in `clip`, with `notes` on its training."""
    towers = load_towers(f"local-dir:{clip}")
    save_embedder(VisionEmbedder(128, 128), folder, describe_towers(towers, folder), **notes)
