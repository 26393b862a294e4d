"""Readings of a tower's last block equal loops over heads and tokens, and the library's own attention on other rows."""

import copy
import math
from typing import get_args

import pytest
import timm
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from pacl.backbones import freeze, patch_tokens
from pacl.dense import dense_tokens
from pacl.flags import Tokens
from pacl.readings import READINGS, Reader, check_reading, nearness
from torch import nn

torch.set_num_threads(1)
PATCH, WIDTH, HEADS = 8, 32, 2
GRIDS = [(2, 5), (5, 2)]


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


# By loops, on open_clip's own blocks


def attention_by_loops(attn: nn.Module, h: torch.Tensor, pairs: list[str], bias) -> torch.Tensor:
    """Return out_proj of sum over pairs of softmax(a b^T / sqrt(d) + bias) v, token by token, for h [L, C]."""
    rows = dict(zip("qkv", (h @ attn.in_proj_weight.T + attn.in_proj_bias).split(WIDTH, 1), strict=True))
    size, out = WIDTH // HEADS, torch.zeros_like(h)
    for head in range(HEADS):
        part = {name: x[:, head * size : (head + 1) * size] for name, x in rows.items()}
        for i in range(len(h)):
            values = torch.zeros(size, dtype=h.dtype)
            for a, b in pairs:
                logits = [float(part[a][i] @ part[b][j]) / math.sqrt(size) + bias(i, j) for j in range(len(h))]
                total = sum(math.exp(x) for x in logits)
                for j, x in enumerate(logits):
                    values += math.exp(x) / total * part["v"][j]
            if not pairs:
                values = part["v"][i]
            out[i, head * size : (head + 1) * size] = values
    return out @ attn.out_proj.weight.T + attn.out_proj.bias


def by_loops(tower: nn.Module, x: torch.Tensor, name: str, columns: int, stride: int) -> torch.Tensor:
    """Return the reading `name` of the last block of an open_clip tower for one image's tokens x [L, C]."""
    block = tower.transformer.resblocks[-1]

    def gaussian(i: int, j: int) -> float:
        if name != "naclip" or 0 in (i, j):
            return 0.0
        (y, x), (v, u) = divmod(i - 1, columns), divmod(j - 1, columns)
        return math.exp(-((y - v) ** 2 + (x - u) ** 2) / (2 * (5 * stride) ** 2))

    pairs = {"sclip": ["qq", "kk"], "clearclip": ["qq"], "naclip": ["kk"], "kk": ["kk"]}.get(name, [])
    out = block.ls_1(attention_by_loops(block.attn, block.ln_1(x), pairs, gaussian))
    if name in ("maskclip", "sclip"):
        out = out + x
        out = out + block.ls_2(block.mlp(block.ln_2(out)))
    return tower.ln_post(out)[1:]


@pytest.mark.parametrize("name", [x for x in READINGS if x != "plain"])
@pytest.mark.parametrize(
    "grid, stride, options", [((2, 5), 1, {}), ((5, 2), 1, {"ls_init_value": 0.1}), ((2, 3), 2, {})]
)
def test_every_reading_by_loops_over_heads_and_tokens(name, grid, stride, options):
    tower = native(**options)
    before = copy.deepcopy(tower.state_dict())
    picture = images(grid, 1)
    found = read(tower, picture, name, stride)
    entered, _ = entering(tower, picture, stride)
    expected = by_loops(tower, entered[0], name, found.shape[2], stride)
    torch.testing.assert_close(found.flatten(1, 2)[0], expected, rtol=1e-10, atol=1e-10)
    assert all(torch.equal(x, before[key]) for key, x in tower.state_dict().items())


def test_readings_differ_and_plain_is_the_towers_own():
    tower, picture = native(), images((4, 4))
    found = {name: read(tower, picture, name) for name in READINGS}
    assert torch.equal(found["plain"].flatten(1, 2), patch_tokens(tower, picture))
    names = list(found)
    for i, one in enumerate(names):
        assert not any(torch.allclose(found[one], found[other], atol=1e-3) for other in names[i + 1 :])
    for name, tokens in found.items():  # a batch of two is two images
        singles = [read(tower, picture[i : i + 1], name) for i in range(2)]
        torch.testing.assert_close(torch.cat(singles), tokens, rtol=1e-10, atol=1e-10)
    assert read(tower, images((1, 1)), "naclip").shape == (2, 1, 1, WIDTH)


def test_the_names_of_the_flag_are_those_of_the_table():
    assert set(get_args(Tokens)) == set(READINGS)
    with pytest.raises(ValueError, match="tokens: got 'qkv', expected one of plain, value, maskclip"):
        check_reading("qkv", native())


def test_nearness_is_a_gaussian_of_the_distance():
    found = nearness((2, 3), 1.5, 1, torch.zeros(1, dtype=torch.float64))
    assert found.shape == (7, 7) and not found[0].any() and not found[:, 0].any()
    assert torch.equal(found, found.T) and torch.equal(found.diag()[1:], torch.ones(6, dtype=torch.float64))
    assert float(found[1, 6]) == pytest.approx(math.exp(-5 / 4.5))  # one row and two columns away
