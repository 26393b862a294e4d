"""patch_tokens takes the tensor that it says, from towers with random weights."""

import open_clip
import pytest
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from pacl.backbones import freeze, patch_tokens


def tower(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    return freeze(_build_vision_tower(24, CLIPVisionCfg(**{"image_size": 32, "width": 64, "layers": 2} | options)))


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_native_tower():
    visual = tower(patch_size=8, head_width=32, output_tokens=True)
    torch.nn.init.normal_(visual.ln_post.bias)  # at its initial 0 the norm would be hard to miss
    tokens = patch_tokens(visual, IMAGES)
    assert tokens.shape == (2, 16, 64) and not tokens.requires_grad
    pooled, expected = visual(IMAGES)  # open_clip's own patch tokens: after ln_post, before proj
    torch.testing.assert_close(tokens, expected)
    assert pooled.shape == (2, 24)


def test_timm_tower():
    visual = tower(timm_model_name="vit_tiny_patch16_224", timm_pool="token", timm_proj="linear")
    visual.set_input_size(32)
    torch.nn.init.normal_(visual.trunk.norm.bias)
    tokens = patch_tokens(visual, IMAGES)
    assert tokens.shape == (2, 4, 192)
    torch.testing.assert_close(tokens, visual.trunk.forward_features(IMAGES)[:, 1:])


def test_position_matters_row_by_row():
    """Changing the last patch of the picture changes the last token most."""
    visual = tower(patch_size=8, head_width=32)
    changed = IMAGES.clone()
    changed[:, :, -8:, -8:] += 3
    difference = (patch_tokens(visual, changed) - patch_tokens(visual, IMAGES)).norm(dim=-1)
    assert difference.argmax(1).tolist() == [15, 15]


def test_frozen_tower_has_no_graph_and_an_open_one_has():
    visual = tower(patch_size=8, head_width=32)
    visual.conv1.weight.requires_grad_(True)
    patch_tokens(visual, IMAGES).sum().backward()
    assert visual.conv1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "visual",
    [
        tower(layers=(1, 1, 1, 1)),  # OpenAI's ResNet
        tower(timm_model_name="resnet18", timm_pool="", timm_proj="linear"),
        torch.nn.Linear(3, 3),
        open_clip.CLIP(8, CLIPVisionCfg(layers=1, width=64, image_size=32), open_clip.CLIPTextCfg(layers=1)),
    ],
    ids=["resnet", "timm_resnet", "linear", "whole_model"],
)
def test_unknown_family(visual):
    with pytest.raises(TypeError, match="visual: got .*expected"):
        patch_tokens(visual, IMAGES)


def test_attention_pooled_native_tower():
    with pytest.raises(ValueError, match="visual: got .* attention pooler"):
        patch_tokens(tower(patch_size=8, head_width=32, attentional_pool=True), IMAGES)


def test_dropped_patches_are_an_error():
    visual = tower(patch_size=8, head_width=32, patch_dropout=0.5)
    assert patch_tokens(visual, IMAGES).shape[1] == 16
    with pytest.raises(ValueError, match="left 8 of 16 patches, expected a tower in eval mode"):
        patch_tokens(visual.train(), IMAGES)


@pytest.mark.parametrize("images", [IMAGES[:, :1], IMAGES[0], IMAGES.byte(), IMAGES[:, :, :16]])
def test_bad_images(images):
    with pytest.raises(ValueError, match="images: got"):
        patch_tokens(tower(patch_size=8, head_width=32), images)
