"""Peers: what people run instead of the fused loss, each written as its authors would write it, normalisation included.

A peer is `phi(patches, texts, temperature, form)`, the compatibility `[B, K]` of patches `[B, N, D]` and texts
`[K, D]`. Each form has the peers that can express it. A floor is another loss, cheaper than any over patches: each
image is one vector, the mean of its patches. A forward has no backward.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Mapping
from importlib import metadata
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LOGIT_SCALE = 1 / 0.07
MIN_POOLED_NORM = 1e-6
CHUNK = 16  # images; at the usual sizes the scores of a chunk stay in the last-level cache


def pooled(patches: Tensor, texts: Tensor, temperature: float, form: str) -> Tensor:
    """Compute φ as in the paper: scores, softmax, the pooled patch of every pair, its product with the text."""
    p, t = F.normalize(patches, dim=-1), F.normalize(texts, dim=-1)
    scores = torch.einsum("bnd,kd->bkn", p, t)
    return _compare(torch.einsum("bkn,bnd->bkd", (scores / temperature).softmax(-1), p), t, form)


def weighted_scores(patches: Tensor, texts: Tensor, temperature: float, form: str) -> Tensor:
    """Compute φ without a pooled patch: Σ a s, divided by sqrt(aᵀ G a) with G = p̂ p̂ᵀ for the cosine."""
    p, t = F.normalize(patches, dim=-1), F.normalize(texts, dim=-1)
    scores = torch.einsum("bnd,kd->bkn", p, t)
    a = (scores / temperature).softmax(-1)
    phi = (a * scores).sum(-1)
    if form == "dot":
        return phi
    squared = (a * torch.einsum("bkn,bnm->bkm", a, p @ p.mT)).sum(-1)
    return phi / squared.clamp_min(MIN_POOLED_NORM**2).sqrt()


def attention(patches: Tensor, texts: Tensor, temperature: float, form: str) -> Tensor:
    """Compute φ by PyTorch's fused attention: texts are the queries of every image, its patches keys and values."""
    p, t = F.normalize(patches, dim=-1), F.normalize(texts, dim=-1)
    queries = t.expand(len(p), 1, *t.shape)
    v = F.scaled_dot_product_attention(queries, p[:, None], p[:, None], scale=1 / temperature)
    return _compare(v[:, 0], t, form)


def flex_attention(patches: Tensor, texts: Tensor, temperature: float, form: str) -> Tensor:
    """Compute φ by FlexAttention, the attention that torch.compile generates."""
    from torch.nn.attention.flex_attention import flex_attention

    p, t = F.normalize(patches, dim=-1), F.normalize(texts, dim=-1)
    queries = t.expand(len(p), 1, *t.shape)
    return _compare(flex_attention(queries, p[:, None], p[:, None], scale=1 / temperature)[:, 0], t, form)


def largest_score(patches: Tensor, texts: Tensor, temperature: float, form: str) -> Tensor:
    """Compute the max form as usually written; its backward is a product with a tensor that is nearly all zeros."""
    p, t = F.normalize(patches, dim=-1), F.normalize(texts, dim=-1)
    return torch.einsum("bnd,kd->bkn", p, t).max(-1).values


def late_interaction_kernels(patches: Tensor, texts: Tensor, temperature: float, form: str) -> Tensor:
    """Compute MaxSim of queries `[K, 1, D]` and documents `[B, N, D]`; the package normalises them itself."""
    return importlib.import_module("late_interaction_kernels").maxsim(texts[:, None], patches, normalize=True).T


def flash_maxsim(patches: Tensor, texts: Tensor, temperature: float, form: str) -> Tensor:
    """Compute MaxSim of normalised arguments; the package's kernels always multiply in float16."""
    p, t = F.normalize(patches, dim=-1), F.normalize(texts, dim=-1)
    return importlib.import_module("flash_maxsim").flash_maxsim_batched_train(t[:, None], p).T


