"""The tables of study.py, study_readings.py, tolerance_study.py, cross_attention.py and real_words.py."""

from __future__ import annotations

import math

from result_tables import grid

WORLDS = ("demo", "hard")
STUDY_BATCH, STUDY_TAU = 256, 0.05  # defaults of the study, from which its controls differ


def centre(value: dict[str, float] | float) -> float:
    return value["mean"] if isinstance(value, dict) else value


def label(row: dict) -> str:
    """Describe the difference between a run of the study and its default."""
    if row["pooling"] != "all pairs":
        return {"paired": "attention of the paired caption only", "mean": "mean pooling"}[row["pooling"]]
    if row["tower"] == "random":
        return "random frozen tower"
    if row["form"] != "cosine":
        return f"form {row['form']}"
    tau = row["tau"]
    return "τ learned" if tau is None else f"τ = {tau:g}"


def study(result: dict, world: str, kind: str) -> str:
    """Return the runs of one world: percent, mean (least to most) over seeds.

    Args:
        result: contents of the JSON file.
        world: "demo" or "hard".
        kind: "batches", or "controls" at a batch of 256.
    """
    measures = {"miou": "mIoU", "patch_accuracy": "patches right", "retrieval_r1": "image→text R@1"}
    rows = []
    for row in result["rows"]:
        default, last = label(row) == f"τ = {STUDY_TAU:g}", row["points"][-1]
        if row["world"] != world or not (default if kind == "batches" else row["batch"] == STUDY_BATCH):
            continue
        first = [f"{row['batch']:,}", str(last["step"]), f"{row['lr']:g}"] if kind == "batches" else [label(row)]
        rows.append([*first, *(_percent(last[name]) for name in measures), str(row["seeds"])])
    first = ["batch", "steps", "learning rate"] if kind == "batches" else [f"at a batch of {STUDY_BATCH}"]
    return grid([*first, *measures.values(), "seeds"], rows)


def all_pairs(result: dict) -> str:
    """Return the study's two losses that differ in the attention alone: all pairs, and the paired caption only."""
    losses = {f"τ = {STUDY_TAU:g}": "all pairs", "attention of the paired caption only": "paired caption only"}
    last = {(row["world"], label(row)): row["points"][-1] for row in result["rows"] if row["batch"] == STUDY_BATCH}
    rows = []
    for name, text in losses.items():
        cells = [_percent(last[world, name][measure]) for measure in ("miou", "retrieval_r1") for world in WORLDS]
        rows.append([text, *cells])
    head = [f"{measure}, {world} world" for measure in ("mIoU", "image→text R@1") for world in WORLDS]
    return grid([f"at a batch of {STUDY_BATCH}", *head], rows)


def readings(result: dict, world: str) -> str:
    """Return the readings of one world without training, and beside them PACL at the better of its learning rates."""
    measures = {"miou": "mIoU", "patch_accuracy": "patches right", "retrieval_r1": "image→text R@1"}
    found: dict[str, dict] = {}
    for row in result["rows"]:
        if row["world"] == world:
            pair = found.setdefault(row["tokens"], {})
            other = pair.get(row["trained"])
            if other is None or centre(row["miou"]) > centre(other["miou"]):
                pair[row["trained"]] = row
    any_trained = any(True in pair for pair in found.values())
    head = ["tokens", *measures.values()]
    if any_trained:
        head += [*(f"PACL: {x}" for x in measures.values()), "learning rate"]
    rows = []
    for name, pair in found.items():
        cells = [_percent(pair[kind][x]) if kind in pair else "-" for kind in (False, True) for x in measures]
        cells.append(f"{pair[True]['lr']:g}" if True in pair else "-")
        rows.append([f"`{name}`", *cells][: len(head)])
    return grid(head, rows)


def _percent(value: dict[str, float] | float, sign: str = "") -> str:
    """Return percent, mean (least to most). `sign`: "+" to show it."""
    text = f"{100 * centre(value):{sign}.1f}"
    if not isinstance(value, dict):
        return text
    return f"{text} ({100 * value['min']:{sign}.1f}{' to ' if sign else '–'}{100 * value['max']:{sign}.1f})"


def tolerance_study(result: dict) -> str:
    """Return the runs of tolerance_study.py: mean (least to most) over seeds, and the differences to the exact runs.

    Differences are between runs of the same seed, in points.
    """
    rows = []
    for row in result["rows"]:
        tolerance, cells = row["tolerance"], []
        for name in ("miou", "retrieval_r1"):
            cells += [_percent(row[name]), _percent(row["differences"][name], "+") if tolerance else "-"]
        share = _percent(row["kept_share"]) if tolerance else "100"
        name = f"2<sup>{math.log2(tolerance):.0f}</sup>" if tolerance else "0"
        rows.append([row["world"], name, share, *cells, f"{centre(row['loss']):.3f}", str(len(row["seeds"]))])
    measures = ["mIoU", "to exact", "image→text R@1", "to exact"]
    return grid(["world", "tolerance", "pairs kept, %", *measures, "last loss", "seeds"], rows)


