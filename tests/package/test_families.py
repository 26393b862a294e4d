"""Vision towers by the families that people load: grid and order of the patches, on random weights.

One patch of an image is changed, and the token at its place must change most. `-m families` walks over all of
open_clip's models and timm's ViT, EVA, hybrid, NaFlex, ConvNeXt, EfficientNet, FastViT, Swin and Hiera models; it
builds the smallest of each kind, which takes minutes.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any

import open_clip
import pytest
import timm
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from pacl.backbones import (
    NAFLEX_VITS,
    TIMM_VITS,
    freeze,
    own_size,
    patch_sides,
    patch_tokens,
    tower_trunk,
)
from torch import nn

torch.set_num_threads(1)
MODULES = "vision_transformer vision_transformer_hybrid vitamin deit beit vision_transformer_relpos eva naflexvit"
MODULES += " convnext efficientnet fastvit swin_transformer swin_transformer_v2 hiera"
# A sample for every run. Models of open_clip, by their families:
CLIPS = {
    "PE-Core": "PE-Core-T-16-384",
    "MobileCLIP": "MobileCLIP2-S0",
    "CoCa": "coca_ViT-B-32",
    "CLIPA": "ViT-L-14-CLIPA",
}
# Models of timm that open_clip wraps, and others, made narrow.
NARROW = {"embed_dim": 64, "num_heads": 2}
STAGES = {"embed_dim": 16, "num_heads": (1, 2, 4, 8), "depths": (1, 1, 1, 2)}
TRUNKS: dict[str, dict[str, Any]] = {
    "eva02_base_patch16_clip_224": NARROW,
    "vit_base_patch32_siglip_256": NARROW,
    "vit_base_mci_224": {},
    "vit_small_patch16_dinov3": NARROW,
    "naflexvit_base_patch16_siglip": NARROW,
    "test_convnext": {},
    "test_efficientnet": {},
    "swin_tiny_patch4_window7_224": STAGES,
    "swinv2_tiny_window8_256": STAGES,
    "hiera_tiny_224": {"embed_dim": 16, "stages": (1, 1, 1, 2)},
}


def clip_tower(name: str, cut: bool = True) -> nn.Module:
    """Build the vision tower of an open_clip model with random weights; `cut` makes its own transformer small."""
    config = copy.deepcopy(open_clip.get_model_config(name))
    vision = config["vision_cfg"]
    if cut and isinstance(vision.get("layers"), int):
        vision |= {"layers": 2, "width": 64, "head_width": 32}
    return _build_vision_tower(config["embed_dim"], CLIPVisionCfg(**vision), config.get("quick_gelu", False))


def timm_tower(name: str, **options: Any) -> nn.Module:
    """Build a timm model with random weights, with two blocks if its class takes a depth."""
    try:
        return timm.create_model(name, num_classes=0, depth=2, **options)
    except (TypeError, AssertionError):  # an assertion, where an option lists the blocks
        return timm.create_model(name, num_classes=0, **options)


def check_patches(visual: nn.Module) -> None:
    trunk: Any = tower_trunk(freeze(visual))
    resnet = isinstance(trunk, ModifiedResNet)
    height, width = own_size(trunk) or ((trunk.image_size,) * 2 if resnet else trunk.pretrained_cfg["input_size"][1:])
    high, wide = patch_sides(trunk)
    rows, columns = height // high, width // wide
    row, column = 1, columns - 2  # far from its mirror image, and from the edges
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))
    changed = images.clone()
    changed[:, :, row * high : (row + 1) * high, column * wide : (column + 1) * wide] += 3
    before, after = patch_tokens(visual, images), patch_tokens(visual, changed)
    assert before.shape[:2] == (2, rows * columns)
    most = int((after - before).norm(dim=-1).sum(0).argmax())
    found = divmod(most, columns)
    exact = isinstance(trunk, (VisionTransformer, *TIMM_VITS, *NAFLEX_VITS)) and not hasattr(
        getattr(trunk, "patch_embed", None), "backbone"
    )
    # A stack of strided convolutions sees beyond its patch and off its centre.
    assert max(abs(found[0] - row), abs(found[1] - column)) <= (0 if exact else 1), (found, (row, column))


@pytest.mark.parametrize("name", CLIPS.values(), ids=list(CLIPS))
def test_open_clip_models(name):
    if name not in open_clip.list_models() or not timm.is_model(
        open_clip.get_model_config(name)["vision_cfg"].get("timm_model_name", "vit_base_patch16_224")
    ):
        pytest.skip(f"this open_clip or timm has no {name}")
    torch.manual_seed(0)
    check_patches(clip_tower(name))


@pytest.mark.parametrize("name", TRUNKS)
def test_timm_models(name):
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    torch.manual_seed(0)
    check_patches(timm_tower(name, **TRUNKS[name]))


def smallest(names: Iterable[str], build: Any) -> list[str]:
    """Return the name of the smallest model of each kind; the modules of a tower make its kind."""
    found: dict[tuple, tuple[int, str]] = {}
    for name in names:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trunk: Any = tower_trunk(build(name))
        kind = (type(trunk), *((x, type(module)) for x, module in trunk.named_children()))
        kind += tuple(getattr(trunk, x, None) for x in ("global_pool", "num_prefix_tokens", "pool_type"))
        kind = tuple(type(x) if isinstance(x, nn.Module) else x for x in kind)
        size = sum(x.numel() for x in trunk.parameters())
        found[kind] = min(found.get(kind, (size, name)), (size, name))
    return [name for _, name in found.values()]


@pytest.mark.families
def test_every_family_of_open_clip():
    whole = smallest(open_clip.list_models(), lambda name: clip_tower(name, False))
    assert len(whole) > 15
    for name in whole:
        trunk = open_clip.get_model_config(name)["vision_cfg"].get("timm_model_name")
        print(name, trunk or "", flush=True)
        torch.manual_seed(0)
        check_patches(timm_tower(trunk) if trunk else clip_tower(name))


@pytest.mark.families
@pytest.mark.parametrize("module", MODULES.split())
def test_every_family_of_timm(module):
    for name in smallest(timm.list_models(module=module), lambda name: timm.create_model(name, num_classes=0)):
        print(name, flush=True)
        torch.manual_seed(0)
        check_patches(timm_tower(name))
