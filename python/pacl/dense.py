"""Patch tokens on a grid, for images of any size and at a smaller stride than the tower's own (the "stride trick").

A transformer's patches may overlap: its patch convolution can step by a fraction of the patch, if each token's position
embedding is interpolated on the trained grid at the token's own centre. The tower and its weights do not change: a
second module runs over the same tensors.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import timm.layers
import timm.models as timm_models
import torch
from open_clip.transformer import VisionTransformer
from timm.layers import PatchEmbed, RotaryEmbeddingCat
from torch import Tensor, nn
from torch.nn import functional as F

from .backbones import TIMM_VITS, patch_sides, patch_tokens, share, tower_trunk
from .readings import PLAIN, Reader, proxy_attention, read_as

# timm before DINOv3 has only the first class.
ROTARY = tuple(
    getattr(timm.layers, x) for x in ("RotaryEmbeddingCat", "RotaryEmbeddingDinoV3") if hasattr(timm.layers, x)
)


def patch_size(visual: nn.Module) -> int:
    """Return the side of the tower's patches in pixels, or a convolutional tower's stride; raises as patch_tokens."""
    sides = patch_sides(tower_trunk(visual))
    if sides[0] != sides[1]:
        raise ValueError(f"visual: got patches of {sides[0]} x {sides[1]} pixels, expected square ones")
    return sides[0]


def token_step(visual: nn.Module, stride: int) -> int:
    """Return the pixels from one token to the next, patch / stride.

    Raises ValueError if `stride` does not divide the patch, or is above 1 and the tower has no patch convolution.
    """
    patch = patch_size(visual)
    if isinstance(stride, bool) or not isinstance(stride, int) or stride < 1 or patch % stride:
        fit = ", ".join(str(x) for x in range(1, patch + 1) if patch % x == 0)
        raise ValueError(f"stride: got {stride!r}, expected a divisor of the patch of {patch} pixels: {fit}")
    trunk = tower_trunk(visual)
    if stride > 1 and not isinstance(trunk, (VisionTransformer, *TIMM_VITS)):
        raise ValueError(f"stride: got {stride}, expected 1 for {type(trunk).__name__}, which has no patch convolution")
    return patch // stride


def dense_tokens(visual: nn.Module, images: Tensor, stride: int = 1, reader: Reader = PLAIN) -> Tensor:
    """Return tokens of images of any size, `stride` times as many along each side as the tower's own.

    visual: a tower that patch_tokens accepts. images: float [B, 3, H, W], normalised; H and W are a patch plus a
    multiple of the step, patch / stride, so that the last token ends with the image. Returns [B, h, w, width] with
    h = (H - patch) / step + 1; token (i, j) sees the patch whose corner is at pixel (i * step, j * step). reader: the
    reading of the last block.

    A NaFlex ViT of timm interpolates its own, at stride 1. For other towers:

    Position embeddings are interpolated bicubically at the patches' centres, with the trained grid covering the image;
    at stride 1 that is the usual resizing. Rotary embeddings are computed at those centres. Raises ValueError for
    towers with other positions (relative biases, learnt rotations), unless images have the tower's size and stride is
    1, and for convolutional towers at any stride but 1.
    """
    step, patch = token_step(visual, stride), patch_size(visual)
    height, width = images.shape[-2:]
    for side in (height, width):
        if side < patch or (side - patch) % step:
            raise ValueError(
                f"images: got {height} x {width} pixels, expected {patch} and a multiple of {step} on each side"
            )
    trunk = tower_trunk(visual)
    if isinstance(trunk, (VisionTransformer, *TIMM_VITS)) and (stride > 1 or (height, width) != _own_size(trunk)):
        trunk = _view(trunk, (height, width), stride)
    grid = (height - patch) // step + 1, (width - patch) // step + 1
    if reader.name != "plain":
        attention = None if reader.proxy is None else proxy_attention(_proxy_tokens(reader, images, grid, patch, step))
        trunk = read_as(trunk, reader.name, grid, stride, attention)
    return patch_tokens(trunk, images).unflatten(1, grid)


def _proxy_tokens(reader: Reader, images: Tensor, grid: tuple[int, int], patch: int, step: int) -> Tensor:
    """Return the proxy's tokens [B, N, C], one for each token of the tower that got `images`.

    A token stands for a square of `step` pixels at the centre of its patch. The proxy gets the image without the margin
    outside these squares, resized so that each becomes one of its patches.
    """
    proxy: Any = reader.proxy
    side, margin = patch_size(proxy), (patch - step) // 2
    rows, columns = (slice(margin, margin + n * step) for n in grid)
    scale, shift = (images.new_tensor(x).view(3, 1, 1) for x in (reader.scale, reader.shift))
    seen = images[:, :, rows, columns] * scale + shift
    if side != step:
        size = [n * side for n in grid]
        seen = F.interpolate(seen, size, mode="bicubic", align_corners=False, antialias=True)
    return dense_tokens(proxy, seen.to(next(proxy.parameters()).dtype)).flatten(1, 2)


def _own_size(trunk: Any) -> tuple[int, int]:
    return tuple(trunk.image_size if isinstance(trunk, VisionTransformer) else trunk.patch_embed.img_size)


def _view(trunk: Any, size: tuple[int, int], stride: int) -> nn.Module:
    """Return the tower for images of `size` and another stride; it shares all weights but the position embedding."""
    view: Any = share(trunk)
    patch = patch_size(trunk)
    if isinstance(trunk, VisionTransformer):
        view.conv1 = _strided(trunk.conv1, patch // stride)
        view.image_size = size
        table = _resampled(trunk.positional_embedding[None], trunk.grid_size, size, patch, stride)
        view._parameters["positional_embedding"] = table[0]
        return view
    rope = getattr(trunk, "rope", None)
    known = isinstance(trunk, (timm_models.VisionTransformer, timm_models.Eva))
    turns = isinstance(rope, ROTARY) and hasattr(rope, "update_feat_shape")  # old timm lacks this method
    if not known or not (rope is None or turns) or not isinstance(trunk.patch_embed, PatchEmbed):
        raise ValueError(
            f"images, stride: got {size[0]} x {size[1]} pixels and {stride}, expected {_own_size(trunk)[0]} x "
            f"{_own_size(trunk)[1]} and 1: the positions of this {type(trunk).__name__} cannot be interpolated"
        )
    embed: Any = share(trunk.patch_embed)
    view.patch_embed = embed
    embed.proj = _strided(embed.proj, patch // stride)
    embed.img_size, embed.dynamic_img_pad = None, False  # neither check the size nor pad
    if trunk.pos_embed is not None:
        prefix = 0 if getattr(trunk, "no_embed_class", False) else trunk.num_prefix_tokens
        table = _resampled(trunk.pos_embed, embed.grid_size, size, patch, stride, prefix)
        view._parameters["pos_embed"] = table
    view.dynamic_img_size, embed.flatten = False, True  # tokens and table are flat and of equal length
    if rope is not None:
        turned = _turned(rope, size, patch, stride)
        del view._modules["rope"]
        view.rope = SimpleNamespace(feat_shape=None, get_embed=lambda shape=None: turned)
    return view


def _strided(convolution: nn.Conv2d, step: int) -> nn.Conv2d:
    twin = share(convolution)
    twin.stride = (step, step)
    return twin


def _resampled(
    table: Tensor, grid: tuple[int, int], size: tuple[int, int], patch: int, stride: int, prefix: int = 1
) -> Tensor:
    """Interpolate position embeddings [1, prefix + grid, C] at the centres of the patches of an image of `size`.

    Positions are relative to the image's sides. At stride 1 the result is therefore F.interpolate(mode="bicubic"), and
    at every stride a patch that the tower itself has keeps its embedding.
    """
    step = patch // stride
    rows, columns = (torch.arange(patch / 2, side - patch / 2 + 1, step) * 2 / side - 1 for side in size)
    points = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], -1)[None].to(table.device)
    old = table[:, prefix:].float().unflatten(1, tuple(grid)).permute(0, 3, 1, 2)
    new = F.grid_sample(old, points, mode="bicubic", padding_mode="border", align_corners=False)
    return torch.cat([table[:, :prefix], new.flatten(2).transpose(1, 2).to(table.dtype)], 1)


def _turned(rope: Any, size: tuple[int, int], patch: int, stride: int) -> Tensor:
    """Return the rotary embedding [h * w, ...] at the patches' positions in an image of `size`.

    Angles are linear in the position, and timm computes them for whole grids. The tokens are the first rows and columns
    of a grid `stride` times as fine as the tower's, shifted by half the difference if timm measures from the centres.
    """
    fine = [side * stride // patch for side in size]
    rope = copy.deepcopy(rope)
    rope.grid_offset *= stride
    if not isinstance(rope, RotaryEmbeddingCat):
        rope.grid_offset += (stride - 1) / 2
    elif stride > 1 and rope.ref_feat_shape is None:
        shape: Any = [x / stride for x in fine]
        rope.ref_feat_shape = shape  # measure positions in patches, not in tokens
    if isinstance(rope, RotaryEmbeddingCat) and rope.feat_shape is not None:
        rope.feat_shape = [0, 0]  # differs from the cached shape, so that timm recomputes
        rope.update_feat_shape(fine)
        embed = rope.get_embed()
    else:
        embed = rope.get_embed(fine)
    return embed.unflatten(0, fine)[: fine[0] - stride + 1, : fine[1] - stride + 1].flatten(0, 1)
