"""Recalls of image-text retrieval from blocks of scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ..processes import group_device

RECALLS = (1, 5, 10)


class Retrieval:
    """Recalls and loss from blocks of φ; keeps a dozen numbers for each text, whatever the number of images.

    captions: of all T texts; the one of a pair is found by its image, or the image by it, and where two images have the
    same caption, either is right for the other and neither is counted against it. owners: the image of each text, from
    0; default: text i is image i's. Of an image with several texts the best one counts. Another caption (or image) that
    ties with the pair, or is NaN, counts as better than the pair: an embedder that gives everything the same score has
    recall 0. scale, bias: of the logits; a bias means the sigmoid loss, and none InfoNCE, both with all pairs as one
    batch; scale None: no loss, which images with several texts do not have.
    """

    def __init__(
        self,
        captions: Sequence[str],
        scale: float | None,
        bias: float | None,
        device: torch.device,
        owners: Sequence[int] | None = None,
    ):
        known: dict[str, int] = {}
        labels = [known.setdefault(caption, len(known)) for caption in captions]
        self.labels, self.distinct = torch.tensor(labels, device=device), len(known)
        self.owners = torch.as_tensor(range(len(captions)) if owners is None else owners, device=device)
        self.scale, self.bias = scale, bias
        best = max(RECALLS)
        # For each text: the best of the other images, what its column sums to, and its own image.
        self.columns = torch.full((len(captions), best + 2), -torch.inf, device=device)
        self.hits, self.loss, self.images = [0] * len(RECALLS), 0.0, 0

    def update(self, phi: Tensor, at: int) -> None:
        """Rows [b, T] of φ, images `at` and following against all texts."""
        phi, best = phi.float(), max(RECALLS)
        texts = ((self.owners >= at) & (self.owners < at + len(phi))).nonzero()[:, 0]
        rows = self.owners[texts] - at
        pair = phi[rows, texts]
        right = torch.zeros(len(phi), self.distinct, dtype=torch.bool, device=phi.device)
        right[rows, self.labels[texts]] = True
        others = phi.masked_fill(right[:, self.labels], -torch.inf)
        own = phi.new_full((len(phi),), -torch.inf).scatter_reduce(0, rows, pair, "amax")
        worse = (~(others < own[:, None])).sum(1)
        for i, k in enumerate(RECALLS):
            self.hits[i] += int((worse < k).sum())
        self.columns[:, :best] = torch.cat([self.columns[:, :best], others.T], 1).topk(best).values
        self.columns[texts, -1] = pair
        self.images += len(phi)
        if self.scale is None:
            return
        logits = self.scale * phi if self.bias is None else self.scale * phi + self.bias
        if self.bias is None:
            self.columns[:, -2] = torch.logaddexp(self.columns[:, -2], logits.logsumexp(0))
            self.loss += (logits.logsumexp(1) - logits[rows, texts]).double().sum().item() / 2
        else:
            sign = torch.full_like(logits, -1.0)
            sign[rows, texts] = 1.0
            self.loss -= F.logsigmoid(sign * logits).double().sum().item()

    def values(self, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """Recalls as fractions and `clip_val_loss`; of the images of all processes of a group."""
        columns, best = self.columns[None], max(RECALLS)
        counts = torch.tensor([*self.hits, self.images, self.loss], dtype=torch.float64, device=columns.device)
        if group is not None:
            mine, counts = (x.to(group_device(group)) for x in (self.columns, counts))
            columns = mine.new_empty(group.size(), *mine.shape)
            dist.all_gather(list(columns), mine, group=group)
            dist.all_reduce(counts, group=group)
        *hits, images, loss = counts.tolist()
        pair = columns[..., -1].amax(0)
        top = columns[..., :best].transpose(0, 1).flatten(1).topk(best).values
        found = {f"image_to_text_R@{k}": hit / images for k, hit in zip(RECALLS, hits, strict=True)}
        for k in RECALLS:
            found[f"text_to_image_R@{k}"] = (top[:, k - 1] < pair).double().mean().item()
        if self.scale is None:
            return found
        if self.bias is None:
            logits = self.scale * pair
            loss += (columns[..., -2].logsumexp(0) - logits).double().sum().item() / 2
        return found | {"clip_val_loss": loss / images}
