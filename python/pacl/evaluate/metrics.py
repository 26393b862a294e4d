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


def class_scores(patches: Tensor, texts: Tensor) -> Tensor:
    """Cosine of every patch [B, N, D] with every class text [K, D]: [B, K, h, w] on the patches' square grid.

    Raw cosines, because they alone compare between classes: a softmax over patches is normalised per text.
    """
    side = round(patches.shape[1] ** 0.5)
    if side * side != patches.shape[1]:
        raise ValueError(f"patches: got {patches.shape[1]} patches, expected a square number")
    scores = F.normalize(texts, dim=-1) @ F.normalize(patches, dim=-1).transpose(1, 2)
    return scores.unflatten(2, (side, side))


def label_map(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Scores [B, K, h, w] enlarged bilinearly to `size` pixels, then the best class of each: int64 [B, H, W]."""
    return upsample_argmax(scores, size).long()


def patch_shares(masks: Tensor, classes: int | Sequence[int], grid: tuple[int, int]) -> Tensor:
    """The share of each patch that each class covers: float [B, K, h, w] from labels [B, H, W].

    classes: the labels to look for, or how many from 0. Any other label covers nothing. A pixel that lies in two
    patches counts for both.
    """
    labels = range(classes) if isinstance(classes, int) else classes
    return torch.stack([F.adaptive_avg_pool2d((masks == label).float(), grid) for label in labels], 1)


def patch_labels(shares: Tensor, ignore: int = IGNORE) -> Tensor:
    """The class that covers at least half of a patch, else `ignore`: int64 [B, h, w] from shares [B, K, h, w]."""
    share, label = shares.max(1)
    return label.masked_fill(share < HALF, ignore)


def patch_truth(labels: Tensor, grid: tuple[int, int]) -> Tensor:
    """The label that covers at least half of each patch, else IGNORED (-1): int64 [h, w] from labels [H, W].

    For data sets of many classes: only those that the image has are looked for.
    """
    present = [int(x) for x in labels.unique() if x != IGNORED]
    if not present:
        return torch.full(grid, IGNORED)
    found = patch_labels(patch_shares(labels[None], present, grid), ignore=len(present))[0]
    return torch.tensor([*present, IGNORED])[found]


class ScoreCounts:
    """How well scores on the patches' grid segment: their enlarged maps pixel by pixel, and patch by patch.

    `pixels` and `patches` are confusion matrices of all that was counted.
    """

    def __init__(self, classes: int):
        self.pixels, self.patches = ConfusionMatrix(classes), ConfusionMatrix(classes)

    def update(self, masks: Tensor, scores: Tensor) -> Tensor:
        """Count scores [B, K, h, w] of images with labels [B, H, W]; returns their label maps [B, H, W]."""
        labels = label_map(scores, masks.shape[1:]).cpu()
        self.pixels.update(masks, labels)
        truth = patch_labels(patch_shares(masks, scores.shape[1], scores.shape[2:]))
        self.patches.update(truth, scores.argmax(1).cpu())
        return labels


def add_hits(counts: Tensor, labels: Tensor, *hits: Tensor) -> None:
    """Add to counts [1 + n, K], in place: how many there are of each of `labels`, and how many that each hit marks."""
    for row, hit in zip(counts, (torch.ones_like(labels, dtype=torch.bool), *hits), strict=True):
        row += labels[hit].bincount(minlength=len(row))


class ConfusionMatrix:
    """Counts of (true, predicted) label pairs over any number of batches; exact, and K x K whatever the data's size."""

    def __init__(self, classes: int, ignore: int = IGNORE):
        self.counts = torch.zeros(classes, classes, dtype=torch.int64)
        self.ignore = ignore

    def update(self, truth: Tensor, predicted: Tensor) -> None:
        """Count label tensors of equal shape; where `truth` is `ignore` nothing counts. Other labels are below K."""
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
        """Add up the counts of every process of `group`, whose data are disjoint; None: this process alone."""
        if group is not None:
            counts = self.counts.to(group_device(group))
            dist.all_reduce(counts, group=group)
            self.counts = counts.cpu()

    def recall(self) -> Tensor:
        """Share of each class's pixels that was found, float64 [K]; NaN for a class that is not present."""
        return self.counts.diagonal().double() / self.counts.sum(1)

    def iou(self) -> Tensor:
        """Intersection over union per class, float64 [K]; NaN for a class neither present nor predicted."""
        hit = self.counts.diagonal().double()
        return hit / (self.counts.sum(0) + self.counts.sum(1) - hit)

    def miou(self, labels: Sequence[int] | None = None) -> float:
        """Mean IoU over `labels` (all classes unless given), as a fraction; classes with NaN are left out."""
        iou = self.iou()
        return float(iou[list(labels)].nanmean() if labels is not None else iou.nanmean())

    def accuracy(self, labels: Sequence[int] | None = None) -> float:
        """Share of correct predictions among the truths in `labels` (all unless given); NaN without any."""
        rows = list(labels) if labels is not None else list(range(len(self.counts)))
        return float(self.counts.diagonal()[rows].sum() / self.counts[rows].sum())


def chance_miou(truth: Tensor, scored: Sequence[int], competing: int) -> float:
    """The mIoU over classes `scored` of labels drawn evenly from `competing` ones, for pixel counts [K]; a fraction.

    With f the share of a class and q = 1 / competing, f q of the pixels are hits and f + q - f q are true or predicted.
    """
    share = (truth / truth.sum()).double()[list(scored)]
    hit = share / competing
    return float((hit / (share + 1 / competing - hit)).mean())


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
