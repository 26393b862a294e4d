"""The command line of `pacl train`."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
import tyro

from ..files import write_bytes
from .checkpoints import checkpoints
from .config import TrainConfig, dump_config, read_config
from .run import Run


def main(argv: Sequence[str], prog: str = "pacl train") -> int:
    """Run `pacl train` with these arguments; returns its exit status."""
    config = None
    try:
        config = _parse(list(argv), prog)
        if not config.dry_run:
            _refuse_to_overwrite(config)
        run = Run(config)
        run.say(run.plan())
        if config.dry_run:
            return 0
        if config.resume:
            path = _checkpoint(config)
            if path is not None:
                run.restore(path)
                run.say(f"resume: {path}, step {run.step}")
        if run.rank == 0:
            write_bytes(config.folder / "config.yaml", dump_config(dataclasses.replace(config, resume=None)).encode())
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
        run.say(f"stopped at step {run.step} of {run.steps}; go on with --resume latest")
        return 128 + run.stopped_by
    run.say(f"finished {run.steps} steps: {config.folder / 'embedder'}")
    return 0


def _parse(argv: list[str], prog: str) -> TrainConfig:
    """`--config FILE` gives the values of a run, flags change them."""
    if "--config" not in argv:
        return tyro.cli(TrainConfig, args=argv, prog=prog).check()
    at = argv.index("--config")
    if at + 1 == len(argv):
        raise ValueError("config: got no file, expected the config.yaml of a run")
    config = read_config(Path(argv[at + 1]))
    return tyro.cli(TrainConfig, args=argv[:at] + argv[at + 2 :], default=config, prog=prog).check()


def _checkpoint(config: TrainConfig) -> Path | None:
    """The one to go on from; None for "latest" in a folder that has none, where the run begins."""
    if config.resume != "latest":
        return Path(config.resume)
    found = checkpoints(config.folder / "checkpoints")
    return found[-1] if found else None


def _refuse_to_overwrite(config: TrainConfig) -> None:
    if config.resume is None and checkpoints(config.folder / "checkpoints"):
        raise ValueError(f"name: {config.folder} has checkpoints of an earlier run; --resume latest or another --name")
