"""Checks of the arguments that say which image belongs to which text, and their defaults."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import Inputs, check_dense
from .pairs import Pairs


def check_pairs(
    inputs: Inputs,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    targets: Tensor | None,
    pair_bias: Tensor | None,
    loss: str,
    in_group: bool,
    text_index: Tensor | None = None,
) -> Pairs | None:
    """Return the pairs of images and texts, or None for the default, where text i belongs to image i.

    With lists `text_index` `[B, M]`, targets and bias are `[B, M]` too, and the result is never None. In a group an id
    that is not given stays None: only the exchange of texts tells the number of an image in the whole batch. Raises
    TypeError or ValueError, with one sentence that names the argument, what came and what was expected.
    """
    patches, b, k = inputs.patches, inputs.images, inputs.text_count
    if targets is not None and (image_ids is not None or text_ids is not None):
        given = "image_ids" if image_ids is not None else "text_ids"
        raise ValueError(
            f"targets and {given} are both given, expected one of them: each says which pairs are positive"
        )
    if in_group and (image_ids is None) != (text_ids is None):
        given, missing = ("image_ids", "text_ids") if text_ids is None else ("text_ids", "image_ids")
        raise ValueError(f"{missing} is None, expected ids like {given}: with a group ids count in the whole batch")
    if text_ids is None and targets is None and b != k:
        raise ValueError(
            f"texts has {k} {'rows' if inputs.texts.ndim == 2 and inputs.text_lengths is None else 'texts'}, expected "
            f"one for each of the {b} images of patches, or text_ids or targets, which say what belongs together"
        )
    if k == 0:
        raise ValueError(f"texts has shape {list(inputs.texts.shape)}, expected [K, D] with K of at least 1")
    if all(x is None for x in (image_ids, text_ids, targets, pair_bias, text_index)):
        return None
    image_ids = check_ids("image_ids", image_ids, b, "images", patches)
    text_ids = check_ids("text_ids", text_ids, k, "texts", patches)
    if targets is None and not in_group:
        if image_ids is None:
            image_ids = torch.arange(b, device=patches.device)
        if text_ids is None:
            text_ids = image_ids
    columns = text_index.shape[1] if text_index is not None else None if in_group else k
    _matrix("targets", targets, b, columns, patches)
    _matrix("pair_bias", pair_bias, b, columns, patches)
    if targets is not None and targets.requires_grad:
        raise ValueError("targets requires a gradient, expected constants (targets.detach())")
    if targets is not None and _readable(targets):
        highest, expected = (1.0, "in [0, 1]") if loss == "sigmoid" else (torch.finfo(targets.dtype).max, "at least 0")
        if not ((targets >= 0) & (targets <= highest)).all():  # False for NaN
            raise ValueError(f"targets has {_offender(targets, highest)}, expected finite numbers {expected}")
    if pair_bias is not None and _readable(pair_bias) and not (pair_bias < float("inf")).all():
        raise ValueError("pair_bias has inf or NaN, expected finite numbers, or -inf to take a pair out")
    return Pairs(image_ids, text_ids, targets, pair_bias)


def check_text_index(text_index: Tensor | None, inputs: Inputs, count: int | None) -> Tensor | None:
    """Return lists of some of `count` texts as int64 with -1 for none, or None without lists.

    `count` is None with a group, where only the exchange of texts tells their number.

    Raises TypeError or ValueError like `check_pairs`. An index beyond the texts is an error on a CPU outside of
    `torch.compile`, elsewhere it counts as -1.
    """
    if text_index is None:
        return None
    b = inputs.images
    if not isinstance(text_index, Tensor):
        raise TypeError(f"text_index is a {type(text_index).__name__}, expected an int64 tensor of shape [{b}, M]")
    _check_integers("text_index", text_index, inputs.patches, "patches")
    if text_index.ndim != 2 or text_index.shape[0] != b or text_index.shape[1] == 0:
        raise ValueError(f"text_index has shape {list(text_index.shape)}, expected [{b}, M] with M of at least 1")
    index = text_index.long()
    wrong = (index < -1) | (index >= (torch.iinfo(torch.int64).max if count is None else count))
    if _readable(index) and wrong.any():
        of = "texts of all processes" if count is None else f"{count} texts"
        raise ValueError(
            f"text_index has {int(index[wrong][0])}, expected the number of one of the {of}, or -1 for none"
        )
    return index.masked_fill(wrong, -1)


def check_ids(name: str, ids: Any, count: int, what: str, like: Tensor, like_name: str = "patches") -> Tensor | None:
    """Return ids as int64 `[count]`, or None if there are none."""
    if ids is None:
        return None
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} is a {type(ids).__name__}, expected an int64 tensor of shape [{count}]")
    _check_integers(name, ids, like, like_name)
    if ids.ndim != 1 or ids.shape[0] != count:
        raise ValueError(f"{name} has shape {list(ids.shape)}, expected [{count}], one id for each of the {what}")
    return ids.long()


def _check_integers(name: str, value: Tensor, like: Tensor, like_name: str) -> None:
    check_dense(name, value)
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} is {value.dtype}, expected torch.int64 or torch.int32")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, expected {like.device} like {like_name}")


def _matrix(name: str, value: Any, rows: int, columns: int | None, patches: Tensor) -> None:
    if value is None:
        return
    shape = f"[{rows}, {columns if columns is not None else 'K of all processes'}]"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a tensor of shape {shape}")
    check_dense(name, value)
    wide = torch.float64 if patches.dtype == torch.float64 else torch.float32
    if value.dtype != wide:
        raise TypeError(f"{name} is {value.dtype}, expected {wide} for patches of {patches.dtype}")
    if value.ndim != 2 or value.shape[0] != rows or columns is not None and value.shape[1] != columns:
        raise ValueError(f"{name} has shape {list(value.shape)}, expected {shape}")
    if value.device != patches.device:
        raise ValueError(f"{name} is on {value.device}, expected {patches.device} like patches")


def _readable(x: Tensor) -> bool:
    """Return True if reading the values neither waits for a device nor breaks a trace."""
    return (
        x.device.type == "cpu" and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
    )


def _offender(targets: Tensor, highest: float) -> float:
    return float(targets[~((targets >= 0) & (targets <= highest))][0])
