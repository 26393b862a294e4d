"""`pacl compare`: one page with the settings, curves, results and segmentations of several runs."""

from __future__ import annotations

import string
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..commands import LEFT_OUT
from ..evaluate.plots import MISSING, plot_png, series
from ..evaluate.results import SEGMENTATION, Table, metric_tables, model_of, segmentation_tables
from ..files import write_bytes
from ..flags import parse
from ..formats import printable
from ..page import Page, Picture
from ..sharing import TOLERANCE
from ..training.config import NOTES
from .config import CompareConfig
from .entries import Entry, curve, is_number, read_entry
from .pictures import add_pictures

CURVES = {  # for each file, the measures to draw and their titles
    "train": {"train/contrastive_loss": "training loss"},
    "validation": {
        "clip_val_loss": "validation loss",
        "image_to_text_R@1": "image to text R@1",
        "text_to_image_R@1": "text to image R@1",
        "mIoU": "mIoU",
        "patch_accuracy": "patch accuracy",
    },
}
TRAINED_AS = ("steps", "global_batch", "pairs_seen", "form", "loss", "attn_temperature", "logit_scale")
LOWER = ("clip_val_loss",)  # measures of which the lower value is better
NOT_SETTINGS = (*NOTES, "name")


def main(argv: Sequence[str], prog: str = "pacl compare") -> int:
    """Run `pacl compare` and return its exit status."""
    config = parse(CompareConfig, argv, prog)
    if (config.images is None) != (config.words is None):
        raise ValueError(f"images: got {config.images} with --words {config.words}, expected both or neither")
    entries = [read_entry(path) for path in dict.fromkeys(config.entries)]
    notes = [note for entry in entries for note in entry.notes]
    left_out = sum(entry.left_out for entry in entries)
    entries = [entry for entry in entries if entry.trained or entry.results]
    if not entries:
        raise ValueError(
            f"entries: got nothing to compare ({'; '.join(notes) or 'none given'}), expected runs, embedders or results"
        )
    told = len(notes)
    page = make_page(entries, notes, config)
    write_bytes(config.out, page.render())
    for note in notes:
        print(printable(f"note: {note}"), file=sys.stderr)
    print(f"{config.out}\nNext: open {config.out} in a browser")
    left_out += sum("--most-images" not in note for note in notes[told:])  # those are left out on purpose
    return LEFT_OUT if left_out else 0


def make_page(entries: list[Entry], notes: list[str], config: CompareConfig) -> Page:
    """Make the page. It ends with `notes`, to which this function adds everything that turns out to be missing."""
    runs = {f"{_letter(i)} {entry.name}": entry for i, entry in enumerate(x for x in entries if x.trained)}
    page = Page("pacl compare: " + ", ".join(runs or [str(entry.path) for entry in entries]))
    if runs:
        _runs(page, runs)
        _settings(page, runs)
        _validation(page, runs)
        _curves(page, runs)
    _results(page, entries)
    if config.images is not None:
        add_pictures(page, runs, config, notes)
    if notes:
        page.heading("Notes")
        for note in notes:
            page.text(note)
    return page


def _letter(i: int) -> str:
    """Return A to Z, then A2, ..."""
    turn, place = divmod(i, 26)
    return string.ascii_uppercase[place] + (str(turn + 1) if turn else "")


def _runs(page: Page, runs: dict[str, Entry]) -> None:
    page.heading("Runs")
    rows = [["folder", *(str(entry.path) for entry in runs.values())]]
    notes = [entry.described | entry.described.get("training", {}) for entry in runs.values()]
    for name in TRAINED_AS:
        if any(name in x for x in notes):
            rows.append([name, *(_value(x.get(name)) for x in notes)])
    towers = [_towers(entry) for entry in runs.values()]
    rows.append(["towers", *(_tower_names(x) for x in towers)])
    page.table(["", *runs], rows)
    described = {name: entry.described.get("towers", {}) for name, entry in runs.items()}
    prints = {name: x["fingerprint"] for name, x in described.items() if "fingerprint" in x}
    first = next(iter(prints), "")
    other = [name for name, x in prints.items() if not _same(x, prints[first])]
    if other:
        page.note(f"By their fingerprints, the towers of {', '.join(other)} differ from those of {first}.")


def _towers(entry: Entry) -> dict[str, Any]:
    """Return the towers of the embedder, or without one those of the settings."""
    found = entry.described.get("towers")
    return found if isinstance(found, dict) and found else entry.config


def _same(one: dict[str, list[float]], other: dict[str, list[float]]) -> bool:
    """Return whether two fingerprints agree within the rounding of different machines."""
    if one.keys() != other.keys() or any(len(one[x]) != len(other[x]) for x in one):
        return False
    pairs = [(np.array(one[x]), np.array(other[x])) for x in one]
    return all(np.linalg.norm(a - b) <= TOLERANCE[torch.float32] * np.linalg.norm(b) for a, b in pairs)


def _tower_names(towers: dict[str, Any]) -> str:
    others = "".join(f" with {towers[name]}" for name in ("vision_model", "text_model") if towers.get(name))
    pretrained = f" {towers['pretrained']}" if towers.get("pretrained") else ""
    tokens = towers.get("tokens", "plain")
    return f"{towers.get('model', '-')}{pretrained}{others}" + (f", {tokens} tokens" if tokens != "plain" else "")


