"""Compute scores and label maps of an image for classes given by words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torchvision.transforms as transforms
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor

from pacl_kernels import upsample_argmax

from ..data.images import to_rgb
from ..dense import dense_tokens, patch_size, token_step
from ..readings import normalisation, pools_by_attention
from ..resolution import find_fit
from ..towers import Towers
from .prompts import TEMPLATES, Texts, best_synonym, class_texts

LONG_SIDE = 2048  # largest side of the resized image, as in mmsegmentation's usual Resize((2048, short_side))
WINDOWS = 8  # windows in a batch of the tower
BAND = 2**24  # most class scores in memory at a time: 64 MiB


@dataclass(frozen=True)
class Labels:
    """Maps of an image, `[H, W]` each.

    Attributes:
        labels: int16.
        best: cosine of the best class, float32.
        entropy: entropy of the softmax over the classes in nats, float32, if the rule for background needs it.
    """

    labels: Tensor
    best: Tensor
    entropy: Tensor | None = None


@dataclass(frozen=True)
class Dense:
    """An image's patch embeddings, computed once for any number of words.

    Attributes:
        patches: float32 `[h, w, D]`; normalised, or the mean over windows of normalised embeddings, whose product with
            a text is the mean of the windows' cosines.
        size: H and W of the image.
        margins: fractions of its height and width outside the grid of cells, at each end: the tokens' centres begin and
            end half a patch inside the image.
    """

    patches: Tensor
    size: tuple[int, int]
    margins: tuple[float, float] = (0.0, 0.0)

    def scores(self, texts: Texts) -> Tensor:
        """Return raw cosines `[K, h, w]`; a class with synonyms gets its best one's."""
        return best_synonym(self.patches @ texts.embeddings.T, texts.synonyms).permute(2, 0, 1)

    def summary(self, texts: Texts) -> tuple[Tensor, Tensor]:
        """Return the highest and the mean cosine of each class over the tokens, `[K]` each, a band at a time."""
        size = max(1, BAND // (len(texts.embeddings) * self.patches.shape[1]))
        highest: Any = -math.inf
        total: Any = 0.0
        for rows in self.patches.split(size):
            scores = Dense(rows, self.size).scores(texts).flatten(1)
            highest, total = scores.amax(1).clamp(min=highest), total + scores.sum(1)
        return highest, total / self.patches[..., 0].numel()

    def labels(
        self, texts: Texts, *, threshold: float | None = None, entropy: float | None = None, logit_scale: float = 100.0
    ) -> Labels:
        """Return the best class of every pixel, from scores enlarged bilinearly.

        Args:
            texts: the classes, as `Segmenter.texts` returns them.
            threshold: a pixel is background if its best cosine is lower.
            entropy: a pixel is background if its softmax over the classes has a higher entropy, in nats (1.5 in the
                paper, which does not give the scale).
            logit_scale: factor of the cosines in that softmax.

        Returns:
            The maps. Labels are 0 to K - 1; with a rule for background, 0 is background and the classes are 1 to K.
        """
        height, width = (side - 2 * pad for side, pad in zip(self.size, self._pads, strict=True))
        parts = [
            _argmax(scores, (rows, width), None if entropy is None else logit_scale)
            for scores, rows in self._bands(texts, height)
        ]
        labels, best, *more = (_extend(torch.cat(x), self._pads) for x in zip(*parts, strict=True))
        if threshold is not None or entropy is not None:
            labels = labels + 1
            if threshold is not None:
                labels[best < threshold] = 0
            if entropy is not None:
                labels[more[0] > entropy] = 0
        return Labels(labels, best, *more)

    def enlarged(self, scores: Tensor) -> Tensor:
        """Enlarge scores `[K, h, w]` to the image's resolution `[K, H, W]`, as `labels` does; for a few words."""
        inner = [side - 2 * pad for side, pad in zip(self.size, self._pads, strict=True)]
        return _extend(F.interpolate(scores[None], inner, mode="bilinear", align_corners=False)[0], self._pads)

    @property
    def _pads(self) -> list[int]:
        """Margins in pixels of the image."""
        return [min(round(x * side), (side - 1) // 2) for x, side in zip(self.margins, self.size, strict=True)]

    def _bands(self, texts: Texts, height: int) -> Iterator[tuple[Tensor, int]]:
        """Yield class scores and the number of pixel rows that they make, from top to bottom.

        The scores are those of all tokens, [K, h, w]; if these exceed BAND, they come in parts [K, rows, w], already
        interpolated to rows of pixels.
        """
        rows = len(self.patches)
        if len(texts.embeddings) * self.patches[..., 0].numel() <= BAND:
            yield self.scores(texts), height
            return
        # Sampling positions of F.interpolate, clamped to the first and the last row.
        places = ((torch.arange(height) + 0.5) * (rows / height) - 0.5).clamp(0, rows - 1).to(self.patches.device)
        above = places.long().clamp(max=max(0, rows - 2))
        share = (places - above).float()
        size = max(1, BAND // (len(texts.embeddings) * self.patches.shape[1]))
        for start in range(0, height, size):
            top, part = above[start : start + size], share[start : start + size, None]
            first, last = int(top[0]), min(int(top[-1]) + 2, rows)
            scores = Dense(self.patches[first:last], self.size).scores(texts)
            below = (top - first + 1).clamp(max=last - first - 1)
            yield torch.lerp(scores[:, top - first], scores[:, below], part), len(top)


class Segmenter:
    """Score images for words: `Segmenter(*load_pacl(folder))`, or `Segmenter(load_towers(...))` for plain CLIP.

    Args:
        towers: vision and text tower.
        embedder: maps patch tokens to the text embeddings' space; None takes the model's own projection, which must
            then work on single patches.
        stride: tokens per patch along each side, a divisor of the patch; 4 with patches of 16 pixels is the paper's
            stride of 4.
        short_side: pixels of the resized image's shorter side (default: the tower's, or for towers with `max_patches`
            at most so many patches of the image); sides are rounded to whole patches, the longer one to at most 2,048.
        window: side in pixels of the squares that the tower sees, clipped to the image, a multiple of the patch
            (default: the whole image).
        window_stride: pixels between the windows, a multiple of the token step (default: half a window); the last of a
            row ends with the image.

    Raises:
        ValueError: for a size or stride that does not fit the tower, or for a tower without a projection of patches.
    """

    def __init__(
        self,
        towers: Towers,
        embedder: nn.Module | None = None,
        *,
        stride: int = 1,
        short_side: int | None = None,
        window: int | None = None,
        window_stride: int | None = None,
    ):
        self.towers, self.embed = towers, embedder or own_projection(towers.visual)
        self.patch, self.step = patch_size(towers.visual), token_step(towers.visual, stride)
        self.stride = stride
        self.fit = None if short_side else find_fit(towers.transform)
        self.short_side = short_side or min(towers.transform(Image.new("RGB", (64, 64))).shape[1:])
        if window_stride is not None and window is None:
            raise ValueError(f"window_stride: got {window_stride} without a window, expected a window with it")
        if window is not None and window_stride is None:
            window_stride = max(self.step, window // 2 // self.step * self.step)
        self.window, self.window_stride = window, window_stride
        for name, value, unit in (
            ("short_side", self.short_side, 1),
            ("window", window, self.patch),
            ("window_stride", window_stride, self.step),
        ):
            if value is not None and (value < 1 or value % unit):
                expected = f"a positive multiple of {unit}" if unit > 1 else "a positive number of pixels"
                raise ValueError(f"{name}: got {value}, expected {expected}")
        if window is not None and window_stride is not None and window_stride > window - self.patch + self.step:
            most = window - self.patch + self.step
            raise ValueError(
                f"window_stride: got {window_stride}, expected at most {most}, so that windows cover every token"
            )
        self.normalise = transforms.Normalize(*normalisation(towers.transform))

    @torch.no_grad()
    def dense(self, image: Image.Image) -> Dense:
        """Return the patch embeddings of a PIL image of any mode and size."""
        picture = self._resized(image)
        sides = picture.shape[1:]
        window = [min(self.window or side, side) for side in sides]
        corners = [(y, x) for y in self._offsets(sides[0], window[0]) for x in self._offsets(sides[1], window[1])]
        grid = [(side - self.patch) // self.step + 1 for side in sides]
        total: Any = None
        count = torch.zeros(*grid, 1, device=picture.device)
        for start in range(0, len(corners), WINDOWS):
            part = corners[start : start + WINDOWS]
            crops = torch.stack([picture[:, y : y + window[0], x : x + window[1]] for y, x in part])
            tokens = dense_tokens(self.towers.visual, crops, self.stride, self.towers.reader)
            embedded = F.normalize(self.embed(tokens).float(), dim=-1)
            if total is None:
                total = embedded.new_zeros(*grid, embedded.shape[3])
            for (y, x), one in zip(part, embedded, strict=True):
                place = (slice(y // self.step, y // self.step + len(one)), slice(x // self.step, None))
                total[place][:, : one.shape[1]] += one
                count[place][:, : one.shape[1]] += 1
        margin = (self.patch - self.step) / 2
        return Dense(total / count, (image.height, image.width), (margin / sides[0], margin / sides[1]))

    def texts(self, classes: Sequence[str], templates: Sequence[str] = TEMPLATES["simple"]) -> Texts:
        """Embed classes, each "name" or "name, synonym, ...", to use for many images.

        Args:
            classes: one line for each class; the best of its synonyms counts.
            templates: sentences with {} for the word, over which the embedding of a word is the mean.

        Returns:
            The embeddings of all words.

        Raises:
            ValueError: for no classes, and for a class without a name.
        """
        return class_texts(self.towers, classes, templates)

    def scores(self, image: Image.Image, classes: Texts | Sequence[str]) -> Tensor:
        """Return raw cosines `[K, h, w]` on the grid of tokens."""
        return self.dense(image).scores(classes if isinstance(classes, Texts) else self.texts(classes))

    def labels(self, image: Image.Image, classes: Texts | Sequence[str], **rule: Any) -> Tensor:
        """Return the label map, int16 `[H, W]`, at the image's size; `rule` has the options of `Dense.labels`."""
        texts = classes if isinstance(classes, Texts) else self.texts(classes)
        return self.dense(image).labels(texts, **rule).labels

    def _resized(self, image: Image.Image) -> Tensor:
        """Return the image normalised, [3, H, W] on the tower's device; each side is at least one whole patch."""
        scale = min(self.short_side / min(image.size), LONG_SIDE / max(image.size))
        width, height = (max(self.patch, round(x * scale / self.patch) * self.patch) for x in image.size)
        if self.fit is not None:
            height, width = self.fit.size(image)
        picture = to_rgb(image).resize((width, height), Image.Resampling.BICUBIC)
        weight = next(self.towers.visual.parameters())
        return self.normalise(pil_to_tensor(picture).float() / 255).to(weight.device, weight.dtype)

    def _offsets(self, side: int, window: int) -> list[int]:
        """Return where windows begin; the last one ends with the side. All are multiples of the step, as sides are."""
        if window == side or self.window_stride is None:
            return [0]
        steps = math.ceil((side - window) / self.window_stride)
        return [min(i * self.window_stride, side - window) for i in range(steps + 1)]


def similarity_map(
    image: Image.Image, words: Sequence[str], towers: Towers, embedder: nn.Module | None = None, **settings: Any
) -> Tensor:
    """Return raw cosines of an image's patches with words.

    Args:
        image: a PIL image of any mode and size.
        words: K words, each "name" or "name, synonym, ...".
        towers: vision and text tower.
        embedder: as in `Segmenter`.
        **settings: the other arguments of `Segmenter`.

    Returns:
        Cosines, float32 `[K, h, w]`, on the grid of tokens.
    """
    return Segmenter(towers, embedder, **settings).scores(image, words)


def own_projection(visual: nn.Module) -> nn.Module:
    """Return an open_clip tower's projection as a module for single tokens.

    A head that pools by attention with a latent query (SigLIP, PE) is applied to each token alone, where its attention
    has one key and is 1. Raises ValueError if the tower pools in another way than this, a mean or one token.
    """
    if isinstance(visual, VisionTransformer) and visual.proj is not None and visual.attn_pool is None:
        return _Projection(visual.proj)
    if isinstance(visual, TimmModel) and getattr(visual.trunk, "attn_pool", None) is None:
        if "pool" not in dict(visual.head.named_children()):
            return visual.head if len(visual.head) else visual.trunk.get_classifier()
    if pools_by_attention(visual) and isinstance(visual.get_submodule("trunk.fc_norm"), nn.Identity):
        return _PooledAlone(visual)
    raise ValueError(
        f"embedder: got none, and {type(visual).__name__} has no projection of single patches; "
        "expected the embedder of a checkpoint"
    )


class _PooledAlone(nn.Module):
    """The head of a tower that pools by attention, for each token alone."""

    def __init__(self, visual: Any):
        super().__init__()
        self.pool, self.classify, self.project = visual.trunk.attn_pool, visual.trunk.get_classifier(), visual.head

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.project(self.classify(self.pool(tokens.flatten(0, -2)[:, None])))
        return rows.unflatten(0, tokens.shape[:-1])


class _Projection(nn.Module):
    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = weight

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens @ self.weight


def _argmax(scores: Tensor, size: tuple[int, int], logit_scale: float | None) -> tuple[Tensor, ...]:
    """Enlarge scores [K, h, w]; return labels (int16), best scores and, with a logit_scale, entropies, [H, W] each."""
    options: dict[str, Any] = {} if logit_scale is None else {"return_entropy": True, "logit_scale": logit_scale}
    return tuple(x[0] for x in upsample_argmax(scores[None], size, return_best=True, **options))


def _extend(x: Tensor, pads: Sequence[int]) -> Tensor:
    """Pad [H, W] or [K, H, W] by `pads` pixels, repeating the edge: scores are constant beyond the tokens' centres."""
    y, z = (
        torch.arange(-pad, side + pad, device=x.device).clamp(0, side - 1)
        for side, pad in zip(x.shape[-2:], pads, strict=True)
    )
    return x[..., y, :][..., z]
