"""The Hugging Face Trainer and accelerate train as a plain loop does, in one process and in two."""

from __future__ import annotations

import pytest
import torch
from recipe_runs import losses, names_of, plain_losses
from torch.utils.data import DataLoader, RandomSampler

BATCH, STEPS = 16, 6
MAX_SCALE = {"clip": 14.0, "siglip": 9.9}  # the scales begin at 14.3 and 10, so the clamp acts
LOSSES = {"clip": "infonce", "siglip": "sigmoid"}


def patches_and_texts(clip, is_siglip: bool):
    """Return a function from a batch to the arguments of the loss, by the models' public outputs."""

    def embed(batch: dict) -> tuple[torch.Tensor, ...]:
        hidden = clip.vision_model(batch["pixel_values"], output_hidden_states=True).hidden_states[-1]
        patches = clip.vision_model.post_layernorm(hidden)
        texts = clip.get_text_features(batch["input_ids"]).pooler_output
        if is_siglip:
            return patches, texts, clip.logit_scale.exp(), clip.logit_bias
        return clip.visual_projection(patches)[:, 1:], texts, clip.logit_scale.exp()

    return embed


def plain(name: str, sampler_seed: int, bf16: bool = False, **options) -> tuple[list[float], float]:
    """Return the losses of a plain loop, and the mean loss of two batches after it."""
    example = names_of("hf_trainer.py")
    data, unseen = example["pairs"](BATCH * STEPS, seed=1), example["pairs"](2 * BATCH, seed=2)
    sampler = RandomSampler(data, generator=torch.Generator().manual_seed(sampler_seed))
    torch.manual_seed(0)
    clip = example["random_model"](name)
    embed = patches_and_texts(clip, name == "siglip")
    parameters = [p for n, p in clip.named_parameters() if "vision_model.head" not in n]
    found = plain_losses(
        embed, parameters, [[batch] for batch in DataLoader(data, BATCH, sampler=sampler)], clip.logit_scale,
        MAX_SCALE[name], loss=LOSSES[name], bf16=bf16, lr=1e-3, eps=1e-3, **options,
    )  # fmt: skip
    frozen = plain_losses(
        embed, parameters, [[batch] for batch in DataLoader(unseen, BATCH)], clip.logit_scale, 100.0,
        loss=LOSSES[name], bf16=bf16, lr=0.0,
    )  # fmt: skip
    return found, sum(frozen) / len(frozen)


def words(name: str, *more: object) -> list[object]:
    flags = ["--model", name, "--batch-size", BATCH, "--steps", STEPS, "--max-scale", MAX_SCALE[name]]
    return [*flags, *more]


@pytest.fixture(scope="module", autouse=True)
def _imported():
    """Import what the forked processes need; not at the top, where every run of the tests would pay for it."""
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    torch.set_num_threads(1)


@pytest.mark.parametrize("name, processes, more", [
    ("clip", None, []),
    ("clip", 2, []),
    ("siglip", 2, []),
    ("clip", 2, ["--micro-batch", 3]),
    ("siglip", None, ["--micro-batch", 5]),
])  # fmt: skip
def test_trainer(name, processes, more, tmp_path):
    """Losses of the steps and of the validation are those of a loop with Trainer's settings."""
    *found, validation = losses(tmp_path / "output", "hf_trainer.py", *words(name, *more), processes=processes)
    options = {"clip": 1.0, "optimizer": torch.optim.AdamW, "weight_decay": 0.0}
    expected, unseen = plain(name, sampler_seed=0, **options)
    assert found == pytest.approx(expected, rel=1e-5) and len(set(found)) == STEPS
    assert validation == pytest.approx(unseen, rel=1e-5)


@pytest.mark.parametrize("script", ["hf_trainer.py", "accelerate_loop.py"])
def test_autocast(script, tmp_path):
    """The loss is computed inside autocast; `--micro-batch` changes nothing in that."""
    (bf16, *_), _ = plain("siglip", sampler_seed=0, bf16=True)
    (full, *_), _ = plain("siglip", sampler_seed=0)
    assert abs(full / bf16 - 1) > 1e-4
    for i, more in enumerate(([], ["--micro-batch", 5])):
        first, *_ = losses(tmp_path / f"output{i}", script, *words("siglip", "--bf16", *more))
        assert first == pytest.approx(bf16, rel=1e-5)


@pytest.mark.parametrize("name, processes, more", [
    ("clip", 2, []),
    ("siglip", None, []),
    ("siglip", 2, ["--micro-batch", 3]),
])  # fmt: skip
def test_accelerate(name, processes, more, tmp_path):
    found = losses(tmp_path / "output", "accelerate_loop.py", *words(name, *more), processes=processes)
    expected, _ = plain(name, sampler_seed=0)
    assert found == pytest.approx(expected, rel=1e-5) and len(set(found)) == STEPS
