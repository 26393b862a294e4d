"""Backend `cpu`: passes addresses, sizes and strides to the native module in C++."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import native, tolerance
from ..checks import Scalar
from ..constants import RUNNING_MAX_BELOW
from ..packed import starts_of
from ..pairs import Pairs
from ..tolerance import KeptPairs, Lists, lists_of
from . import null_patch as null
from . import raw_texts

_native: Any = native.native()  # None: built without a C++ compiler, or for another Python
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_SMALLEST = torch.finfo(torch.float32).tiny


@functools.cache
def _openmp_addresses() -> tuple[int, int, int]:
    """Return the addresses of three functions of PyTorch's OpenMP runtime; zeros if it cannot be found.

    The native module starts its parallel regions with them: torch's workers spin for milliseconds after each operator
    and would compete with threads of another runtime for the cores.
    """
    library = next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"), None)
    names = (
        "GOMP_parallel",
        "omp_get_thread_num",
        "omp_get_num_threads",
    )  # LLVM's and Intel's runtimes have GNU's names too
    try:
        # Search this library's own dependencies, because a process may hold several OpenMP runtimes.
        handle = ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        start, thread, threads = (ctypes.cast(getattr(handle, name), ctypes.c_void_p).value or 0 for name in names)
        return start, thread, threads
    except (OSError, AttributeError):
        return (0, 0, 0)


_forked = False


def _openmp() -> tuple[int, int, int]:
    """Return the addresses, or zeros in a forked process: it has no workers, and waiting for them would hang."""
    return (0, 0, 0) if _forked else _openmp_addresses()


def _set_forked() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_set_forked)


def why_not(device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
    if _native is None:
        missing = native.why_not()
        return f"the native module is not built ({missing}); install a C++ compiler, then run `pip install .` again"
    if device is not None and device.type != "cpu":
        return f"it takes tensors on the CPU, not on {device.type}"
    if dtype is not None and dtype not in _DTYPES:
        return f"it takes float32, bfloat16 and float16, not {dtype}"
    return None


def compatibility_forward(
    patches: Tensor, texts: Tensor, patch_mask: Tensor | None, temperature: Scalar, form: str,
    phi: Tensor, state: Tensor, scores: Tensor | None = None, *, patch_lengths: Tensor | None = None,
    null_patch: bool = False, normalize: str = "both", text_index: Tensor | None = None,
    scores_texts: tuple[int, int] = (0, 0),
) -> None:  # fmt: skip
    starts, raw = _patch_starts(patch_lengths), normalize == "none"
    params = _params(patches, texts, patch_mask, temperature, form, starts, phi, state, raw)
    if scores is not None:
        params.set(**_kept(scores), scores_texts=scores_texts[0], scores_first_text=scores_texts[1])
    if text_index is None:
        _run(_native.compatibility_forward(params))
    else:
        lists = lists_of(text_index)
        values = phi.new_empty(2, len(lists.places))
        _set_lists(params, lists, *values)
        _run(_native.compatibility_forward(params))
        for to, x, without in ((phi, values[0], 0.0), (state, values[1], -1.0 if form == "max" else 0.0)):
            to.fill_(without).view(-1)[lists.places] = x
    del starts  # the call has its address
    if raw and form == "cosine":
        raw_texts.divide(phi, texts)
    if null_patch:
        null.add(phi, state, temperature, form, _entropy_unit(temperature, raw))


def compatibility_backward(
    patches: Tensor, texts: Tensor, patch_mask: Tensor | None, temperature: Scalar, form: str,
    phi: Tensor, state: Tensor, grad_phi: Tensor,
    grad_patches: Tensor | None, grad_texts: Tensor | None, grad_temperature: Tensor | None,
    keeps_scores: bool = False, *, patch_lengths: Tensor | None = None, null_patch: bool = False,
    normalize: str = "both", text_index: Tensor | None = None, grad_tolerance: float = 0.0,
) -> KeptPairs | None:  # fmt: skip
    raw = normalize == "none"
    lists, kept = None if text_index is None else lists_of(text_index), None
    if grad_tolerance and text_index is None:
        least, count, mass = tolerance.threshold(grad_phi, grad_tolerance)
        if _lists_are_worth(count, len(phi), len(texts), patches.dtype == torch.bfloat16 and grad_texts is not None):
            kept = KeptPairs(count, grad_phi.numel(), mass)
            lists, keeps_scores = tolerance.lists_from(grad_phi, least), False
            if (raw and form == "cosine") or (null_patch and form == "dot"):  # they add terms of all pairs
                grad_phi = grad_phi.masked_fill(grad_phi.abs() < least, 0.0)
    if raw and form == "cosine":
        with raw_texts.gradient(texts, phi, grad_phi, grad_texts) as (grad_phi, grad_texts):
            _backward(
                *(patches, texts, patch_mask, temperature, form, phi, state, grad_phi),
                *(grad_patches, grad_texts, grad_temperature, patch_lengths, raw, keeps_scores, lists),
            )
        return kept
    _backward(
        *(patches, texts, patch_mask, temperature, form, phi, state, grad_phi),
        *(grad_patches, grad_texts, grad_temperature, patch_lengths, raw, keeps_scores, lists),
    )
    if null_patch and form == "dot" and grad_temperature is not None:
        null.add_to_temperature(grad_temperature, phi, state, grad_phi, temperature, _entropy_unit(temperature, raw))
    return kept


def _lists_are_worth(kept: int, images: int, texts: int, wide: bool) -> bool:
    """Return True if a backward over lists of `kept` pairs is faster than one over all pairs.

    `wide`: the gradient of bfloat16 texts is summed in float32, which takes as long as their products. An image has a
    fixed cost, that of about 48 texts.
    """
    return kept + 48 * images <= (0.35 if wide else 0.6) * images * texts


def _backward(
    patches: Tensor, texts: Tensor, patch_mask: Tensor | None, temperature: Scalar, form: str,
    phi: Tensor, state: Tensor, grad_phi: Tensor,
    grad_patches: Tensor | None, grad_texts: Tensor | None, grad_temperature: Tensor | None,
    patch_lengths: Tensor | None, raw: bool, keeps_scores: bool, lists: Lists | None,
) -> None:  # fmt: skip
    starts = _patch_starts(patch_lengths)
    params = _params(patches, texts, patch_mask, temperature, form, starts, phi, state, raw)
    texts_sum = _set_gradients(params, grad_patches, grad_texts, grad_temperature)
    if lists is not None:
        listed = [x.view(-1)[lists.places] for x in (phi, state, grad_phi)]
        _set_lists(params, lists, *listed)
    else:
        params.set(grad_phi=grad_phi.data_ptr())
    if keeps_scores:
        assert grad_patches is not None
        params.set(**_kept(grad_patches))
    _run(_native.compatibility_backward(params))
    del starts, texts_sum  # the call has their addresses


def _set_lists(params: Any, lists: Lists, *values: Tensor) -> None:
    """Set the lists and φ, state and perhaps ∂L/∂φ of their pairs, `[ΣM]` each. The caller keeps all of them alive."""
    names = "phi", "state", "grad_phi"
    params.set(
        list_starts=lists.starts.data_ptr(),
        list_texts=lists.texts.data_ptr(),
        **{name: x.data_ptr() for name, x in zip(names, values, strict=False)},
    )


def sigmoid_step(
    patches: Tensor, texts: Tensor, patch_mask: Tensor | None, temperature: Scalar, form: str,
    scale: Scalar, bias: Scalar | None, pairs: Pairs | None, value: Tensor,
    grad_patches: Tensor | None, grad_texts: Tensor | None, grad_temperature: Tensor | None,
    grad_scale: Tensor | None, grad_bias: Tensor | None, grad_pair_bias: Tensor | None,
    *, patch_lengths: Tensor | None = None,
) -> None:  # fmt: skip
    """Write the sigmoid loss (0-D) and the gradients whose buffers are not None, without an array of all pairs."""
    starts = _patch_starts(patch_lengths)
    params = _params(patches, texts, patch_mask, temperature, form, starts)
    texts_sum = _set_gradients(params, grad_patches, grad_texts, grad_temperature)
    sums = torch.empty(3, dtype=torch.float64, device="cpu")
    image_ids, text_ids, targets, pair_bias = (
        (None,) * 4 if pairs is None else (None if x is None else x.contiguous() for x in pairs)
    )
    params.set(
        loss_sums=sums.data_ptr(),
        logit_scale=float(scale),
        logit_bias=0.0 if bias is None else float(bias),
        image_ids=_address(image_ids),
        text_ids=_address(text_ids),
        targets=_address(targets),
        pair_bias=_address(pair_bias),
        grad_pair_bias=_address(grad_pair_bias),
    )
    _run(_native.sigmoid_step(params))
    del starts, texts_sum  # the call has their addresses
    images = len(patches if patch_lengths is None else patch_lengths)
    for to, total in zip((value, grad_scale, grad_bias), sums / images, strict=True):
        if to is not None:
            to.copy_(total)


def loss_forward(
    phi: Tensor, scale: Scalar, bias: Scalar | None, loss: str, value: Tensor, statistics: Tensor | None
) -> None:
    """Write the loss of φ `[B, B]`, and for InfoNCE `statistics` `[4, B]`, see csrc/cpu/params.h."""
    params = _loss_params(phi, scale, bias, loss, statistics, value=value.data_ptr())
    _run(_native.loss_forward(params))


def loss_backward(
    phi: Tensor, scale: Scalar, bias: Scalar | None, loss: str, statistics: Tensor | None, grad_loss: Tensor,
    grad_phi: Tensor, grad_scale: Tensor | None, grad_bias: Tensor | None,
) -> None:  # fmt: skip
    """Write ∂L/∂φ `[B, B]` and, where the buffers are not None, the gradients of logit scale and bias (0-D)."""
    grads = {"grad_phi": grad_phi.data_ptr(), "grad_scale": _address(grad_scale), "grad_bias": _address(grad_bias)}
    params = _loss_params(phi, scale, bias, loss, statistics, grad_loss=float(grad_loss), **grads)
    _run(_native.loss_backward(params))


def _loss_params(
    phi: Tensor, scale: Scalar, bias: Scalar | None, loss: str, statistics: Tensor | None, **others: Any
) -> Any:
    return _native.LossParams(
        size=len(phi),
        sigmoid=loss == "sigmoid",
        scale=float(scale),
        bias=0.0 if bias is None else float(bias),
        threads=torch.get_num_threads(),
        openmp=_openmp(),
        phi=phi.data_ptr(),
        statistics=_address(statistics),
        **others,
    )


def keeps_scores(form: str, dtype: torch.dtype) -> bool:
    """Return True if scores may be kept. With a matrix unit, computing them again is faster than storing them."""
    return form != "max" and (dtype != torch.bfloat16 or "amx" not in _native.cpu_isa())


def upsample_argmax(
    scores: Tensor, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor], scale: Scalar,
    labels: Tensor, best: Tensor | None, entropy: Tensor | None,
) -> None:  # fmt: skip
    images, classes, height, width = scores.shape
    _, out_height, out_width = labels.shape
    params = _native.UpsampleParams(
        images=images,
        classes=classes,
        height=height,
        width=width,
        out_height=out_height,
        out_width=out_width,
        dtype=_DTYPES[scores.dtype],
        threads=torch.get_num_threads(),
        openmp=_openmp(),
        scores=scores.data_ptr(),
        strides=scores.stride(),
        row=rows[0].data_ptr(),
        row_fraction=rows[1].data_ptr(),
        column=columns[0].data_ptr(),
        column_fraction=columns[1].data_ptr(),
        scale=float(scale),
        labels=labels.data_ptr(),
        best=_address(best),
        entropy=_address(entropy),
    )
    _run(_native.upsample_argmax(params))


def _params(
    patches: Tensor, texts: Tensor, patch_mask: Tensor | None, temperature: Scalar, form: str,
    starts: Tensor | None, phi: Tensor | None = None, state: Tensor | None = None, raw: bool = False,
) -> Any:  # fmt: skip
    """Return the native module's `CompatibilityParams`. Patches with `starts` are packed: `[ΣN, D]`."""
    temperature = float(temperature)
    if 0 < temperature < _SMALLEST:  # 1 / τ would overflow; the best patch has all the attention with either τ
        temperature = _SMALLEST
    if starts is None:
        images, patches_per_image = patches.shape[:2]
        patch_strides, mask_strides = patches.stride(), (0, 0) if patch_mask is None else patch_mask.stride()
    else:
        images = len(starts) - 1
        patches_per_image = max(1, int(starts.diff().max()))
        patch_strides, mask_strides = (0, *patches.stride()), (0, 1 if patch_mask is None else patch_mask.stride(0))
    return _native.CompatibilityParams(
        images=images,
        patches_per_image=patches_per_image,
        text_count=len(texts),
        dim=patches.shape[-1],
        dtype=_DTYPES[patches.dtype],
        form=form,
        raw=raw,
        temperature=temperature,
        threads=torch.get_num_threads(),
        openmp=_openmp(),
        patches=patches.data_ptr(),
        patch_strides=patch_strides,
        patch_starts=_address(starts),
        texts=texts.data_ptr(),
        text_strides=texts.stride(),
        mask=_address(patch_mask),
        mask_strides=mask_strides,
        phi=_address(phi),
        state=_address(state),
    )


