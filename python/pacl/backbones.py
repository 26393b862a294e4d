"""Patch tokens of frozen vision towers, one function for every family that is known to give the right tensor."""

from __future__ import annotations

import math

from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn


def freeze(model: nn.Module) -> nn.Module:
    """Put `model` in eval mode, turn its gradients off, and return it. Tokens of a frozen tower carry no graph."""
    return model.eval().requires_grad_(False)


def patch_tokens(visual: nn.Module, images: Tensor) -> Tensor:
    """Tokens of the last block, one per patch, class and register tokens left out.

    visual: an open_clip model's vision tower, `model.visual`. Which tensor that gives:

    - open_clip `VisionTransformer` (ViT-B-32, ViT-B-16, ViT-L-14, ...): the last block's output after `ln_post` and
      before `proj`, as its `output_tokens=True` gives, so 768 wide for ViT-B-16. OpenAI's code applies `ln_post` to
      the class token alone; PACL's paper does not say.
    - open_clip `TimmModel` around a timm vision transformer (SigLIP, EVA, DINOv2, ...): the last block's output after
      the trunk's final `norm` and before its pooling and head.

    images: float [B, 3, H, W], normalised as the tower expects, H x W its own size.
    Returns [B, N, width] in the tower's dtype, N = (H / patch) * (W / patch), row by row from the top left.
    Raises TypeError for any other tower, ValueError for towers or images of a known family that do not fit.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images: got {images.dtype} {list(images.shape)}, expected floats of shape [B, 3, H, W]")
    if isinstance(visual, VisionTransformer):
        if tuple(images.shape[-2:]) != tuple(visual.image_size):  # its position embedding has one size
            raise ValueError(f"images: got {list(images.shape[-2:])} pixels, expected {list(visual.image_size)}")
        if visual.attn_pool is not None:  # ln_post then normalises what the pooler returns, not the patches
            raise ValueError("visual: got an open_clip tower with an attention pooler, whose patches have no norm")
    elif isinstance(visual, TimmModel):
        if not hasattr(visual.trunk, "num_prefix_tokens"):
            raise TypeError(f"visual: got timm's {type(visual.trunk).__name__}, expected a vision transformer")
    else:
        raise TypeError(
            f"visual: got {type(visual).__name__}, expected model.visual of an open_clip ViT "
            "(VisionTransformer, or TimmModel around a timm vision transformer)"
        )
    tokens = visual.forward_intermediates(
        images, indices=1, normalize_intermediates=True, output_fmt="NLC", intermediates_only=True
    )["image_intermediates"][0]
    if isinstance(visual, VisionTransformer) and tokens.shape[1] != math.prod(visual.grid_size):
        raise ValueError(
            f"visual: its patch dropout left {tokens.shape[1]} of {math.prod(visual.grid_size)} patches, "
            "expected a tower in eval mode"
        )
    return tokens
