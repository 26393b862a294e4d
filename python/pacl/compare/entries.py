"""Read what a path holds for comparison: a training run's folder, an embedder's, or results of `pacl evaluate`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..embedder import CONFIG, WEIGHTS, read_embedder_config
from ..evaluate.results import read_result
from ..failures import sentence
from ..settings import read_settings


@dataclass
class Entry:
    """Findings at `path`; fields of missing files are empty.

    config: content of config.yaml. train, validation: lines of metrics.jsonl and results.jsonl, by rising step.
    embedder: the embedder's folder. described: its config.json. results: rows of pacl evaluate. notes: sentences about
    missing and unreadable files. left_out: number of files that should be results and are not.
    """

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    train: list[dict[str, Any]] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    embedder: Path | None = None
    described: dict[str, Any] = field(default_factory=dict)
    results: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left_out: int = 0

    @property
    def name(self) -> str:
        """Name used by results: that of the folder, or that of the run for its `embedder` folder."""
        path = self.path.resolve()
        return path.parent.name if path.name == "embedder" else path.name

    @property
    def trained(self) -> bool:
        """True for a run or an embedder, false for results alone."""
        return bool(self.config or self.train or self.validation or self.embedder)


def read_entry(path: Path) -> Entry:
    """Read what is at `path`; raises FileNotFoundError if it does not exist."""
    if not path.exists():
        raise FileNotFoundError(f"entries: {path} does not exist, expected a run, an embedder or results")
    entry = Entry(path)
    if path.is_dir():
        _read_run(entry)
        _read_embedder(entry)
        files = sorted(path.glob("*.json"))
    else:
        files = [path]
    for file in files:
        try:
            entry.results.append(read_result(file))
        except (ValueError, OSError) as error:
            # The folders of runs and embedders hold other JSON files too.
            if not entry.trained:
                entry.notes.append(sentence(error))
                entry.left_out += 1
    if not entry.trained and not entry.results and not entry.notes:
        entry.notes.append(f"{path} is neither a run nor an embedder and holds no results (*.json)")
        entry.left_out += 1
    return entry


def _read_run(entry: Entry) -> None:
    files = {name: entry.path / name for name in ("config.yaml", "metrics.jsonl", "results.jsonl")}
    if not any(x.is_file() for x in files.values()):
        return
    config = files["config.yaml"]
    if config.is_file():
        try:
            entry.config = read_settings(config)
        except (ValueError, OSError) as error:
            entry.notes.append(sentence(error))
    else:
        entry.notes.append(f"{config} is missing: the settings are unknown")
    for name, what in (("metrics.jsonl", "training curves"), ("results.jsonl", "validation")):
        if files[name].is_file():
            rows, bad = read_lines(files[name])
            setattr(entry, "train" if name == "metrics.jsonl" else "validation", rows)
            entry.notes += [f"{files[name]}: {bad} line(s) could not be read"] if bad else []
        else:
            entry.notes.append(f"{files[name]} is missing: no {what}")


def _read_embedder(entry: Entry) -> None:
    for folder in (entry.path, entry.path / "embedder"):
        if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
            continue
        try:
            entry.embedder, entry.described = folder, dict(read_embedder_config(folder / CONFIG))
        except (ValueError, OSError) as error:
            entry.notes.append(sentence(error))
        return
    if entry.trained:
        entry.notes.append(f"{entry.path / 'embedder'} is missing: no segmentations")


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Read the rows of a .jsonl by rising step, and count the broken lines (a crash truncates the last).

    A run resumed from an earlier step repeats steps; the later row counts.
    """
    rows: list[dict[str, Any]] = []
    bad = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            step = row["step"]
            if type(step) is not int or not 0 <= step < 2**63:
                raise ValueError("step")
        except (ValueError, KeyError, TypeError, RecursionError):
            bad += bool(line.strip())
            continue
        while rows and rows[-1]["step"] >= step:
            rows.pop()
        rows.append(row)
    return rows, bad


def curve(rows: Iterable[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of a measure, skipping values that are not finite numbers."""
    found = [(row["step"], row[name]) for row in rows if is_number(row.get(name))]
    return [step for step, _ in found], [value for _, value in found]


def is_number(x: Any) -> bool:
    return type(x) in (int, float) and abs(x) < 2**1000  # not NaN, and no integer that is too large for a float
