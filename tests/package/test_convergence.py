"""Two hundred training steps of the demo with any backend follow those with the reference."""

from __future__ import annotations

import pytest

pytest.importorskip("open_clip")
import torch
from pacl.backbones import freeze
from pacl.data import scenes
from pacl.data.scene_shards import write_scenes
from pacl.demo.toy_clip import new_clip
from pacl.demo.training import embedder_config, embedder_pairs, frozen_features
from pacl.embedder import VisionEmbedder
from pacl.training.model import Trainable
from pacl.training.trainer import Trainer

from pacl_kernels import available_backends

STEPS = 200


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Compute tokens and texts with a frozen, untrained CLIP."""
    torch.set_num_threads(1)  # two threads are far slower when another process holds one of two cores
    torch.manual_seed(0)
    shards = write_scenes(tmp_path_factory.mktemp("scenes"), "train", 96, seed=0, pairs=scenes.SEEN)
    return frozen_features(freeze(new_clip()), shards, 96)


def curve(features, form: str, backend: str, seed: int = 0) -> torch.Tensor:
    tokens, texts = features
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    config = embedder_config(STEPS, 16, form=form, backend=backend)
    model = Trainable(VisionEmbedder(tokens.shape[2], texts.shape[1]), config)
    losses: list[float] = []
    Trainer(model, config, STEPS).run(embedder_pairs(tokens, texts, 16, seed), lambda loss: losses.append(loss.item()))
    return torch.tensor(losses)


@pytest.mark.sampled(2)
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
