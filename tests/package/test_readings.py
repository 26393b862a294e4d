"""Readings of a tower's last block equal loops over heads and tokens, and the library's own attention on other rows."""

import copy
import json
import math
import re
from typing import get_args

import pytest
import timm
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from pacl.backbones import freeze, patch_tokens
from pacl.dense import dense_tokens
from pacl.embedder import VisionEmbedder, save_embedder
from pacl.flags import Tokens
from pacl.readings import (
    READINGS,
    Reader,
    best_reading,
    check_reading,
    middle_blocks,
    nearness,
    proxy_attention,
    proxy_reader,
)
from pacl.sharing import describe_towers, load_pacl
from pacl.towers import load_towers
from safetensors.torch import save_file
from timm.models.vision_transformer import ResPostBlock
from torch import nn
from torch.nn import functional as F
from torchvision import transforms

torch.set_num_threads(1)
PATCH, WIDTH, HEADS = 8, 32, 2
GRIDS = [(2, 5), (5, 2)]
ALONE = [name for name in READINGS if name != "proxy"]  # without a second tower
ONE_BLOCK = [name for name in ALONE if name not in ("plain", "rcs", "gem")]  # they read the last block alone


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
    low = copy.deepcopy(tower).to(dtype)
    for name in ALONE:
        expected = read(tower, picture, name)
        found = read(low, picture.to(dtype), name)
        assert found.dtype == dtype
        assert (found.double() - expected).norm() < (0.05 if dtype == torch.bfloat16 else 0.01) * expected.norm()


# Several blocks


def test_middle_blocks_of_towers_of_any_depth():
    assert list(middle_blocks(12)) == [5, 6, 7, 8] and list(middle_blocks(24)) == list(range(10, 18))
    assert list(middle_blocks(2)) == list(middle_blocks(1)) == [0]


@pytest.mark.parametrize("kind", ["native", "dinov3"])
def test_the_maps_of_the_middle_blocks_by_the_librarys_weights(kind):
    """The map is twice the mean of NACLIP's and of the middle blocks' own, which the library returns or a hook sees."""
    depth = 4  # the blocks 1 and 2
    try:
        tower = native(layers=depth) if kind == "native" else timm_vit("vit_small_patch16_dinov3", depth=depth)
    except RuntimeError:
        pytest.skip("timm is older than this model")
    picture = images((2, 5))
    maps = []
    blocks = tower.transformer.resblocks if kind == "native" else tower.blocks

    def keep(module: nn.Module, inputs: tuple) -> None:
        weights = module.attn(*[module.ln_1(inputs[0])] * 3, average_attn_weights=False)[1]
        maps.append(weights)

    if kind == "native":
        handles = [blocks[i].register_forward_pre_hook(keep) for i in (1, 2)]
        x, _ = entering(tower, picture)
        h = blocks[-1].ln_1(x)
    else:  # unfused, the map passes through the attention's dropout
        for i in (1, 2):
            blocks[i].attn.fused_attn = False
        handles = [blocks[i].attn.attn_drop.register_forward_hook(lambda m, x, out: maps.append(out)) for i in (1, 2)]
        x, keywords = entering(tower, picture)
        h = blocks[-1].norm1(x)
    for handle in handles:
        handle.remove()
    assert len(maps) == 2
    # The values of the last block, weighted by hand; NACLIP's tokens come from its own reading, tested above.
    attn = blocks[-1].attn
    weight, bias = (attn.in_proj_weight, attn.in_proj_bias) if kind == "native" else (attn.qkv.weight, attn.qkv.bias)
    bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias]) if bias is None and attn.q_bias is not None else bias
    values = F.linear(h, weight, bias)[..., -WIDTH:].unflatten(2, (HEADS, -1)).transpose(1, 2)
    middle = (sum(maps) / 2 @ values).transpose(1, 2).flatten(2)
    seen = []
    out = attn.out_proj if kind == "native" else attn.proj
    weighted = out.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    read(tower, picture, "naclip"), read(tower, picture, "rcs")
    weighted.remove()
    naclip, rcs = seen[-2:]
    torch.testing.assert_close(rcs, naclip + middle, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("depth, scale", [(2, None), (7, 0.1)])
def test_gem_by_loops_over_heads_and_tokens(depth, scale):
    tower, picture = native(layers=depth, ls_init_value=scale), images((2, 3), 1)
    blocks, inputs = tower.transformer.resblocks, []
    handles = [x.register_forward_pre_hook(lambda module, given: inputs.append(given[0][0])) for x in blocks]
    dense_tokens(tower, picture)
    for handle in handles:
        handle.remove()
    inputs, size = inputs[-6:], WIDTH // HEADS
    stream = inputs[0]
    for block, x in zip(blocks[-6:], inputs, strict=True):
        h = block.ln_1(x)
        rows = (h @ block.attn.in_proj_weight.T + block.attn.in_proj_bias).split(WIDTH, 1)
        temper = sum(float(token.norm()) for token in h) / len(h) / math.sqrt(size)
        out = torch.zeros_like(h)
        for head in range(HEADS):
            q, k, v = (part[:, head * size : (head + 1) * size] for part in rows)
            for s in (q, k, v):
                s = torch.stack([token / token.norm() for token in s])
                for _ in range(2):
                    logits = [[math.exp(temper * float(a @ b)) for b in s] for a in s]
                    weights = torch.tensor([[x / sum(line) for x in line] for line in logits], dtype=h.dtype)
                    mixed = torch.stack([sum(w * token for w, token in zip(line, s, strict=True)) for line in weights])
                    s = torch.stack([token / token.norm() for token in mixed])
                out[:, head * size : (head + 1) * size] += weights @ v / 3
        stream = stream + block.ls_1(out @ block.attn.out_proj.weight.T + block.attn.out_proj.bias)
    expected = tower.ln_post(stream)[1:].unflatten(0, (2, 3))
    torch.testing.assert_close(read(tower, picture, "gem")[0], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(read(tower, picture, "gem")[0], expected, rtol=1e-9, atol=1e-9)  # no state is kept


# A second tower


def proxy_of(patch: int = PATCH, **options) -> nn.Module:
    return timm_vit("vit_base_patch16_224.dino", patch_size=patch, **options)


def test_the_map_of_a_second_tower():
    """The softmax of 3 (S - 1.2 mean S) over its positive entries, by loops; a blank image leaves each token itself."""
    tokens = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = proxy_attention(tokens)
    for image, one in zip(found, tokens, strict=True):
        cosines = [[float(a @ b / a.norm() / b.norm()) for b in one] for a in one]
        mean = sum(map(sum, cosines)) / 36
        for row, values in zip(image, cosines, strict=True):
            weights = [math.exp(3 * (x - 1.2 * mean)) if x >= 1.2 * mean else 0.0 for x in values]
            torch.testing.assert_close(row, torch.tensor(weights, dtype=torch.float64) / sum(weights))
    assert (found == 0).any()
    assert torch.equal(proxy_attention(torch.ones(1, 5, 3)), torch.eye(5)[None])


@pytest.mark.parametrize("grid", GRIDS)
def test_proxy_by_the_towers_own_attention(grid):
    """With q of zeros and the map's logarithm as the mask, the library's attention gives the map times the values."""
    tower, second, picture = native(), proxy_of(), images(grid)
    tokens = dense_tokens(second, picture * 0.5 + 0.25).flatten(1, 2)
    found = dense_tokens(tower, picture, 1, Reader("proxy", second, (0.5,) * 3, (0.25,) * 3))
    block = tower.transformer.resblocks[-1]
    attn, h = copy.deepcopy(block.attn), block.ln_1(entering(tower, picture)[0])
    attn.in_proj_weight.data[:WIDTH], attn.in_proj_bias.data[:WIDTH] = 0, 0
    for image, own, one in zip(found, h[:, 1:], tokens, strict=True):
        mask = proxy_attention(one[None])[0].log()
        out = tower.ln_post(attn(own[None], own[None], own[None], attn_mask=mask)[0])
        torch.testing.assert_close(image.flatten(0, 1), out[0], rtol=1e-9, atol=1e-9)


def test_each_cell_of_the_tower_is_a_patch_of_the_proxy():
    tower, picture = native(), images((4, 6))
    seen = []
    for patch, stride, size in ((8, 1, (32, 48)), (8, 2, (56, 88)), (4, 1, (16, 24)), (4, 2, (28, 44))):
        second = proxy_of(patch)
        second.patch_embed.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        dense_tokens(tower, picture, stride, Reader("proxy", second))
        assert tuple(seen[-1].shape[2:]) == size
    assert torch.equal(seen[0], picture)
    assert torch.equal(seen[3], picture[:, :, 2:30, 2:46])  # half a cell outside the first and the last centre


def test_a_blank_window_has_tokens():
    tower, second = native(), proxy_of()
    found = dense_tokens(tower, torch.zeros(1, 3, 32, 32, dtype=torch.float64), 1, Reader("proxy", second))
    assert found.isfinite().all()


def test_normalised_for_the_second_tower():
    one, other = ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]), ([0.1, 0.2, 0.3], [0.6, 0.5, 0.4])
    pixels = torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(0))
    first, second = (transforms.Compose([transforms.Normalize(*x)]) for x in (one, other))
    reader = proxy_reader(nn.Linear(1, 1), second, first)
    scale, shift = (torch.tensor(x).view(3, 1, 1) for x in (reader.scale, reader.shift))
    torch.testing.assert_close(first(pixels) * scale + shift, second(pixels))