def coherence_weights(result: dict) -> str:
    """Return the weights of the coherence loss on the trained CLIP, of coherence_study.py."""
    several = {row["tower"] for row in result["rows"] if row["weight"] not in (0, result["weight"])}
    rows = [
        [f"{row['weight']:g}", *_measures(row), _percent(row["retrieval_r1"]), str(row["seeds"])]
        for row in result["rows"]
        if row["tower"] in several
    ]
    return grid(["weight", *COHERENCE, "image→text R@1", "seeds"], rows)


def coherence_towers(result: dict) -> str:
    """Return coherence and gain of every tower of coherence_study.py, without and with the coherence loss."""
    found: dict[str, dict[float, dict]] = {}
    for row in result["rows"]:
        found.setdefault(row["tower"], {})[row["weight"]] = row
    rows = []
    for number, (tower, pair) in enumerate(found.items(), start=1):
        first, other = pair[0.0], pair.get(result["weight"])
        cells = [str(number), tower, f"{first['tokens_coherence']:.3f}", _percent(first["own_miou"])]
        rows.append([*cells, *_measures(first), *(_measures(other) if other else ["-"] * 3)])
    loss = [f"{name}, with the loss" for name in COHERENCE]
    return grid(["", "tower", "coherence of its tokens", "own mIoU", *COHERENCE, *loss], rows)


COHERENCE = ("coherence of PACL's patches", "mIoU", "patches right")


def _measures(row: dict) -> list[str]:
    return [f"{centre(row['coherence']):.3f}", _percent(row["miou"]), _percent(row["patch_accuracy"])]


def cross_attention(result: dict, kind: str) -> str:
    """Return the runs of cross_attention.py (kind "quality"), or what the scores of B x B pairs cost ("cost")."""
    if kind == "cost":
        rows = []
        for row in result["cost"]:
            phi, head = (row["seconds"][name] for name in ("phi", "cross-attention"))
            cells = [f"{row['batch']} × {row['batch']}", f"{1e3 * phi:.3g}", f"{1e3 * head:,.0f}", f"{head / phi:,.0f}"]
            rows.append(cells)
        return grid(["pairs", "φ, ms", "cross-attention, ms", "ratio"], rows)
    names = {"phi": "φ", "cross-attention": "cross-attention"}
    measures = {"miou": "mIoU", "patch_accuracy": "patches right", "retrieval_r1": "image→text R@1"}
    rows = []
    for row in result["rows"]:
        cells = [row["world"], names[row["align"]], str(row["steps"])]
        for name in measures:
            cells += [_percent(row[name]), _percent(row["differences"][name], "+") if "differences" in row else "-"]
        rows.append([*cells, str(len(row["seeds"]))])
    heads = [text for name in measures.values() for text in (name, "to φ")]
    return grid(["world", "scores", "steps", *heads, "seeds"], rows)


def tables_of_study(result: dict) -> str:
    """Return all tables of a study."""
    parts = [f"{result['size']['images']:,} images in each run"]
    for world in WORLDS:
        for kind in ("batches", "controls"):
            parts += [f"**{world} world, {kind}**", study(result, world, kind)]
    return "\n\n".join(parts)


# Real encoders, pictures and words: real_words.py


def real_words(result: dict, kind: str | None = None) -> str:
    """Return the runs of a tower, or those that tuned, in percent: mean (least to most) over seeds.

    kind: a tower's name, or "tuning"; None for all.
    """
    measures = {"patches": "patches right", "own_words": "among own words", "miou": "mIoU"}
    measures |= {"find": "find IoU", "r1": "image→text R@1"}
    rows = []
    for row in result["tuning" if kind == "tuning" else "rows"]:
        if kind in (None, "tuning", row["tower"]):
            method = {"paired": "the paired caption's", "mean": "none (mean)"}.get(row["method"], row["method"])
            first = [row["tower"], method, f"{row['batch']:,}", str(row["steps"]), f"{row['lr']:g}"]
            rows.append([*first, *(_percent(row[name]) for name in measures), str(row.get("seeds", 1))])
    head = ["vision tower", "attention", "batch", "steps", "learning rate", *measures.values(), "seeds"]
    return grid(head, rows)
