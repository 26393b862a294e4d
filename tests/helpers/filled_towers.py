"""Small vision transformers in float64 with random values in every parameter, and their readings."""

import math

import timm
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from pacl.backbones import freeze
from pacl.dense import dense_tokens
from pacl.readings import Reader
from torch import nn

PATCH, WIDTH, HEADS = 8, 32, 2


def filled(tower: nn.Module) -> nn.Module:
    """Give every parameter normal values, because zeros and ones hide errors, and make it float64."""
    generator = torch.Generator().manual_seed(0)
    for name, x in tower.named_parameters():
        is_norm = x.ndim == 1 and name.endswith("weight")
        x.data = torch.randn(x.shape, generator=generator) * (0.3 if x.ndim == 1 else 0.8 / math.sqrt(x.shape[-1]))
        x.data += is_norm
    return freeze(tower).double()


def native(**options) -> nn.Module:
    sizes = {"image_size": 32, "patch_size": PATCH, "width": WIDTH, "layers": 2, "head_width": WIDTH // HEADS}
    return filled(_build_vision_tower(24, CLIPVisionCfg(**sizes | options)))


def timm_vit(name: str, **options) -> nn.Module:
    sizes = {"img_size": 32, "patch_size": PATCH, "embed_dim": WIDTH, "depth": 2, "num_heads": HEADS, "num_classes": 0}
    return filled(timm.create_model(name, **sizes | options))


def images(grid: tuple[int, int], count: int = 2) -> torch.Tensor:
    shape = (count, 3, *(PATCH * n for n in grid))
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def read(tower: nn.Module, picture: torch.Tensor, name: str, stride: int = 1) -> torch.Tensor:
    return dense_tokens(tower, picture, stride, Reader(name))


def entering(tower: nn.Module, picture: torch.Tensor, stride: int = 1) -> tuple[torch.Tensor, dict]:
    """Return the tokens [B, L, C] that enter the last block, and its keyword arguments."""
    block = tower.transformer.resblocks[-1] if hasattr(tower, "transformer") else tower.blocks[-1]
    kept = []
    hook = lambda module, inputs, keywords: kept.append((inputs[0], keywords))  # noqa: E731
    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    dense_tokens(tower, picture, stride)
    handle.remove()
    return kept[0]
