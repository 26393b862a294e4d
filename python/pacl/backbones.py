"""Patch tokens of vision towers, by one function for all supported families."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import timm.models as timm_models
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

Module = TypeVar("Module", bound=nn.Module)
TIMM_VITS = (
    timm_models.VisionTransformer,
    timm_models.Eva,
    timm_models.Beit,
    timm_models.VisionTransformerRelPos,
)
# Variable resolution: images of a batch may have sizes of their own. timm before 1.0.16 has no such class.
NAFLEX_VITS: Any = (timm_models.NaFlexVit,) if hasattr(timm_models, "NaFlexVit") else ()
TIMM_CONVNETS = (timm_models.ConvNeXt, timm_models.ResNet)
# The vision models of transformers, by `config.model_type`: the number of class tokens before registers and patches.
TRANSFORMERS_VITS = {
    "clip_vision_model": 1,
    "siglip_vision_model": 0,
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "dinov3_vit": 1,
}


def freeze(model: nn.Module) -> nn.Module:
    """Put `model` in eval mode, turn its gradients off, and return it. Tokens of a frozen tower carry no graph."""
    return model.eval().requires_grad_(False)


def share(module: Module) -> Module:
    """Return another module over the same tensors and children; replacing one in it leaves the original unchanged."""
    twin = copy.copy(module)
    twin._parameters, twin._modules = dict(module._parameters), dict(module._modules)
    return twin


def patch_tokens(visual: nn.Module, images: Tensor) -> Tensor:
    """Return the last feature of every patch, without class and register tokens.

    The feature depends on the family of the tower:

    - open_clip `VisionTransformer` (ViT-B-32, ViT-B-16, ViT-L-14, ...): the last block's output after `ln_post` and
      before `proj`, as with its `output_tokens=True`; 768 wide for ViT-B-16. OpenAI's code applies `ln_post` to the
      class token alone; PACL's paper does not state it.
    - timm's vision transformers (`VisionTransformer`, `Eva`, `Beit`, `VisionTransformerRelPos`: DINO, DINOv2, DINOv3,
      SigLIP, EVA, MAE, ...): the last block's output after the final `norm` and before pooling and head. A model that
      pools before its norm calls the norm `fc_norm`; it is then applied to each token.
    - timm's NaFlex ViT (`naflexvit_*`): the same, for images of any multiple of the patch. `packed_tokens` takes images
      of different sizes.
    - timm `ConvNeXt` (DINOv3 too): the last stage's feature map, with each position normalised by the norm before the
      model's head (in most models `head.norm`, after pooling).
    - timm `ResNet` and open_clip's `ModifiedResNet` (OpenAI's RN50, ...): the last stage's feature map before pooling;
      these have no norm there.
    - open_clip `TimmModel`: the feature of its trunk.
    - CLIP, SigLIP, DINOv2 (with or without registers) and DINOv3 of transformers: the last block's output after the
      final norm, also in CLIP, whose own `last_hidden_state` is without it; in CLIP before `visual_projection`.

    Args:
        visual: an open_clip model's vision tower, `model.visual`; a timm model; or a vision model of transformers, or
            a model that has one as `vision_model`, such as `CLIPModel`.
        images: float `[B, 3, H, W]`, normalised for the tower; H x W is the tower's own size, or any for a
            convolutional one, or any multiple of the patch for NaFlex ViTs and for DINOv2 and DINOv3 of transformers.

    Returns:
        Tokens `[B, N, width]` in the tower's dtype, row by row from the top left; N = (H / patch) * (W / patch), where
        a convolutional tower has a stride of 32 instead of a patch.

    Raises:
        TypeError: for any other tower.
        ValueError: if a supported tower or its images do not fit.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images: got {images.dtype} {list(images.shape)}, expected floats of shape [B, 3, H, W]")
    if (vision := _transformers_vision(visual)) is not None:
        return _transformers_tokens(vision, images)
    trunk = tower_trunk(visual)
    _check_size(trunk, images)
    if isinstance(trunk, VisionTransformer):
        _check_transformer(trunk, trunk.patch_dropout)
        options = {"indices": 1, "normalize_intermediates": True, "output_fmt": "NLC", "intermediates_only": True}
        return trunk.forward_intermediates(images, **options)["image_intermediates"][0]
    if isinstance(trunk, TIMM_VITS):
        _check_transformer(trunk, getattr(trunk, "patch_drop", None))
        return trunk.get_submodule("fc_norm")(trunk.forward_features(images)[:, trunk.num_prefix_tokens :])
    if isinstance(trunk, NAFLEX_VITS):
        _check_transformer(trunk, trunk.patch_drop)
        return trunk.fc_norm(trunk.forward_features(images)[:, trunk.num_prefix_tokens :])
    if isinstance(trunk, ModifiedResNet):
        features = trunk.forward_intermediates(images, indices=1, intermediates_only=True)["image_intermediates"][0]
    elif isinstance(trunk, timm_models.ConvNeXt):
        features = getattr(trunk.head, "norm", nn.Identity())(trunk.forward_features(images))
    else:
        features = cast(timm_models.ResNet, trunk).forward_features(images)
    return features.flatten(2).transpose(1, 2)


