"""`pacl data`: pack any source of pairs into shards, or check it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ..commands import LEFT_OUT, Main, next_command, run_command
from ..failures import sentence
from ..flags import parse
from ..formats import one_line
from .flags import PairFlags, given_flags, plan_of

if TYPE_CHECKING:
    from .samples import Samples


TOWERS = ("--model", "ViT-B-16", "--pretrained", "openai")  # of the next command, the training


@dataclass(frozen=True, kw_only=True)
class DataFlags(PairFlags):
    source: Annotated[str, tyro.conf.Positional]
    """Image-caption pairs in local files: shards (`a-{000..015}.tar::b.tar`), a folder of them, a .csv or .tsv file,
    a folder of images with .txt files, an annotation .json of COCO captions, or synthetic."""
    scenes: int = 10_000
    """Number of generated scenes, if SOURCE is synthetic."""
    masks: bool = False
    """Require a mask, .mask.png, of every sample."""

    def read(self, **options: Any) -> Samples:
        return self.open(self.source, scenes=self.scenes, masks=self.masks, max_bad_share=1.0, **options)


@dataclass(frozen=True, kw_only=True)
class PackConfig(DataFlags):
    """Write webdataset shards. Images are copied byte for byte. The processes that torchrun starts share the pairs."""

    out: Path
    """Folder to write to; it must hold no shards. The same command continues a run that was stopped."""
    shard_size: int = 10_000
    """Most pairs in one shard; shards are of equal size."""
    shuffle: bool = False
    """Write the pairs in random order; pairs from shards are shuffled 2,000 at a time."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class CheckConfig(DataFlags):
    """Count the pairs, decode some of them, and show problems (exit status 3): bad samples, captions that are cut, tiny
    images, repetitions, and images and texts that lack the other.
    """

    sample: int = 1000
    """Number of pairs to decode; 0 decodes all."""
    model: str = "ViT-B-16"
    """Model of open_clip whose tokenizer measures the captions."""
    json: bool = False
    """Print the report as JSON."""


def main(argv: Sequence[str], prog: str = "pacl data") -> int:
    """Run `pacl data` with these arguments and return its exit status."""
    return run_command(ACTIONS, argv, prog, "Prepare image-caption pairs for training.")


def _run(flags: type[DataFlags], action: Callable[[Any], int], argv: Sequence[str], prog: str) -> int:
    """Run an action with its flags and return its exit status."""
    try:
        return action(parse(flags, argv, prog))
    except (ValueError, OSError) as error:
        print(f"pacl: error: {sentence(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if flags is PackConfig:
            print("stopped; the same command continues", file=sys.stderr)
        raise


def _pack(config: PackConfig) -> int:
    import torch.distributed as dist  # torch takes seconds, which --help should not

    from ..processes import add_up, gather_objects, patient_group, place_in, shared_progress
    from .check import EXAMPLES
    from .pack import bad_before, pack
    from .samples import no_image
    from .shards import INCOMPLETE

    bad: list[tuple[str, str, str]] = []
    source = config.read(shuffle=2000 if config.shuffle else 0, seed=config.seed).with_options(
        transform=no_image,
        on_skip=lambda reason, key, error: bad.append((reason, key, error)) if len(bad) < EXAMPLES else None,
    )
    plan = plan_of(config, "out", "shard_size")
    mine = not dist.is_initialized()  # leave a caller's group as it is
    try:
        group = patient_group()
        resumed = (config.out / INCOMPLETE).exists()
        with shared_progress("Packed", None, "pair", group) as progress:
            options: dict[str, Any] = {"plan": plan, "progress": progress.step, "group": group}
            sizes = pack(source, config.out, shard_size=config.shard_size, **options)
        add_up(source.counts, group)
        bad = sum(gather_objects(bad, group), [])[:EXAMPLES]
        rank = place_in(group)[0]
    finally:
        if mine and dist.is_initialized():
            dist.destroy_process_group()
    if rank == 0:
        for reason, key, error in bad:
            print(one_line(f"bad: {key}: {reason}: {error}"))
        if not sizes:
            raise ValueError(source.complaint())
        for line in source.remarks():
            print(one_line(line))
        skipped = source.reasons + (" since it was continued" if resumed else "")
        print(f"packed {sum(sizes.values()):,} pairs in {len(sizes):,} shard(s): {config.out}; skipped: {skipped}")
        print(next_command("train", "--train-data", config.out, *TOWERS))
    return 1 if not sizes else LEFT_OUT if any(source.skipped.values()) or bad_before(config.out) else 0


def _check(config: CheckConfig) -> int:
    from .check import check, describe

    report = check(config.read(), config.sample, model=config.model)
    problems, bad = report["problems"], sum(report["bad"].values())
    usable = report["pairs"] > 0 and bad < report["decoded"]
    if config.json:
        print(json.dumps(report, indent=2))
        print(*map(one_line, problems), sep="\n", file=sys.stderr, end="\n" if problems else "")
    else:
        print(describe(report))
        if usable:
            print(_next(config, bad > 0))
    return (LEFT_OUT if usable else 1) if problems else 0


def _next(config: CheckConfig, bad: bool) -> str:
    """Return the line that names the next command: one that leaves bad pairs out, or the training."""
    source, flags = config.source, given_flags(config)
    if bad:
        masks = ["--masks"] if config.masks else []
        return next_command("data", "pack", source, *flags, *masks, "--out", "packed")
    return next_command("train", "--train-data", source, *flags, *TOWERS)


ACTIONS: dict[str, tuple[str | Main, str]] = {
    "pack": (partial(_run, PackConfig, _pack), "Write pairs of any format as webdataset shards."),
    "check": (partial(_run, CheckConfig, _check), "Count pairs, decode some of them, and show problems."),
}
