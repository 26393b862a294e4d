"""`grad_tolerance`: the pairs that a backward may leave out, because they carry next to none of the gradient.

With g = ∂L/∂φ, every gradient of the loss is a sum over the pairs, Σ g ∂φ/∂x. Without a set D of pairs its error is at
most Σ_D |g| · max ‖∂φ/∂x‖. D holds the pairs whose |g| is below one threshold θ, the largest for which

    Σ_D |g| <= tolerance · Σ |g|,

as far as a histogram shows it. Its bins are 2^(1/32) wide, so the two sums are known to 2.2 percent, and both are
rounded to the safe side. Counts are integers, so θ does not depend on the number of threads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

_SHIFT = 18  # the bits of a float32 without these last ones are the number of its bin, 32 bins for each power of two
_BINS = 1 << 31 - _SHIFT
_BLOCK = 1 << 20  # pairs that are looked at together


class KeptPairs(NamedTuple):
    """Pairs that a backward with `grad_tolerance` has used.

    Attributes:
        kept: number of pairs.
        pairs: number of all pairs, B · K.
        dropped_mass: upper bound of the share of Σ |∂L/∂φ| that was left out, at most `grad_tolerance`. 0 if the
            backward took all pairs, because too few could be left out to gain time.
    """

    kept: int
    pairs: int
    dropped_mass: float

    @property
    def share(self) -> float:
        """The share of pairs kept, in [0, 1]."""
        return self.kept / self.pairs if self.pairs else 1.0


class Lists(NamedTuple):
    """Pairs of images `[B]` and texts, by image.

    Attributes:
        starts: int64 `[B + 1]`; image b has the entries `starts[b]` to `starts[b + 1] - 1` of `texts`.
        texts: int32 `[ΣM]`.
        places: int64 `[ΣM]`, the pair's place in flattened values: of all pairs `[B, K]`, or of `text_index` `[B, M]`.
    """

    starts: Tensor
    texts: Tensor
    places: Tensor


def threshold(grad_phi: Tensor, tolerance: float) -> tuple[float, int, float]:
    """Return θ, the number of pairs with |g| >= θ, and an upper bound of the others' share of Σ |g|.

    `grad_phi`: float32, contiguous. θ is 0 where nothing may be left out, as with a NaN or an infinity.
    """
    counts = torch.zeros(_BINS, dtype=torch.int64, device=grad_phi.device)
    for part in grad_phi.view(-1).split(_BLOCK):
        counts += torch.bincount(part.abs().view(torch.int32).bitwise_right_shift_(_SHIFT), minlength=_BINS)
    counts = counts.cpu()
    edges = torch.arange(_BINS + 1, dtype=torch.int64).bitwise_left_shift_(_SHIFT).int().view(torch.float32).double()
    infinite = int(edges.isfinite().sum()) - 1  # the first bin with infinities and NaN
    if bool(counts[infinite:].any()):
        return 0.0, grad_phi.numel(), 0.0
    counts, edges = counts[:infinite], edges[: infinite + 1]
    total = float((counts * edges[:-1]).sum())  # at most Σ |g|
    dropped = (counts * edges[1:]).cumsum(0)  # at least that of the pairs up to each bin
    bins = int((dropped <= tolerance * total).sum()) if total else 0
    if not bins:
        return 0.0, grad_phi.numel(), 0.0
    return float(edges[bins]), grad_phi.numel() - int(counts[:bins].sum()), float(dropped[bins - 1]) / total


def lists_of(text_index: Tensor) -> Lists:
    """Return the lists without the entries that are no text. `text_index`: int64 `[B, M]`, -1 for none."""
    listed = text_index >= 0
    places = listed.view(-1).nonzero().squeeze(1)
    return Lists(_starts(listed.sum(1)), text_index.reshape(-1)[places].int(), places)


def lists_from(grad_phi: Tensor, least: float) -> Lists:
    """Return the pairs of `grad_phi` `[B, K]` with |g| >= `least`."""
    columns = grad_phi.shape[1]
    parts, sizes = [], []
    for rows in grad_phi.split(max(1, _BLOCK // columns)):
        kept = rows.abs() >= least
        sizes.append(kept.sum(1))
        parts.append(kept.view(-1).nonzero().squeeze(1))
    offset = 0
    for part, size in zip(parts, sizes, strict=True):
        part += offset
        offset += len(size) * columns
    places = torch.cat(parts)
    return Lists(_starts(torch.cat(sizes)), (places % columns).int(), places)


def _starts(sizes: Tensor) -> Tensor:
    starts = torch.zeros(len(sizes) + 1, dtype=torch.int64, device=sizes.device)
    torch.cumsum(sizes, 0, out=starts[1:])
    return starts


def added(one: Tensor | None, other: Tensor) -> Tensor:
    """Return the record of two parts of a backward from theirs, float64 `[3]` each like `KeptPairs`."""
    if one is None:
        return other
    return torch.stack((one[0] + other[0], one[1] + other[1], torch.maximum(one[2], other[2])))


def kept_pairs(loss: Tensor) -> KeptPairs | None:
    """Return what the backward of `loss` has used of the pairs, or None before a backward and without `grad_tolerance`.

    `loss`: the tensor that `fused_pacl_loss` returned, or one computed from it, after its backward. With a group the
    pairs are those of this process, with the padding of uneven batches. Nothing is recorded inside `torch.compile`, and
    for the sigmoid loss with a group.
    """
    seen: set[Any] = set()
    todo = [loss.grad_fn]
    while todo:
        node: Any = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        kept = getattr(node, "kept_pairs", None)
        if isinstance(kept, Tensor):
            count, pairs, mass = kept.tolist()
            return KeptPairs(int(count), int(pairs), mass)
        todo += [other for other, _ in node.next_functions]
    return None
