"""Argument checks that the public functions share, and the choices that they offer.

Each check raises TypeError or ValueError with one sentence that names the argument, what came and what was expected.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from numbers import Real
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

Form = Literal["dot", "cosine", "max"]
"""Formula of φ."""
Loss = Literal["infonce", "sigmoid"]
"""Loss over the logits."""
TextPool = Literal["mean", "sum", "max", "logsumexp"]
"""Way from the scores of a text's tokens to the score of the text."""
Normalize = Literal["both", "values", "none"]
"""Rows that are divided by their norm."""
Exchange = Literal["auto", "gather", "ring"]
"""Way of the texts among processes."""
BackendName = Literal["auto", "cuda", "triton", "cpu", "torch", "reference"]
"""Name of a backend, or `"auto"`."""

Scalar = float | Tensor

FORMS: tuple[str, ...] = get_args(Form)
LOSSES: tuple[str, ...] = get_args(Loss)
TEXT_POOLS: tuple[str, ...] = get_args(TextPool)
NORMALIZE: tuple[str, ...] = get_args(Normalize)
EXCHANGES: tuple[str, ...] = get_args(Exchange)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Inputs(NamedTuple):
    """Inputs of φ `[B, K]`, checked.

    Patches are `[B, N, D]` with a mask `[B, N]` or None, or packed: `[ΣN, D]` with lengths `[B]` and a mask `[ΣN]`.
    Texts are `[K, D]`; with many tokens they are `[K, L, D]` with a mask `[K, L]` or None, or packed: `[ΣL, D]` with
    lengths `[K]`. Lengths are int64 on the CPU.
    """

    patches: Tensor
    texts: Tensor
    patch_mask: Tensor | None
    attn_temperature: Scalar
    patch_lengths: Tensor | None = None
    text_mask: Tensor | None = None
    text_lengths: Tensor | None = None

    @property
    def images(self) -> int:
        """B, the number of images."""
        return (self.patches if self.patch_lengths is None else self.patch_lengths).shape[0]

    @property
    def text_count(self) -> int:
        """K, the number of texts."""
        return (self.texts if self.text_lengths is None else self.text_lengths).shape[0]

    @property
    def tokens(self) -> int:
        """Number of tokens of all texts, padding included; a text `[K, D]` is one token."""
        return self.texts.shape[0] * (self.texts.shape[1] if self.texts.ndim == 3 else 1)


def check_inputs(
    patches: Tensor,
    texts: Tensor,
    attn_temperature: float | Tensor,
    patch_mask: Tensor | None,
    patch_lengths: Sequence[int] | Tensor | None,
    text_mask: Tensor | None,
    text_lengths: Sequence[int] | Tensor | None,
    text_pool: str | None,
) -> Inputs:
    """Check the inputs of φ and return them; inside autocast, patches and texts are cast to its dtype."""
    packed = patch_lengths is not None
    _check_text_layout(text_mask, text_lengths, text_pool)
    texts_layout = "[K, D]" if text_pool is None else "[K, L, D]" if text_lengths is None else "[ΣL, D]"
    for name, value, layout in (
        ("patches", patches, "[ΣN, D]" if packed else "[B, N, D]"),
        ("texts", texts, texts_layout),
    ):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}, expected a tensor of shape {layout}")
        if hasattr(value, "full_tensor"):
            raise TypeError(f"{name} is a DTensor, expected this process's own rows as a plain tensor (to_local())")
        check_dense(name, value)
        if value.dtype not in DTYPES:
            raise TypeError(f"{name} is {value.dtype}, expected float32, bfloat16, float16 or float64")
        if value.ndim != layout.count(",") + 1:
            hint = _layout_hint(patches, texts, packed) if name == "patches" else _texts_hint(value, text_pool)
            raise ValueError(f"{name} has shape {list(value.shape)}, expected {layout}{hint}")
    if texts.device != patches.device:
        raise ValueError(f"texts is on {texts.device}, expected {patches.device} like patches")
    device = patches.device.type
    if autocasts(device) and torch.float64 not in (patches.dtype, texts.dtype):
        dtype = torch.get_autocast_dtype(device)
        patches, texts = patches.to(dtype), texts.to(dtype)
    if texts.dtype != patches.dtype:
        raise TypeError(f"texts is {texts.dtype}, expected {patches.dtype} like patches")
    if texts.shape[-1] != patches.shape[-1]:
        hint = _layout_hint(patches, texts, packed)
        raise ValueError(f"texts has D = {texts.shape[-1]}, expected {patches.shape[-1]} like patches{hint}")
    if patch_mask is not None:
        _check_mask("patch_mask", patch_mask, patches, "[ΣN]" if packed else "[B, N]", "patches")
    if text_mask is not None:
        _check_mask("text_mask", text_mask, texts, "[K, L]", "texts")
    if patch_lengths is not None:
        patch_lengths = _check_lengths("patch_lengths", patch_lengths, "patches", patches.shape[0])
    if text_lengths is not None:
        text_lengths = _check_lengths("text_lengths", text_lengths, "texts", texts.shape[0])
    attn_temperature = check_scalar("attn_temperature", attn_temperature, patches, positive=True)
    return Inputs(patches, texts, patch_mask, attn_temperature, patch_lengths, text_mask, text_lengths)