def _patch_starts(patch_lengths: Tensor | None) -> Tensor | None:
    """Return `packed.starts_of` the lengths, or None without lengths."""
    return None if patch_lengths is None else starts_of(patch_lengths)


def _set_gradients(
    params: Any, grad_patches: Tensor | None, grad_texts: Tensor | None, grad_temperature: Tensor | None
) -> Tensor | None:
    """Set the buffers of gradients, and return the sum of the texts' gradient, which must live as long as the call."""
    params.set(grad_patches=_address(grad_patches), grad_temperature=_address(grad_temperature))
    if grad_texts is None:
        return None
    texts_sum = torch.zeros(params.accumulator_floats(), dtype=torch.float32, device="cpu")
    params.set(
        grad_texts=grad_texts.data_ptr(), grad_texts_dtype=_DTYPES[grad_texts.dtype], texts_sum=texts_sum.data_ptr()
    )
    return texts_sum


def _entropy_unit(temperature: Scalar, raw: bool) -> float | None:
    """Return the unit of the state of the `dot` form, see `null_patch.add`."""
    return None if float(temperature) >= RUNNING_MAX_BELOW and not raw else 1.0


def _kept(scores: Tensor) -> dict[str, int]:
    """Return the fields for memory that is shaped like the patches and holds scores."""
    return {"scores": scores.data_ptr(), "scores_row_bytes": scores.shape[-1] * scores.element_size()}


def _run(call: Any) -> None:
    """Run a planned call in a workspace of the size that its plan needs."""
    workspace = torch.empty(call.workspace_bytes, dtype=torch.uint8)
    call.run(workspace.data_ptr(), workspace.numel())


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
