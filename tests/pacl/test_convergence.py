"""Two hundred steps of the demo's training with every backend follow those with the reference."""

from __future__ import annotations

import functools

import pytest

pytest.importorskip("open_clip")
import torch
from pacl.backbones import freeze
from pacl.data import scenes
from pacl.data.scene_shards import write_scenes
from pacl.demo import loops
from pacl.demo.run import frozen_features
from pacl.demo.toy_clip import new_clip
from pacl.embedder import VisionEmbedder

from pacl_kernels import available_backends, fused_pacl_loss

STEPS = 200


class Curve:
    """Takes the losses in place of a progress bar."""

    total = STEPS

    def __init__(self):
        self.losses: list[float] = []

    @property
    def done(self) -> int:
        return len(self.losses)

    def step(self, loss) -> None:
        self.losses.append(loss.item())


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Tokens and texts of a frozen, untrained CLIP."""
    torch.set_num_threads(1)  # two collapse when another process holds one of two cores
    torch.manual_seed(0)
    shards = write_scenes(tmp_path_factory.mktemp("scenes"), "train", 96, seed=0, pairs=scenes.SEEN)
    return frozen_features(freeze(new_clip()), shards, 96)


def curve(features, form: str, backend: str, seed: int = 0) -> torch.Tensor:
    tokens, texts = features
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    embedder, losses = VisionEmbedder(tokens.shape[2], texts.shape[1]), Curve()
    options = {"form": form, "attn_temperature": loops.ATTN_TEMPERATURE, "backend": backend}
    loss = functools.partial(fused_pacl_loss, **options)
    loops.train_embedder(embedder, loss, tokens, texts, losses, batch_size=16, seed=seed)
    return torch.tensor(losses.losses)


@pytest.mark.parametrize("form", ["dot", "cosine"])
def test_loss_curves_agree(form, features):
    expected = curve(features, form, "reference")
    assert expected[-20:].mean() < 0.7 * expected[:20].mean(), "nothing was learned"
    noise = (curve(features, form, "reference", seed=1) - expected).abs()[-50:].mean()
    for backend in ("cpu", "torch"):
        if available_backends()[backend] is None:
            difference = (curve(features, form, backend) - expected).abs()
            assert difference[:20].max() < 1e-3, f"{backend} leaves the curve at once"
            assert difference[-50:].mean() < noise, f"{backend} is further from the reference than another seed"
