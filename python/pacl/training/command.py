"""The command line of `pacl train`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
import tyro

from ..data.features import tower_names
from ..files import write_bytes
from .checkpoints import newest, remove_halves
from .config import TrainConfig, dump_config, read_config
from .plan import plan
from .recipe import defaults, fill_batch, recipe_notes
from .run import Run


def main(argv: Sequence[str], prog: str = "pacl train") -> int:
    """Run `pacl train` with these arguments and return its exit status."""
    config = None
    try:
        config = _parse(list(argv), prog)
        if not config.dry_run:
            _refuse_to_overwrite(config)
        run = Run(config)
        run.say(plan(run))
        if config.dry_run:
            return 0
        if config.resume:
            path = _checkpoint(config, config.resume)
            if path is not None:
                run.restore(path)
                run.say(f"resume: {path}, step {run.step}")
        if run.rank == 0:
            remove_halves(config.folder / "checkpoints")
            notes = recipe_notes(config, run.global_batch)
            text = dump_config(dataclasses.replace(config, resume=None), notes)
            write_bytes(config.folder / "config.yaml", text.encode())
        run.train()
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"pacl: error: {error}", file=sys.stderr)
        if config is not None and (config.folder / "out.log").exists():
            with contextlib.suppress(OSError), open(config.folder / "out.log", "a") as file:
                file.write(f"pacl: error: {error}\n")
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if run.stopped_by is not None:
        run.say(f"stopped at step {run.step} of {run.steps}; continue with --resume latest")
        return 128 + run.stopped_by
    if run.data.reasons != "none":
        run.say(f"samples skipped by the first process: {run.data.reasons}")
    run.say(f"finished {run.steps} steps: {config.folder / 'embedder'}")
    return 0


def _parse(argv: list[str], prog: str) -> TrainConfig:
    """Parse the flags, with defaults from `--config FILE` or from `--recipe`."""
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" in argv:
        at = argv.index("--config")
        if at + 1 == len(argv):
            raise ValueError("config: got no file, expected the config.yaml of a run")
        if any(word.partition("=")[0] == "--recipe" for word in argv):
            raise ValueError("recipe: got --recipe and --config, expected only one of them")
        config = read_config(Path(argv[at + 1]))
        config = tyro.cli(TrainConfig, args=argv[:at] + argv[at + 2 :], default=config, prog=prog)
    else:
        config = tyro.cli(TrainConfig, args=argv, prog=prog)
        if config.recipe is not None or config.features is not None:
            default = defaults(config.recipe)
            if config.features is not None:
                default = dataclasses.replace(default, **tower_names(config.features))
            config = tyro.cli(TrainConfig, args=argv, default=default, prog=prog)
    return fill_batch(config.check(), int(os.environ.get("WORLD_SIZE", 1)))


def _checkpoint(config: TrainConfig, resume: str) -> Path | None:
    """Return the checkpoint to continue from; None for "latest" in a folder without checkpoints: the run begins."""
    return newest(config.folder / "checkpoints") if resume == "latest" else Path(resume)


def _refuse_to_overwrite(config: TrainConfig) -> None:
    if config.resume is None and newest(config.folder / "checkpoints"):
        raise ValueError(
            f"name: got {config.name!r}, but {config.folder} has checkpoints of an earlier run; expected "
            "--resume latest or another --name"
        )
