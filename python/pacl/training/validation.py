"""Measures of a run on held-out data: retrieval among pairs, and segmentation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from pacl_kernels import compatibility
from pacl_kernels.checks import BackendName

from ..data.samples import BadData, Samples, loader, no_image
from ..evaluate.metrics import IGNORE, Retrieval, ScoreCounts, class_scores
from ..processes import place_in
from ..resolution import find_fit, images_of
from ..segment.prompts import best_synonym, read_classes
from ..towers import Towers
from .config import TrainConfig
from .model import Trainable

SEGMENTED = 32  # images that are segmented at a time


class Validation:
    """The held-out data of a run. Every process reads its share and gets the result of all.

    towers: those of the run, on `device`. group: the processes of the run; None for one alone. amp: use bfloat16
    autocast, as training does.
    """

    def __init__(
        self,
        config: TrainConfig,
        towers: Towers,
        device: torch.device,
        group: dist.ProcessGroup | None,
        amp: bool,
    ):
        self.config, self.towers, self.device, self.group, self.amp = config, towers, device, group, amp
        self.rank, self.world = place_in(group)
        # All captions of the images of all processes, and the image of each; read by the first validation.
        self.captions: list[str] = []
        self.owners: list[int] = []
        self.texts: Tensor | None = None
        self.pairs: Samples | None = None
        self.labelled: Samples | None = None
        if config.val_data:
            self.pairs = self._open(config.val_data, towers.transform)
        if config.val_segmentation and config.val_classes:
            whole = towers.transform if towers.variable else _Squashed(towers.transform)
            self.labelled = self._open(config.val_segmentation, whole, masks=True)
            self.classes = read_classes(config.val_classes, "val_classes")

    def __bool__(self) -> bool:
        return self.pairs is not None or self.labelled is not None

    @torch.no_grad()
    def __call__(self, model: Trainable) -> dict[str, float]:
        """Return measures of `model` as fractions, and the loss. The random numbers of the training do not change."""
        values: dict[str, float] = {}
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            if self.pairs is not None:
                values |= self._retrieval(model, self.pairs)
            if self.labelled is not None:
                values |= self._segmentation(model, self.labelled)
        return values

    def _open(self, data: str, transform: Callable[[Image.Image], Tensor], masks: bool = False) -> Samples:
        # --dataset-type is the type of the pairs; a csv, for example, has no masks.
        kind = {"kind": "auto"} if masks else {}
        return self.config.open(data, transform=transform, masks=masks, rank=self.rank, world=self.world, **kind)

    def _read(self, data: Samples, batch_size: int) -> Iterator[dict[str, Any]]:
        workers = min(self.config.workers, data.most_workers)
        try:
            yield from loader(data, batch_size, workers=workers)
        except BadData as error:  # replaced, because a worker's message holds its traceback
            name = "val_segmentation" if data is self.labelled else "val_data"
            raise ValueError(f"{name}: {data.complaint()}") from error

    # Retrieval

    def _retrieval(self, model: Trainable, pairs: Samples) -> dict[str, float]:
        """Encode every image once and score it against all texts, with one block in memory at a time."""
        config = self.config
        if not self.captions:
            self._read_captions(pairs)
        if self.texts is None or model.text is not None:  # the embeddings of a frozen tower stay the same
            blocks = range(0, len(self.captions), config.batch_size)
            parts = [self.captions[i : i + config.batch_size] for i in blocks]
            self.texts = torch.cat([model.texts_of(part, self.towers) for part in parts])
        scale = model.log_scale.exp().item()
        bias = None if model.bias is None else model.bias.item()
        result = Retrieval(self.captions, scale, bias, self.device, self.owners)
        at, text = self.first
        for batch in self._read(pairs.with_options(captions="all"), config.batch_size):
            patches, lengths = model.patches_of(images_of(batch), self.towers)
            temperature = config.attn_temperature if model.log_temperature is None else model.log_temperature.exp()
            phi = compatibility(
                patches,
                self.texts.to(patches.dtype),
                patch_lengths=lengths,
                attn_temperature=temperature,
                form=config.form,
                backend=cast(BackendName, config.backend),  # the loss checks it
            )
            found = [caption for captions in batch["captions"] for caption in captions]
            if found != self.captions[text : text + len(found)]:
                raise ValueError("val_data: got other samples than at the first validation, expected the same ones")
            result.update(phi, at)
            at, text = at + len(phi), text + len(found)
        return result.values(self.group)

    def _read_captions(self, pairs: Samples) -> None:
        """Read all captions, without pixels, because an image is scored against the texts that come after it, too.

        The batches are those of the images: with several workers their size decides the order.
        """
        texts = pairs.with_options(captions="all", transform=no_image)
        mine = [captions for batch in self._read(texts, self.config.batch_size) for captions in batch["captions"]]
        shares: list[Any] = [mine]
        if self.group is not None:
            shares = [None] * self.world
            dist.all_gather_object(shares, mine, group=self.group)
        images = [captions for share in shares for captions in share]
        self.captions = [caption for captions in images for caption in captions]
        self.owners = [i for i, captions in enumerate(images) for _ in captions]
        image = sum(len(share) for share in shares[: self.rank])
        self.first = image, sum(len(captions) for captions in images[:image])  # this process's image and caption

    # Segmentation

    def _segmentation(self, model: Trainable, labelled: Samples) -> dict[str, float]:
        words, synonyms = sum(self.classes, []), [len(each) for each in self.classes]
        texts = model.texts_of(words, self.towers).float()
        counts = ScoreCounts(len(self.classes))
        samples = iter(self._read(labelled, 1))  # one by one, because masks differ in size
        while part := list(itertools.islice(samples, SEGMENTED)):
            for score, sample in zip(self._scores(model, part, texts, synonyms), part, strict=True):
                mask = sample["mask"]
                wrong = mask[(mask >= len(self.classes)) & (mask != IGNORE)]
                if len(wrong):
                    raise ValueError(
                        f"val_segmentation: {sample['key'][0]} has label {int(wrong[0])}, expected {IGNORE} or 0 to "
                        f"{len(self.classes) - 1}, for the {len(self.classes)} lines of --val-classes"
                    )
                counts.update(mask, score)
        for matrix in (counts.pixels, counts.patches):
            matrix.all_reduce(self.group)
        return {"mIoU": counts.pixels.miou(), "patch_accuracy": counts.patches.accuracy()}

    def _scores(
        self, model: Trainable, samples: list[dict[str, Any]], texts: Tensor, synonyms: list[int]
    ) -> Sequence[Tensor]:
        """Return class scores [1, K, h, w] of each of some images."""
        images = [sample["image"][0] for sample in samples]
        patches, lengths = model.patches_of(images if self.towers.variable else torch.stack(images), self.towers)
        with torch.autocast(patches.device.type, enabled=False):
            fit = find_fit(self.towers.transform)
            if fit is None or lengths is None:
                return best_synonym(class_scores(patches.float(), texts), synonyms, 1).split(1)
            grids = [(image.shape[1] // fit.patch[0], image.shape[2] // fit.patch[1]) for image in images]
            each = zip(patches.float().split(lengths.tolist()), grids, strict=True)
            return [best_synonym(class_scores(rows[None], texts, grid), synonyms, 1) for rows, grid in each]


class _Squashed:
    """Squeeze an image to the tower's size before `transform`, whose crop would leave the rest without a label."""

    def __init__(self, transform: Callable[[Image.Image], Tensor]):
        self.transform = transform
        height, width = transform(Image.new("RGB", (8, 8))).shape[-2:]
        self.size = width, height

    def __call__(self, image: Image.Image) -> Tensor:
        return self.transform(image.resize(self.size, Image.Resampling.BICUBIC))