def packed_tokens(visual: nn.Module, images: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    """Return the patch tokens of images of different sizes, packed: one image's rows after another's, no padding.

    The tokens of each image are those of `patch_tokens`, up to rounding. `fused_pacl_loss` takes them, embedded, with
    `patch_lengths`.

    Args:
        visual: a NaFlex ViT of timm.
        images: at least one float `[3, H, W]`, normalised for the tower; H and W are multiples of the patch. A tensor
            `[B, 3, H, W]` is a batch of images of one size.

    Returns:
        Tokens `[sum of N, width]` in the tower's dtype, row by row of each image from the top left, and int64 lengths
        `[B]` on the CPU, N = (H / patch) * (W / patch) of each image.

    Raises:
        TypeError: for a tower without variable resolution.
        ValueError: for no images, and for images that do not fit.
    """
    trunk: Any = visual.trunk if isinstance(visual, TimmModel) else visual
    if not isinstance(trunk, NAFLEX_VITS):
        raise TypeError(
            f"visual: got {type(trunk).__name__}, expected a NaFlex ViT of timm, which takes any resolution"
        )
    if not len(images):
        raise ValueError("images: got none, expected at least one")
    for i, image in enumerate(images):
        if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
            raise ValueError(
                f"images: got {image.dtype} {list(image.shape)} at {i}, expected floats of shape [3, H, W]"
            )
        _check_size(trunk, image)
    _check_transformer(trunk, trunk.patch_drop)
    patch, channels_last = trunk.embeds.patch_size, trunk.embeds.channels_last
    patches, coords = zip(*(_patchify(image, patch, channels_last) for image in images), strict=True)
    lengths = torch.tensor([len(x) for x in patches])
    device = patches[0].device
    valid = (torch.arange(int(lengths.max())) < lengths[:, None]).to(device)
    padded = pad_sequence(list(patches), batch_first=True)
    places = pad_sequence(list(coords), batch_first=True)
    # timm computes the padding of a batch and hides it from the other tokens; it goes no further than this function.
    tokens = trunk.forward_features(padded, patch_coord=places, patch_valid=valid)["patches"]
    return trunk.fc_norm(tokens[:, trunk.num_prefix_tokens :][valid]), lengths


def patch_counts(visual: nn.Module, images: Sequence[Tensor] | Tensor) -> Tensor:
    """Return the lengths of `packed_tokens`, int64 [B], without running the tower."""
    trunk: Any = visual.trunk if isinstance(visual, TimmModel) else visual
    high, wide = trunk.embeds.patch_size
    return torch.tensor([(image.shape[1] // high) * (image.shape[2] // wide) for image in images])


def tower_blocks(visual: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return the blocks of a tower (stages of a convolutional one), first to last, and the norms that follow them.

    Raises TypeError as patch_tokens does.
    """
    trunk: Any = tower_trunk(visual)
    if isinstance(trunk, VisionTransformer):
        return list(trunk.transformer.resblocks), [trunk.ln_post]
    if isinstance(trunk, TIMM_VITS + NAFLEX_VITS):
        return list(trunk.blocks), [trunk.norm, trunk.fc_norm]
    if isinstance(trunk, timm_models.ConvNeXt):
        return list(trunk.stages), [trunk.norm_pre, getattr(trunk.head, "norm", nn.Identity())]
    return [trunk.get_submodule(f"layer{i}") for i in range(1, 5)], []


def tower_trunk(visual: nn.Module) -> nn.Module:
    """Return the tower itself, unwrapped from open_clip's TimmModel. Raises TypeError as patch_tokens does."""
    trunk: nn.Module = visual.trunk if isinstance(visual, TimmModel) else visual
    if not isinstance(trunk, (VisionTransformer, ModifiedResNet, *TIMM_VITS, *NAFLEX_VITS, *TIMM_CONVNETS)):
        raise TypeError(
            f"visual: got {type(trunk).__name__}, expected model.visual of an open_clip model (VisionTransformer, "
            "ModifiedResNet, or TimmModel) or a timm vision transformer, ConvNeXt or ResNet (patch_tokens also takes "
            "CLIP, SigLIP, DINOv2 and DINOv3 of transformers)"
        )
    return trunk


def _check_size(trunk: nn.Module, images: Tensor) -> None:
    """Raise ValueError for images [..., H, W] of a size that the tower does not take as it is.

    A position embedding that timm does not resample fixes the size. A NaFlex ViT takes whole patches; timm would pad.
    """
    size = None
    if isinstance(trunk, NAFLEX_VITS):
        patch = trunk.embeds.patch_size
        if any(side % x or not side for side, x in zip(images.shape[-2:], patch, strict=True)):
            raise ValueError(f"images: got {list(images.shape[-2:])} pixels, expected multiples of {list(patch)}")
    if isinstance(trunk, VisionTransformer):
        size = trunk.image_size
    elif isinstance(trunk, TIMM_VITS) and trunk.patch_embed.strict_img_size:
        size = trunk.patch_embed.img_size
    if size is not None and tuple(images.shape[-2:]) != tuple(size):
        raise ValueError(f"images: got {list(images.shape[-2:])} pixels, expected {list(size)}")


def _patchify(image: Tensor, patch: tuple[int, int], channels_last: bool) -> tuple[Tensor, Tensor]:
    """Return the pixels [N, P * P * 3] of an image's patches in timm's order, and their (row, column), int64 [N, 2]."""
    rows, columns = (side // x for side, x in zip(image.shape[1:], patch, strict=True))
    parts = image.reshape(3, rows, patch[0], columns, patch[1])
    parts = parts.permute(1, 3, 2, 4, 0) if channels_last else parts.permute(1, 3, 0, 2, 4)
    place = torch.cartesian_prod(*(torch.arange(x, device=image.device) for x in (rows, columns)))
    return parts.reshape(rows * columns, -1), place


def _check_transformer(trunk: nn.Module, dropout: nn.Module | None) -> None:
    if not isinstance(dropout, nn.Identity | None) and dropout.training:
        raise ValueError("visual: got a tower that drops patches, expected it in eval mode")
    if isinstance(trunk, VisionTransformer) and trunk.attn_pool is not None:
        # ln_post of such a tower normalises the pooler's output, not the patches.
        raise ValueError("visual: got an open_clip tower with an attention pooler, expected one without")


def _transformers_vision(model: nn.Module) -> Any:
    """Return the vision model of transformers that `model` is or has, or None if that is no supported one.

    It is recognised by its config, so that transformers need not be installed.
    """
    while isinstance(inner := getattr(model, "vision_model", None), nn.Module) and inner is not model:
        model = inner
    return model if getattr(getattr(model, "config", None), "model_type", None) in TRANSFORMERS_VITS else None


def _transformers_tokens(vision: Any, images: Tensor) -> Tensor:
    config, size, patch = vision.config, list(images.shape[-2:]), vision.config.patch_size
    if config.model_type.startswith("dino"):  # resamples its position embedding, or has none
        if any(pixels % patch for pixels in size):
            raise ValueError(f"images: got {size} pixels, expected multiples of {patch}")
    elif size != [config.image_size] * 2:
        raise ValueError(f"images: got {size} pixels, expected {[config.image_size] * 2}")
    prefix = TRANSFORMERS_VITS[config.model_type] + getattr(config, "num_register_tokens", 0)
    tokens = vision(pixel_values=images, return_dict=True).last_hidden_state[:, prefix:]
    # CLIP applies its last norm to the class token alone; the other models have applied theirs.
    return vision.post_layernorm(tokens) if config.model_type == "clip_vision_model" else tokens
