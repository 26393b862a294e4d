"""Which captions of a step belong to which of its images.

The relation is given to the loss as ids, targets or a bias of each pair. With `--duplicates positive` it is targets
`[B, K]` and not ids: ids can say only that pairs fall into groups. If one image has the captions x and y, and others
x alone and y alone, then ids equal for all three would make the last two positives of each other, although they share
no caption.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..data.texts import choose_text
from ..processes import gather_rows, place_in


def pair_options(
    captions: Sequence[Sequence[str]],
    names: Sequence[str],
    duplicates: str,
    *,
    several: bool,
    group: dist.ProcessGroup | None,
    device: torch.device | str,
) -> dict[str, Tensor]:
    """Return the arguments of `fused_pacl_loss` that say which captions belong to which images of a step.

    captions: those of each of the B images of this process, at least one each, K in all. names: those of the images;
    two samples with the same name are the same image. duplicates: "positive", "ignore" or "negative": what a pair of an
    image and another one's caption is if that caption is also one of the image's own, or if both are the same image.
    several: False if every image has one caption; the result is then {} for "negative". group: processes that share the
    step, each with B images. device: that of the result.

    "positive" gives targets `[B, K of all processes]`. The others give ids of images `[B]` and texts `[K]`,
    "ignore" also a bias `[B, K of all processes]`, which is -inf for the duplicates.
    """
    if duplicates == "negative" and not several:
        return {}
    rank, _ = place_in(group)
    own_image = torch.arange(len(captions)).repeat_interleave(torch.tensor([len(each) for each in captions]))
    images, owners = rank * len(captions) + torch.arange(len(captions)), rank * len(captions) + own_image
    name_ids = torch.tensor([text_id(name) for name in names])
    texts = [torch.tensor([text_id(caption) for caption in each]) for each in captions]
    mine = torch.stack((torch.cat(texts), name_ids[own_image], owners), 1)
    images, owners, name_ids, mine = (x.to(device, non_blocking=True) for x in (images, owners, name_ids, mine))
    ids = {"image_ids": images, "text_ids": owners}
    if duplicates == "negative":
        return ids
    all_texts, all_names, all_owners = gather_rows(mine, group).unbind(1)
    same = name_ids[:, None] == all_names
    for column in pad_sequence(texts).to(device):  # padding is 0, which is no id
        same |= column[:, None] == all_texts
    own = images[:, None] == all_owners
    if duplicates == "positive":
        return {"targets": (same | own).float()}
    return ids | {"pair_bias": torch.zeros(same.shape, device=device).masked_fill(same & ~own, -torch.inf)}


def text_id(text: str) -> int:
    """Return a number from 1 to 2⁶³ - 1 by the text, the same in every process. Spaces around the text do not count."""
    digest = hashlib.blake2b(text.strip().encode(errors="surrogatepass"), digest_size=8).digest()
    return max(1, int.from_bytes(digest, "little") >> 1)


def places_of(captions: Sequence[Sequence[str]]) -> Tensor:
    """Return int64 `[B, N]`: the place of each image's captions in the list of all K, -1 where an image has fewer."""
    counts = [len(each) for each in captions]
    return pad_sequence(list(torch.arange(sum(counts)).split(counts)), batch_first=True, padding_value=-1)


def chosen_texts(
    captions: Sequence[Sequence[str]],
    keys: Sequence[str],
    *,
    seed: int,
    epoch: int,
    nouns: Callable[[str], list[str]],
) -> list[list[str]]:
    """Return the choice of choose_text for each caption of each image."""
    return [
        [
            choose_text(caption, f"{key} {place}" if place else key, seed=seed, epoch=epoch, nouns=nouns)
            for place, caption in enumerate(each)
        ]
        for each, key in zip(captions, keys, strict=True)
    ]
