"""Results as JSON rows and text tables; rows of different protocols are never in one table."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import write_bytes
from ..towers import Towers
from .data import SegmentationData
from .measure import Measured
from .specs import Protocol, datasets, fingerprint, spec


def result_row(
    data: SegmentationData,
    protocol: Protocol,
    measured: Measured,
    *,
    model: str,
    pretrained: str | None = None,
    embedder: str | None = None,
) -> dict[str, Any]:
    """What a result file holds: the measures, and everything without which they cannot be compared.

    model, pretrained: open_clip's names. embedder: that of a PACL embedder, None for the model alone.
    """
    return {
        "dataset": data.spec.name,
        "model": model,
        "pretrained": pretrained,
        "embedder": embedder,
        "task": "zeroshot_segmentation",
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


def names_of(towers: Towers, checkpoint: str | None) -> dict[str, str | None]:
    """How a row calls the model: without the folders of this machine, and a run's `embedder` by the run's name."""
    model, pretrained, vision = (towers.names[name] for name in ("model", "pretrained", "vision_model"))
    if model.startswith("local-dir:"):
        model = Path(model).name
    if pretrained and Path(pretrained).is_file():
        pretrained = Path(pretrained).name
    if checkpoint and Path(checkpoint).is_dir():
        folder = Path(checkpoint).resolve()
        checkpoint = folder.parent.name if folder.name == "embedder" else folder.name
    model += f" with {vision}" if vision else ""
    return {"model": model, "pretrained": pretrained, "embedder": checkpoint}


def write_row(folder: Path, row: dict[str, Any]) -> Path:
    """Write a row as DATASET_MODEL_PROTOCOL.json into `folder`; returns its path."""
    parts = [row["dataset"], *_model(row), row["protocol"]["name"]]
    name = "_".join(re.sub(r"[^A-Za-z0-9.=-]+", "-", part).strip("-.") for part in parts if part)
    path = folder / f"{name}.json"
    write_bytes(path, (json.dumps(row, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode())
    return path


def read_row(path: Path) -> dict[str, Any]:
    """A row that write_row wrote; ValueError for another file."""
    try:
        row = json.loads(Path(path).read_bytes())
        spec(row["dataset"]), row["protocol"]["name"], row["metrics"]["mIoU"], _model(row)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"results: {path} is not a result of pacl evaluate segmentation ({error})") from error
    return row


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """mIoU of models by data set, a table per protocol: sets with background, the others and their mean.

    A star marks a number of a part of the official images, an exclamation mark one with a warning, # other class names.
    """
    by_protocol: dict[str, list] = {}
    for row in rows:
        by_protocol.setdefault(json.dumps(row["protocol"], sort_keys=True), []).append(row)
    return "\n\n".join(_table(group) for group in by_protocol.values())


def class_table(row: dict[str, Any], data: SegmentationData) -> str:
    """A row's measures per class."""
    metrics = row["metrics"]
    lines = [["class", "IoU", "Acc"]]
    lines += [[name, _number(metrics["IoU"][name]), _number(metrics["Acc"][name])] for name in metrics["IoU"]]
    means = "  ".join(f"{name} {_number(metrics[name])}" for name in ("aAcc", "mIoU", "mAcc"))
    head = f"{data.spec.title}, protocol {row['protocol']['name']}, {row['images']} images"
    return "\n".join([head, *_aligned(lines), means])


def _table(rows: list[dict[str, Any]]) -> str:
    present = [name for name in datasets() if any(row["dataset"] == name for row in rows)]
    models = list(dict.fromkeys(map(_model, rows)))
    lines = [["mIoU", *(spec(name).column for name in present), "Avg"]]
    for model in models:
        cells, values = [], []
        for name in present:
            row = next((x for x in reversed(rows) if _model(x) == model and x["dataset"] == name), None)
            cells.append("-" if row is None else _cell(row))
            values.append(None if row is None else row["metrics"]["mIoU"])
        mean = None if None in values else sum(values) / len(values)
        lines.append([" ".join(model), *cells, _number(mean)])
    return "\n".join([f"protocol {rows[0]['protocol']['name']}", *_aligned(lines)])


def _model(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[key] for key in ("model", "pretrained", "embedder") if row[key])


def _cell(row: dict[str, Any]) -> str:
    official = spec(row["dataset"])
    marks = "*" if row["images"] not in official.count else ""
    marks += "#" if row["classes"]["sha256"] != fingerprint([[name] for name in official.classes]) else ""
    return _number(row["metrics"]["mIoU"]) + marks + ("!" if row["warnings"] else "")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _aligned(lines: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
