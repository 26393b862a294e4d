"""The paper's training recipe: defaults for the flags of `pacl train`, and how a run deviates from them."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

from .config import TrainConfig

BATCH = 4096  # of all processes: 1,024 on each of 4 GPUs
# Mukhoti et al., CVPR 2023, section 4 and appendix A.2.
PAPER: dict[str, Any] = {
    "model": "ViT-B-16",
    "pretrained": "openai",
    "vision_model": None,
    "text_model": None,
    "force_image_size": None,
    "lock_image": True,
    "lock_image_unlocked_groups": 0,
    "lock_text": True,
    "epochs": 10,
    "max_steps": None,
    "lr": 5e-4,
    "wd": 0.2,
    "beta1": 0.9,
    "beta2": 0.98,
    "eps": 1e-6,
    "warmup": 0,
    "lr_scheduler": "cosine",
    "grad_clip_norm": None,
    "align": "phi",
    "form": "dot",
    "loss": "infonce",
    "attn_temperature": 1.0,
    "learn_attn_temperature": False,
    "logit_scale": 100.0,
    "learn_logit_scale": False,
    "ema_decay": None,
    "captions_per_image": 1,
    "duplicates": "negative",
    "nouns": "words",
}
ALSO_THE_PAPERS = {"model": ("ViT-L-14",), "nouns": ("nltk",)}
LEFT_OPEN = {
    "data": "the paper trains on GCC-3M, GCC-12M and YFCC-15M, about 30 million pairs; this run on its own pairs",
    "attn_temperature": "the paper states none; 1 is used, a plain softmax over patches",
    "form": "dot or cosine of the pooled patch and the text; texts about the paper have both",
    "logit_scale": "not stated; SPARC (2024), a re-implementation, does not learn it; 100 is used, CLIP's own",
    "tokens": "not stated; taken after ln_post and before proj, which gives the paper's 1.1 M parameters",
    "weight_decay": "the paper does not state which parameters decay; matrices do, biases do not",
    "grad_clip_norm": "not mentioned; none is used",
    "warmup": "not mentioned; none is used",
    "duplicates": "not stated; equal texts of two images in a batch are negatives of each other",
    "nouns": "how nouns are found is not stated",
    "image_transform": "size and augmentation are not stated; the tower's own size, resized and cropped at the centre",
}


def recipe_config() -> TrainConfig:
    """Return the defaults under `--recipe paper`; fill_batch sets accum_freq."""
    return TrainConfig(**PAPER, recipe="paper", accum_freq=None)


def defaults(config: TrainConfig) -> TrainConfig:
    """Return the defaults of the flags, with the recipe of `config` or without.

    A model from a folder or the Hub brings its own weights, and random towers have none, so neither gets the paper's.
    """
    if config.recipe is None:
        return TrainConfig()
    own = ":" in config.model or config.random_towers
    return dataclasses.replace(recipe_config(), pretrained=None) if own else recipe_config()


def fill_batch(config: TrainConfig, world: int) -> TrainConfig:
    """Return `config` with an accum_freq of None replaced by the number that gives all `world` processes 4,096 pairs.

    Raises ValueError if that is not a whole number.
    """
    if config.accum_freq is not None:
        return config
    accum_freq, rest = divmod(BATCH, config.batch_size * world)
    if rest or not accum_freq:
        raise ValueError(
            f"batch_size: got {config.batch_size} in {world} process(es), expected a divisor of the recipe's "
            f"{BATCH} pairs; or give --accum-freq"
        )
    return dataclasses.replace(config, accum_freq=accum_freq)


def command(config: TrainConfig) -> str:
    """Return the command that gives this config on any machine: every flag that is not the default of its recipe."""
    words, default = ["pacl", "train"], dataclasses.replace(defaults(config), recipe=None)
    for item in dataclasses.fields(config):
        value, flag = getattr(config, item.name), item.name.replace("_", "-")
        # The default of --workers depends on the machine.
        given = value != getattr(default, item.name) or item.name == "workers"
        if given and item.name not in ("resume", "dry_run"):
            words += (
                [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
            )
    return shlex.join(words)


def recipe_notes(config: TrainConfig, global_batch: int) -> dict[str, Any]:
    """Return notes for config.yaml: deviations from the recipe, and what the paper leaves open; {} without a recipe."""
    if config.recipe is None:
        return {}
    deviations = {
        name: {"paper": value, "run": getattr(config, name)}
        for name, value in PAPER.items()
        if getattr(config, name) not in (value, *ALSO_THE_PAPERS.get(name, ()))
    }
    if global_batch != BATCH:
        deviations["global_batch"] = {"paper": BATCH, "run": global_batch}
    return {"deviations": deviations, "left_open": LEFT_OPEN}