def test_a_second_tower_from_a_folder_is_kept_with_an_embedder(untrained, tmp_path):
    folder = tmp_path / "dino"
    folder.mkdir()
    values = {"img_size": 32, "patch_size": PATCH, "embed_dim": WIDTH, "depth": 1, "num_heads": HEADS}
    config = {"architecture": "vit_base_patch16_224", "num_classes": 0, "model_args": values, "pretrained_cfg": {}}
    (folder / "config.json").write_text(json.dumps(config))
    made = timm.create_model("vit_base_patch16_224", num_classes=0, **values)
    save_file(made.state_dict(), folder / "model.safetensors")
    model, proxy = f"local-dir:{untrained / 'clip'}", f"local-dir:{folder}"
    towers = load_towers(model, tokens="proxy", proxy=proxy)
    image = towers.probe()[0]
    save_embedder(
        VisionEmbedder(128, 128), tmp_path / "run/embedder", describe_towers(towers, tmp_path / "run/embedder")
    )
    again, embedder = load_pacl(tmp_path / "run")
    assert embedder.towers["tokens"] == "proxy" and embedder.towers["proxy"] == "local-dir:../../dino"
    assert torch.equal(again.tokens(image), towers.tokens(image))
    assert not torch.allclose(towers.tokens(image), towers.read("value").tokens(image), atol=0.01)
    save_file({name: x + 0.1 for name, x in made.state_dict().items()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="the vision tower's output is off by"):
        load_pacl(tmp_path / "run")
    with pytest.raises(ValueError, match="proxy: got 'local-dir:.*' with kk tokens, expected it with proxy tokens"):
        load_towers(model, tokens="kk", proxy=proxy)
    with pytest.raises(ValueError, match="proxy: got 'vit_dino', expected a model of timm, such as"):
        load_towers(model, tokens="proxy", proxy="vit_dino")
