"""Readings of several blocks, and of a second tower, equal loops and the library's own attention."""

import copy
import json
import math

import pytest
import timm
import torch
from filled_towers import HEADS, PATCH, WIDTH, entering, images, native, read, timm_vit
from pacl.dense import dense_tokens
from pacl.embedder import VisionEmbedder, save_embedder
from pacl.evaluate.results import names_of
from pacl.readings import (
    Reader,
    middle_blocks,
    proxy_attention,
    proxy_reader,
)
from pacl.self_calibration import Calibrated, after
from pacl.sharing import describe_towers, load_pacl
from pacl.towers import load_towers
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torchvision import transforms

torch.set_num_threads(1)


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


def self_calibrated(tower: nn.Module, inputs: list[torch.Tensor], grid: tuple[int, int]) -> torch.Tensor:
    """Return SC-CLIP's tokens [N, D] for one image by loops. inputs: tokens [L, C] that enter each of 12 blocks."""
    block, (rows, columns) = tower.transformer.resblocks[-1], grid
    size, count = WIDTH // HEADS, rows * columns

    def square(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(sum((a - b) ** 2))

    patches, far, nearest = inputs[11][1:], [], []
    for one in patches:
        order = sorted(range(count), key=lambda j: square(one, patches[j]))[1:31]
        nearest.append(order)
        far.append(square(one, patches[order[-1]]))
    factors = [sum(far[i] / far[j] for j in nearest[i]) / len(nearest[i]) for i in range(count)]
    place = 0.95 * (count - 1)
    low, high = (sorted(factors)[n] for n in (math.floor(place), math.ceil(place)))
    odd = [x > low + (place - math.floor(place)) * (high - low) for x in factors]
    assert any(odd) or count < 31

    def repair(tokens: torch.Tensor) -> torch.Tensor:
        out = tokens.clone()
        for i in range(count):
            y, x = divmod(i, columns)
            around = [(y + a, x + b) for a in (-1, 0, 1) for b in (-1, 0, 1) if a or b]
            inside = [a * columns + b for a, b in around if 0 <= a < rows and 0 <= b < columns]
            sound = [j for j in inside if not odd[j]]
            if odd[i] and sound:
                out[i] = sum(tokens[j] for j in sound) / len(sound)
        return out

    def similar(tokens: torch.Tensor) -> list[list[float]]:
        return [[float(a @ b / a.norm() / b.norm()) for b in tokens] for a in tokens]

    def mix(cosines: list[list[float]], tokens: torch.Tensor) -> torch.Tensor:
        kept = [[c if c >= 0.4 else 0.0 for c in line] for line in cosines]
        return torch.stack(
            [sum(c * x for c, x in zip(line, tokens, strict=True)) / (sum(line) + 1e-6) for line in kept]
        )

    middle, early = similar(repair(inputs[9][1:])), similar(inputs[4][1:])
    mean = sum(map(sum, middle)) / count**2

    def attend(tokens: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        _, k, v = (block.ln_1(tokens) @ block.attn.in_proj_weight.T + block.attn.in_proj_bias).split(WIDTH, 1)
        out = torch.zeros_like(v)
        for i in range(count):
            map_of_cosines = [math.exp(3 * (c - mean)) if c >= mean else 0.0 for c in middle[i]]
            for part in (slice(head * size, (head + 1) * size) for head in range(HEADS)):
                map_of_keys = [math.exp(float(k[i, part] @ other[part]) / math.sqrt(size)) for other in k]
                for j in range(count):
                    share = map_of_cosines[j] / sum(map_of_cosines) + map_of_keys[j] / sum(map_of_keys)
                    out[i, part] += share / 2 * v[j, part]
        return block.ls_1(out @ block.attn.out_proj.weight.T + block.attn.out_proj.bias) + 0.3 * first

    found = mix(early, attend(mix(middle, repair(patches)), inputs[11][0]))
    total = sum(inputs[4:11])
    return tower.ln_post(found + mix(early, attend(total[1:], total[0])))


@pytest.mark.parametrize("grid, scale", [((4, 9), None), ((5, 2), 0.1)])
def test_scclip_by_loops_over_patches(grid, scale):
    tower, picture = native(layers=12, ls_init_value=scale), images(grid, 1)
    inputs = []
    handles = [
        x.register_forward_pre_hook(lambda module, given: inputs.append(given[0])) for x in tower.transformer.resblocks
    ]
    dense_tokens(tower, picture)
    for handle in handles:
        handle.remove()
    found = read(tower, picture, "scclip")
    expected = self_calibrated(tower, [x[0] for x in inputs], grid)
    torch.testing.assert_close(found[0].flatten(0, 1), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(read(tower, picture, "scclip"), found)  # no state is kept


def test_scclip_in_towers_of_any_depth_and_with_registers():
    assert [after(n, 12) for n in (4, 9, 10)] == [4, 9, 10] and [after(n, 24) for n in (4, 9, 10)] == [8, 18, 20]
    assert [after(n, 3) for n in (4, 9, 10)] == [1, 2, 2] and [after(4, n) for n in (1, 2)] == [0, 1]
    for options in ({"depth": 1}, {"depth": 5, "reg_tokens": 2}, {"reg_tokens": 2, "class_token": False}):
        tower = timm_vit("vit_base_patch16_224", global_pool="avg", **options)
        blank = torch.zeros(1, 3, 24, 24, dtype=torch.float64)
        assert read(tower, blank, "scclip").isfinite().all() and read(tower, blank[..., :8, :8], "scclip").numel()
    x = torch.randn(1, 3 + 9, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    other = x.clone()
    for rows, has_class, equal in ((slice(1, 3), True, True), (slice(0, 1), True, False), (slice(0, 3), False, True)):
        other[:, rows] += 1
        found = [Calibrated(tower.blocks[-1], [y], 2, (3, 3), 3, has_class)(y)[:, 3:] for y in (x, other)]
        assert torch.allclose(*found) == equal


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


@pytest.mark.parametrize("grid", [(2, 5), (5, 2)])
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
    assert again.reading == "proxy of dino" and names_of(again, None)["tokens"] == "proxy of dino"
    assert not torch.allclose(towers.tokens(image), towers.read("value").tokens(image), atol=0.01)
    save_file({name: x + 0.1 for name, x in made.state_dict().items()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="the vision tower's output is off by"):
        load_pacl(tmp_path / "run")
    with pytest.raises(ValueError, match="proxy: got 'local-dir:.*' with kk tokens, expected it with proxy tokens"):
        load_towers(model, tokens="kk", proxy=proxy)
    with pytest.raises(ValueError, match="proxy: got 'vit_dino', expected a model of timm, such as"):
        load_towers(model, tokens="proxy", proxy="vit_dino")
