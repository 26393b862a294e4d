"""`patch_tokens` takes the documented tensor from towers with random weights; tests compute it again by hand."""

import open_clip
import pytest
import timm
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from pacl.backbones import freeze, own_size, patch_sides, patch_tokens, tower_blocks
from torch import nn

torch.set_num_threads(1)


def randomise(model: nn.Module) -> nn.Module:
    """Draw gains, biases and statistics other than 1 and 0, so that a missing or doubled norm changes the result."""
    torch.manual_seed(1)
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        if x.is_floating_point() and x.ndim == 1 and "rope" not in name:
            nn.init.uniform_(x, 0.5, 1.5)
    return freeze(model)


def tower(**options) -> nn.Module:
    torch.manual_seed(0)
    return randomise(_build_vision_tower(24, CLIPVisionCfg(**{"image_size": 32, "width": 64, "layers": 2} | options)))


def timm_model(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    return randomise(timm.create_model(name, **options))


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
SMALL = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}


def test_native_tower():
    visual = tower(patch_size=8, head_width=32, output_tokens=True)
    tokens = patch_tokens(visual, IMAGES)
    assert tokens.shape == (2, 16, 64) and not tokens.requires_grad
    pooled, expected = visual(IMAGES)  # open_clip's patch tokens: after ln_post, before proj
    torch.testing.assert_close(tokens, expected)
    assert pooled.shape == (2, 24)


