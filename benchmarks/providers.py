"""Providers to compare: the fused loss, its peers (`peers.py`), and the bare matrix products."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path

import peers
import torch
from peers import LOGIT_SCALE, PEERS, Peer, logit_bias
from torch.nn import functional as F

from pacl_kernels import backends, fused_pacl_loss, reference

PRODUCTS = "matrix products"
# Number of scores that the bare products write at a time. On a CPU they stay in its cache. On a GPU smaller products
# are slower: with 4096 texts a unit took 6.0 ms on an H200 with 2²⁴ scores and 5.1 ms with 2²⁸.
BLOCK = {"cpu": 2**24, "cuda": 2**28}


def losses(args, only: str | None = None) -> dict[str, Callable]:
    """Return loss(patches, texts) by name. `only` selects one, because torch.compile takes 5 s to load.

    All are the same loss except the floors.
    """

    def fused(backend):
        return lambda patches, texts: fused_pacl_loss(
            patches, texts, LOGIT_SCALE, attn_temperature=args.temperature, form=args.form, loss=args.loss,
            logit_bias=logit_bias(args.loss), backend=backend,
        )  # fmt: skip

    def of(peer: Peer):
        def loss(patches, texts):
            if peer.kind == "floor":
                return peer.function(F.normalize(patches.mean(1), dim=-1), texts, args.loss)
            logits = LOGIT_SCALE * peer.function(patches, texts, args.temperature, args.form).float()
            return reference.contrastive_loss(logits + logit_bias(args.loss), args.loss)

        return torch.compile(loss, fullgraph=True, dynamic=False, mode=peer.mode) if peer.mode else loss

    makers = {f"fused {name}": functools.partial(fused, name) for name in args.backend}
    makers |= {name: functools.partial(of, peer) for name, peer in peers.chosen(args).items()}
    return {name: make() for name, make in makers.items() if only in (None, name)}


def why_not(name: str, args) -> str | None:
    """Return why a provider cannot run, or None. Memory is estimated: running out of it may kill any process."""
    if name not in PEERS:
        try:
            backends.resolve(name.removeprefix("fused "), args.torch_device, args.torch_dtype)
        except ValueError as error:
            return str(error)
        return does_not_fit(3, args)
    patches, scores, pooled_patches = PEERS[name].peak[args.form]
    copies = 3 + patches + scores * args.batch / args.dim + pooled_patches * args.batch / args.patches
    return peers.why_not(name, args) or does_not_fit(copies, args)


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
