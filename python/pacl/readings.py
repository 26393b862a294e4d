"""Readings: other patch tokens of a frozen vision transformer, without training.

A reading replaces the attention of the last block and says what else of the block is kept. The tower and its weights do
not change: a second module runs over the same tensors. `docs/readings.md` has the formulas and their sources.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import timm.layers
import timm.models as timm_models
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import Normalize

from .backbones import freeze, share, tower_trunk
from .block_parts import ATTENTIONS, BLOCKS, attention_of, cosines, finished, part, projections, scaled
from .self_calibration import EARLY, Calibrated, Noted, after


@dataclass(frozen=True)
class Reading:
    """A way to compute the last block.

    Attributes:
        pairs: projections whose products make the attention maps: "qk", "qq", "kk" or "vv". Each map is a softmax over
            all tokens, and the maps are added. Without pairs each token keeps its own value.
        sigma: standard deviation, in patches, of a Gaussian of height 1 that is added to the logits between patches.
        residual: add the block's input.
        mlp: apply the block's MLP.
        proxy: take one map for all heads, between patches alone, from the tokens of a second tower.
        middle: share of the mean map of the middle blocks in the map, which is then doubled.
        stream: number of last blocks whose own outputs are added up beside the tower (GEM), in place of all the above.
        calibrated: read several blocks as SC-CLIP does, in place of all the above.
    """

    pairs: tuple[str, ...] = ()
    sigma: float | None = None
    residual: bool = False
    mlp: bool = False
    proxy: bool = False
    middle: float | None = None
    stream: int = 0
    calibrated: bool = False


READINGS = {
    "plain": Reading(("qk",), residual=True, mlp=True),
    "value": Reading(),
    "maskclip": Reading(residual=True, mlp=True),
    "sclip": Reading(("qq", "kk"), residual=True, mlp=True),
    "clearclip": Reading(("qq",)),
    "naclip": Reading(("kk",), sigma=5.0),
    "kk": Reading(("kk",)),
    "rcs": Reading(("kk",), sigma=5.0, middle=0.5),
    "gem": Reading(stream=6),
    "scclip": Reading(calibrated=True),
    "proxy": Reading(proxy=True),
}
PROXY = "vit_base_patch16_224.dino"  # the second tower of "proxy" by default: timm's DINO
BEST = "naclip"  # the best published mIoU among the readings of the last block alone, which need no depth


@dataclass(frozen=True, eq=False)
class Reader:
    """The reading of a tower's tokens.

    Attributes:
        name: a key of `READINGS`.
        proxy: the second tower of the reading "proxy", frozen.
        scale, shift: for each colour channel; images normalised for the tower, times scale, plus shift, are normalised
            for the proxy.
    """

    name: str = "plain"
    proxy: nn.Module | None = None
    scale: tuple[float, ...] = (1.0, 1.0, 1.0)
    shift: tuple[float, ...] = (0.0, 0.0, 0.0)


PLAIN = Reader()


def proxy_reader(proxy: nn.Module, own: Any, transform: Any) -> Reader:
    """Return the reader of the reading "proxy".

    Args:
        proxy: the second tower.
        own: its transform from a PIL image to float `[3, H, W]`.
        transform: that of the first tower, whose normalised images both get.

    Returns:
        The reader; its tower is frozen.

    Raises:
        ValueError: for a transform without `Normalize`.
    """
    (mean, deviation), (other, spread) = normalisation(transform), normalisation(own)
    scale = tuple(a / b for a, b in zip(deviation, spread, strict=True))
    shift = tuple((a - b) / c for a, b, c in zip(mean, other, spread, strict=True))
    return Reader("proxy", freeze(proxy), scale, shift)


def normalisation(transform: Any) -> tuple[list[float], list[float]]:
    """Return the mean and the deviation, for each channel, of a transform's `Normalize`; raise ValueError without."""
    for step in getattr(transform, "transforms", []):
        if isinstance(step, Normalize):
            return [float(x) for x in step.mean], [float(x) for x in step.std]
    raise ValueError("towers: got a transform without Normalize, expected one with the mean and deviation of images")


def best_reading(visual: nn.Module) -> tuple[str, str]:
    """Return the name of the last block's reading with the best published maps, and the reason as a clause."""
    if (reason := why_plain_only(visual)) is not None:
        return "plain", reason
    if pools_by_attention(visual):
        return "plain", "the head that pools by attention is applied to each token alone, which is MaskCLIP's idea"
    return BEST, "the last block's reading with the best published maps"