# Among them: a class token, DINOv2's registers, an attention pooler without a prefix, the norm after the pooling.
@pytest.mark.parametrize(
    "name, options, prefix, patches",
    [
        ("vit_base_patch16_224.dino", {}, 1, 4),
        ("vit_small_patch14_dinov2", {"img_size": 28}, 1, 4),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 28}, 5, 4),
        ("vit_base_patch16_siglip_224", {}, 0, 4),
        ("vit_base_patch16_224", {"global_pool": "avg"}, 1, 4),
        ("vit_base_patch16_clip_quickgelu_224", {}, 1, 4),
    ],
)
def test_timm_vision_transformers(name, options, prefix, patches):
    visual = timm_model(name, **{"num_classes": 0} | SMALL | options)
    size = options.get("img_size", 32)
    images = IMAGES[:, :, :size, :size]
    x = visual.norm_pre(visual._pos_embed(visual.patch_embed(images)))
    for block in visual.blocks:
        x = x + block.ls1(block.attn(block.norm1(x)))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    norms = [m for m in (visual.norm, visual.fc_norm) if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 1 and x.shape[1] == prefix + patches
    torch.testing.assert_close(patch_tokens(visual, images), norms[0](x)[:, prefix:])


@pytest.mark.parametrize(
    "name, prefix, width",
    [("vit_small_patch16_dinov3", 5, 384), ("eva02_tiny_patch14_224", 1, 192), ("beit_base_patch16_224", 1, 768)],
)
def test_timm_families_with_rotary_or_relative_positions(name, prefix, width):
    if not timm.is_model(name):
        pytest.skip("timm is older than DINOv3")
    size = 28 if "patch14" in name else 32
    visual = timm_model(name, depth=2, img_size=size, num_classes=0)
    images = IMAGES[:, :, :size, :size]
    kept = []
    visual.blocks[-1].register_forward_hook(lambda module, inputs, output: kept.append(output))
    tokens = patch_tokens(visual, images)
    norms = [m for m in (visual.norm, visual.fc_norm) if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 1 and tokens.shape == (2, 4, width) and kept[0].shape[1] == prefix + 4
    torch.testing.assert_close(tokens, norms[0](kept[0])[:, prefix:])


def by_hand(features: torch.Tensor, norm: nn.Module | None = None) -> torch.Tensor:
    """Convert features [B, C, h, w] to tokens [B, h w, C], one position after the other."""
    tokens = torch.stack([features[:, :, i, j] for i in range(features.shape[2]) for j in range(features.shape[3])], 1)
    if norm is not None:
        tokens = nn.functional.layer_norm(tokens, tokens.shape[-1:], norm.weight, norm.bias, norm.eps)
    return tokens


@pytest.mark.parametrize("head_norm_first", [False, True])
def test_convnext(head_norm_first):
    visual = timm_model("test_convnext", head_norm_first=head_norm_first)
    images = torch.randn(2, 3, 64, 96)
    x = visual.stem(images)
    for stage in visual.stages:
        x = stage(x)
    norm = visual.norm_pre if head_norm_first else visual.head.norm
    tokens = patch_tokens(visual, images)
    assert tokens.shape == (2, 6, visual.num_features)
    torch.testing.assert_close(tokens, by_hand(x, norm))
    if not head_norm_first:  # the model pools these features, then applies the norm
        pooled = nn.functional.layer_norm(x.mean((2, 3)), x.shape[1:2], norm.weight, norm.bias, norm.eps)
        torch.testing.assert_close(visual.head(x, pre_logits=True), pooled)


def test_resnet():
    visual = timm_model("test_resnet")
    images = torch.randn(2, 3, 64, 96)
    x = visual.maxpool(visual.act1(visual.bn1(visual.conv1(images))))
    for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        x = layer(x)
    tokens = patch_tokens(visual, images)
    assert tokens.shape == (2, 6, visual.num_features)
    torch.testing.assert_close(tokens, by_hand(x))
    torch.testing.assert_close(visual(images), visual.fc(tokens.mean(1)))


def test_openai_resnet():
    visual = tower(layers=(1, 1, 1, 1), width=8, image_size=64)
    images = torch.randn(2, 3, 64, 64)
    kept = []
    visual.attnpool.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    visual(images)
    tokens = patch_tokens(visual, images)
    assert tokens.shape == (2, 4, 256)
    torch.testing.assert_close(tokens, by_hand(kept[0]))


@pytest.mark.parametrize("name, width", [("vit_tiny_patch16_224", 192), ("test_convnext", 64), ("test_resnet", 96)])
def test_a_timm_model_inside_open_clip_is_its_trunk(name, width):
    pool = "token" if name.startswith("vit") else ""
    visual = tower(timm_model_name=name, timm_pool=pool, timm_proj="linear")
    if pool:
        visual.set_input_size(32)
    tokens = patch_tokens(visual, IMAGES)
    assert tokens.shape[2] == width
    assert torch.equal(tokens, patch_tokens(visual.trunk, IMAGES))


@pytest.mark.parametrize(
    "visual",
    [
        tower(patch_size=8, head_width=32),
        timm_model("vit_small_patch14_reg4_dinov2", num_classes=0, **SMALL | {"patch_size": 8}),
        timm_model("test_convnext"),
    ],
    ids=["native", "timm", "convnext"],
)
def test_position_matters_row_by_row(visual):
    """Changing one patch of the image changes the token at its position most."""
    size = 128 if type(visual).__name__ == "ConvNeXt" else 32
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    changed = images.clone()
    changed[:, :, size // 4 : size // 2, -size // 4 :] += 3
    difference = (patch_tokens(visual, changed) - patch_tokens(visual, images)).norm(dim=-1)
    assert difference.argmax(1).tolist() == [7, 7]


def test_patches_of_a_hybrid_embedding_are_those_of_the_image():
    """timm's own number counts the features of the convolutions before it."""
    visual = timm_model("vit_tiny_r_s16_p8_224", depth=1)
    assert visual.patch_embed.patch_size == (8, 8) and patch_sides(visual) == (32, 32)
    assert patch_tokens(visual, torch.randn(1, 3, 224, 224)).shape[1] == 49


def test_frozen_tower_has_no_graph_and_an_open_one_has():
    visual = tower(patch_size=8, head_width=32)
    visual.conv1.weight.requires_grad_(True)
    patch_tokens(visual, IMAGES).sum().backward()
    assert visual.conv1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "visual",
    [
        tower(patch_size=8, head_width=32),
        timm_model("vit_small_patch14_dinov2", **SMALL),
        timm_model("test_convnext"),
        timm_model("test_resnet"),
        tower(layers=(1, 1, 1, 1), width=8),
        tower(patch_size=8, head_width=32, attentional_pool=True),
        timm_model("test_efficientnet"),
        timm_model("fastvit_t8"),
    ],
    ids=["native", "timm", "convnext", "resnet", "openai_resnet", "coca", "efficientnet", "fastvit"],
)
def test_blocks_are_what_runs_last(visual):
    blocks, norms = tower_blocks(visual)
    order = []
    for i, module in enumerate([*blocks, *norms]):
        module.register_forward_hook(lambda *_, i=i: order.append(i))
    patch_tokens(visual, IMAGES)
    assert order[: len(blocks)] == list(range(len(blocks))) and set(order) == set(range(len(blocks) + len(norms)))
    assert len(blocks) >= 2


@pytest.mark.parametrize(
    "visual",
    [
        tower(timm_model_name="test_byobnet", timm_pool="", timm_proj="linear"),
        timm_model("test_mambaout"),
        nn.Linear(3, 3),
        open_clip.CLIP(8, CLIPVisionCfg(layers=1, width=64, image_size=32), open_clip.CLIPTextCfg(layers=1)),
    ],
    ids=["timm_in_open_clip", "timm", "linear", "whole_model"],
)
def test_unknown_family(visual):
    for function in (tower_blocks, lambda visual: patch_tokens(visual, IMAGES)):
        with pytest.raises(TypeError, match="visual: got .*expected"):
            function(visual)


def test_attention_pooled_native_tower():
    """CoCa's pooler normalises the patches itself; `ln_post` normalises what the pooler returns."""
    visual = tower(patch_size=8, head_width=32, attentional_pool=True, attn_pooler_queries=5)
    kept = []
    visual.attn_pool.ln_k.register_forward_hook(lambda module, inputs, output: kept.append(output))
    visual(IMAGES)
    assert kept[0].shape == (2, 17, 64)
    torch.testing.assert_close(patch_tokens(visual, IMAGES), kept[0][:, 1:])


def test_efficientnet_and_fastvit_before_pooling():
    for name, head in (("test_efficientnet", "global_pool"), ("fastvit_t8", "head")):
        visual = timm_model(name)
        kept = []
        visual.get_submodule(head).register_forward_pre_hook(lambda module, inputs, kept=kept: kept.append(inputs[0]))
        images = torch.randn(2, 3, 64, 96)
        visual(images)
        tokens = patch_tokens(visual, images)
        assert tokens.shape == (2, 6, visual.num_features if name == "test_efficientnet" else 768)
        torch.testing.assert_close(tokens, by_hand(kept[0]))


@pytest.mark.parametrize(
    "name, options",
    [
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 2), "num_heads": (1, 2, 4, 8)}),
        ("swinv2_tiny_window8_256", {"depths": (1, 1, 1, 2), "num_heads": (1, 2, 4, 8)}),
        ("hiera_tiny_224", {"stages": (1, 1, 1, 2)}),
    ],
)
def test_windows_of_one_size(name, options):
    """The model pools these tokens by their mean: before the norm in Hiera, after it in Swin."""
    visual = timm_model(name, embed_dim=16, **options)
    size = visual.pretrained_cfg["input_size"][1]
    images = torch.randn(2, 3, size, size)
    tokens = patch_tokens(visual, images)
    assert tokens.shape == (2, (size // 32) ** 2, 128) and own_size(visual) == (size, size)
    if "hiera" in name:
        kept = []
        visual.blocks[-1].register_forward_hook(lambda module, inputs, output: kept.append(output))
        visual(images)
        norm = visual.head.norm
        expected = nn.functional.layer_norm(kept[0], (128,), norm.weight, norm.bias, norm.eps)
        torch.testing.assert_close(tokens, expected)
    else:
        torch.testing.assert_close(
            visual.forward_head(tokens.unflatten(1, (size // 32, size // 32)), True), tokens.mean(1)
        )
    with pytest.raises(ValueError, match=rf"images: got \[64, 64\] pixels, expected \[{size}, {size}\]"):
        patch_tokens(visual, images[:, :, :64, :64])


@pytest.mark.parametrize(
    "visual",
    [
        tower(patch_size=8, head_width=32, patch_dropout=0.5),
        timm_model("vit_small_patch14_dinov2", **SMALL | {"patch_size": 8, "patch_drop_rate": 0.5}),
    ],
    ids=["native", "timm"],
)
def test_dropped_patches_are_an_error(visual):
    assert patch_tokens(visual, IMAGES).shape[1] == 16
    with pytest.raises(ValueError, match="visual: got a tower that drops patches, expected it in eval mode"):
        patch_tokens(visual.train(), IMAGES)


@pytest.mark.parametrize("images", [IMAGES[:, :1], IMAGES[0], IMAGES.byte(), IMAGES[:, :, :16]])
def test_bad_images(images):
    for visual in (tower(patch_size=8, head_width=32), timm_model("vit_base_patch16_siglip_224", **SMALL)):
        with pytest.raises(ValueError, match="images: got"):
            patch_tokens(visual, images)
