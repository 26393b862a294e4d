"""Public objects of `pacl` are deep-copied, pickled and saved, and the copies compute the same."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pacl
import pytest
import torch
from pictures import picture
from PIL import Image

WORDS = ["a cyan striped shape", "grass"]


def saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda value: pickle.loads(pickle.dumps(value)), "torch.save": saved}


def weights(segmenter: pacl.Segmenter) -> list[torch.Tensor]:
    modules = segmenter.towers.visual, segmenter.towers.text, segmenter.embed
    return [x for module in modules for x in module.parameters()]


@pytest.fixture(scope="module", params=["PACL", "plain CLIP", "timm", "trained"])
def segmenter(request, untrained) -> pacl.Segmenter:
    """Return a segmenter on an embedder, on CLIP's own projection, on a timm tower, or on trained towers."""
    if request.param == "PACL":
        return pacl.Segmenter(*pacl.load_pacl(untrained / "run/embedder"), stride=2)
    options = {
        "plain CLIP": {},
        "timm": {"vision_model": "test_vit", "vision_pretrained": False},
        "trained": {"lock_image": False, "lock_text": False, "grad_checkpointing": True},
    }[request.param]
    towers = pacl.load_towers(f"local-dir:{untrained / 'clip'}", **options)
    return pacl.Segmenter(towers, pacl.VisionEmbedder(*towers.widths).eval() if request.param == "timm" else None)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("how", COPIES)
def test_segmenters(how, segmenter):
    """A copy of a segmenter, and with it of towers and embedder, has weights of its own and gives the same labels."""
    image = Image.fromarray(picture(1, 48, 80))
    other = COPIES[how](segmenter)
    assert torch.equal(other.labels(image, WORDS), segmenter.labels(image, WORDS))
    assert other.towers.names == segmenter.towers.names and other.towers.trained == segmenter.towers.trained
    assert not {x.data_ptr() for x in weights(other)} & {x.data_ptr() for x in weights(segmenter)}


@pytest.mark.parametrize("how", COPIES)
def test_what_segmenters_return(how, segmenter):
    """An image's patch embeddings, texts and maps can be kept for later."""
    dense, texts = segmenter.dense(Image.fromarray(picture(1, 48, 80))), segmenter.texts(WORDS)
    expected = dense.labels(texts, threshold=0.1)
    got = COPIES[how](COPIES[how](dense).labels(COPIES[how](texts), threshold=0.1))
    assert torch.equal(got.labels, expected.labels) and torch.equal(got.best, expected.best)


@pytest.mark.parametrize("how", COPIES)
def test_embedders(how, tmp_path):
    """A copy of an embedder keeps its description, and saves it."""
    embedder = pacl.VisionEmbedder(6, 4, form="dot", attn_temperature=0.2, towers={"model": "x"}, training={"steps": 7})
    COPIES[how](embedder).save_pretrained(tmp_path)
    again = pacl.VisionEmbedder.from_pretrained(tmp_path)
    assert again.config == embedder.config and (again.towers, again.notes) == ({"model": "x"}, {"steps": 7})
    again.load_state_dict(embedder.state_dict())
    tokens = torch.randn(2, 6)
    assert torch.equal(again(tokens), embedder(tokens))


@pytest.mark.parametrize("name", pacl.__all__)
def test_every_public_name_pickles(name):
    value = getattr(pacl, name)
    assert pickle.loads(pickle.dumps(value)) is value and copy.deepcopy(value) is value
