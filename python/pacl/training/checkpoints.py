"""Checkpoints of a run: tensors and plain Python only, written atomically, read with `weights_only=True`."""

from __future__ import annotations

import pickle
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any, TypedDict

import torch

from ..annotations import checked
from ..files import atomic_writer, impostor, remove_unfinished
from ..settings import Damaged


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


class State(TypedDict, total=False):
    """Contents of a checkpoint; resuming.restore says what is missing."""

    step: int
    name: str
    state_dict: dict[str, Any]
    ema: dict[str, Any] | None
    optimizer: dict[str, Any]
    global_batch: int
    world: int
    data: list[Any]
    validated: dict[str, Any]
    run: dict[str, Any]
    resumed: list[Any]


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint of save_checkpoint, after comparing its checksums, which takes a second per 1 to 3 GB.

    Raises ValueError for a damaged file, for one that holds anything but tensors and plain Python, which is not
    unpickled, and for weights that are not finite.
    """
    check_zip(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"resume: {path} holds other objects than tensors and plain Python, expected a checkpoint of pacl train"
        ) from error
    except Exception as error:  # the bytes are as they were written, but not by save_checkpoint
        raise ValueError(f"resume: {path} cannot be read, expected a checkpoint of pacl train") from error
    if not isinstance(state, dict):
        raise ValueError(f"resume: {path} holds a {type(state).__name__}, expected a checkpoint of pacl train")
    checked(state, State, path)
    for part in ("state_dict", "ema"):
        for name, x in (state.get(part) or {}).items():
            if not isinstance(x, torch.Tensor) or not x.isfinite().all():
                raise Damaged(path, f"{name} of its {part} is not a tensor of finite numbers")
    return state


def check_zip(path: Path) -> None:
    """Compare the checksums of all parts of a file that torch.save wrote; raise ValueError for a damaged or other file.

    The reader of torch checks none of them.
    """
    if kind := impostor(path):
        raise ValueError(f"resume: {path} is {kind}, expected a checkpoint of pacl train")
    with open(path, "rb") as stream:
        try:
            parts = zipfile.ZipFile(stream)
            # torch.save compresses nothing, so no part can unfold to more bytes than the file has.
            packed = any(part.compress_type != zipfile.ZIP_STORED for part in parts.infolist())
            wrong = None if packed else parts.testzip()
        except Exception as error:  # on damaged headers zipfile raises OSError, struct.error, UnicodeError, ...
            raise ValueError(f"resume: {path} is not a whole checkpoint of pacl train; it is cut or damaged") from error
    if packed:
        raise ValueError(f"resume: {path} has compressed parts, expected a checkpoint of pacl train")
    if wrong is not None:
        raise Damaged(path, f"the bytes of its part {wrong} do not have the checksum that they had")
