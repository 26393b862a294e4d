"""Patch tokens of vision towers, by one function for all supported families."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

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
SWINS = (timm_models.SwinTransformer, timm_models.SwinTransformerV2)
# Towers whose last output is a map of features. All but Swin and Hiera take images of any size.
TIMM_MAPS = (
    timm_models.ConvNeXt,
    timm_models.ResNet,
    timm_models.EfficientNet,
    timm_models.FastVit,
    *SWINS,
    timm_models.Hiera,
)
# The vision models of transformers, by `config.model_type`: the number of class tokens before registers and patches.
TRANSFORMERS_VITS = {
    "clip_vision_model": 1,
    "siglip_vision_model": 0,
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "dinov3_vit": 1,
}
SIZED = (*TIMM_VITS, *SWINS, timm_models.Hiera)  # made for images of one size, timm's `img_size`
DROPS = "visual: got a tower that drops patches, expected it in eval mode"


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
      class token alone; PACL's paper does not state it. In CoCa (`coca_ViT-*`), whose `ln_post` belongs to the output
      of its attention pooler, the pooler's own norm `attn_pool.ln_k` takes its place.
    - timm's vision transformers (`VisionTransformer`, `Eva`, `Beit`, `VisionTransformerRelPos`: DINO, DINOv2, DINOv3,
      SigLIP, EVA, MAE, ...): the last block's output after the final `norm` and before pooling and head. A model that
      pools before its norm calls the norm `fc_norm`; it is then applied to each token.
    - timm's NaFlex ViT (`naflexvit_*`): the same, for images of any multiple of the patch. `packed_tokens` takes images
      of different sizes.
    - timm `ConvNeXt` (DINOv3 too), `SwinTransformer`, `SwinTransformerV2` and `Hiera`: the last stage's feature map,
      with each position normalised by the norm before the model's head (in ConvNeXt and Hiera `head.norm`, which the
      model applies after pooling).
    - timm `ResNet`, `EfficientNet` and `FastVit` (MobileCLIP-S0 to S4), and open_clip's `ModifiedResNet` (OpenAI's
      RN50, ...): the last feature map before pooling; these have no norm there.
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
        a convolutional tower, a Swin and a Hiera have a stride, mostly of 32, instead of a patch. In timm's
        ResNet, EfficientNet, FastViT and ViTamin a token sees an area around the upper left corner of its patch.

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
        _check_dropout(trunk.patch_dropout)
        options = {"indices": 1, "output_fmt": "NLC", "intermediates_only": True}
        return _last_norm(trunk)(trunk.forward_intermediates(images, **options)["image_intermediates"][0])
    if isinstance(trunk, TIMM_VITS):
        _check_dropout(getattr(trunk, "patch_drop", None))
        return trunk.get_submodule("fc_norm")(trunk.forward_features(images)[:, trunk.num_prefix_tokens :])
    if isinstance(trunk, NAFLEX_VITS):
        _check_dropout(trunk.patch_drop)
        return trunk.fc_norm(trunk.forward_features(images)[:, trunk.num_prefix_tokens :])
    return _feature_map(trunk, images).flatten(1, 2)


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
    _check_dropout(trunk.patch_drop)
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
        return list(trunk.transformer.resblocks), [_last_norm(trunk)]
    if isinstance(trunk, TIMM_VITS + NAFLEX_VITS):
        return list(trunk.blocks), [trunk.norm, trunk.fc_norm]
    if isinstance(trunk, timm_models.ConvNeXt):
        return list(trunk.stages), [trunk.norm_pre, getattr(trunk.head, "norm", nn.Identity())]
    if isinstance(trunk, timm_models.Hiera):
        return list(trunk.blocks), [trunk.head.norm]
    if isinstance(trunk, SWINS):
        return list(trunk.layers), [trunk.norm]
    if isinstance(trunk, timm_models.EfficientNet):
        return list(trunk.blocks), [trunk.conv_head, trunk.bn2]
    if isinstance(trunk, timm_models.FastVit):
        return list(trunk.stages), [trunk.final_conv]
    return [trunk.get_submodule(f"layer{i}") for i in range(1, 5)], []


def patch_sides(trunk: nn.Module) -> tuple[int, int]:
    """Return height and width in pixels of the patch of a token, or the strides of a tower without patches.

    trunk: as tower_trunk returns it.
    """
    tower: Any = trunk
    if isinstance(trunk, VisionTransformer):
        return tuple(tower.patch_size)
    if isinstance(trunk, TIMM_VITS):  # the convolutions of a hybrid embedding reduce the image before its patches
        return tuple(tower.patch_embed.feat_ratio(as_scalar=False))
    if isinstance(trunk, NAFLEX_VITS):
        return tuple(tower.embeds.patch_size)
    side = 32 if isinstance(trunk, ModifiedResNet) else tower.feature_info[-1]["reduction"]
    return side, side


def own_size(trunk: nn.Module) -> tuple[int, int] | None:
    """Return the only height and width of images that a tower takes as it is; None for one that takes others too.

    trunk: as tower_trunk returns it. A position embedding that timm does not resample fixes the size.
    """
    tower: Any = trunk
    if isinstance(trunk, VisionTransformer):
        return tuple(tower.image_size)
    if isinstance(trunk, timm_models.Hiera):
        rows, columns = (side * step for side, step in zip(tower.tokens_spatial_shape, tower.patch_stride, strict=True))
        return rows, columns
    if isinstance(trunk, (*TIMM_VITS, *SWINS)) and tower.patch_embed.strict_img_size:
        size = tower.patch_embed.img_size  # None in a view of the tower for other sizes
        return None if size is None else tuple(size)
    return None


def tower_trunk(visual: nn.Module) -> nn.Module:
    """Return the tower itself, unwrapped from open_clip's TimmModel. Raises TypeError as patch_tokens does."""
    trunk: nn.Module = visual.trunk if isinstance(visual, TimmModel) else visual
    if not isinstance(trunk, (VisionTransformer, ModifiedResNet, *TIMM_VITS, *NAFLEX_VITS, *TIMM_MAPS)):
        raise TypeError(
            f"visual: got {type(trunk).__name__}, expected model.visual of an open_clip model (VisionTransformer, "
            "ModifiedResNet, or TimmModel) or a timm vision transformer, ConvNeXt, ResNet, EfficientNet, FastViT, Swin "
            "or Hiera (patch_tokens also takes CLIP, SigLIP, DINOv2 and DINOv3 of transformers)"
        )
    return trunk


