"""`pacl evaluate`: segmentation of data sets, tables of the results, and the tasks of tasks.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch.distributed as dist
import tyro

from ..files import write_bytes
from ..processes import choose_device, process_group
from ..segment.draw import png
from ..sharing import load_model
from ..towers import Towers
from .check import check_segmentation
from .data import SegmentationData
from .measure import check_background, evaluate_segmentation
from .report import class_table, names_of, read_result, result_row, tables, write_row
from .sheet import contact_sheet
from .specs import Protocol, protocol, spec


@dataclass(frozen=True)
class SegmentationConfig:
    """Zero-shot segmentation of data sets: aAcc, mIoU, mAcc and every class's IoU, as a table and a JSON file each."""

    data_root: Path
    """Folder of the data set, or the one above it that mmsegmentation calls data."""
    dataset: tuple[str, ...] = ()
    """voc21, context60, object81, voc20, cityscapes, context59, ade150, stuff171, stuff27, ade847; one or more."""
    checkpoint: str | None = None
    """Folder of a PACL embedder, or its name on the Hub; without it the open_clip model alone is measured."""
    model: str = "ViT-B-16"
    """open_clip's name, where no checkpoint names it."""
    pretrained: str | None = None
    """Tag or file of the model's weights, which a model by its name must have."""
    protocol: str = "tcl"
    """tcl, dino.txt, paper, present, or a JSON file; it is written into every result."""
    stride: int | None = None
    """Tokens along a side per patch, instead of the protocol's; changes its name."""
    threshold: float | None = None
    """Cosine below which a pixel is background, instead of the protocol's rule; changes its name."""
    class_file: Path | None = None
    """Other class names: a class per line in the labels' order, synonyms separated by commas."""
    limit: int | None = None
    """Only so many images, spread over the set."""
    partial: bool = False
    """Accept a data set that lacks images; the result says so."""
    check: bool = False
    """Only look at the data: counts, damaged files, shifted labels, one picture."""
    out: Path = Path("results")
    """Folder for JSON files and contact sheets."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""


def main(argv: Sequence[str], prog: str = "pacl evaluate") -> int:
    """Run `pacl evaluate` with these arguments; returns its exit status."""
    from .tasks import TASKS

    tasks = {"segmentation": _segmentation, "table": _table} | TASKS
    if not argv or argv[0] not in tasks:
        print(f"usage: {prog} {{{','.join(tasks)}}} ...; {prog} segmentation --help", file=sys.stderr)
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    mine = not dist.is_initialized()  # a caller's group stays
    try:
        return tasks[argv[0]](argv[1:], f"{prog} {argv[0]}")
    except (ValueError, OSError) as error:
        print(f"pacl: error: {error}", file=sys.stderr)
        return 1
    finally:
        if mine and dist.is_initialized():
            dist.destroy_process_group()


def _segmentation(argv: Sequence[str], prog: str) -> int:
    config = tyro.cli(SegmentationConfig, args=list(argv), prog=prog)
    if not config.dataset:
        raise ValueError("dataset: got none, expected one or more of pacl evaluate segmentation --help")
    if config.check:
        return _check(config)
    changes = {} if config.stride is None else {"stride": config.stride}
    if config.threshold is not None:
        changes["background"] = {"rule": "threshold", "value": config.threshold}
    rules = protocol(config.protocol, **changes)
    # All data sets are looked at before hours are spent on the first.
    sets = [
        SegmentationData(
            name, config.data_root, class_file=config.class_file, partial=config.partial, limit=config.limit
        )
        for name in config.dataset
    ]
    for data in sets:
        check_background(data, rules)
    device = choose_device(config.device)
    group = process_group(device)
    first = group is None or dist.get_rank() == 0
    towers, embedder = load_model(config.checkpoint, config.model, config.pretrained, device)
    rows = [_measure(data, towers, embedder, rules, config, group, first) for data in sets]
    if first and len(rows) > 1:
        print("\n" + tables(rows))
    return 0


def _measure(data: SegmentationData, towers: Towers, embedder, rules: Protocol, config, group, first: bool) -> dict:
    from .predictor import SegmenterPredictor

    predict = SegmenterPredictor(towers, embedder, data, rules)
    measured = evaluate_segmentation(data, predict, rules, group=group)
    row = result_row(data, rules, measured, **names_of(towers, config.checkpoint))
    if first:
        path = write_row(config.out, row)
        sheet = path.with_suffix(".png")
        write_bytes(sheet, png(contact_sheet(data, predict, rules, measured)))
        print(class_table(row, data))
        for warning in measured.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        print(f"{path}\n{sheet}", flush=True)
    return row


def _check(config: SegmentationConfig) -> int:
    bad = 0
    for name in config.dataset:
        picture = config.out / f"{spec(name).name}_check.png"
        found = check_segmentation(name, config.data_root, class_file=config.class_file, picture=picture)
        print(f"{found.text()}\n{picture}", flush=True)
        bad += bool(found.problems)
    return 1 if bad else 0


@dataclass(frozen=True)
class TableConfig:
    """mIoU of many results, a table per protocol: * a part of the images, # other class names, ! a warning; of other
    tasks all measures, a table per task, data set and protocol."""

    results: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """JSON files of pacl evaluate."""


def _table(argv: Sequence[str], prog: str) -> int:
    config = tyro.cli(TableConfig, args=list(argv), prog=prog)
    print(tables([read_result(path) for path in config.results]))
    return 0
