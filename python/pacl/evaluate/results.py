"""Results as JSON rows and text tables, and `pacl evaluate table`; each protocol has tables of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

import tyro

from ..annotations import checked
from ..files import write_bytes
from ..flags import parse
from ..formats import printable
from ..settings import read_settings
from ..towers import Towers
from .specs import OWN, datasets, fingerprint, spec

SEGMENTATION = "zeroshot_segmentation"


class _Protocol(TypedDict):
    name: str


class _MoreProtocol(_Protocol, total=False):
    form: str
    attn_temperature: float | None


class _Row(TypedDict):
    task: str
    dataset: str
    model: str
    pretrained: str | None
    embedder: str | None
    protocol: _MoreProtocol
    metrics: dict[str, Any]


class Row(_Row, total=False):
    """A result of any task, as far as tables show it."""

    images: int
    tokens: str
    warnings: list[str]


class _Classes(TypedDict):
    sha256: str


class _Means(TypedDict):
    mIoU: float | None


class SegmentationRow(TypedDict):
    """A result of zero-shot segmentation, as far as tables show it."""

    images: int
    warnings: list[str]
    classes: _Classes
    metrics: _Means


def names_of(towers: Towers, checkpoint: str | None) -> dict[str, Any]:
    """Return a row's names of the model: without local folders; a run's `embedder` gets the name of the run."""
    model, pretrained, vision = (towers.names[name] for name in ("model", "pretrained", "vision_model"))
    text = towers.names.get("text_model")
    if model.startswith("local-dir:"):
        model = Path(model).name
    if pretrained and Path(pretrained).is_file():
        pretrained = Path(pretrained).name
    if checkpoint and Path(checkpoint).is_dir():
        folder = Path(checkpoint).resolve()
        checkpoint = folder.parent.name if folder.name == "embedder" else folder.name
    model += f" with {vision}" if vision else ""
    model += f" with {Path(text).name}" if text else ""
    return {"model": model, "pretrained": pretrained, "tokens": towers.reading, "embedder": checkpoint}


def write_row(folder: Path, row: dict[str, Any]) -> Path:
    """Write a row as DATASET_MODEL_PROTOCOL.json into `folder` and return its path."""
    parts = [row["dataset"], *model_of(row), row["protocol"]["name"]]
    name = "_".join(re.sub(r"[^A-Za-z0-9.=-]+", "-", part).strip("-.") for part in parts if part)
    path = folder / f"{name}.json"
    write_bytes(path, (json.dumps(row, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode())
    return path


def read_result(path: Path) -> dict[str, Any]:
    """Read a row of any task that write_row wrote; raises ValueError for any other file."""
    try:
        row = checked(read_settings(path), Row, path)
        if row["task"] == SEGMENTATION:
            checked(row, SegmentationRow, path)
            if not _is_own(row):
                spec(row["dataset"])
        else:
            checked(row["metrics"], dict[str, float | None], path, "metrics")
    except ValueError as error:
        reason = str(error).removeprefix(f"{path} is damaged: ")
        raise ValueError(f"results: {path} is not a result of pacl evaluate ({reason})") from error
    return row


@dataclass(frozen=True)
class Table:
    """Table of results. lines: rows of cells; the first is the head."""

    title: str
    protocol: dict[str, Any]
    lines: list[list[str]]


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Format segmentation_tables and metric_tables of the rows as text."""
    parts = [[row for row in rows if (row["task"] == SEGMENTATION) == is_it] for is_it in (True, False)]
    found = segmentation_tables(parts[0]) + metric_tables(parts[1])
    return "\n\n".join("\n".join([printable(x.title), *aligned(x.lines)]) for x in found)


def segmentation_tables(rows: Sequence[dict[str, Any]], names: Sequence[str] | None = None) -> list[Table]:
    """Tabulate mIoU of models by dataset, a table per protocol: sets with background first, then the others, the mean.

    * marks a number from a part of the official images, ! one with a warning, # one with other class names. names: of
    the rows' models (default: those in the rows); among rows with the same name and dataset the last one counts.
    """
    return [_table(group) for group in _grouped(rows, names, lambda row: row["protocol"])]


