"""Providers to compare: the fused loss, what people run instead of it, and the bare matrix products.

A peer is `phi(patches, texts, temperature, form)`, the compatibility `[B, K]` of patches `[B, N, D]` and texts
`[K, D]`, written as its authors would write it, normalisation included. Each form has the peers that can express it;
for `max` these include two published MaxSim packages, if they are installed and there is a GPU.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import re
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pacl_kernels import backends, fused_pacl_loss, reference

LOGIT_SCALE = 1 / 0.07
PRODUCTS = "matrix products"
# Number of scores that the bare products write at a time. On a CPU they stay in its cache. On a GPU smaller products
# are slower: with 4096 texts a unit took 6.0 ms on an H200 with 2²⁴ scores and 5.1 ms with 2²⁸.
BLOCK = {"cpu": 2**24, "cuda": 2**28}
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


def chunked(patches: Tensor, texts: Tensor, temperature: float, form: str, phi=None) -> Tensor:
    """Compute φ for a few images at a time, and each chunk again in the backward pass."""
    phi = phi or (largest_score if form == "max" else weighted_scores)
    chunks = patches.split(CHUNK)
    return torch.cat([checkpoint(phi, chunk, texts, temperature, form, use_reentrant=False) for chunk in chunks])


def _compare(v: Tensor, t: Tensor, form: str) -> Tensor:
    if form == "cosine":
        v = v / v.norm(dim=-1, keepdim=True).clamp_min(MIN_POOLED_NORM)
    return torch.einsum("bkd,kd->bk", v, t)


# For each name: φ, whether it is compiled, and for each of its forms the peak memory of a step beyond inputs and
# gradients, in multiples of patches, of scores [B, K, N] and of pooled patches [B, K, D] (measured on a CPU; for
# packages, from their documentation).
PEERS = {
    "eager, pooled patch (paper)": (pooled, False, {"dot": (1, 2, 1), "cosine": (1, 2, 6)}),
    "eager, sum of a s": (weighted_scores, False, {"dot": (1, 4, 0), "cosine": (1, 11, 0)}),
    "compiled, pooled patch": (pooled, True, {"dot": (1, 2, 1), "cosine": (1, 2, 2)}),
    "compiled, sum of a s": (weighted_scores, True, {"dot": (1, 2, 0), "cosine": (1, 8, 0)}),
    "scaled_dot_product_attention": (attention, False, {"dot": (1, 0, 4), "cosine": (1, 0, 5)}),
    "eager, max of s": (largest_score, False, {"max": (1, 2, 0)}),
    "compiled, max of s": (largest_score, True, {"max": (1, 2, 0)}),
    "eager, chunks + checkpoint": (chunked, False, {"dot": (3, 0, 0), "cosine": (3, 0, 0), "max": (3, 0, 0)}),
    "late-interaction-kernels": (late_interaction_kernels, False, {"max": (2, 0, 0)}),
    "flash-maxsim": (flash_maxsim, False, {"max": (3, 0, 0)}),
}
PACKAGES = {"late-interaction-kernels": "late_interaction_kernels", "flash-maxsim": "flash_maxsim"}  # name to module


def logit_bias(loss: str) -> float:
    """Return SigLIP's initial bias for the sigmoid loss, 0 for the other, which does not depend on a bias."""
    return -10.0 if loss == "sigmoid" else 0.0


def losses(args, only: str | None = None) -> dict:
    """Return equal losses loss(patches, texts) by name. `only` selects one, because torch.compile takes 5 s to load."""

    def fused(backend):
        return lambda patches, texts: fused_pacl_loss(
            patches, texts, LOGIT_SCALE, attn_temperature=args.temperature, form=args.form, loss=args.loss,
            logit_bias=logit_bias(args.loss), backend=backend,
        )  # fmt: skip

    def peer(phi, compiled, _):
        def loss(patches, texts):
            logits = LOGIT_SCALE * phi(patches, texts, args.temperature, args.form).float() + logit_bias(args.loss)
            return reference.contrastive_loss(logits, args.loss)

        return torch.compile(loss, fullgraph=True, dynamic=False) if compiled else loss

    makers = {f"fused {name}": functools.partial(fused, name) for name in args.backend}
    for name, description in PEERS.items():
        if args.form in description[2] and (args.peers == "all" or args.peers in name):
            makers[name] = functools.partial(peer, *description)
    return {name: make() for name, make in makers.items() if only in (None, name)}


def is_compiled(name: str) -> bool:
    return name in PEERS and PEERS[name][1]


def why_not(name: str, args) -> str | None:
    """Return why a provider cannot run, or None. Memory is estimated: running out of it may kill any process."""
    if name not in PEERS:
        try:
            backends.resolve(name.removeprefix("fused "), args.torch_device, args.torch_dtype)
        except ValueError as error:
            return str(error)
        return does_not_fit(3, args)
    _, compiled, at_peak = PEERS[name]
    patches, scores, pooled_patches = at_peak[args.form]
    if compiled and "1" in map(os.environ.get, ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")):
        return "torch.compile is disabled by an environment variable"
    if name in PACKAGES and args.torch_device.type != "cuda":
        return f"its kernels take CUDA tensors, not tensors on {args.torch_device.type}"
    if name in PACKAGES and find_spec(PACKAGES[name]) is None:
        return f"not installed; `pip install {name}`"
    return does_not_fit(3 + patches + scores * args.batch / args.dim + pooled_patches * args.batch / args.patches, args)


def does_not_fit(copies_of_patches: float, args) -> str | None:
    size = torch.empty((), dtype=args.torch_dtype).element_size() * args.batch * args.patches * args.dim
    needed, free = copies_of_patches * size, _free_bytes(args.torch_device)
    return f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free" if needed > 0.9 * free else None


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])
    except OSError:
        return math.inf


def products(inputs, clock, form):
    """Return a function that does a step's bare products into existing buffers: a lower bound without page faults.

    The max form needs only the product of its forward.
    """
    patches, texts = inputs[0].detach().flatten(0, 1), inputs[1].detach()
    blocks = patches.split(max(1, BLOCK[patches.device.type] // len(texts)))
    scores = patches.new_empty(len(blocks[0]), len(texts))
    grad_patches, grad_texts = torch.empty_like(blocks[0]), torch.empty_like(texts)

    def run() -> None:
        clock.start()
        for block in blocks:
            torch.mm(block, texts.T, out=scores[: len(block)])
        clock.mark()
        for block in blocks if form != "max" else ():
            w = torch.mm(block, texts.T, out=scores[: len(block)])
            torch.mm(w, texts, out=grad_patches[: len(block)])
            if inputs[1].requires_grad:
                torch.mm(w.T, block, out=grad_texts)
        clock.mark()

    return run
