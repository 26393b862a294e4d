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
) -> Pairs | None:
    """Return the pairs of images and texts, or None for the default, where text i belongs to image i.

    In a group an id that is not given stays None: only the exchange of texts tells the number of an image in the whole
    batch. Raises TypeError or ValueError, with one sentence that names the argument, what came and what was expected.
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
    if all(x is None for x in (image_ids, text_ids, targets, pair_bias)):
        return None
    image_ids = _ids("image_ids", image_ids, b, "images", patches)
    text_ids = _ids("text_ids", text_ids, k, "texts", patches)
    if targets is None and not in_group:
        if image_ids is None:
            image_ids = torch.arange(b, device=patches.device)
        if text_ids is None:
            text_ids = image_ids
    columns = None if in_group else k
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


def _ids(name: str, ids: Any, count: int, what: str, patches: Tensor) -> Tensor | None:
    if ids is None:
        return None
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} is a {type(ids).__name__}, expected an int64 tensor of shape [{count}]")
    check_dense(name, ids)
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} is {ids.dtype}, expected torch.int64 or torch.int32")
    if ids.ndim != 1 or ids.shape[0] != count:
        raise ValueError(f"{name} has shape {list(ids.shape)}, expected [{count}], one id for each of the {what}")
    if ids.device != patches.device:
        raise ValueError(f"{name} is on {ids.device}, expected {patches.device} like patches")
    return ids.long()


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
