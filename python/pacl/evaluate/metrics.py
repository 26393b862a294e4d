"""Measures of segmentation, of single patches and of retrieval, streamed batch by batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pacl_kernels import upsample_argmax

from ..processes import group_device
from .specs import IGNORED

IGNORE = 255  # the label of pixels that do not count
HALF = 0.5  # share of a patch that its class must cover
RECALLS = (1, 5, 10)


def class_scores(patches: Tensor, texts: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
    """Return the cosine of every patch [B, N, D] with every class text [K, D]: [B, K, h, w] on the patch grid.

    grid: h and w, by default those of a square.

    The cosines are raw, because only they compare between classes: a softmax over patches is normalised per text.
    Raises ValueError if N is not a square number.
    """
    side = round(patches.shape[1] ** 0.5)
    if grid is None and side * side != patches.shape[1]:
        raise ValueError(f"patches: got {patches.shape[1]} patches, expected a square number")
    scores = F.normalize(texts, dim=-1) @ F.normalize(patches, dim=-1).transpose(1, 2)
    return scores.unflatten(2, grid or (side, side))


def label_map(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarge scores [B, K, h, w] bilinearly to `size` pixels and return each pixel's best class: int64 [B, H, W]."""
    return upsample_argmax(scores, size).long()


def patch_shares(masks: Tensor, classes: int | Sequence[int], grid: tuple[int, int]) -> Tensor:
    """Return the share of each patch that each class covers: float [B, K, h, w] from labels [B, H, W].

    classes: the labels to look for, or their number from 0; other labels cover nothing. A pixel that lies in two
    patches counts for both.
    """
    labels = range(classes) if isinstance(classes, int) else classes
    return torch.stack([F.adaptive_avg_pool2d((masks == label).float(), grid) for label in labels], 1)


def patch_labels(shares: Tensor, ignore: int = IGNORE) -> Tensor:
    """Return the class that covers at least half of a patch, else `ignore`: int64 [B, h, w] of shares [B, K, h, w]."""
    share, label = shares.max(1)
    return label.masked_fill(share < HALF, ignore)


