"""Checkpoints of a run: tensors and plain Python only, written atomically, read with `weights_only=True`."""

from __future__ import annotations

import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from ..files import atomic_writer, remove_unfinished


def save_checkpoint(folder: Path, state: dict[str, Any], *, keep: int) -> Path:
    """Write `state` as `folder`/step_N.pt with N = state["step"], and delete all but the newest `keep` checkpoints.

    Raises OSError if the write fails, for example on a full disk; the older checkpoints then stay.
    """
    path = folder / f"step_{state['step']:08d}.pt"
    remove_unfinished(folder)
    try:
        with atomic_writer(path) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch's writer turns an OSError into its own RuntimeError
        free = shutil.disk_usage(folder).free / 2**20
        raise OSError(
            f"checkpoint: {path} could not be written ({free:.0f} MiB free); the last one is {newest(folder) or 'none'}"
        ) from error
    for old in checkpoints(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step_*.pt") if re.fullmatch(r"step_\d+\.pt", path.name))


def newest(folder: Path) -> Path | None:
    """Return the checkpoint of the highest step, that of `--resume latest`, or None."""
    return next(reversed(checkpoints(folder)), None)


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint of save_checkpoint.

    Raises ValueError for a file that holds anything but tensors and plain Python; it is not unpickled.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"resume: {path} is not a checkpoint of tensors and plain Python ({first[:120]})") from error
    if not isinstance(state, dict):
        raise ValueError(f"resume: {path} holds a {type(state).__name__}, expected a checkpoint of pacl train")
    return state