def pools_by_attention(visual: nn.Module) -> bool:
    """Return True for an open_clip tower whose head pools by attention with a latent query: SigLIP, PE."""
    return isinstance(visual, TimmModel) and isinstance(
        getattr(visual.trunk, "attn_pool", None), timm.layers.AttentionPoolLatent
    )


def check_reading(name: str, visual: nn.Module) -> None:
    """Raise ValueError for an unknown reading, and for one that the tower does not have."""
    if name not in READINGS:
        raise ValueError(f"tokens: got {name!r}, expected one of {', '.join(READINGS)}")
    if name != "plain" and (reason := why_plain_only(visual)):
        raise ValueError(f"tokens: got {name!r}, expected 'plain': {reason}")


def why_plain_only(visual: nn.Module) -> str | None:
    """Return why a tower has no other reading than "plain", or None if it has all of them."""
    try:
        trunk: Any = tower_trunk(visual)
    except TypeError:  # a vision model of transformers
        return f"readings are for vision transformers of open_clip and timm, not for {type(visual).__name__}"
    kind = type(trunk).__name__
    if isinstance(trunk, (VisionTransformer, timm_models.VisionTransformer, timm_models.Eva)):
        block = _blocks(trunk)[-1]  # all blocks of these towers are of one kind
        if type(block) in BLOCKS and type(block.attn) in ATTENTIONS and not _by_cosine(block.attn):
            return None
        return f"the last block of this {kind}, {type(block).__name__} with {type(block.attn).__name__}, is not known"
    return f"readings are for the plain blocks of open_clip's and timm's vision transformers, not for {kind}"


def read_as(
    trunk: Any, name: str, grid: tuple[int, int], stride: int = 1, attention: Tensor | None = None
) -> nn.Module:
    """Return a tower over the same tensors whose last block is read another way.

    Args:
        trunk: a tower that `check_reading` accepts.
        name: the reading, a key of `READINGS`.
        grid: rows and columns of the patches in the images that the tower will get.
        stride: tokens per patch along each side, by which a distance in patches becomes one in tokens.
        attention: for "proxy", the map between the patches of these images, [B, N, N], as `proxy_attention` returns it.

    Returns:
        The tower, for images of that grid.

    Raises:
        ValueError: as `check_reading`.
    """
    check_reading(name, trunk)
    view, blocks = share(trunk), _blocks(trunk)
    prefix = 1 if isinstance(trunk, VisionTransformer) else trunk.num_prefix_tokens
    reading, replaced = READINGS[name], list(blocks)
    if reading.stream:
        sums: list[Tensor] = []
        count = min(reading.stream, len(blocks))
        replaced[-count:] = [_Streamed(block, sums, i == count) for i, block in enumerate(blocks[-count:], 1)]
    elif reading.calibrated:
        inputs: list[Tensor] = []
        first, last = after(EARLY, len(blocks)), len(blocks) - 1
        replaced[first:last] = [Noted(block, inputs) for block in blocks[first:last]]
        has_class = isinstance(trunk, VisionTransformer) or trunk.cls_token is not None
        replaced[last] = Calibrated(blocks[last], inputs, len(blocks), grid, prefix, has_class)
    else:
        replaced[-1] = block = _Block(blocks[-1], reading, grid, stride, prefix, attention)
        for i in () if reading.middle is None else middle_blocks(len(blocks)):
            replaced[i] = _Watched(blocks[i], block.maps)
    if isinstance(trunk, VisionTransformer):
        view.transformer = share(trunk.transformer)
        view.transformer.resblocks = nn.ModuleList(replaced)
    else:
        view.blocks = nn.Sequential(*replaced) if isinstance(blocks, nn.Sequential) else nn.ModuleList(replaced)
    return view


def _blocks(trunk: Any) -> Any:
    return trunk.transformer.resblocks if isinstance(trunk, VisionTransformer) else trunk.blocks


def _by_cosine(attention: nn.Module) -> bool:
    """Return True for open_clip's attention by cosines with a learnt scale."""
    return getattr(attention, "logit_scale", None) is not None