def patch_truth(labels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the label that covers at least half of each patch, else IGNORED (-1): int64 [h, w] from labels [H, W].

    Suits datasets of many classes, because it looks only for those present in the image.
    """
    present = [int(x) for x in labels.unique() if x != IGNORED]
    if not present:
        return torch.full(grid, IGNORED)
    found = patch_labels(patch_shares(labels[None], present, grid), ignore=len(present))[0]
    return torch.tensor([*present, IGNORED])[found]


class ScoreCounts:
    """Counts of how well scores on the patch grid segment, pixel by pixel on enlarged maps, and patch by patch.

    `pixels` and `patches` are the confusion matrices.
    """

    def __init__(self, classes: int):
        self.pixels, self.patches = ConfusionMatrix(classes), ConfusionMatrix(classes)

    def update(self, masks: Tensor, scores: Tensor) -> Tensor:
        """Count scores [B, K, h, w] of images with labels [B, H, W]; return the predicted label maps [B, H, W]."""
        labels = label_map(scores, (masks.shape[1], masks.shape[2])).cpu()
        self.pixels.update(masks, labels)
        truth = patch_labels(patch_shares(masks, scores.shape[1], (scores.shape[2], scores.shape[3])))
        self.patches.update(truth, scores.argmax(1).cpu())
        return labels


def add_hits(counts: Tensor, labels: Tensor, *hits: Tensor) -> None:
    """Add to counts [1 + n, K], in place: the number of each of `labels`, and the number that each hit marks."""
    for row, hit in zip(counts, (torch.ones_like(labels, dtype=torch.bool), *hits), strict=True):
        row += labels[hit].bincount(minlength=len(row))


class ConfusionMatrix:
    """Exact counts of (true, predicted) label pairs over any number of batches, int64 [K, K]."""

    def __init__(self, classes: int, ignore: int = IGNORE):
        self.counts = torch.zeros(classes, classes, dtype=torch.int64)
        self.ignore = ignore

    def update(self, truth: Tensor, predicted: Tensor) -> None:
        """Count label tensors of equal shape, except where `truth` is `ignore`; raises ValueError beyond K - 1."""
        classes = len(self.counts)
        keep = truth != self.ignore
        truth, predicted = truth[keep].long(), predicted[keep].long()
        for name, labels in (("truth", truth), ("predicted", predicted)):
            if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
                bad = int(labels.min()) if labels.min() < 0 else int(labels.max())
                raise ValueError(f"{name}: got label {bad}, expected 0 to {classes - 1} or {self.ignore}")
        pairs = torch.bincount(classes * truth + predicted, minlength=classes**2)
        self.counts += pairs.reshape(classes, classes)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Add up the counts of every process of `group`, whose data are disjoint; do nothing for None."""
        if group is not None:
            counts = self.counts.to(group_device(group))
            dist.all_reduce(counts, group=group)
            self.counts = counts.cpu()

    def recall(self) -> Tensor:
        """Return the share of each class's pixels predicted correctly, float64 [K]; NaN for an absent class."""
        return self.counts.diagonal().double() / self.counts.sum(1)

    def iou(self) -> Tensor:
        """Return the intersection over union per class, float64 [K]; NaN for a class neither present nor predicted."""
        hit = self.counts.diagonal().double()
        return hit / (self.counts.sum(0) + self.counts.sum(1) - hit)

    def miou(self, labels: Sequence[int] | None = None) -> float:
        """Return the mean IoU over `labels` (default: all), as a fraction; classes with NaN do not count."""
        iou = self.iou()
        return float(iou[list(labels)].nanmean() if labels is not None else iou.nanmean())

    def accuracy(self, labels: Sequence[int] | None = None) -> float:
        """Return the share of correct predictions among truths in `labels` (default: all); NaN if there are none."""
        rows = list(labels) if labels is not None else list(range(len(self.counts)))
        return float(self.counts.diagonal()[rows].sum() / self.counts[rows].sum())


def chance_miou(truth: Tensor, scored: Sequence[int], competing: int) -> float:
    """Return the mIoU over classes `scored`, as a fraction, if labels are drawn evenly from `competing` ones.

    truth: pixel counts [K]. With f the share of a class and q = 1 / competing, f q of the pixels are hits and
    f + q - f q are true or predicted.
    """
    share = (truth / truth.sum()).double()[list(scored)]
    hit = share / competing
    return float((hit / (share + 1 / competing - hit)).mean())


class Retrieval:
    """Recalls and loss from blocks of φ; keeps a dozen numbers for each text, whatever the number of images.

    captions: those of all T texts. If two images have the same caption, either text is right for both images and never
    counts as a competitor. owners: the image of each text, from 0 (default: text i belongs to image i); of an image
    with several texts, which are adjacent, the best one counts. Another caption (or image) that ties with the pair, or
    is NaN, counts as better than the pair, so that an embedder with equal scores everywhere has recall 0. scale, bias:
    those of the logits. With a bias the loss is the sigmoid loss, without one InfoNCE, both over all images with their
    first texts as one batch. scale None: no loss.
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
        starts = torch.ones_like(self.owners, dtype=torch.bool)
        starts[1:] = self.owners[1:] != self.owners[:-1]
        self.first = starts.nonzero()[:, 0]  # the first text of each image
        self.scale, self.bias = scale, bias
        best = max(RECALLS)
        # Scores of each text: those of its best other images, the log-sum-exp of its column, and that of its own image.
        self.columns = torch.full((len(captions), best + 2), -torch.inf, device=device)
        self.hits, self.loss, self.images = [0] * len(RECALLS), 0.0, 0

    def update(self, phi: Tensor, at: int) -> None:
        """Add rows [b, T] of φ: images `at` and following against all texts."""
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
        phi, rows = phi[:, self.first], torch.arange(len(phi), device=phi.device)
        logits = self.scale * phi if self.bias is None else self.scale * phi + self.bias
        if self.bias is None:
            sums = self.columns[self.first, -2]
            self.columns[self.first, -2] = torch.logaddexp(sums, logits.logsumexp(0))
            self.loss += (logits.logsumexp(1) - logits[rows, at + rows]).double().sum().item() / 2
        else:
            sign = torch.full_like(logits, -1.0)
            sign[rows, at + rows] = 1.0
            self.loss -= F.logsigmoid(sign * logits).double().sum().item()

    def values(self, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """Return recalls as fractions and `clip_val_loss`, over the images of all processes of a group."""
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
            logits = self.scale * pair[self.first]
            loss += (columns[:, self.first, -2].logsumexp(0) - logits).double().sum().item() / 2
        return found | {"clip_val_loss": loss / images}
