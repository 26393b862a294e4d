"""The texts of all processes, one block at a time, and what says which of their tokens are real.

Masks and lengths of all texts are gathered at once, a byte for each token or 8 bytes for each text; only the embeddings
travel in the ways of `function.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import Inputs
from ..packed import to_device
from . import collectives
from .collectives import Plan

Block = tuple[slice, Tensor]  # columns of the global batch and their texts


def with_all_layouts(inputs: Inputs, plan: Plan) -> Inputs:
    """Return the inputs with the mask or the lengths of the texts of all processes, padding included."""
    mask, lengths = inputs.text_mask, inputs.text_lengths
    if mask is not None:
        mask = F.pad(mask.to(torch.uint8), (0, 0, 0, plan.capacity - mask.shape[0]))
        mask = collectives.wait(collectives.all_gather(mask, plan.world, plan.group)).bool()
    if lengths is not None:
        lengths = to_device(F.pad(lengths, (0, plan.capacity - lengths.shape[0])), inputs.texts.device)
        lengths = collectives.wait(collectives.all_gather(lengths, plan.world, plan.group))
    return inputs._replace(text_mask=mask, text_lengths=lengths)


def of_block(inputs: Inputs, at: slice | Tensor, texts: Tensor) -> Inputs:
    """Return the inputs of φ with some of the texts; `inputs` are those that `with_all_layouts` returns."""
    mask, lengths = (None if x is None else x[at] for x in (inputs.text_mask, inputs.text_lengths))
    return inputs._replace(texts=texts, text_mask=mask, text_lengths=lengths)


def blocks_of(inputs: Inputs, gathered: Tensor, plan: Plan) -> Iterator[Block]:
    """Yield the gathered texts: all at once, or those of one process at a time if there is padding among the tokens."""
    if inputs.text_lengths is None:
        yield slice(0, gathered.shape[0]), gathered
        return
    for rank, texts in enumerate(gathered.split(plan.rows)):
        yield plan.columns(rank), texts
