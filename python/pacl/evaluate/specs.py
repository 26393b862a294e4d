"""Data sets and protocols: `datasets.json`, `protocols.json` and `class-names/` of this package, read and checked.

Class names are those of the data sets' own lists, in mmsegmentation's order. ADE20K's are the first name of each line
of objectInfo150, as mmsegmentation has them but for "television". The full ADE20K's 847, with their synonyms, are those
of Mask2Former's register_ade20k_full.py (MIT licence), which published results rest on.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..segment.prompts import read_classes

HERE = Path(__file__).parent
IGNORED, UNKNOWN = -1, -2  # of a table of labels: a pixel that does not count, and a value that no mask may hold


@dataclass(frozen=True)
class Masks:
    """One kind of mask files of a data set: where they lie, and `table`, int16 [65536], from their values to labels.

    split: the list of their images, where it is not the data set's.
    """

    path: str
    table: np.ndarray
    split: str | None = None


@dataclass(frozen=True)
class Spec:
    """A data set. Paths are relative to one of `roots`; `*` stands for a part of an image's name.

    count: images that the official set has. background: whether class 0 is "background". column: of result tables.
    """

    name: str
    title: str
    column: str
    classes: tuple[str, ...]
    background: bool
    count: tuple[int, ...]
    source: str
    roots: tuple[str, ...]
    images: tuple[str, ...]
    split: str | None
    masks: tuple[Masks, ...]

    @property
    def synonyms(self) -> list[list[str]]:
        """The official words for each class; only the full ADE20K has several."""
        return [name.split(", ") for name in self.classes]


@dataclass(frozen=True)
class Protocol:
    """How a number was made. Rows of different protocols are never in one table.

    short_side: pixels of the image's shorter side, the longer being at most 2,048. window, window_stride: of the
    sliding window in pixels, or None for the whole image at once. stride: tokens along a side per patch of the tower.
    templates: a set's name or the prompts, with {} for the class. background: how pixels become background where the
    data set has that class: {"rule": "class"}, the class of that name competes; {"rule": "threshold", "value": cosine};
    {"rule": "entropy", "value": nats, "logit_scale": of the softmax over classes}. candidates: "all" classes, or those
    "present" in the image. average: of IoU over the classes of the whole "dataset", or per "image" over those present.
    foreground: leave background out of the means, and with "present" ignore its pixels.
    """

    name: str
    short_side: int
    templates: str | tuple[str, ...]
    background: dict[str, Any]
    window: int | None = None
    window_stride: int | None = None
    stride: int = 1
    candidates: str = "all"
    average: str = "dataset"
    foreground: bool = False
    note: str = ""

    def __post_init__(self):
        allowed = {"candidates": ("all", "present"), "average": ("dataset", "image")}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {' or '.join(values)}")
        rule = self.background.get("rule") if isinstance(self.background, dict) else None
        if rule not in ("class", "threshold", "entropy"):
            raise ValueError(f"background: got {self.background!r}, expected a rule: class, threshold or entropy")
        if rule != "class" and not isinstance(self.background.get("value"), (int, float)):
            raise ValueError(f"background: got {self.background!r}, expected a number as its value")
        if rule != "class" and self.candidates == "present":
            raise ValueError(f"background: got {rule!r} with candidates 'present', expected 'class'")
        if self.average == "image" and self.candidates != "present":
            raise ValueError("average: got 'image' with all candidates, expected candidates 'present'")
        if (self.window is None) != (self.window_stride is None):
            raise ValueError("window: expected window and window_stride together, or neither")
        for name in ("short_side", "window", "window_stride", "stride"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value > 0):
                raise ValueError(f"{name}: got {value!r}, expected a positive integer")


def datasets() -> list[str]:
    """Names of the data sets, in the order of a result table's columns."""
    return list(_json("datasets.json"))