class _Block(nn.Module):
    """A transformer's last block, read another way. It has the signatures of open_clip's and timm's blocks."""

    def __init__(
        self,
        block: nn.Module,
        reading: Reading,
        grid: tuple[int, int],
        stride: int,
        prefix: int,
        attention: Tensor | None,
    ):
        super().__init__()
        self.block, self.reading, self.grid, self.prefix, self.attention = block, reading, grid, prefix, attention
        self.sigma = reading.sigma and reading.sigma * stride
        self.maps: list[Tensor] = []  # of the middle blocks, in this call

    def forward(self, x: Tensor, *unused: Any, rope: Tensor | None = None, **masks: Any) -> Tensor:
        """Return tokens [B, L, C] of tokens [B, L, C], the class token and registers first.

        rope: rotary positions of the patches. unused, masks: the masks of the block's signature, which towers leave
        out for images.
        """
        block: Any = self.block
        h = part(block, "norm1", "ln_1")(x)
        q, k, v = projections(block.attn, h, rope)
        rows = {"q": q, "k": k, "v": v}
        bias = None if self.sigma is None else nearness(self.grid, self.sigma, self.prefix, v)
        pairs = [(rows[pair[0]], rows[pair[1]]) for pair in self.reading.pairs]
        maps = [F.scaled_dot_product_attention(a, b, v, attn_mask=bias) for a, b in pairs]
        heads = torch.stack(maps).sum(0) if maps else v
        if self.attention is not None:  # the class token has no part in it
            first, patches = v.split([self.prefix, v.shape[2] - self.prefix], 2)
            heads = torch.cat([first, self.attention[:, None].to(v) @ patches], 2)
        if self.reading.middle is not None:
            middle = torch.stack(self.maps).mean(0).to(v)
            self.maps.clear()
            heads = 2.0 * torch.lerp(heads, middle @ v, self.reading.middle)
        out = scaled(block, 1, finished(block, h, heads))
        if self.reading.residual:
            out = x + out
        return out + scaled(block, 2, block.mlp(part(block, "norm2", "ln_2")(out))) if self.reading.mlp else out


class _Watched(nn.Module):
    """A block that computes what it always does, and adds its attention map [B, heads, L, L] to a list."""

    def __init__(self, block: nn.Module, maps: list[Tensor]):
        super().__init__()
        self.block, self.maps = block, maps

    def forward(self, x: Tensor, *masks: Any, **more: Any) -> Tensor:
        attention: Any = self.block.attn
        q, k, _ = projections(attention, part(self.block, "norm1", "ln_1")(x), more.get("rope"))
        self.maps.append((q @ k.mT * attention.head_dim**-0.5).softmax(-1))
        return self.block(x, *masks, **more)


class _Streamed(nn.Module):
    """A block of GEM: it adds an attention output of its own to a second stream, which the last block returns."""

    def __init__(self, block: nn.Module, sums: list[Tensor], last: bool):
        super().__init__()
        self.block, self.sums, self.last = block, sums, last

    def forward(self, x: Tensor, *masks: Any, **more: Any) -> Tensor:
        block: Any = self.block
        h = part(block, "norm1", "ln_1")(x)
        q, k, v = projections(block.attn, h, more.get("rope"))
        temper = h.norm(dim=-1).mean(1)[:, None, None, None] * block.attn.head_dim**-0.5
        maps = []
        for rows in (q, k, v):
            rows = F.normalize(rows, dim=-1)
            rows = F.normalize((temper * rows @ rows.mT).softmax(-1) @ rows, dim=-1)
            maps.append((temper * rows @ rows.mT).softmax(-1))
        out = scaled(block, 1, finished(block, h, torch.stack(maps).mean(0).to(v) @ v))
        self.sums.append((self.sums.pop() if self.sums else x) + out)
        return self.sums.pop() if self.last else block(x, *masks, **more)


def middle_blocks(count: int) -> range:
    """Return the indices of the middle blocks among `count`: in ResCLIP the sixth to the ninth of 12."""
    first, end = count * 5 // 12, count * 9 // 12
    return range(first, max(end, first + 1))


def proxy_attention(tokens: Tensor) -> Tensor:
    """Return ProxyCLIP's attention [B, N, N] of a second tower's tokens [B, N, C], float32 or float64."""
    return attention_of(cosines(tokens), 1.2)


def nearness(grid: tuple[int, int], sigma: float, prefix: int, like: Tensor) -> Tensor:
    """Return a Gaussian of the distance of each two tokens of a grid, [L, L], after `prefix` rows and columns of zeros.

    The height is 1 and `sigma` is in tokens. like: tensor of the dtype and device of the result.
    """
    wide, sides = torch.promote_types(like.dtype, torch.float32), []
    for n in grid:
        places = torch.arange(n, dtype=wide, device=like.device)
        sides.append(torch.exp((places[:, None] - places).square() / (-2 * sigma**2)))
    return F.pad(torch.kron(sides[0], sides[1]), (prefix, 0, prefix, 0)).to(like)
