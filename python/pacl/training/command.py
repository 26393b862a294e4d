"""The command line of `pacl train`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch.distributed as dist

from ..commands import next_command
from ..data.features import tower_names
from ..data.flags import given_flags
from ..embedder import HEAD
from ..failures import collective, describe, sentence
from ..files import remove_unfinished, write_bytes
from ..flags import parse
from ..formats import one_line
from ..locks import lock_folder
from ..remote import location
from .checkpoints import newest
from .config import TrainConfig, dump_config, read_config
from .log import set_aside
from .plan import plan
from .recipe import defaults, fill_batch, recipe_notes
from .resuming import restore
from .run import Run


def main(argv: Sequence[str], prog: str = "pacl train") -> int:
    """Run `pacl train` with these arguments and return its exit status."""
    try:
        config = _parse(list(argv), prog)
        with _folder(config):
            return _train(config)
    except (ValueError, OSError) as error:  # not in out.log, which may be another run's
        print(f"pacl: error: {sentence(error)}", file=sys.stderr)
        return 1


@contextlib.contextmanager
def _folder(config: TrainConfig) -> Iterator[None]:
    """Hold the lock of the run's folder, in the first process.

    Raises ValueError if another run is writing to it, or has checkpoints in it that this one would overwrite.
    """
    first = not config.dry_run and int(os.environ.get("RANK", 0)) == 0
    with lock_folder(config.folder, "name") if first else contextlib.nullcontext():
        if not config.dry_run:
            _refuse_to_overwrite(config)
        yield


def _train(config: TrainConfig) -> int:
    """Run `pacl train` in its folder and return its exit status."""
    begun, run = not config.dry_run and newest(config.folder / "checkpoints") is not None, None
    try:
        run = Run(config)
        if run.rank == 0 and not config.dry_run and not begun:
            place = set_aside(config.folder)
            if place is not None:
                run.say(f"name: an earlier run in {config.folder} saved no checkpoint; its files are now in {place}")
        begun = not config.dry_run
        path = _checkpoint(config)
        if path is not None and not config.dry_run:
            restore(run, path)
        run.say(plan(run))
        if config.resume == "latest" and path is None:
            run.say(f"resume: {config.folder / 'checkpoints'} has no checkpoint, so the run starts from step 0")
        if config.dry_run:
            return 0
        if path is not None:
            run.say(f"resume: {path}, step {run.step}")
        if run.rank == 0:
            for folder in ("", "checkpoints", "embedder"):
                remove_unfinished(config.folder / folder)
            notes = recipe_notes(config, run.global_batch) | ({"resumed": run.resumed} if run.resumed else {})
            text = dump_config(dataclasses.replace(config, resume=None), notes)
            write_bytes(config.folder / "config.yaml", text.encode())
        run.train()
    except Exception as error:
        line = _line(error, run)
        _report(error, line, config.folder / "out.log" if begun else None, run)  # else it is another run's
        if line is None:
            raise
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if run.stopped_by is not None:
        run.say(f"stopped at step {run.step} of {run.steps}; continue with --resume latest")
        return 128 + run.stopped_by
    if run.data.reasons != "none":
        run.say(f"samples skipped by the first process: {run.data.reasons}")
    if run.model.head is not None:  # no other command reads it
        run.say(f"finished {run.steps} steps: {config.folder / HEAD}")
        return 0
    run.say(f"finished {run.steps} steps: {config.folder / 'embedder'}")
    run.say(_next(config))
    return 0


def _next(config: TrainConfig) -> str:
    """Return the line that names the next command: it measures the run on its held-out pairs, or serves its page."""
    if config.val_data is None:
        return next_command("serve", "--checkpoint", config.folder)
    flags = given_flags(config)
    return next_command("evaluate", "retrieval", "--data", config.val_data, *flags, "--checkpoint", config.folder)


def _line(error: Exception, run: Run | None) -> str | None:
    """Return the line for an error that a user can act on; None for any other, which needs its traceback."""
    failure = describe(error)
    if failure is None:
        return sentence(error) if isinstance(error, (ValueError, FloatingPointError, OSError)) else None
    if run is None or run.world > 1 and run.rank:
        return failure
    saved = f"step {run.saved} of {run.steps} is saved, continue with --resume latest" if run.saved else "nothing saved"
    return f"{failure}; {saved}"


def _report(error: Exception, line: str | None, log: Path | None, run: Run | None) -> None:
    """Print the line of an error, None if its traceback will be, and append it to out.log if the run has begun it."""
    rank = f"rank {run.rank}: " if run is not None and run.rank else ""
    text = f"pacl: error: {rank}{one_line(line or f'{type(error).__name__}: {error}')}"
    if line is not None:
        print(text, file=sys.stderr, flush=True)
    lost = rank and collective(error)  # the first process writes this line for all that are left
    if log is not None and not lost and log.exists():
        with contextlib.suppress(OSError), open(log, "a") as file:
            file.write(text + "\n")


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
        config = parse(TrainConfig, argv[:at] + argv[at + 2 :], prog, config)
    else:
        config = parse(TrainConfig, argv, prog)
        if config.recipe is not None or config.features is not None:
            default = defaults(config)
            if config.features is not None:
                default = dataclasses.replace(default, **tower_names(location(config.features, config.store)))
            config = parse(TrainConfig, argv, prog, default)
    return fill_batch(config.check(), int(os.environ.get("WORLD_SIZE", 1)))


def _checkpoint(config: TrainConfig) -> Path | None:
    """Return the checkpoint to continue from; None without --resume, and for "latest" in a folder without checkpoints,
    where the run begins.
    """
    if config.resume is None:
        return None
    if config.resume == "latest":
        return newest(config.folder / "checkpoints")
    path = Path(config.resume)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"resume: {path} {what}, expected latest or a checkpoint such as checkpoints/step_00001000.pt")
    return path


def _refuse_to_overwrite(config: TrainConfig) -> None:
    if config.resume is None and newest(config.folder / "checkpoints"):
        raise ValueError(
            f"name: got {config.name!r}, but {config.folder} has checkpoints of an earlier run; expected "
            "--resume latest or another --name"
        )
