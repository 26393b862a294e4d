"""Tokens at smaller strides and other sizes equal those of patches and positions computed by hand."""

import copy

import pytest
import timm
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from pacl.backbones import freeze, patch_tokens
from pacl.dense import dense_tokens, patch_size, token_step
from torch import nn
from torch.nn import functional as F

torch.set_num_threads(1)
PATCH = 8


def native(**options) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": PATCH, "width": 32, "layers": 2, "head_width": 16}
    return freeze(_build_vision_tower(24, CLIPVisionCfg(**sizes | options)))


def timm_vit(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": PATCH, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    return freeze(timm.create_model(name, **sizes | options))


def images(height: int, width: int) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


ABSOLUTE = {
    "native": native,
    "class token": lambda: timm_vit("vit_base_patch16_224.dino"),
    "registers": lambda: timm_vit("vit_small_patch14_reg4_dinov2"),
    "no prefix": lambda: timm_vit("vit_base_patch16_siglip_224"),
    "dynamic size": lambda: timm_vit("vit_base_patch16_224", dynamic_img_size=True),
}
ROTARY = (
    {}
    if not timm.is_model("vit_small_patch16_dinov3")
    else {
        "dinov3": lambda: timm_vit("vit_small_patch16_dinov3"),
        "eva02": lambda: timm_vit("eva02_tiny_patch14_224"),
        "eva02, kept": lambda: timm_vit("eva02_tiny_patch14_224", dynamic_img_size=False),
        "places in patches": lambda: timm_vit("vit_base_patch16_rope_224", rope_grid_offset=0.5),
    }
)


def same_state(visual: nn.Module, before: dict) -> bool:
    now = visual.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)


@pytest.mark.parametrize("make", [*ABSOLUTE.values(), *ROTARY.values()], ids=[*ABSOLUTE, *ROTARY])
def test_own_grid_is_patch_tokens_and_the_tower_stays_as_it_was(make):
    visual = make()
    before, picture = copy.deepcopy(visual.state_dict()), images(32, 32)
    expected = patch_tokens(visual, picture)
    torch.testing.assert_close(dense_tokens(visual, picture).flatten(1, 2), expected, rtol=0, atol=0)
    assert dense_tokens(visual, picture, 4).shape == (2, 13, 13, 32)
    assert dense_tokens(visual, images(40, 72), 2).shape == (2, 9, 17, 32)
    assert same_state(visual, before)
    assert torch.equal(patch_tokens(visual, picture), expected)
    if not getattr(visual, "dynamic_img_size", False):
        with pytest.raises((ValueError, AssertionError)):
            patch_tokens(visual, images(40, 72))


def embedded(visual: nn.Module, picture: torch.Tensor, stride: int) -> torch.Tensor:
    """Return the input of the first block without its prefix, [B, h, w, width]."""
    kept = []
    block = visual.transformer.resblocks[0] if hasattr(visual, "transformer") else visual.blocks[0]
    handle = block.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    tokens = dense_tokens(visual, picture, stride)
    handle.remove()
    return kept[0][:, -tokens.shape[1] * tokens.shape[2] :].unflatten(1, tokens.shape[1:3])


