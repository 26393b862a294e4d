"""The way of texts around the ring of processes."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..checks import Inputs
from . import collectives
from .collectives import Plan, padded

Blocks = list[tuple[slice, Tensor]]  # columns and their texts, one block in memory at a time
RING_BYTES = 2 * 2**30  # size of the four float32 arrays `[B_local, texts]` of a block


def send_round(inputs: Inputs, plan: Plan, visit: Callable[[Blocks], None]) -> None:
    """Call `visit` with the texts of each process, its own first; the next texts travel meanwhile."""
    texts = padded(inputs.texts, plan)
    size = max(1, RING_BYTES // (16 * inputs.images))
    size -= size % 128 if size > 128 else 0
    for step in range(plan.world):
        coming = collectives.hop(texts, plan) if step + 1 < plan.world else None
        first = plan.columns((plan.rank - step) % plan.world).start
        if inputs.text_lengths is None:
            blocks = zip(range(first, first + texts.shape[0], size), texts.split(size), strict=True)
            visit([(slice(at, at + x.shape[0]), x) for at, x in blocks])
        else:  # packed tokens: only the lengths tell where a text begins
            visit([(slice(first, first + plan.capacity), texts)])
        texts = texts if coming is None else collectives.wait(coming)