@cache
def spec(name: str) -> Spec:
    """The data set `name`; ValueError with close names for one that is not there."""
    known = _json("datasets.json")
    if name not in known:
        close = difflib.get_close_matches(name, known, 1, cutoff=0.4)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"dataset: got {name!r}, expected one of {', '.join(known)}{hint}")
    entry = dict(known[name])
    if "foreground_of" in entry:
        # Without the background class: its pixels are ignored and the labels move down by one.
        whole = spec(entry.pop("foreground_of"))
        move = [IGNORED, *range(len(whole.classes) - 1)]
        return dataclasses.replace(_derived(whole, move, whole.classes[1:]), name=name, background=False, **entry)
    if "groups_of" in entry:
        whole, groups = spec(entry.pop("groups_of")), entry.pop("groups")
        group = {member: k for k, members in enumerate(groups.values()) for member in members}
        derived = _derived(whole, [group[member] for member in whole.classes], tuple(groups))
        return dataclasses.replace(derived, name=name, **entry)
    file = entry.pop("classes")
    classes = tuple(", ".join(names) for names in read_classes(HERE / "class-names" / file))
    kinds = map(dict, entry.pop("masks"))
    masks = tuple(Masks(kind.pop("path"), split=kind.pop("split", None), table=_table(**kind)) for kind in kinds)
    lists = {key: tuple(entry.pop(key)) for key in ("count", "roots", "images")}
    return Spec(**{"background": False, "split": None, **entry}, name=name, classes=classes, masks=masks, **lists)


def fingerprint(classes: list[list[str]]) -> str:
    """Of class names and synonyms: with other names the numbers are others."""
    return hashlib.sha256(json.dumps(classes).encode()).hexdigest()[:12]


def spread(count: int, limit: int | None) -> list[int]:
    """The numbers of `limit` of `count` images, spread evenly; all for None. ValueError for a limit below 1."""
    if limit is None:
        return list(range(count))
    if limit < 1:
        raise ValueError(f"limit: got {limit}, expected at least 1")
    step = max(1.0, count / limit)
    return [int(i * step) for i in range(min(limit, count))]


def protocol(name: str, **changes: Any) -> Protocol:
    """A protocol of this package, or of a JSON file like `protocols.json`'s entries; `changes` become part of its name.

    ValueError for one that does not exist, or a field or value that it cannot have.
    """
    known = _json("protocols.json")
    entry, label = known.get(name), name
    if entry is None:
        if not Path(name).is_file():
            raise ValueError(f"protocol: got {name!r}, expected {', '.join(known)}, or a JSON file of one")
        entry, label = json.loads(Path(name).read_text(encoding="utf-8")), Path(name).stem
    fields = {field.name for field in dataclasses.fields(Protocol)} - {"name"}
    unknown = sorted(set(entry | changes) - fields)
    if unknown:
        raise ValueError(f"protocol: {label} has {', '.join(unknown)}, expected of {', '.join(sorted(fields))}")
    missing = sorted({"short_side", "templates", "background"} - set(entry))
    if missing:
        raise ValueError(f"protocol: {label} lacks {', '.join(missing)}")
    if isinstance(entry["templates"], list):
        entry = {**entry, "templates": tuple(entry["templates"])}
    rules = Protocol(name=label, **entry)
    changed = {key: value for key, value in changes.items() if getattr(rules, key) != value}
    parts = [label, *(f"{key}={json.dumps(value)}" for key, value in changed.items())]
    return dataclasses.replace(rules, name=" ".join(parts), **changed)


def numbers(ranges: str) -> list[int]:
    """The numbers of "0-2,5": [0, 1, 2, 5]."""
    pairs = [part.partition("-") for part in ranges.split(",") if part]
    return [n for first, _, last in pairs for n in range(int(first), int(last or first) + 1)]


def _table(values: str, ignore: str = "", first: int = 0, rest: int = UNKNOWN, last: int = (1 << 16) - 1) -> np.ndarray:
    """Label k + first for the k-th of `values`, IGNORED for those to ignore, `rest` for all others up to `last`."""
    table = np.full(1 << 16, UNKNOWN, np.int16)
    table[: last + 1] = rest
    table[numbers(ignore)] = IGNORED
    known = numbers(values)
    table[known] = np.arange(first, first + len(known))
    return table


def _derived(whole: Spec, move: list[int], classes: tuple[str, ...]) -> Spec:
    """`whole` with other classes: label k becomes move[k]."""
    lookup = np.array([*move, UNKNOWN, IGNORED], np.int16)  # UNKNOWN and IGNORED are -2 and -1: they stay what they are
    masks = tuple(dataclasses.replace(kind, table=lookup[kind.table]) for kind in whole.masks)
    return dataclasses.replace(whole, classes=classes, masks=masks)


@cache
def _json(name: str) -> dict[str, Any]:
    return json.loads((HERE / name).read_text(encoding="utf-8"))