def _settings(page: Page, runs: dict[str, Entry]) -> None:
    known = {name: entry for name, entry in runs.items() if entry.config}
    if not known:
        return
    names = [name for entry in known.values() for name in entry.config if name not in NOT_SETTINGS]
    rows = [[name, *(_value(entry.config.get(name)) for entry in known.values())] for name in dict.fromkeys(names)]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    page.heading("Settings that differ")
    if rows:
        page.table(["", *known], rows)
    else:
        page.text("None." if len(known) > 1 else "Only one run has settings.")


def _validation(page: Page, runs: dict[str, Entry]) -> None:
    known = {name: entry for name, entry in runs.items() if entry.validation}
    if not known:
        return
    page.heading("Validation")
    measures = list(dict.fromkeys(name for entry in known.values() for row in entry.validation for name in row))
    measures = [x for x in measures if x not in ("step", "epoch")]
    rows: list[list[str]] = []
    best: set[tuple[int, int]] = set()
    for measure in measures:
        better = min if measure in LOWER else max
        lines = {name: curve(entry.validation, measure) for name, entry in known.items()}
        if not any(values for _, values in lines.values()):
            continue
        last = [values[-1] if values else None for _, values in lines.values()]
        row = [measure]
        for steps, values in lines.values():
            if values:
                top = better(values)
                row += [f"{values[-1]:.4f}", f"{top:.4f} at {steps[values.index(top)]:,}"]
            else:
                row += ["-", "-"]
        winner = better(x for x in last if x is not None)
        best |= {(len(rows), 1 + 2 * i) for i, x in enumerate(last) if x == winner and len(known) > 1}
        rows.append(row)
    different = [
        name
        for name in ("val_data", "val_segmentation", "val_classes")
        if len({str(entry.config.get(name)) for entry in known.values()}) > 1
    ]
    head = [x for name, entry in known.items() for x in (f"{name}, last", f"best of {len(entry.validation)}")]
    page.table(["", *head], rows, best=() if different else best)
    ends = ", ".join(f"{name} {entry.validation[-1]['step']:,}" for name, entry in known.items())
    page.note(f"Measures are fractions, except the loss. Steps of the last validation: {ends}.")
    if different:
        page.text(f"The runs differ in {' and '.join(different)}, so their numbers come from different data.")


def _curves(page: Page, runs: dict[str, Entry]) -> None:
    drawn = False
    for kind, measures in CURVES.items():
        for measure, title in measures.items():
            lines = {name: curve(getattr(entry, kind), measure) for name, entry in runs.items()}
            if not any(steps for steps, _ in lines.values()):
                continue
            if not drawn:
                page.heading("Curves")
                notes = [entry.described.get("training", {}) for entry in runs.values()]
                batches = {str(x["global_batch"]) for x in notes if x.get("global_batch") is not None}
                if len(batches) > 1:
                    page.text("The runs have different batch sizes, so losses and equal steps do not compare.")
            drawn = True
            made = plot_png((6, 3.6), series(lines, title))
            if made is None:
                page.note(f"No plots: {MISSING}")
                return
            page.picture(Picture(made, f"{title} by step"))


def _results(page: Page, entries: list[Entry]) -> None:
    found = [(entry, row) for entry in entries for row in entry.results]
    if not found:
        return
    page.heading("Results of pacl evaluate")
    rows, names = [row for _, row in found], _names(found)
    segmentation = [row["task"] == SEGMENTATION for row in rows]
    for is_it, make in ((True, segmentation_tables), (False, metric_tables)):
        chosen = [i for i, x in enumerate(segmentation) if x == is_it]
        for table in make([rows[i] for i in chosen], [names[i] for i in chosen]):
            _result_table(page, table)
    if any(segmentation):
        page.note("mIoU in percent; * on a part of the official images, # with other class names, ! with a warning.")
    for name, row in zip(names, rows, strict=True):
        for warning in row.get("warnings") or []:
            page.note(f"{name}, {row['dataset']}: {warning}")


def _names(found: list[tuple[Entry, dict[str, Any]]]) -> list[str]:
    """Return the rows' model names, with the path if two paths have the same result under the same name."""
    places: dict[str, dict[str, set]] = {}
    keys = []
    for entry, row in found:
        model = " ".join(model_of(row))
        keys.append((model, f"{row['task']} {row['dataset']} {row['protocol']}"))
        places.setdefault(model, {}).setdefault(keys[-1][1], set()).add(entry.path)
    twice = {model for model, kinds in places.items() if any(len(paths) > 1 for paths in kinds.values())}
    return [f"{m} ({entry.path})" if m in twice else m for (entry, _), (m, _) in zip(found, keys, strict=True)]


def _result_table(page: Page, table: Table) -> None:
    page.table(table.lines[0], table.lines[1:], table.title)
    rules = ", ".join(f"{name} {_value(x)}" for name, x in table.protocol.items() if name not in ("name", "note"))
    if rules:
        page.note(rules)


def _value(x: Any) -> str:
    if x is None:
        return "-"
    if is_number(x):
        return f"{x:.6g}" if isinstance(x, float) else str(x)
    return " | ".join(map(str, x)) if isinstance(x, (list, tuple)) else str(x)
