"""Readings of a tower's last block equal loops over heads and tokens, and the library's own attention on other rows."""

import copy
import math
import re
from typing import get_args

import pytest
import timm
import torch
from filled_towers import HEADS, WIDTH, entering, images, native, read, timm_vit
from pacl.backbones import patch_tokens
from pacl.flags import Tokens
from pacl.readings import (
    READINGS,
    best_reading,
    check_reading,
    nearness,
)
from timm.models.vision_transformer import ResPostBlock
from torch import nn

torch.set_num_threads(1)
ALONE = [name for name in READINGS if name != "proxy"]  # without a second tower
ONE_BLOCK = [name for name in ALONE if name not in ("plain", "rcs", "gem", "scclip")]  # they read the last block alone


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


@pytest.mark.parametrize("name", ONE_BLOCK)
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
    found = {name: read(tower, picture, name) for name in ALONE}
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


# By the library's own attention, in every family of towers


def with_rows(block: nn.Module, source: str) -> nn.Module:
    """Return a copy of the block's attention whose q and k are both computed as `source`, "q" or "k"."""
    attn = copy.deepcopy(block.attn)
    for name, x in attn.named_parameters():
        if name.startswith(("in_proj", "qkv")):
            parts = x.data.chunk(3)
            x.data = torch.cat([parts["qk".index(source)]] * 2 + [parts[2]])
    if getattr(attn, "q_proj", None) is not None:
        attn.q_proj = attn.k_proj = getattr(attn, f"{source}_proj")
    if getattr(attn, "q_bias", None) is not None:  # Eva: k has a bias of zeros
        attn.q_bias.data = attn.k_bias = getattr(attn, f"{source}_bias").data.clone()
    for norms in (("q_norm", "k_norm"), ("ln_q", "ln_k")):
        if hasattr(attn, norms[0]):
            for name in norms:
                setattr(attn, name, copy.deepcopy(getattr(attn, norms["qk".index(source)])))
    return attn


SCALES = ("scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
TOWERS = {
    "native": native,
    "native, LayerScale": lambda: native(ls_init_value=0.1),
    "native, all norms and scales": lambda: native(qk_norm=True, **dict.fromkeys(SCALES, True)),
    "class token": lambda: timm_vit("vit_base_patch16_224.dino"),
    "registers, LayerScale": lambda: timm_vit("vit_small_patch14_reg4_dinov2"),
    "no prefix": lambda: timm_vit("vit_base_patch16_siglip_224"),
    "norms of q and k": lambda: timm_vit("vit_base_patch16_224", qk_norm=True, init_values=0.1),
    "eva02": lambda: timm_vit("eva02_tiny_patch14_224"),
    "eva, separate projections": lambda: timm_vit("eva02_base_patch14_224"),
    "rotary": lambda: timm_vit("vit_base_patch16_rope_224"),
    "dinov3": lambda: timm_vit("vit_small_patch16_dinov3"),
    "mixed rotations": lambda: timm_vit("vit_small_patch16_rope_mixed_224"),
}


@pytest.mark.parametrize("kind", TOWERS)
def test_every_family_by_its_own_attention(kind):
    try:
        tower = TOWERS[kind]()
    except (RuntimeError, TypeError):
        pytest.skip("open_clip or timm is older than this model")
    grid = (4, 4) if "mixed" in kind else (2, 5)
    picture = images(grid)
    is_native = hasattr(tower, "transformer")
    block = tower.transformer.resblocks[-1] if is_native else tower.blocks[-1]
    x, keywords = entering(tower, picture)
    rope = {"rope": keywords["rope"]} if keywords.get("rope") is not None else {}
    prefix = 1 if is_native else tower.num_prefix_tokens
    h = (block.ln_1 if is_native else block.norm1)(x)

    def last(out: torch.Tensor) -> torch.Tensor:
        """Return the tokens of the attention's output by LayerScale and the tower's last norm."""
        if getattr(block, "gamma_1", None) is not None:
            out = out * block.gamma_1
        out = getattr(block, "ln_attn", nn.Identity())(out)
        out = (block.ls_1 if is_native else getattr(block, "ls1", nn.Identity()))(out)
        return (tower.ln_post(out) if is_native else tower.fc_norm(tower.norm(out)))[:, prefix:].unflatten(1, grid)

    def attend(source: str, mask: torch.Tensor | None = None) -> torch.Tensor:
        attn = with_rows(block, source)
        return (
            attn(h, h, h, attn_mask=mask)[0] if type(attn) is nn.MultiheadAttention else attn(h, attn_mask=mask, **rope)
        )

    def alone(module: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        """Return the module's output for each token as a sequence of one, in whose attention positions cancel."""
        rows = tokens.flatten(0, 1)[:, None]
        out = module(rows, rows, rows)[0] if type(module) is nn.MultiheadAttention else module(rows)
        return out.view(tokens.shape)

    mask = torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype)
    for i in range(prefix, x.shape[1]):
        for j in range(prefix, x.shape[1]):
            (a, b), (c, d) = divmod(i - prefix, grid[1]), divmod(j - prefix, grid[1])
            mask[i, j] = math.exp(-((a - c) ** 2 + (b - d) ** 2) / 50)
    expected = {
        "clearclip": last(attend("q")),
        "kk": last(attend("k")),
        "naclip": last(attend("k", mask)),
        "value": last(alone(block.attn, h)),
    }
    for name, tokens in expected.items():
        torch.testing.assert_close(read(tower, picture, name), tokens, rtol=1e-9, atol=1e-9)
    whole = alone(block, x)
    whole = (tower.ln_post(whole) if is_native else tower.fc_norm(tower.norm(whole)))[:, prefix:].unflatten(1, grid)
    torch.testing.assert_close(read(tower, picture, "maskclip"), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: timm.create_model("beit_base_patch16_224", img_size=32, depth=1, num_classes=0), "not for Beit"),
        (lambda: timm.create_model("test_convnext"), "not for ConvNeXt"),
        (lambda: native(layers=(1, 1, 1, 1), width=8, image_size=64), "not for ModifiedResNet"),
        (
            lambda: timm.create_model("naflexvit_base_patch16_gap", embed_dim=32, num_heads=2, depth=1),
            "not for NaFlexVit",
        ),
        (lambda: timm_vit("vit_base_patch16_224", block_fn=ResPostBlock), "ResPostBlock with Attention, is not known"),
        (lambda: native(scaled_cosine_attn=True), "not known"),
        (lambda: nn.Linear(2, 2), "not for Linear"),
    ],
)
def test_towers_that_have_no_reading(make, reason):
    visual = make()
    name, why = best_reading(visual)
    assert name == "plain" and re.search(reason, why)
    check_reading("plain", visual)
    with pytest.raises(ValueError, match=f"tokens: got 'sclip', expected 'plain': .*{reason}"):
        check_reading("sclip", visual)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_readings_in_16_bits(dtype):
    tower, picture = native(), images((3, 4))
    low, single = copy.deepcopy(tower).to(dtype), copy.deepcopy(tower).float()
    found = read(low, picture.to(dtype), "scclip")
    assert found.dtype == dtype and found.isfinite().all()
    for name in (name for name in ALONE if name != "scclip"):  # near its thresholds a rounding changes a whole token
        expected = read(tower, picture, name)
        found = read(low, picture.to(dtype), name)
        assert found.dtype == dtype
        with torch.autocast("cpu", dtype):
            mixed = read(single, picture.float(), name)
        assert (mixed.double() - expected).norm() < 0.05 * expected.norm()
        assert (found.double() - expected).norm() < (0.05 if dtype == torch.bfloat16 else 0.01) * expected.norm()