@pytest.mark.parametrize("make", ABSOLUTE.values(), ids=ABSOLUTE)
@pytest.mark.parametrize("stride, size", [(1, (32, 32)), (2, (32, 32)), (8, (16, 24)), (4, (40, 32)), (4, (26, 18))])
def test_patches_are_those_cut_out_by_hand(make, stride, size):
    """Without positions, every token is the patch convolution at the token's offset."""
    visual = make()
    is_native = hasattr(visual, "positional_embedding")
    nn.init.zeros_(visual.positional_embedding if is_native else visual.pos_embed)
    if is_native:
        visual.ln_pre = nn.Identity()
    convolution = visual.conv1 if is_native else visual.patch_embed.proj
    picture, step = images(*size), PATCH // stride
    patches = picture.unfold(2, PATCH, step).unfold(3, PATCH, step)  # [B, 3, h, w, patch, patch]
    expected = torch.einsum("bchwyx,dcyx->bhwd", patches, convolution.weight)
    expected = expected if convolution.bias is None else expected + convolution.bias
    torch.testing.assert_close(embedded(visual, picture, stride), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", ABSOLUTE.values(), ids=ABSOLUTE)
def test_positions_are_those_of_the_patch_centres(make):
    visual = make()
    is_native = hasattr(visual, "positional_embedding")
    table = (visual.positional_embedding if is_native else visual.pos_embed[0]).data
    nn.init.normal_(table)
    if is_native:
        visual.ln_pre = nn.Identity()
    nn.init.zeros_((visual.conv1 if is_native else visual.patch_embed.proj).weight)
    if not is_native:
        nn.init.zeros_(visual.patch_embed.proj.bias)
    grid = table[-16:].unflatten(0, (4, 4))
    # At every stride, the tower's own patches keep their positions.
    for stride in (2, 8):
        found = embedded(visual, images(32, 32), stride)[0]
        torch.testing.assert_close(found[::stride, ::stride], grid)
    # Larger images at stride 1 get the usual resizing.
    resized = F.interpolate(grid.permute(2, 0, 1)[None], (5, 9), mode="bicubic", align_corners=False)[0]
    found = embedded(visual, images(40, 72), 1)[0]
    torch.testing.assert_close(found, resized.permute(1, 2, 0), rtol=1e-4, atol=1e-4)
    # Positions change evenly from the centre of the second patch to that of the third.
    table[-16:] = (torch.arange(4.0)[:, None, None] + 0 * grid).flatten(0, 1)
    between = embedded(visual, images(32, 32), 4)[0][4:9, 4, 0]
    torch.testing.assert_close(between, 3 - between.flip(0))
    assert between.diff().min() > 0.1 and between[[0, 2, 4]].tolist() == pytest.approx([1, 1.5, 2])


@pytest.mark.parametrize("make", ROTARY.values(), ids=ROTARY)
def test_rotary_positions_of_the_towers_own_patches(make):
    visual = make()
    ropes = []
    for module in visual.modules():  # records the rotary positions that attention gets
        if hasattr(module, "norm1") and hasattr(module, "attn"):
            hook = lambda module, args, kwargs: ropes.append(kwargs["rope"])  # noqa: E731
            module.register_forward_pre_hook(hook, with_kwargs=True)
    for size in ((32, 32), (48, 24)):
        grid = [x // PATCH for x in size]
        ropes.clear()
        dense_tokens(visual, images(*size), 1)
        own = ropes[0].unflatten(0, grid)
        if grid == [4, 4]:
            assert torch.equal(ropes[0], visual.rope.get_embed(shape=grid))
        for stride in (2, 4):
            ropes.clear()
            dense_tokens(visual, images(*size), stride)
            fine = ropes[0].unflatten(0, [(x - 1) * stride + 1 for x in grid])
            torch.testing.assert_close(fine[::stride, ::stride], own, rtol=1e-5, atol=1e-5)
            # Halfway between two patches, the angle is halfway too.
            angles = torch.atan2(*fine.chunk(2, -1))
            turn = torch.remainder(angles[:, 1:] - angles[:, :-1] + torch.pi, 2 * torch.pi) - torch.pi
            torch.testing.assert_close(turn, turn[:1, :1].expand_as(turn), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", [native, ABSOLUTE["registers"], *ROTARY.values()], ids=["native", "timm", *ROTARY])
def test_a_token_follows_its_patch(make):
    """At every stride, changing the image around one place changes a token that sees this place most."""
    visual = make()
    before = images(32, 48)
    after = before.clone()
    after[:, :, 8:16, 32:40] += 3
    for stride in (1, 2, 4):
        step = PATCH // stride
        change = (dense_tokens(visual, after, stride) - dense_tokens(visual, before, stride)).norm(dim=-1)
        for one in change:
            y, x = divmod(int(one.argmax()), change.shape[2])
            assert abs(y * step - 8) < PATCH and abs(x * step - 32) < PATCH


def test_convolutional_towers_have_their_own_stride_only():
    for visual in (
        freeze(timm.create_model("test_convnext")),
        freeze(timm.create_model("test_resnet")),
        native(layers=(1, 1, 1, 1), width=8, image_size=64),
    ):
        assert patch_size(visual) == 32
        picture = images(64, 96)
        tokens = dense_tokens(visual, picture)
        assert tokens.shape[:3] == (2, 2, 3) and torch.equal(tokens.flatten(1, 2), patch_tokens(visual, picture))
        with pytest.raises(ValueError, match="stride: got 2, expected 1 for .*no patch convolution"):
            dense_tokens(visual, picture, 2)


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "vit_small_patch16_rope_mixed_224"])
def test_positions_that_fit_one_grid_alone(name):
    if not timm.is_model(name):
        pytest.skip("timm is older than this model")
    visual = freeze(timm.create_model(name, img_size=32, depth=1, num_classes=0))
    assert dense_tokens(visual, images(32, 32)).shape[:3] == (2, 2, 2)
    with pytest.raises(ValueError, match="images, stride: got 32 x 32 pixels and 2, expected 32 x 32 and 1"):
        dense_tokens(visual, images(32, 32), 2)


def test_a_trained_tower_and_a_timm_model_in_open_clip():
    visual = native()
    visual.conv1.weight.requires_grad_(True)
    dense_tokens(visual, images(32, 32), 2).sum().backward()
    assert visual.conv1.weight.grad.abs().sum() > 0
    wrapped = native(timm_model_name="vit_tiny_patch16_224", timm_pool="token", timm_proj="linear")
    picture = images(64, 96)
    assert torch.equal(dense_tokens(wrapped, picture, 4), dense_tokens(wrapped.trunk, picture, 4))


@pytest.mark.parametrize("stride", [0, 3, 16, 1.0, True, "2"])
def test_bad_strides(stride):
    with pytest.raises(ValueError, match="stride: got .*, expected a divisor of the patch of 8 pixels: 1, 2, 4, 8"):
        token_step(native(), stride)


@pytest.mark.parametrize("height, width, stride", [(33, 32, 1), (32, 35, 4), (4, 32, 1)])
def test_bad_sizes(height, width, stride):
    with pytest.raises(ValueError, match=f"images: got {height} x {width} pixels, expected 8 and a multiple of"):
        dense_tokens(native(), images(height, width), stride)
