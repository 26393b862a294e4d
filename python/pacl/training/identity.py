"""The identity of a run: the flags, towers and data that it must keep when it resumes, and that its processes share."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..data.features import Features
from ..data.pairs import ScenePairs
from ..data.samples import Samples
from ..data.shards import Shards
from ..processes import place_in
from ..sharing import is_local, tower_differences
from ..towers import Towers
from .config import TrainConfig

# A resumed run must have the same values. All other flags may change, and a change is recorded.
FIXED = (
    "tokens lock_image lock_image_unlocked_groups lock_text seed align form loss attn_temperature "
    "learn_attn_temperature logit_scale learn_logit_scale coherence_loss captions_per_image duplicates nouns recipe "
    "dataset_resampled shuffle"
).split()
NAMES = "model pretrained vision_model vision_pretrained text_model force_image_size max_patches proxy".split()
COMPARED = ("tokens", "activation", "image_size", "max_patches", "fingerprint")  # of towers
NOT_RECORDED = ("log_dir", "name", "resume", "dry_run")
SAMPLED = 1000  # pairs whose keys and captions identify a data set that is not in shards


def describe_run(
    config: TrainConfig, towers: dict[str, Any], data: dict[str, Any], *, precision: str, workers: int
) -> dict[str, Any]:
    """Return the identity of a run as plain values, for its checkpoints.

    towers: the result of describe_towers before training. data: that of describe_data. precision: "amp_bf16" or "fp32".
    workers: readers of a process, at least 1.
    """
    flags = {k: str(x) if isinstance(x, Path) else x for k, x in dataclasses.asdict(config).items()}
    return {
        "flags": {name: value for name, value in flags.items() if name not in NOT_RECORDED},
        "precision": precision,
        "workers": workers,
        # Without names, which the flags have, and without paths, so that a run is the same in any folder.
        "towers": {name: x for name, x in towers.items() if name in COMPARED},
        "data": data,
    }


def describe_data(data: Samples) -> dict[str, Any]:
    """Identify a source of pairs: its kind, its number of shards or pairs, and a digest.

    The digest is of the names and sizes of shards, or of the keys and captions of 1,000 pairs (16 of generated scenes,
    which take time to draw). Folders are left out, so that data can be moved.
    """
    entries: list[Any]
    if isinstance(data, Features):
        entries = [[shard["name"], shard["bytes"], shard["count"]] for shard in data.manifest["shards"]]
        size = {"pairs": len(data)}
    elif isinstance(data, Shards):
        entries = [[path.name, path.stat().st_size] for path in data.paths]
        size = {"shards": len(entries), "bytes": sum(entry[1] for entry in entries)}
    else:
        pairs = data.spread(16 if isinstance(data, ScenePairs) else SAMPLED)
        entries = [[raw.key, *map(repr, _held(raw.captions))] for raw in pairs]
        size = {"pairs": data.count()}
    digest = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
    return {"kind": type(data).__name__, **size, "digest": digest[:16]}


def _held(captions: Sequence[bytes] | bytes | Path | None) -> Sequence[bytes]:
    """Return the captions that are in memory; a text file may be anywhere."""
    if captions is None or isinstance(captions, Path):
        return ()
    return [captions] if isinstance(captions, bytes) else captions


def differences(stored: dict[str, Any], mine: dict[str, Any], towers: Towers) -> list[str]:
    """Compare the identity `stored` in a checkpoint with that of this run; return a phrase for each difference that is
    not allowed, with the flag, the stored value and the given one.

    towers: those of this run, before training.
    """
    before, now = _flags(stored), mine["flags"]
    found = [_was(name, before.get(name), now[name]) for name in FIXED if before.get(name) != now[name]]
    named = [name for name in NAMES if before.get(name) != now[name]]
    local = {name for name in named if name == "text_model" or any(map(_is_local, (before.get(name), now[name])))}
    others = [name for name in named if name not in local]
    found += [_was(name, before.get(name), now[name]) for name in others]
    if not others:  # the fingerprint decides about local files, which may have moved
        what = ", ".join(_was(name, before.get(name), now[name]) for name in named) or f"--model is {now['model']}"
        found += [f"{what}, but {each}" for each in tower_differences(stored["towers"], towers)]
    if stored["precision"] != mine["precision"]:
        found.append(_was("precision", stored["precision"], mine["precision"]))
    if stored["workers"] != mine["workers"]:  # the default depends on the machine
        found.append(f"{_was('workers', stored['workers'], mine['workers'])}; give --workers {stored['workers']}")
    if stored["data"] != mine["data"]:
        flag = "train_data" if now["features"] is None else "features"
        found.append(_was(flag, _words(stored["data"]), _words(mine["data"])))
    return found


def _flags(stored: dict[str, Any]) -> dict[str, Any]:
    """Return the flags of a checkpoint. Flags that its version did not have were at what is now their default."""
    return dataclasses.asdict(TrainConfig()) | stored["flags"]


def changes(stored: dict[str, Any], mine: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the flags whose values changed, with both values."""
    before, now = _flags(stored), mine["flags"]
    names = [name for name in now if before.get(name) != now[name]]
    return {name: {"from": before.get(name), "to": now[name]} for name in names}


def check_agreement(values: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    """End the run unless all processes have the same `values`, given by the names of flags. All processes call it.

    Raises ValueError, which names the flags and the values of the processes, in the first process, and SystemExit in
    the others.
    """
    if group is None:
        return
    shares: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(shares, {name: str(value) for name, value in values.items()}, group=group)
    wrong = []
    for name in values:
        holders: dict[str, list[str]] = {}
        for rank, share in enumerate(shares):
            holders.setdefault(share[name], []).append(str(rank))
        if len(holders) > 1:
            wrong.append(
                f"{flag(name)} is "
                + " and ".join(f"{x} in process {', '.join(ranks[:8])}" for x, ranks in holders.items())
            )
    refuse(f"{'; '.join(wrong)}; expected the same in all processes" if wrong else "", group)


def refuse(message: str, group: dist.ProcessGroup | None) -> None:
    """End the run in all processes if the first one has a message: ValueError there, SystemExit in the others."""
    rank = place_in(group)[0]
    said = [message]
    if group is not None:
        dist.broadcast_object_list(said, src=0, group=group)
    if said[0]:
        raise ValueError(said[0]) if rank == 0 else SystemExit(1)


def _is_local(name: Any) -> bool:
    return isinstance(name, str) and is_local(name)


def flag(name: str) -> str:
    """Return the flag of a field of TrainConfig: --batch-size for batch_size."""
    return f"--{name.replace('_', '-')}"


def _was(name: str, before: Any, now: Any) -> str:
    return f"{flag(name)} was {before}, now {now}"


def _words(data: dict[str, Any]) -> str:
    """Describe the data in words: Shards (3 shards, 4,096 bytes, digest ...)."""
    sizes = [f"{value:,} {name}" for name, value in data.items() if name in ("shards", "pairs", "bytes")]
    return f"{data['kind']} ({', '.join(sizes)}, digest {data['digest']})"
