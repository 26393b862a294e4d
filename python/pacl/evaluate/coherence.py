"""Coherence of patches of one class, without any text: the measure, and `pacl evaluate coherence`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ..flags import parse
from ..processes import gather_rows, place_in
from ..segment.predict import Segmenter
from .metrics import HALF
from .patches import PatchOptions, labelled_patches
from .plots import curves, print_plot
from .segmentation_data import SegmentationData
from .specs import IGNORED

PAIRS = 2**16  # pairs of patches multiplied at a time


@dataclass(frozen=True)
class Coherence:
    """Cosines of pairs of patches.

    scores: float [M]. same: bool [M], true where both patches have one class.
    """

    scores: Tensor
    same: Tensor

    def curve(self) -> tuple[Tensor, Tensor]:
        """Return false and true positive rates, float64, rising from 0 to 1, with a point for each distinct score."""
        values, place = self.scores.unique(return_inverse=True)
        counts = torch.zeros(2, len(values), dtype=torch.int64)
        for row, chosen in zip(counts, (~self.same, self.same), strict=True):
            row += place[chosen].bincount(minlength=len(values))
        rates = counts.flip(1).cumsum(1).double() / counts.sum(1, keepdim=True)
        return tuple(F.pad(rates, (1, 0)))

    def roc(self, points: int = 101) -> dict[str, list[float]]:
        """Return the curve at evenly spaced false positive rates, as JSON values."""
        false, true = self.curve()
        at = torch.searchsorted(false, torch.linspace(0, 1, points, dtype=false.dtype), right=True) - 1
        return {"false_positive_rate": false[at].tolist(), "true_positive_rate": true[at].tolist()}

    def auc(self) -> float:
        """Return the probability that a pair of one class has a higher cosine than another pair; ties count half."""
        false, true = self.curve()
        return float(torch.trapezoid(true, false))


@torch.no_grad()
def coherence(
    data: SegmentationData,
    segmenter: Segmenter,
    *,
    patches: int = 20_000,
    pairs: int = 1_000_000,
    seed: int = 0,
    label: str = "coherence",
    group: dist.ProcessGroup | None = None,
) -> Coherence:
    """Compare the tokens of patches of one class with those of other patches, without any text.

    segmenter: stride 1 and no windows; its embeddings are compared, or the tokens if its embedder is an identity.
    patches: how many of the dataset's labelled patches to draw, evenly. pairs: how many of their pairs to draw, or all
    if there are no more. seed: seed of both draws. group: every process takes its share of the images, and all return
    the same. Background is not a class. Raises ValueError if pairs of either kind are missing, or for NaN. This is the
    paper's test of vision encoders.
    """
    keys, labels = torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.int64)
    kept: list[Tensor] = []
    for i, dense, truth, _ in labelled_patches(data, segmenter, label, group):
        keep = truth != IGNORED
        # The patches with the lowest random keys are an even sample, whatever their final number. The keys depend on
        # the image alone, not on the process that reads it.
        drawn = torch.from_numpy(np.random.default_rng([seed, i]).random(int(keep.sum())))
        kept, labels = [*kept, dense.patches.cpu()[keep]], torch.cat([labels, truth[keep]])
        keys = torch.cat([keys, drawn])
        if len(keys) > 2 * patches:
            keys, tokens, labels = _lowest(patches, keys, torch.cat(kept), labels)
            kept = [tokens]
    keys, tokens, labels = _lowest(patches, keys, torch.cat(kept) if kept else torch.empty(0, 0), labels)
    if group is not None:
        last = gather_rows(keys[:, None], group)[:, 0].sort().values[:patches][-1:]
        mine = (x[keys <= last] for x in (keys[:, None], tokens, labels[:, None]))
        keys, tokens, labels = (gather_rows(x, group) for x in mine)
        keys, tokens, labels = _lowest(patches, keys[:, 0], tokens, labels[:, 0])
    return compared(tokens, labels, pairs=pairs, seed=seed, name=data.spec.name)


def compared(tokens: Tensor, labels: Tensor, *, pairs: int, seed: int = 0, name: str = "data") -> Coherence:
    """Compare patches with each other.

    tokens: normalised, [M, width]. labels: int64 [M], without patches of no class. pairs, seed: as in `coherence`.
    name: that of the dataset, for the errors, which are those of `coherence`.
    """
    count, generator = len(tokens), torch.Generator().manual_seed(seed)
    if count * (count - 1) // 2 <= pairs:
        one, other = torch.triu_indices(count, count, 1)
    else:
        one = torch.randint(count, (pairs,), generator=generator)
        other = torch.randint(count - 1, (pairs,), generator=generator)
        other += other >= one
    same = labels[one] == labels[other]
    if same.all() or not same.any():
        raise ValueError(f"data: {count} patches of {name} make no pairs of one class and of two")
    parts = zip(one.split(PAIRS), other.split(PAIRS), strict=True)
    scores = torch.cat([(tokens[i] * tokens[j]).sum(1) for i, j in parts])
    if scores.isnan().any():
        raise ValueError("tokens: got NaN among their cosines")
    return Coherence(scores, same)


def _lowest(count: int, keys: Tensor, *rows: Tensor) -> list[Tensor]:
    """Return the `count` lowest keys in ascending order, and the rows that belong to them."""
    chosen = keys.argsort()[:count]
    return [x[chosen] for x in (keys, *rows)]


@dataclass(frozen=True, kw_only=True)
class CoherenceOptions(PatchOptions):
    """Measure whether patches of one class have more similar tokens than other patches: ROC and AUC of the vision
    tower's tokens and of the checkpoint's embeddings, without any text.
    """

    patches: int = 20_000
    """Number of patches drawn from the dataset."""
    pairs: int = 1_000_000
    """Number of pairs drawn from those patches."""
    seed: int = 0
    """Seed of the draws."""


def main(argv: Sequence[str], prog: str = "pacl evaluate coherence") -> int:
    """Run `pacl evaluate coherence` and return its exit status."""
    options = parse(CoherenceOptions, argv, prog)
    data, shown = options.read(), {}
    group = options.group()
    rank, (towers, embedder) = place_in(group)[0], options.load()
    for name, embed in {"vision": nn.Identity(), **({"embedder": embedder} if embedder else {})}.items():
        segmenter = Segmenter(towers, embed, short_side=options.short_side)
        sample = {x: getattr(options, x) for x in ("patches", "pairs", "seed")}
        found = coherence(data, segmenter, **sample, label=f"coherence {name}", group=group)
        if rank:
            continue
        rules = {"name": f"coherence {name}", "short_side": segmenter.short_side, "share": HALF, **sample}
        roc = found.roc()
        counts = {"pairs": len(found.same), "pairs_of_one_class": int(found.same.sum())}
        metrics = {"auc": found.auc()}
        path = options.write(
            "semantic_coherence", data.spec.name, rules, metrics, towers, **options.describe(data), **counts, roc=roc
        )
        shown[f"{name}, AUC {metrics['auc']:.3f}"] = (roc["false_positive_rate"], roc["true_positive_rate"])
    if rank:
        return 0
    print_plot(path.with_suffix(".png"), (6, 6), curves(shown, f"{data.spec.title}: pairs of patches"))
    print(options.next_command())
    return 0