def _check_mask(name: str, mask: Any, like: Tensor, layout: str, like_name: str) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} is a {type(mask).__name__}, expected a bool tensor of shape {layout}")
    check_dense(name, mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} is {mask.dtype}, expected torch.bool")
    if mask.shape != like.shape[:-1]:
        raise ValueError(f"{name} has shape {list(mask.shape)}, expected {list(like.shape[:-1])} like {like_name}")
    if mask.device != like.device:
        raise ValueError(f"{name} is on {mask.device}, expected {like.device} like {like_name}")


def _check_text_layout(text_mask: Any, text_lengths: Any, text_pool: str | None) -> None:
    if text_pool is not None:
        check_choice("text_pool", text_pool, TEXT_POOLS)
        if text_mask is not None and text_lengths is not None:
            raise ValueError(
                "text_mask and text_lengths are both given, expected one of them: a mask with texts [K, L, D], or "
                "lengths with texts [ΣL, D]"
            )
        return
    for name, value in (("text_mask", text_mask), ("text_lengths", text_lengths)):
        if value is not None:
            raise ValueError(
                f"{name} is given and text_pool is None, expected one of {', '.join(map(repr, TEXT_POOLS))}, which "
                "says how the tokens of a text become one score"
            )


def _check_lengths(name: str, lengths: Any, of: str, rows: int) -> Tensor:
    """Return lengths as an int64 tensor on the CPU."""
    if isinstance(lengths, Tensor):
        if lengths.device.type != "cpu":
            raise ValueError(
                f"{name} is on {lengths.device}, expected a list or a tensor on the CPU: the number of rows decides "
                "what is launched, and reading it from the device would make the host wait"
            )
        if lengths.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name} is {lengths.dtype}, expected torch.int64")
        if lengths.ndim != 1:
            raise ValueError(f"{name} has shape {list(lengths.shape)}, expected one length for each item, [n]")
        lengths = lengths.detach().long()
    elif isinstance(lengths, list | tuple):
        for length in lengths:
            if isinstance(length, bool) or not isinstance(length, int):
                raise TypeError(f"{name} has a {type(length).__name__}, expected integers")
        lengths = torch.tensor(lengths, dtype=torch.int64, device="cpu")
    else:
        raise TypeError(f"{name} is a {type(lengths).__name__}, expected a list of integers or an int64 tensor")
    if not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():
        check_sum(name, lengths, of, rows)
    return lengths  # type: ignore[no-any-return]


def check_sum(name: str, lengths: Tensor, of: str, rows: int) -> None:
    """Raise ValueError unless the lengths, int64 on the CPU, are those of `rows` packed rows."""
    if lengths.numel() and int(lengths.min()) < 0:
        raise ValueError(f"{name} has {int(lengths.min())}, expected lengths of at least 0")
    if int(lengths.sum()) != rows:
        raise ValueError(f"{name} add up to {int(lengths.sum())}, expected {rows}, the number of rows of {of}")


def _texts_hint(texts: Tensor, text_pool: str | None) -> str:
    if texts.ndim == 3 and text_pool is None:
        return ", or text_pool, which says how the tokens of a text become one score"
    if texts.ndim == 2 and text_pool is not None:
        return ", or text_lengths, which say how many rows each text has"
    return ""


def _layout_hint(patches: Tensor, texts: Any, packed: bool) -> str:
    """Say how to bring patches of another layout to `[B, N, D]`; empty where the texts' D does not tell."""
    if packed:
        return ""
    d = texts.shape[-1] if isinstance(texts, Tensor) and texts.ndim in (2, 3) else None
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


def check_not_empty(inputs: Inputs, dimensions: str) -> None:
    """Raise ValueError if one of the named dimensions of the patches, a subset of "BND", is 0."""
    shape = inputs.patches.shape
    if inputs.patch_lengths is not None:  # an image may be empty
        if "B" in dimensions and inputs.images == 0:
            raise ValueError("patch_lengths is empty, expected the length of at least one image")
        if shape[1] == 0:
            raise ValueError(f"patches has shape {list(shape)}, expected [ΣN, D] with D of at least 1")
        return
    for name in dimensions:
        if shape["BND".index(name)] == 0:
            raise ValueError(f"patches has shape {list(shape)}, expected [B, N, D] with {name} of at least 1")


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