def maxsim_cpu(patches: Tensor, texts: Tensor, temperature: float, form: str) -> Tensor:
    """Compute MaxSim of one query at a time, as the package does it; it has no backward."""
    scores = importlib.import_module("maxsim_cpu").maxsim_scores
    p, t = (F.normalize(x.detach(), dim=-1).numpy() for x in (patches, texts))
    return torch.stack([torch.as_tensor(scores(query[None], p)) for query in t], 1)


def chunked(patches: Tensor, texts: Tensor, temperature: float, form: str, phi: Callable | None = None) -> Tensor:
    """Compute φ for a few images at a time, and each chunk again in the backward pass."""
    phi = phi or (largest_score if form == "max" else weighted_scores)
    chunks = patches.split(CHUNK)
    return torch.cat([checkpoint(phi, chunk, texts, temperature, form, use_reentrant=False) for chunk in chunks])


def _compare(v: Tensor, t: Tensor, form: str) -> Tensor:
    if form == "cosine":
        v = v / v.norm(dim=-1, keepdim=True).clamp_min(MIN_POOLED_NORM)
    return torch.einsum("bkd,kd->bk", v, t)


# Floors: losses of one vector `[B, D]` for each image


def open_clip(images: Tensor, texts: Tensor, loss: str) -> Tensor:
    losses = importlib.import_module("open_clip.loss")
    if loss == "sigmoid":
        return losses.SigLipLoss()(images, F.normalize(texts, dim=-1), LOGIT_SCALE, logit_bias(loss))
    return losses.ClipLoss()(images, F.normalize(texts, dim=-1), LOGIT_SCALE)


def memeff(images: Tensor, texts: Tensor, loss: str) -> Tensor:
    make = importlib.import_module("memeff").MemoryEfficientCLIPLoss
    return make(1 / LOGIT_SCALE, normalized_inputs=True, stable=False)(images, F.normalize(texts, dim=-1))


def siglip_kernel(images: Tensor, texts: Tensor, loss: str) -> Tensor:
    scale, bias = (torch.full((), x, device=texts.device) for x in (math.log(LOGIT_SCALE), logit_bias(loss)))
    fused = importlib.import_module("siglip_kernel").fused_siglip_loss
    return fused(images, F.normalize(texts, dim=-1), scale, bias)


class Peer(NamedTuple):
    """Description of a peer.

    Attributes:
        function: φ(patches, texts, temperature, form); of a floor loss(images, texts, loss).
        peak: form -> peak memory of a step beyond inputs and gradients, in multiples of patches, of scores `[B, K, N]`
            and of pooled patches `[B, K, D]`, measured on a CPU; for packages, from their documentation.
        mode: mode of torch.compile; None does not compile.
        package: name on PyPI and of its module; None needs torch alone.
        device: type of the only device that it runs on.
        losses: losses that it can express.
        kind: "loss" is the same loss as ours, "floor" and "forward" are explained above.
    """

    function: Callable[..., Tensor]
    peak: Mapping[str, tuple[float, float, float]]
    mode: str | None = None
    package: tuple[str, str] | None = None
    device: str | None = None
    losses: tuple[str, ...] = ("infonce", "sigmoid")
    kind: str = "loss"


