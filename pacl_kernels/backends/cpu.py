"""The fused functions in C++ for CPUs: hands addresses, sizes and strides to the native module."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch
from torch import Tensor

from .. import native
from ..contrastive import loss_backward, loss_forward  # noqa: F401  (part of a backend, see `Backend`)

_native = native.native()  # None: built without a C++ compiler, or for another Python
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_SMALLEST = torch.finfo(torch.float32).tiny


@functools.cache
def _openmp_addresses() -> tuple[int, int, int]:
    """Addresses of what starts parallel regions in PyTorch's own OpenMP runtime; zeros if it cannot be found.

    Its workers spin for milliseconds after each of torch's operators and would share the cores with threads of ours.
    """
    library = next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"), None)
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")  # GNU's, and LLVM's and Intel's as well
    try:
        # Looked up in that library's own dependencies: a process may hold several such runtimes.
        library = ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        return tuple(ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in names)
    except (OSError, AttributeError):
        return (0, 0, 0)


_forked = False


def _openmp() -> tuple[int, int, int]:
    """The addresses; zeros in a forked process, where the workers do not exist and would be waited for for ever."""
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


def compatibility_forward(patches, texts, patch_mask, temperature, form, phi, state) -> None:
    _run(_native.compatibility_forward(_params(patches, texts, patch_mask, temperature, form, phi, state)))


def compatibility_backward(
    patches, texts, patch_mask, temperature, form, phi, state, grad_phi, grad_patches, grad_texts, grad_temperature
) -> None:
    params = _params(patches, texts, patch_mask, temperature, form, phi, state)
    texts_sum = phi.new_zeros(params.accumulator_floats()) if grad_texts is not None else None
    params.set(
        grad_phi=grad_phi.data_ptr(),
        grad_patches=_address(grad_patches),
        grad_texts=_address(grad_texts),
        grad_texts_dtype=_DTYPES[texts.dtype if grad_texts is None else grad_texts.dtype],
        texts_sum=_address(texts_sum),
        grad_temperature=_address(grad_temperature),
    )
    _run(_native.compatibility_backward(params))


def upsample_argmax(scores, rows, columns, scale, labels, best, entropy) -> None:
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


def _params(patches: Tensor, texts: Tensor, patch_mask: Tensor | None, temperature, form, phi, state):
    temperature = float(temperature)
    if 0 < temperature < _SMALLEST:  # of which the inverse overflows; the best patch takes all with either
        temperature = _SMALLEST
    images, patches_per_image, dim = patches.shape
    return _native.CompatibilityParams(
        images=images,
        patches_per_image=patches_per_image,
        text_count=len(texts),
        dim=dim,
        dtype=_DTYPES[patches.dtype],
        form=form,
        temperature=temperature,
        threads=torch.get_num_threads(),
        openmp=_openmp(),
        patches=patches.data_ptr(),
        patch_strides=patches.stride(),
        texts=texts.data_ptr(),
        text_strides=texts.stride(),
        mask=_address(patch_mask),
        mask_strides=(0, 0) if patch_mask is None else patch_mask.stride(),
        phi=phi.data_ptr(),
        state=state.data_ptr(),
    )


def _run(call) -> None:
    """Runs a planned call in a workspace of the size that its plan asks for."""
    workspace = torch.empty(call.workspace_bytes, dtype=torch.uint8)
    call.run(workspace.data_ptr(), workspace.numel())


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