def _check_size(trunk: nn.Module, images: Tensor) -> None:
    """Raise ValueError for images [..., H, W] of a size that the tower does not take as it is.

    A NaFlex ViT takes whole patches; timm would pad.
    """
    if isinstance(trunk, NAFLEX_VITS):
        patch = trunk.embeds.patch_size
        if any(side % x or not side for side, x in zip(images.shape[-2:], patch, strict=True)):
            raise ValueError(f"images: got {list(images.shape[-2:])} pixels, expected multiples of {list(patch)}")
    size = own_size(trunk)
    if size is not None and tuple(images.shape[-2:]) != size:
        raise ValueError(f"images: got {list(images.shape[-2:])} pixels, expected {list(size)}")


def _feature_map(trunk: Any, images: Tensor) -> Tensor:
    """Return the last features [B, h, w, C] of a tower that has a map of them, each position after the last norm."""
    if isinstance(trunk, SWINS):
        return trunk.forward_features(images)
    if isinstance(trunk, timm_models.Hiera):
        if trunk.training and trunk.patch_drop_rate:
            raise ValueError(DROPS)
        stages = trunk.forward_features(images, return_intermediates=True)[1]  # in the order of the image
        return trunk.head.norm(stages[-1])
    if isinstance(trunk, ModifiedResNet):
        features = trunk.forward_intermediates(images, indices=1, intermediates_only=True)["image_intermediates"][0]
    else:
        features = trunk.forward_features(images)
        if isinstance(trunk, timm_models.ConvNeXt):
            features = getattr(trunk.head, "norm", nn.Identity())(features)
    return features.permute(0, 2, 3, 1)


def _last_norm(trunk: VisionTransformer) -> nn.Module:
    """Return the norm of the last block's output: `ln_post`, unless that normalises the output of a pooler."""
    pooler: Any = trunk.attn_pool
    return trunk.ln_post if pooler is None or trunk.attn_pool_contrastive is not None else pooler.ln_k


def _patchify(image: Tensor, patch: tuple[int, int], channels_last: bool) -> tuple[Tensor, Tensor]:
    """Return the pixels [N, P * P * 3] of an image's patches in timm's order, and their (row, column), int64 [N, 2]."""
    rows, columns = (side // x for side, x in zip(image.shape[1:], patch, strict=True))
    parts = image.reshape(3, rows, patch[0], columns, patch[1])
    parts = parts.permute(1, 3, 2, 4, 0) if channels_last else parts.permute(1, 3, 0, 2, 4)
    place = torch.cartesian_prod(*(torch.arange(x, device=image.device) for x in (rows, columns)))
    return parts.reshape(rows * columns, -1), place


def _check_dropout(dropout: nn.Module | None) -> None:
    if not isinstance(dropout, nn.Identity | None) and dropout.training:
        raise ValueError(DROPS)


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