def metric_tables(rows: Sequence[dict[str, Any]], names: Sequence[str] | None = None) -> list[Table]:
    """Tabulate all measures of the other tasks, a table per task, dataset (with its classes) and protocol.

    The form and the attention temperature of φ belong to the model, not to the protocol, and have a column.
    """

    def kind(row: dict[str, Any]) -> list:
        protocol = {name: x for name, x in row["protocol"].items() if name not in ("form", "attn_temperature")}
        return [row["task"], row["dataset"], row.get("classes"), protocol]

    return [_metric_table(group) for group in _grouped(rows, names, kind)]


def _grouped(
    rows: Sequence[dict[str, Any]], names: Sequence[str] | None, kind: Callable[[dict[str, Any]], Any]
) -> list[list[tuple[str, dict]]]:
    """Group (name, row) pairs by `kind(row)`."""
    groups: dict[str, list] = {}
    names = [" ".join(model_of(row)) for row in rows] if names is None else names
    for name, row in zip(names, rows, strict=True):
        groups.setdefault(json.dumps(kind(row), sort_keys=True), []).append((name, row))
    return list(groups.values())


def _table(group: list[tuple[str, dict[str, Any]]]) -> Table:
    found = dict.fromkeys(row["dataset"] for _, row in group)
    own = dict.fromkeys(row["dataset"] for _, row in group if _is_own(row))
    present = [*(name for name in datasets() if name in found), *own]
    columns = [name.partition(":")[2] if name in own else spec(name).column for name in present]
    protocol = group[0][1]["protocol"]
    lines = [["mIoU", *columns, "Avg", "protocol"]]  # in each row, because rows are copied without the title
    for model in dict.fromkeys(model for model, _ in group):
        cells: list[str] = []
        values: list[Any] = []
        for name in present:
            row = next((x for given, x in reversed(group) if given == model and x["dataset"] == name), None)
            cells.append("-" if row is None else _cell(row))
            values.append(None if row is None else row["metrics"]["mIoU"])
        mean = None if None in values else sum(values) / len(values)
        lines.append([model, *cells, number(mean), protocol["name"]])
    return Table(f"protocol {protocol['name']}", protocol, lines)


def _metric_table(group: list[tuple[str, dict[str, Any]]]) -> Table:
    first = group[0][1]
    metrics = list(dict.fromkeys(name for _, row in group for name in row["metrics"]))
    lines = [["model", "images", "φ", *metrics]]
    for model, row in group:
        rules, found = row["protocol"], row["metrics"]
        phi = f"{rules['form']}, τ {rules.get('attn_temperature')}" if "form" in rules else "-"
        cells = ("-" if found.get(name) is None else f"{found[name]:.4f}" for name in metrics)
        lines.append([model, str(row.get("images", "-")), phi, *cells])
    rules = {name: x for name, x in first["protocol"].items() if name not in ("form", "attn_temperature")}
    return Table(f"{first['task']}, {first['dataset']}, protocol {rules['name']}", rules, lines)


def model_of(row: dict[str, Any]) -> tuple[str, ...]:
    """Return the parts of a row's model name, as tables show them: with its reading, if that is not the plain one."""
    parts = row["model"], row["pretrained"], row.get("tokens", "plain"), row["embedder"]
    return tuple(part for part in parts if part and part != "plain")


def _cell(row: dict[str, Any]) -> str:
    if _is_own(row):  # its class file is its own, and never another than the official one
        marks = "*" if row["images"] != row.get("images_of_the_set") else ""
    else:
        official = spec(row["dataset"])
        marks = "*" if row["images"] not in official.count else ""
        marks += "#" if row["classes"]["sha256"] != fingerprint(official.synonyms) else ""
    return number(row["metrics"]["mIoU"]) + marks + ("!" if row["warnings"] else "")


def _is_own(row: dict[str, Any]) -> bool:
    return row["dataset"].startswith(f"{OWN}:")


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def aligned(lines: list[list[str]]) -> list[str]:
    lines = [[printable(cell) for cell in line] for line in lines]  # cells come from files
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]


@dataclass(frozen=True)
class TableOptions:
    """Print results side by side. Segmentation: mIoU, in a table per protocol, where * marks a part of the images,
    # other class names and ! a warning. Other tasks: all measures, in a table per task, dataset and protocol.
    """

    results: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """JSON files written by pacl evaluate."""


def main(argv: Sequence[str], prog: str = "pacl evaluate table") -> int:
    """Run `pacl evaluate table` and return its exit status."""
    options = parse(TableOptions, argv, prog)
    print(tables([read_result(path) for path in options.results]))
    return 0
