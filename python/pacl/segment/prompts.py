"""Class names, their synonyms, and the templates that turn them into sentences."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from torch import Tensor
from torch.nn import functional as F

from ..towers import SENTENCES, Towers

# open_clip defines its templates as functions of the class name.
TEMPLATES = {
    "none": ("{}",),
    "photo": ("a photo of a {}.",),
    "simple": tuple(template("{}") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES),
    "openai": tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES),
}


@dataclass(frozen=True)
class Texts:
    """Text embeddings of K classes.

    Attributes:
        names: first word of each class.
        synonyms: number of rows of each class, in order.
        embeddings: float32 `[S, D]`, normalised, a row for each word.
    """

    names: tuple[str, ...]
    synonyms: tuple[int, ...]
    embeddings: Tensor


def templates(name: str) -> tuple[str, ...]:
    """Return the templates of a set (TEMPLATES: 1, 1, 7 and 80), or of a file with one per line; {} is the class."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    if not Path(name).is_file():
        raise ValueError(f"templates: got {name!r}, expected {', '.join(TEMPLATES)}, or a file of templates")
    lines = [line.strip() for line in _read_text(name, "templates").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"templates: {name} is empty, expected one template per line")
    wrong = [line for line in lines if "{}" not in line]
    if wrong:
        raise ValueError(f"templates: got {wrong[0]!r} in {name}, expected {{}} where the class goes")
    return tuple(lines)


def read_classes(path: str | os.PathLike, name: str = "classes") -> list[list[str]]:
    """Read a class file with one class per line; return each class as a list of its name and synonyms.

    Commas separate synonyms. The label of a class is its line number from 0. name: the option that gave the file, for
    errors. Raises ValueError for an empty line (except at the end), for an empty file, and if the file is not UTF-8.
    """
    lines = _read_text(path, name).rstrip().splitlines()
    classes = [[word.strip() for word in line.split(",") if word.strip()] for line in lines]
    empty = [number for number, words in enumerate(classes, 1) if not words]
    if empty or not classes:
        raise ValueError(f"{name}: {path} line {(empty or [1])[0]} is empty, expected a class in every line")
    return classes


@torch.no_grad()
def class_texts(towers: Towers, classes: Sequence[str], templates: Sequence[str] = TEMPLATES["simple"]) -> Texts:
    """Embed classes, each "name" or "name, synonym, ...".

    A synonym's embedding is the normalised mean of its normalised sentences, as in OpenAI's code. A class's score is
    that of its best synonym, as in SCLIP, not that of a mean over synonyms. Raises ValueError for no classes and for a
    class without a name.
    """
    words = [[" ".join(word.split()) for word in str(line).split(",")] for line in classes]
    words = [[word for word in line if word] for line in words]
    if not words or not all(words):
        raise ValueError(f"classes: got {list(classes)!r}, expected at least one, and a name for each")
    flat, rows = [word for line in words for word in line], []
    size = max(1, SENTENCES // len(templates))
    for start in range(0, len(flat), size):
        part = flat[start : start + size]
        # replace, not str.format, which would interpret braces in a word.
        sentences = [template.replace("{}", word) for word in part for template in templates]
        found = towers.embed(sentences)
        rows.append(F.normalize(found.unflatten(0, (len(part), len(templates))).mean(1), dim=-1))
    return Texts(tuple(line[0] for line in words), tuple(map(len, words)), torch.cat(rows))


def best_synonym(scores: Tensor, synonyms: Sequence[int], dim: int = -1) -> Tensor:
    """Reduce S scores along `dim` to K: the highest score among the synonyms of each class.

    synonyms: number of scores of each class, in order.
    """
    if len(synonyms) == scores.shape[dim]:
        return scores
    return torch.stack([part.amax(dim) for part in scores.split(list(synonyms), dim)], dim)


def _read_text(path: str | os.PathLike, name: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: {path} is not UTF-8 text: {error.reason}") from error
