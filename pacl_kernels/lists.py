"""Lists of texts `[B, M]`: each image is compared only with the texts in its list.

The loss over the listed pairs equals the loss over all pairs with a bias of -inf on the others. Its rows are the lists.
Its columns are the lists transposed: the entries are sorted by text, in the order of the images, and every sum over a
column runs in that order, so that no result depends on threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import pairs
from .checks import Scalar
from .contrastive import logits_of, total
from .pair_checks import check_ids
from .pairs import Lines, Pairs, Statistics


def without_repeats(index: Tensor) -> Tensor:
    """Return lists with -1 for an entry whose text is in the same list before it."""
    ordered, place = index.sort(dim=1, stable=True)
    repeats = torch.zeros_like(index, dtype=torch.bool)
    repeats[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return index.masked_fill(torch.zeros_like(repeats).scatter(1, place, repeats), -1)


def transposed(index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the entries of each text as places in the flattened lists, and int64 `[count + 1]`, the first of each.

    The entries of a text are in the order of the images. Those of no text come last.
    """
    texts, order = torch.where(index < 0, count, index).flatten().sort(stable=True)
    return order, torch.searchsorted(texts, torch.arange(count + 1, device=index.device))


def logits_and_targets(
    phi: Tensor, scale: Scalar, bias: Scalar | None, given: Pairs, index: Tensor
) -> tuple[Tensor, Tensor]:
    """Return new arrays of the logits, -inf where the list has no text, and of the targets.

    φ, targets and pair bias are `[B, M]`, ids are those of images `[B]` and texts `[K]`.
    """
    logits = logits_of(phi, scale, bias)
    if given.targets is not None:
        targets = given.targets
    else:
        assert given.image_ids is not None and given.text_ids is not None
        images = given.image_ids[:, None]
        targets = ((images == given.text_ids[index.clamp_min(0)]) & (images >= 0)).to(phi.dtype)
    out = index < 0
    if given.pair_bias is not None:
        logits = logits.add_(given.pair_bias)
        out = out | (given.pair_bias == float("-inf"))
    return logits.masked_fill_(out, float("-inf")), targets.masked_fill(out, 0.0)


def column_sums(logits: Tensor, targets: Tensor, index: Tensor, count: int) -> Lines:
    """Sum over the entries of each of `count` texts."""
    order, starts = transposed(index, count)
    texts = index.flatten()[order].clamp_min(0)
    logits, targets = logits.flatten()[order], targets.flatten()[order]

    def reduce(x: Tensor, reduction: str) -> Tensor:  # in float64, because it adds one number after the other
        return torch.segment_reduce(x.double(), reduction, offsets=starts, unsafe=True).to(x.dtype)

    largest = reduce(logits, "max")
    largest = largest.masked_fill(largest == float("-inf"), 0.0)
    shifted = logits - largest[texts]
    positive = torch.where(targets == 0, 0.0, targets * shifted)  # not 0 × -inf
    return Lines(largest, reduce(shifted.exp_(), "sum"), reduce(targets, "sum"), reduce(positive, "sum"))


def loss_forward(
    phi: Tensor, scale: Scalar, bias: Scalar | None, given: Pairs, index: Tensor, loss: str,
    value: Tensor, row_statistics: Tensor | None, column_statistics: Tensor | None,
) -> None:  # fmt: skip
    """Write the loss (0-D) of φ `[B, M]`, and for InfoNCE the statistics `[4, B]` and `[4, K]`."""
    logits, targets = logits_and_targets(phi, scale, bias, given, index)
    if loss == "sigmoid":
        value.copy_(pairs.sigmoid(logits, targets) / phi.shape[0])
        return
    assert row_statistics is not None and column_statistics is not None
    value.zero_()
    for lines, into in (
        (pairs.line_sums(logits, targets, 1), row_statistics),
        (column_sums(logits, targets, index, column_statistics.shape[1]), column_statistics),
    ):
        number = pairs.count(lines)
        value.add_(pairs.cross_entropy(lines).sum() / number.clamp_min(1) / 2)
        torch.stack(pairs.statistics(lines, number), out=into)