SUM = {"dot": (1, 2, 0), "cosine": (1, 8, 0)}
POOLED = {"dot": (1, 2, 1), "cosine": (1, 2, 2)}
MAX = {"max": (1, 2, 0)}
ATTENTION = {"dot": (1, 0, 4), "cosine": (1, 0, 5)}
PAIRS = dict.fromkeys(("dot", "cosine", "max"), (2, 0.1, 0))  # a few arrays `[B, K]` of a floor
TUNED = "max-autotune-no-cudagraphs"  # launches take no time beside these kernels, and a graph keeps its memory
PEERS = {
    "eager, pooled patch (paper)": Peer(pooled, {"dot": (1, 2, 1), "cosine": (1, 2, 6)}),
    "eager, sum of a s": Peer(weighted_scores, {"dot": (1, 4, 0), "cosine": (1, 11, 0)}),
    "compiled, pooled patch": Peer(pooled, POOLED, "default"),
    "compiled, sum of a s": Peer(weighted_scores, SUM, "default"),
    "max-autotune, pooled patch": Peer(pooled, POOLED, TUNED),
    "max-autotune, sum of a s": Peer(weighted_scores, SUM, TUNED),
    "scaled_dot_product_attention": Peer(attention, ATTENTION),
    "FlexAttention": Peer(flex_attention, ATTENTION, "default", device="cuda"),
    "eager, max of s": Peer(largest_score, MAX),
    "compiled, max of s": Peer(largest_score, MAX, "default"),
    "max-autotune, max of s": Peer(largest_score, MAX, TUNED),
    "eager, chunks + checkpoint": Peer(chunked, dict.fromkeys(("dot", "cosine", "max"), (3, 0, 0))),
    "late-interaction-kernels": Peer(
        late_interaction_kernels,
        {"max": (2, 0, 0)},
        package=("late-interaction-kernels", "late_interaction_kernels"),
        device="cuda",
    ),
    "flash-maxsim": Peer(flash_maxsim, {"max": (3, 0, 0)}, package=("flash-maxsim", "flash_maxsim"), device="cuda"),
    "maxsim-cpu, forward alone": Peer(
        maxsim_cpu, {"max": (2, 0, 0)}, package=("maxsim-cpu", "maxsim_cpu"), device="cpu", kind="forward"
    ),
    "floor: open_clip, mean patch": Peer(open_clip, PAIRS, package=("open_clip_torch", "open_clip"), kind="floor"),
    "floor: memeff, mean patch": Peer(
        memeff, PAIRS, package=("memeff", "memeff"), device="cuda", losses=("infonce",), kind="floor"
    ),
    "floor: siglip-kernel, mean patch": Peer(
        siglip_kernel, PAIRS, package=("siglip-kernel", "siglip_kernel"), device="cuda", losses=("sigmoid",),
        kind="floor",
    ),
}  # fmt: skip


def logit_bias(loss: str) -> float:
    """Return SigLIP's initial bias for the sigmoid loss, 0 for the other, which does not depend on a bias."""
    return -10.0 if loss == "sigmoid" else 0.0


def chosen(args) -> dict[str, Peer]:
    """Return the peers of a form and a loss whose names hold one of the words of --peers."""
    words = [word.strip() for word in args.peers.split(";")]
    return {
        name: peer
        for name, peer in PEERS.items()
        if args.form in peer.peak and args.loss in peer.losses and ("all" in words or any(x in name for x in words))
    }


def kind_of(name: str) -> str:
    """Return the kind of a row: that of a peer, or "loss"."""
    return PEERS[name].kind if name in PEERS else "loss"


def is_compiled(name: str) -> bool:
    return name in PEERS and PEERS[name].mode is not None


def why_not(name: str, args) -> str | None:
    """Return why a peer cannot run here, apart from memory, or None."""
    peer = PEERS[name]
    if peer.device not in (None, args.torch_device.type):
        if name == "FlexAttention":
            return "it has no backward on a CPU"
        return f"its kernels take {peer.device.upper()} tensors, not tensors on {args.torch_device.type}"
    if peer.package and find_spec(peer.package[1]) is None:
        return f"not installed; `pip install {peer.package[0]}`"
    if name == "maxsim-cpu, forward alone" and args.dtype != "float32":
        return f"it takes float32, not {args.dtype}"
    if peer.mode and "1" in map(os.environ.get, ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")):
        return "torch.compile is disabled by an environment variable"
    if peer.mode == TUNED and not args.max_autotune:
        return "it compiles for minutes, and runs with --max-autotune"
    return None


def versions() -> dict[str, str | None]:
    """Return the installed version of every package that a peer needs, None where it is absent."""
    found: dict[str, str | None] = {}
    for package in ("torch", "triton", *(peer.package[0] for peer in PEERS.values() if peer.package)):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found
