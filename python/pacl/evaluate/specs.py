"""Datasets and protocols: `datasets.json`, `protocols.json` and `class-names/` of this package, read and checked.

Class names come from the datasets' own lists, in mmsegmentation's order. ADE20K's are the first name of each line of
objectInfo150, as in mmsegmentation except for "television". The full ADE20K's 847, with their synonyms, come from
Mask2Former's register_ade20k_full.py (MIT licence), on which published results rest.
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

from ..annotations import checked
from ..segment.prompts import read_classes
from ..settings import read_settings

HERE = Path(__file__).parent
OWN = "folder"  # a dataset of the user's own; its results have the name folder:NAME
IGNORED, UNKNOWN = -1, -2  # entries of a label table: a pixel that does not count, and a value that no mask may hold


@dataclass(frozen=True)
class Masks:
    """One kind of mask files of a dataset: their path, and `table`, int16 [65536], which maps values to labels.

    split: the list of their images, if it differs from the dataset's.
    """

    path: str
    table: np.ndarray
    split: str | None = None


@dataclass(frozen=True)
class Spec:
    """A dataset. Paths are relative to one of `roots`; `*` stands for a part of an image's name.

    count: number of images in the official set. background: true if class 0 is "background". column: heading in result
    tables.
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
        """Official words for each class; only the full ADE20K has several."""
        return [name.split(", ") for name in self.classes]


@dataclass(frozen=True)
class Protocol:
    """Rules by which a number is measured. Rows of different protocols never share a table.

    short_side: pixels of the image's shorter side; the longer one has at most 2,048. window, window_stride: pixels of
    the sliding window, or None for the whole image at once. stride: tokens per patch of the tower along each side.
    templates: name of a set, or the prompts, with {} for the class. background: the rule that makes pixels background
    in datasets with that class: {"rule": "class"}, the class of that name competes; {"rule": "threshold", "value":
    cosine}; {"rule": "entropy", "value": nats, "logit_scale": scale of the softmax over classes}. candidates: "all"
    classes compete, or only those "present" in the image. average: mean IoU over the classes of the whole "dataset", or
    per "image" over those present. foreground: exclude background from the means, and with "present" ignore its pixels.
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

    def __post_init__(self) -> None:
        allowed = {"candidates": ("all", "present"), "average": ("dataset", "image")}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {' or '.join(values)}")
        rule = self.background.get("rule") if isinstance(self.background, dict) else None
        if rule not in ("class", "threshold", "entropy"):
            raise ValueError(f"background: got {self.background!r}, expected the rule class, threshold or entropy")
        if rule != "class" and not isinstance(self.background.get("value"), (int, float)):
            raise ValueError(f"background: got {self.background!r}, expected a number as its value")
        if rule != "class" and self.candidates == "present":
            raise ValueError(f"background: got {rule!r} with candidates 'present', expected 'class'")
        if self.average == "image" and self.candidates != "present":
            raise ValueError("average: got 'image' with all candidates, expected candidates 'present'")
        if (self.window is None) != (self.window_stride is None):
            raise ValueError(
                f"window: got {self.window} with window_stride {self.window_stride}, expected both or neither"
            )
        for name in ("short_side", "window", "window_stride", "stride"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value > 0):
                raise ValueError(f"{name}: got {value!r}, expected a positive integer")


def datasets() -> list[str]:
    """Return the names of the datasets, in the order of a result table's columns."""
    return list(_json("datasets.json"))


@cache
def spec(name: str) -> Spec:
    """Return the dataset `name`; raises ValueError, with a close name, for an unknown one."""
    known = _json("datasets.json")
    if name not in known:
        close = difflib.get_close_matches(name, known, 1, cutoff=0.4)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"dataset: got {name!r}, expected one of {', '.join(known)}, or {OWN}{hint}")
    entry = dict(known[name])
    if "foreground_of" in entry:
        # Drop the background class: ignore its pixels and move the labels down by one.
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
    values: dict[str, Any] = {"background": False, "split": None, **entry, **lists}
    return Spec(**values, name=name, classes=classes, masks=masks)


def fingerprint(classes: list[list[str]]) -> str:
    """Hash class names and synonyms, because other names give other numbers."""
    return hashlib.sha256(json.dumps(classes).encode()).hexdigest()[:12]


def spread(count: int, limit: int | None) -> list[int]:
    """Return the indices of `limit` of `count` images, spread evenly; None means all. Raises ValueError below 1."""
    if limit is None:
        return list(range(count))
    if limit < 1:
        raise ValueError(f"limit: got {limit}, expected at least 1")
    step = max(1.0, count / limit)
    return [int(i * step) for i in range(min(limit, count))]


def protocol(name: str, **changes: Any) -> Protocol:
    """Return a protocol of this package, or of a JSON file like an entry of `protocols.json`.

    Args:
        name: `"tcl"`, `"dino.txt"`, `"paper"`, `"present"`, or a JSON file.
        **changes: other values of its fields, which become part of its name.

    Returns:
        The protocol.

    Raises:
        ValueError: for an unknown protocol, field or value.
    """
    known = _json("protocols.json")
    entry, label = known.get(name), name
    if entry is None:
        if not Path(name).is_file():
            raise ValueError(f"protocol: got {name!r}, expected {', '.join(known)}, or a JSON file of a protocol")
        if Path(name).suffix != ".json":
            raise ValueError(f"protocol: got {name!r}, expected a file with the suffix .json")
        entry, label = read_settings(Path(name)), Path(name).stem
    fields = {field.name for field in dataclasses.fields(Protocol)} - {"name"}
    unknown = sorted(set(entry | changes) - fields)
    if unknown:
        raise ValueError(f"protocol: {label} has {', '.join(unknown)}, expected only {', '.join(sorted(fields))}")
    missing = sorted({"short_side", "templates", "background"} - set(entry))
    if missing:
        raise ValueError(f"protocol: {label} lacks {', '.join(missing)}, expected short_side, templates and background")
    rules = checked(entry | {"name": label}, Protocol, Path(name))
    changed = {key: value for key, value in changes.items() if getattr(rules, key) != value}
    parts = [label, *(f"{key}={json.dumps(value)}" for key, value in changed.items())]
    return dataclasses.replace(rules, name=" ".join(parts), **changed)


def numbers(ranges: str) -> list[int]:
    """Expand ranges: "0-2,5" gives [0, 1, 2, 5]."""
    pairs = [part.partition("-") for part in ranges.split(",") if part]
    return [n for first, _, last in pairs for n in range(int(first), int(last or first) + 1)]


def _table(values: str, ignore: str = "", first: int = 0, rest: int = UNKNOWN, last: int = (1 << 16) - 1) -> np.ndarray:
    """Map the k-th of `values` to label k + first, those of `ignore` to IGNORED, others up to `last` to `rest`."""
    table = np.full(1 << 16, UNKNOWN, np.int16)
    table[: last + 1] = rest
    table[numbers(ignore)] = IGNORED
    known = numbers(values)
    table[known] = np.arange(first, first + len(known))
    return table


def _derived(whole: Spec, move: list[int], classes: tuple[str, ...]) -> Spec:
    """Return `whole` with other classes: label k becomes move[k]."""
    lookup = np.array([*move, UNKNOWN, IGNORED], np.int16)  # indices -2 and -1: UNKNOWN and IGNORED stay
    masks = tuple(dataclasses.replace(kind, table=lookup[kind.table]) for kind in whole.masks)
    return dataclasses.replace(whole, classes=classes, masks=masks)


@cache
def _json(name: str) -> dict[str, Any]:
    return json.loads((HERE / name).read_text(encoding="utf-8"))