def loss_backward(
    phi: Tensor, scale: Scalar, bias: Scalar | None, given: Pairs, index: Tensor, loss: str,
    row_statistics: Tensor | None, column_statistics: Tensor | None, grad_loss: Tensor,
    grad_phi: Tensor, grad_scale: Tensor | None, grad_bias: Tensor | None, grad_pair_bias: Tensor | None,
) -> None:  # fmt: skip
    """Write ∂L/∂φ `[B, M]`, and the gradients whose buffers are given: of logit scale, logit bias and pair bias."""
    grad = logits_gradient(phi, scale, bias, given, index, loss, row_statistics, column_statistics)
    if loss == "sigmoid":
        grad.div_(phi.shape[0])
    grad.mul_(grad_loss)
    if grad_scale is not None:
        grad_scale.copy_(total(grad * phi))
    if grad_bias is not None:
        grad_bias.copy_(total(grad))
    if grad_pair_bias is not None:
        grad_pair_bias.copy_(grad)
    torch.mul(grad, scale, out=grad_phi)


def logits_gradient(
    phi: Tensor, scale: Scalar, bias: Scalar | None, given: Pairs, index: Tensor, loss: str,
    row_statistics: Tensor | None, column_statistics: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return the gradient of the logits `[B, M]`: of InfoNCE, or of B times the sigmoid loss."""
    logits, targets = logits_and_targets(phi, scale, bias, given, index)
    if loss == "sigmoid":
        grad = pairs.sigmoid_gradient(logits, targets)
    else:
        assert row_statistics is not None and column_statistics is not None
        columns = Statistics(*(x[index.clamp_min(0)] for x in column_statistics))
        grad = pairs.gradient(logits, targets, Statistics(*row_statistics), columns)
    return grad.masked_fill_(index < 0, 0.0)  # a column that is not finite has no say where it is not listed


def mine(phi: Tensor, m: int, image_ids: Tensor | None = None, text_ids: Tensor | None = None) -> Tensor:
    """Return lists of texts for `text_index`: of each image its positives first, then its hardest negatives.

    Positives are in the order of the texts, negatives in the order of falling φ, and equal ones in that of the texts.
    A pair with φ = -inf is in no list, so `phi.masked_fill(doubtful, -inf)` leaves out negatives that may be none.

    Args:
        phi: `[B, K]`, of any floating-point dtype, as `compatibility` returns it. No gradient flows through the choice.
        m: number of texts in a list, at least 1. Of more positives than that the first m are taken.
        image_ids: int64 or int32 `[B]`, as in `fused_pacl_loss`: by default `arange(B)`. A negative id equals none.
        text_ids: int64 or int32 `[K]`, by default those of the images, and K is then B.

    Returns:
        int64 `[B, m]`, with -1 where an image has fewer than m texts.

    Raises:
        TypeError, ValueError: for a bad argument; the message names it, what came and what was expected.
    """
    if not isinstance(phi, Tensor) or not phi.is_floating_point():
        came = phi.dtype if isinstance(phi, Tensor) else f"a {type(phi).__name__}"
        raise TypeError(f"phi is {came}, expected a floating-point tensor of shape [B, K]")
    if phi.ndim != 2:
        raise ValueError(f"phi has shape {list(phi.shape)}, expected [B, K]")
    if isinstance(m, bool) or not isinstance(m, int):
        raise TypeError(f"m is a {type(m).__name__}, expected an int")
    if m < 1:
        raise ValueError(f"m is {m}, expected at least 1")
    b, k = phi.shape
    image_ids = check_ids("image_ids", image_ids, b, "images", phi, "phi")
    text_ids = check_ids("text_ids", text_ids, k, "texts", phi, "phi")
    if text_ids is None and b != k:
        raise ValueError(f"phi has shape [{b}, {k}], expected as many texts as images, or text_ids [{k}]")
    image_ids = torch.arange(b, device=phi.device) if image_ids is None else image_ids
    text_ids = image_ids if text_ids is None else text_ids
    phi, out = phi.detach(), phi.detach() == float("-inf")
    positive = (image_ids[:, None] == text_ids) & (image_ids[:, None] >= 0)
    hardness = phi.masked_fill(positive & ~out, float("inf"))
    order = hardness.argsort(dim=1, descending=True, stable=True)[:, :m]
    order = order.masked_fill(out.gather(1, order), -1)
    return torch.nn.functional.pad(order, (0, m - order.shape[1]), value=-1)
