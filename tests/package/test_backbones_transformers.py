"""`patch_tokens` of transformers' models with random weights: compared with the models' own blocks and norms."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
pytest.importorskip("open_clip")
import torch
import transformers
from pacl.backbones import freeze, patch_tokens
from torch import nn

torch.set_num_threads(1)

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
CLIP = SIZES | {"intermediate_size": 64}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
# model, options of its config, tokens before the patches, name of the last norm
MODELS = {
    "clip": ("CLIPVisionModel", CLIP, 1, "post_layernorm"),
    "clip_with_projection": ("CLIPVisionModelWithProjection", CLIP, 1, "post_layernorm"),
    "whole_clip": ("CLIPModel", {"vision_config": CLIP, "text_config": TEXT}, 1, "post_layernorm"),
    "siglip": ("SiglipVisionModel", CLIP, 0, "post_layernorm"),
    "whole_siglip": ("SiglipModel", {"vision_config": CLIP, "text_config": TEXT}, 0, "post_layernorm"),
    "dinov2": ("Dinov2Model", SIZES, 1, "layernorm"),
    "registers": ("Dinov2WithRegistersModel", SIZES | {"num_register_tokens": 3}, 4, "layernorm"),
    "dinov3": ("DINOv3ViTModel", CLIP | {"num_register_tokens": 4}, 5, "norm"),
}


@pytest.fixture(params=list(MODELS))
def case(request):
    """Return a frozen model, the number of its tokens before the patches, and its last norm."""
    name, options, prefix, norm = MODELS[request.param]
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return made(name, **options), prefix, norm


def made(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**options))
    for name, x in model.named_parameters():
        if x.ndim == 1 or "token" in name:  # gains, biases, and tokens that are zero at first
            nn.init.uniform_(x, 0.5, 1.5)
    return freeze(model)


def images(height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_tokens_are_the_last_blocks_output_after_the_norm(case):
    model, prefix, norm = case
    (blocks,) = [x for name, x in model.named_modules() if isinstance(x, nn.ModuleList) and "text" not in name]
    (norm,) = [x for name, x in model.named_modules() if name.split(".")[-1] == norm]
    kept = []
    blocks[-1].register_forward_hook(lambda module, inputs, output: kept.append(output))
    tokens = patch_tokens(model, images())
    hidden = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
    assert hidden.shape == (2, prefix + 16, 32) and tokens.shape == (2, 16, 32) and not tokens.requires_grad
    torch.testing.assert_close(
        tokens, nn.functional.layer_norm(hidden, (32,), norm.weight, norm.bias, norm.eps)[:, prefix:]
    )


@pytest.mark.parametrize("row, column", [(0, 0), (1, 3), (2, 1), (3, 3)])
def test_tokens_are_in_the_order_of_the_patches(case, row, column):
    """Changing one patch of the image changes the token at its position most."""
    model, changed = case[0], images()
    changed[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 3
    difference = (patch_tokens(model, changed) - patch_tokens(model, images())).norm(dim=-1)
    assert difference.argmax(1).tolist() == [4 * row + column] * 2


def test_size_of_images(case):
    model = case[0]
    if "dino" in type(model).__name__.lower():
        assert patch_tokens(model, images(40, 48)).shape == (2, 30, 32)
        expected = "multiples of 8"
    else:
        expected = r"\[32, 32\]"
    with pytest.raises(ValueError, match=rf"images: got \[33, 40\] pixels, expected {expected}"):
        patch_tokens(model, images(33, 40))


def test_gradients_reach_an_open_model(case):
    weight = next(x for name, x in case[0].named_parameters() if "patch_embed" in name and x.ndim == 4)
    weight.requires_grad_(True)
    patch_tokens(case[0], images()).sum().backward()
    assert weight.grad.abs().sum() > 0


def test_other_models_are_an_error():
    model = made("ViTModel", **CLIP)
    with pytest.raises(TypeError, match="visual: got ViTModel, expected .*DINOv3 of transformers"):
        patch_tokens(model, images())
