"""`pacl evaluate segmentation`: its options, its result files and its output."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn

from ..commands import LEFT_OUT
from ..files import write_bytes
from ..flags import parse
from ..formats import one_line
from ..processes import place_in
from ..readings import READINGS
from ..segment.draw import png
from ..towers import Towers
from .options import DatasetOptions
from .own_data import own_name, segmentation_data
from .results import SEGMENTATION, aligned, names_of, number, tables, write_row
from .segmentation_check import check_segmentation
from .segmentation_data import SegmentationData
from .segmentation_measure import Measured, SegmenterPredictor, check_background, evaluate_segmentation
from .segmentation_pictures import contact_sheet
from .specs import OWN, Protocol, protocol, spec


@dataclass(frozen=True, kw_only=True)
class SegmentationOptions(DatasetOptions):
    """Measure zero-shot segmentation: aAcc, mIoU, mAcc and the IoU of every class, as a table and a JSON file for each
    dataset.
    """

    dataset: tuple[str, ...] = ()
    """One or more of voc21, context60, object81, voc20, cityscapes, context59, ade150, stuff171, stuff27, ade847, or
    folder: your own images/, masks/ and classes.txt in --data-root."""
    protocol: str = "tcl"
    """Protocol, recorded in every result: tcl, dino.txt, paper, present, or a JSON file."""
    stride: int | None = None
    """Tokens per patch along each side, instead of the protocol's; recorded in the protocol's name."""
    threshold: float | None = None
    """Cosine below which a pixel is background, instead of the protocol's rule; recorded in the protocol's name."""
    tokens: str | None = None
    """Reading of the patch tokens, plain, value, maskclip, sclip, clearclip, naclip, kk, rcs, gem, scclip or proxy;
    several with commas between; or all (proxy only with --proxy), for a table. Default: the checkpoint's, or plain."""
    check: bool = False
    """Check the data instead of measuring: counts, damaged files, shifted labels, and one picture."""


def main(argv: Sequence[str], prog: str = "pacl evaluate segmentation") -> int:
    """Run `pacl evaluate segmentation` and return its exit status."""
    options = parse(SegmentationOptions, argv, prog)
    if not options.dataset:
        raise ValueError("dataset: got none, expected one or more of those in pacl evaluate segmentation --help")
    if options.check:
        return _check(options)
    changes: dict[str, Any] = {} if options.stride is None else {"stride": options.stride}
    if options.threshold is not None:
        changes["background"] = {"rule": "threshold", "value": options.threshold}
    rules = protocol(options.protocol, **changes)
    # Open every dataset before spending hours on the first.
    sets = [segmentation_data(name, **options.reading) for name in options.dataset]
    for data in sets:
        check_background(data, rules)
    group = options.group()
    first = place_in(group)[0] == 0
    several = _several(options)
    if several and options.checkpoint:
        raise ValueError(
            f"tokens: got {options.tokens} with --checkpoint, expected none: an embedder has the reading that it was "
            "trained on"
        )
    towers, embedder = (dataclasses.replace(options, tokens=None, proxy=None) if several else options).load()
    read = [towers.read(x, options.proxy if x == "proxy" else None) for x in several] or [towers]
    rows = [_measure(data, each, embedder, rules, options, group, first) for each in read for data in sets]
    if first:
        print(("\n" + tables(rows) + "\n" if len(rows) > 1 else "") + options.next_command())
    return 0


def _several(options: SegmentationOptions) -> list[str]:
    """Return the readings to compare, none if the options name one alone."""
    tokens = options.tokens or ""
    if tokens == "all":
        return [name for name in READINGS if name != "proxy" or options.proxy]
    return tokens.split(",") if "," in tokens else []


def _measure(
    data: SegmentationData,
    towers: Towers,
    embedder: nn.Module | None,
    rules: Protocol,
    options: SegmentationOptions,
    group: dist.ProcessGroup | None,
    first: bool,
) -> dict[str, Any]:
    predict = SegmenterPredictor(towers, embedder, data, rules)
    measured = evaluate_segmentation(data, predict, rules, group=group)
    row = result_row(data, rules, measured, **names_of(towers, options.checkpoint))
    if first:
        path = write_row(options.out, row)
        sheet = path.with_suffix(".png")
        write_bytes(sheet, png(contact_sheet(data, predict, rules, measured)))
        print(class_table(row, data))
        for warning in measured.warnings:
            print(one_line(f"warning: {warning}"), file=sys.stderr)
        print(f"{path}\n{sheet}", flush=True)
    return row


def _check(options: SegmentationOptions) -> int:
    bad = 0
    for name in options.dataset:
        known = own_name(options.data_root).replace(":", "-") if name == OWN else spec(name).name
        picture = options.out / f"{known}_check.png"
        found = check_segmentation(name, options.data_root, class_file=options.class_file, picture=picture)
        print(f"{found.text()}\n{picture}", flush=True)
        bad += bool(found.problems)
    return LEFT_OUT if bad else 0


def result_row(
    data: SegmentationData,
    protocol: Protocol,
    measured: Measured,
    *,
    model: str,
    pretrained: str | None = None,
    tokens: str = "plain",
    embedder: str | None = None,
) -> dict[str, Any]:
    """Return the content of a result file: the measures and everything needed to compare them.

    model, pretrained: open_clip's names. tokens: the reading. embedder: the PACL embedder's name, None for the model
    alone.
    """
    return {
        "dataset": data.spec.name,
        "model": model,
        "pretrained": pretrained,
        "tokens": tokens,
        "embedder": embedder,
        "task": SEGMENTATION,
        "language": "en",
        "protocol": dataclasses.asdict(protocol),
        "classes": {"count": len(data.classes), "sha256": data.class_hash, "background": data.spec.background},
        "layout": data.layout,
        "images": len(data),
        "images_of_the_set": data.spec.count[0],
        "metrics": measured.metrics,
        "chance_mIoU": round(measured.chance, 2),
        "warnings": measured.warnings,
    }


def class_table(row: dict[str, Any], data: SegmentationData) -> str:
    """Format a row's measures per class as text."""
    metrics = row["metrics"]
    lines = [["class", "IoU", "Acc"]]
    lines += [[name, number(metrics["IoU"][name]), number(metrics["Acc"][name])] for name in metrics["IoU"]]
    means = "  ".join(f"{name} {number(metrics[name])}" for name in ("aAcc", "mIoU", "mAcc"))
    head = f"{data.spec.title}, protocol {row['protocol']['name']}, {row['images']} images"
    return "\n".join([head, *aligned(lines), means])
