"""Argument checks that the public functions share, and the choices that they offer.

Each check raises TypeError or ValueError with one sentence that names the argument, what came and what was expected.
"""

from __future__ import annotations

import contextlib
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Form = Literal["dot", "cosine", "max"]
"""Formula of φ."""
Loss = Literal["infonce", "sigmoid"]
"""Loss over the logits."""
Exchange = Literal["auto", "gather", "ring"]
"""Way of the texts among processes."""
BackendName = Literal["auto", "cuda", "triton", "cpu", "torch", "reference"]
"""Name of a backend, or `"auto"`."""

Scalar = float | Tensor

FORMS: tuple[str, ...] = get_args(Form)
LOSSES: tuple[str, ...] = get_args(Loss)
EXCHANGES: tuple[str, ...] = get_args(Exchange)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_pair(patches: Tensor, texts: Tensor, patch_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Check patches `[B, N, D]`, texts `[K, D]` and the mask `[B, N]`.

    Return patches and texts, inside autocast in its dtype.
    """
    for name, value, layout in (("patches", patches, "[B, N, D]"), ("texts", texts, "[K, D]")):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}, expected a tensor of shape {layout}")
        if hasattr(value, "full_tensor"):
            raise TypeError(f"{name} is a DTensor, expected this process's own rows as a plain tensor (to_local())")
        check_dense(name, value)
        if value.dtype not in DTYPES:
            raise TypeError(f"{name} is {value.dtype}, expected float32, bfloat16, float16 or float64")
        if value.ndim != layout.count(",") + 1:
            hint = _layout_hint(patches, texts) if name == "patches" else ""
            raise ValueError(f"{name} has shape {list(value.shape)}, expected {layout}{hint}")
    if texts.device != patches.device:
        raise ValueError(f"texts is on {texts.device}, expected {patches.device} like patches")
    device = patches.device.type
    if autocasts(device) and torch.float64 not in (patches.dtype, texts.dtype):
        dtype = torch.get_autocast_dtype(device)
        patches, texts = patches.to(dtype), texts.to(dtype)
    if texts.dtype != patches.dtype:
        raise TypeError(f"texts is {texts.dtype}, expected {patches.dtype} like patches")
    if texts.shape[1] != patches.shape[2]:
        hint = _layout_hint(patches, texts)
        raise ValueError(f"texts has D = {texts.shape[1]}, expected {patches.shape[2]} like patches{hint}")
    if patch_mask is not None:
        if not isinstance(patch_mask, Tensor):
            raise TypeError(f"patch_mask is a {type(patch_mask).__name__}, expected a bool tensor of shape [B, N]")
        check_dense("patch_mask", patch_mask)
        if patch_mask.dtype != torch.bool:
            raise TypeError(f"patch_mask is {patch_mask.dtype}, expected torch.bool")
        if patch_mask.shape != patches.shape[:2]:
            raise ValueError(
                f"patch_mask has shape {list(patch_mask.shape)}, expected {list(patches.shape[:2])} like patches"
            )
        if patch_mask.device != patches.device:
            raise ValueError(f"patch_mask is on {patch_mask.device}, expected {patches.device} like patches")
    return patches, texts


def _layout_hint(patches: Tensor, texts: Any) -> str:
    """Say how to bring patches of another layout to `[B, N, D]`; empty where the texts' D does not tell."""
    d = texts.shape[1] if isinstance(texts, Tensor) and texts.ndim == 2 else None
    sizes = list(patches.shape)
    if len(sizes) == 3 and sizes[1] == d:
        return ": patches.transpose(1, 2) makes it of [B, D, N]"
    if len(sizes) == 4 and sizes[3] == d:
        return ": patches.flatten(1, 2) makes it of [B, h, w, D]"
    if len(sizes) == 4 and sizes[1] == d:
        return ": patches.flatten(2).transpose(1, 2) makes it of [B, D, h, w]"
    return ""


def autocasts(device: str) -> bool:
    """Return True inside autocast. "meta" has no autocast, and PyTorch raises an error when asked about it."""
    return device != "meta" and torch.is_autocast_enabled(device)


def without_autocast(device: str) -> contextlib.AbstractContextManager[object]:
    """Return a context in which autocast of the caller's region does not cast our own products once more."""
    return torch.autocast(device, enabled=False) if autocasts(device) else contextlib.nullcontext()


def check_not_empty(patches: Tensor, dimensions: str) -> None:
    """Raise ValueError if one of the named dimensions, a subset of "BND", is 0."""
    for name in dimensions:
        if patches.shape["BND".index(name)] == 0:
            raise ValueError(f"patches has shape {list(patches.shape)}, expected [B, N, D] with {name} of at least 1")


def check_dense(name: str, value: Tensor) -> None:
    if value.is_nested or value.layout != torch.strided:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name} is a {kind} tensor, expected a dense one")


def check_scalar(name: str, value: Any, like: Tensor, like_name: str = "patches", positive: bool = False) -> Scalar:
    """Return a tensor of one element unchanged, and a number as a float.

    The number must be finite in the dtype of the computation: float64 if `like` is float64, else float32. `positive`
    also excludes subnormal numbers, so that 1 / value is finite.
    """
    if isinstance(value, Tensor):
        # A parameter under FSDP. `full_tensor` requires the same gradient on every rank, which the loss provides.
        if hasattr(value, "full_tensor"):
            value = value.full_tensor()
        if not value.dtype.is_floating_point:
            raise TypeError(f"{name} is a {value.dtype} tensor, expected a floating-point one")
        if value.numel() != 1:
            raise ValueError(f"{name} has shape {list(value.shape)}, expected one element")
        if value.device != like.device:
            raise ValueError(f"{name} is on {value.device}, expected {like.device} like {like_name}")
        return value  # type: ignore[no-any-return]  # `full_tensor` is untyped
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a number or a tensor of one element")
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    limits = torch.finfo(wide)
    smallest, kind = (limits.tiny, "finite number above 0") if positive else (-limits.max, "finite number")
    number: Any = value  # the type stubs give Real no order
    if not smallest <= number <= limits.max:  # False for NaN
        dtype = str(wide).removeprefix("torch.")
        raise ValueError(
            f"{name} is {_shown(value)}, expected a {kind} that {dtype} holds ({smallest:.2g} to {limits.max:.2g})"
        )
    return float(value)


def _shown(value: Real) -> str:
    """Return a number as text; integers beyond float64 have more digits than Python prints."""
    try:
        float(value)
    except OverflowError:
        return "a number beyond float64"
    return str(value)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}")
