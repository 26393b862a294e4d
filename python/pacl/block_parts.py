"""Parts of the blocks of open_clip's and timm's vision transformers, from which readings compute other tokens."""

from __future__ import annotations

from typing import Any

import timm.layers
import torch
from open_clip import transformer as open_clip_blocks
from timm.layers import apply_rot_embed_cat
from timm.models import eva, vision_transformer
from torch import Tensor, nn
from torch.nn import functional as F

# Blocks of the form x + attention(norm(x)), then x + mlp(norm(x)), and the attentions whose q, k and v are known.
BLOCKS = (
    open_clip_blocks.ResidualAttentionBlock,
    open_clip_blocks.CustomResidualAttentionBlock,
    vision_transformer.Block,
    eva.EvaBlock,
)
ATTENTIONS = (
    nn.MultiheadAttention,
    open_clip_blocks.Attention,
    vision_transformer.Attention,
    eva.EvaAttention,
    *(getattr(timm.layers, x) for x in ("AttentionRope",) if hasattr(timm.layers, x)),
)


def cosines(tokens: Tensor) -> Tensor:
    """Return the cosines [B, N, N] of each image's tokens [B, N, C] with one another, float32 or float64."""
    tokens = F.normalize(tokens.to(torch.promote_types(tokens.dtype, torch.float32)), dim=-1)
    with torch.autocast(tokens.device.type, enabled=False):
        return tokens @ tokens.mT


def attention_of(similar: Tensor, share: float) -> Tensor:
    """Return the softmax over the positive entries of 3 (S - share mean S), with the mean of each image.

    similar: S, cosines [B, N, N]. In a blank image there may be no positive entry in a row; a token's own stays.
    """
    logits = 3.0 * (similar - share * similar.mean((1, 2), keepdim=True))
    own = torch.eye(logits.shape[1], dtype=torch.bool, device=logits.device)
    return logits.masked_fill((logits < 0) & ~own, float("-inf")).softmax(-1)


def projections(attention: Any, h: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v [B, heads, L, d] as the attention itself multiplies them: normalised and rotated."""
    if (weight := getattr(attention, "in_proj_weight", None)) is not None:
        rows = F.linear(h, weight, attention.in_proj_bias).chunk(3, -1)
    elif attention.qkv is not None:
        bias = attention.qkv.bias
        if getattr(attention, "q_bias", None) is not None:
            bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        rows = F.linear(h, attention.qkv.weight, bias).chunk(3, -1)
    else:
        rows = attention.q_proj(h), attention.k_proj(h), attention.v_proj(h)
    q, k, v = (x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for x in rows)
    q, k = part(attention, "q_norm", "ln_q")(q), part(attention, "k_norm", "ln_k")(k)
    if rope is not None:
        prefix, how = attention.num_prefix_tokens, {"half": True} if getattr(attention, "rotate_half", False) else {}
        q, k = (torch.cat([x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], rope, **how)], 2) for x in (q, k))
    groups = q.shape[1] // v.shape[1]  # several heads of q may share one of k and v
    if groups > 1:
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    return q.to(v.dtype), k.to(v.dtype), v


def finished(block: Any, h: Tensor, heads: Tensor) -> Tensor:
    """Return the attention's output [B, L, C] from the weighted values [B, heads, L, d]; h is the attention's input."""
    attention = block.attn
    if getattr(attention, "head_scale", None) is not None:
        heads = heads * attention.head_scale
    out = part(attention, "norm", "ln_inner")(heads.transpose(1, 2).flatten(2))
    if getattr(attention, "gate", None) is not None:
        out = out * attention.gate(h).sigmoid()
    return part(block, "ln_attn")(part(attention, "proj", "out_proj")(out))


def scaled(block: nn.Module, number: int, x: Tensor) -> Tensor:
    """Apply the block's LayerScale after its attention (1) or its MLP (2), if it has one."""
    gamma = getattr(block, f"gamma_{number}", None)
    return x * gamma if gamma is not None else part(block, f"ls{number}", f"ls_{number}")(x)


def part(module: nn.Module, *names: str) -> Any:
    """Return the module's child with the first of `names` that it has, or an identity."""
    found = (getattr(module, name, None) for name in names)
    return next((x for x in found if x is not None), nn.Identity())
