"""The two fused functions in CUDA C++ for Hopper (csrc/cuda), bfloat16 and float16; docs/cuda.md draws the kernel.

Its launches take the place of the Triton backend's: φ and the weights of the `dot` form, and both for the `cosine` form
with 97 patches or more (for fewer see ATTENTION_IN_MEMORY). Everything around them, the loss, the `max` form and
`upsample_argmax` are the Triton backend's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import native
from . import triton, triton_call
from . import triton_tiles as tiles
from .triton_launch import ranges

loss_forward, loss_backward, upsample_argmax = triton.loss_forward, triton.loss_backward, triton.upsample_argmax

# Blocks of a cluster, 0 for what csrc/cuda/plan.h says; benchmarks try others.
CLUSTER = 0
# Whether `cosine` with other than 97 to 256 patches has kernels of its own (`attention` and those `from_attention` of
# csrc/cuda/epilogues.def) or takes the Triton backend's. None: with more, where they were measured and a step is 1.3 to
# 2.2 times as fast. Tests and benchmarks/tune_cuda.py try both.
ATTENTION_IN_MEMORY: bool | None = None
RUNNING_MAX_BELOW = 0.05  # as kRunningMaxBelow in csrc/cuda/constants.h


def why_not(device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
    if not hasattr(native(), "CudaLaunch"):
        return "not built; install from source with nvcc 12.3 or newer on PATH and PACL_CUDA=ON in the environment"
    if dtype is not None and dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {dtype}"
    if device is not None and device.type != "cuda":
        return f"it takes tensors on a GPU, not on {device.type}"
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "torch finds no GPU of NVIDIA's"
    index = device if device is not None else torch.device("cuda", torch.cuda.current_device())
    if torch.cuda.get_device_capability(index) != (9, 0):
        return f"{torch.cuda.get_device_name(index)} is not of compute capability 9.0 (Hopper)"
    reason = triton.why_not(device, dtype)
    return None if reason is None else f"it needs the Triton backend beside it: {reason}"


def score_forward(patches, texts, patch_mask, temperature, form, phi, stat) -> None:
    triton.forward(Call, patches, texts, patch_mask, temperature, form, phi, stat)


def score_backward(
    patches, texts, patch_mask, temperature, form, phi, stat, grad_phi, grad_patches, grad_texts, grad_temperature
) -> None:
    gradients = (grad_phi, grad_patches, grad_texts, grad_temperature)
    triton.backward(Call, patches, texts, patch_mask, temperature, form, phi, stat, gradients)


class Call(triton_call.Call):
    def __init__(self, patches, texts, patch_mask, temperature, phi, stat):
        super().__init__(patches, texts, patch_mask, temperature, phi, stat)
        self.rows, self.text_rows = _aligned(patches), _aligned(self.texts)
        self.device = patches.device.index or 0
        self.stream = torch.cuda.current_stream(patches.device).cuda_stream if patches.is_cuda else 0

    def forward(self, form: str) -> None:
        if form == "cosine" and native().cuda_fits_one_tile(self.n):
            self.pooled()
        else:
            super().forward(form)

    def pooled(self) -> None:
        """φ and STAT of the `cosine` form in one launch for each block of images."""
        blocks = tiles.Blocks(max(1, min(self.b, tiles.WORKSPACE // self.gram_bytes)), self.k)
        gram = self.gram_workspace(blocks)
        for b0, b1 in ranges(self.b, blocks.images):
            self.gram(b0, b1, gram)
            call = self._call(native().CudaEpilogue.cosine_forward, b0, b1, 0, self.k, self.phi)
            call.gram, call.gram_stride = gram.data_ptr(), gram.stride(1)
            self._launch(call, b0, b1)

    def scores(self, form: str) -> None:
        if form == "max":
            super().scores(form)
            return
        temperature = self.temperature
        both = isinstance(temperature, Tensor)  # it is not read: both are launched, and one returns
        epilogues = native().CudaEpilogue.dot_forward, native().CudaEpilogue.dot_forward_running_max
        for epilogue in epilogues if both else (epilogues[temperature < RUNNING_MAX_BELOW],):
            call = self._call(epilogue, 0, self.b, 0, self.k, self.phi)
            self._launch(call, 0, self.b)

    @property
    def in_memory(self) -> bool:
        return self.n > 256 if ATTENTION_IN_MEMORY is None else ATTENTION_IN_MEMORY

    def attention(self, b0, b1, k0, k1, attention, entropy_over=None) -> None:
        if not self.in_memory:
            super().attention(b0, b1, k0, k1, attention, entropy_over)
            return
        call = self._call(native().CudaEpilogue.attention, b0, b1, k0, k1, entropy_over)
        call.attention, call.attention_stride = attention.data_ptr(), attention.stride(1)
        self._launch(call, b0, b1)

    def cosine_forward(self, b0, b1, k0, k1, attention, gram) -> None:
        if not self.in_memory:
            super().cosine_forward(b0, b1, k0, k1, attention, gram)
            return
        call = self._call(native().CudaEpilogue.cosine_forward_from_attention, b0, b1, k0, k1, self.phi)
        call.gram, call.gram_stride = gram.data_ptr(), gram.stride(1)
        call.attention, call.attention_stride = attention.data_ptr(), attention.stride(1)
        call.run()

    def weights(self, b0, b1, k0, k1, w, grad_phi, needs_tau=False) -> Tensor | None:
        call = self._call(native().CudaEpilogue.dot_weights, b0, b1, k0, k1, self.phi)
        return self._launch_weights(call, b0, b1, k0, w, grad_phi, needs_tau)

    def cosine_weights(self, b0, b1, k0, k1, attention, gram, grad_phi, w, curvature, needs_tau) -> Tensor | None:
        pooled = native().cuda_fits_one_tile(self.n)
        if not pooled and not self.in_memory:
            return super().cosine_weights(b0, b1, k0, k1, attention, gram, grad_phi, w, curvature, needs_tau)
        if not pooled:
            self.attention(b0, b1, k0, k1, attention)
        names = native().CudaEpilogue
        epilogue = names.cosine_weights if pooled else names.cosine_weights_from_attention
        call = self._call(epilogue, b0, b1, k0, k1, None)
        call.gram, call.gram_stride = gram.data_ptr(), gram.stride(1)
        call.attention, call.attention_stride = attention.data_ptr(), attention.stride(1)
        call.norm_factor = curvature.data_ptr()
        return self._launch_weights(call, b0, b1, k0, w, grad_phi, needs_tau)

    def attention_workspace(self, blocks: tiles.Blocks, dtype: torch.dtype | None = None) -> Tensor:
        return super().attention_workspace(blocks, self.patches.dtype if native().cuda_fits_one_tile(self.n) else dtype)

    def _launch_weights(self, call, b0, b1, k0, w, grad_phi, needs_tau) -> Tensor | None:
        sums = None
        if needs_tau:  # one of each block that is launched; the others' stay 0
            sums = self.phi.new_zeros(2 * call.plan.clusters)
            call.temperature_sums = sums.data_ptr()
        call.weights, call.weights_stride = w.data_ptr(), w.stride(0)
        call.grad_phi = grad_phi[b0:b1, k0:].data_ptr()
        call.range_scale = 0 if self.scale is None else self.scale.data_ptr()
        call.full = needs_tau or self.mask is not None
        self._launch(call, b0, b1)
        return sums

    def _launch(self, call, b0: int, b1: int) -> None:
        """With columns, which the allocator hands on afterwards, in the order of the stream."""
        columns = self._columns(call, b0, b1)
        call.run()
        del columns

    def _call(self, epilogue, b0, b1, k0, k1, phi: Tensor | None):
        temperature = self.temperature
        on_device = isinstance(temperature, Tensor)
        rows, texts = self.rows[b0:b1], self.text_rows[k0:k1]
        return native().CudaLaunch(
            epilogue=epilogue,
            images=b1 - b0,
            patches=self.n,
            texts=k1 - k0,
            dim=self.d,
            dtype=_name(rows),
            cluster=CLUSTER,
            device=self.device,
            stream=self.stream,
            patch_rows=rows.data_ptr(),
            patch_stride_image=rows.stride(0),
            patch_stride_row=rows.stride(1),
            text_rows=texts.data_ptr(),
            text_stride=texts.stride(0),
            inverse_texts=self.inv_t[k0:].data_ptr(),
            temperature=0.0 if on_device else temperature,
            temperature_at=temperature.data_ptr() if on_device else 0,
            phi=0 if phi is None else phi[b0:b1, k0:].data_ptr(),
            state=self.stat[b0:b1, k0:].data_ptr(),
            phi_stride=self.k,
        )

    def _columns(self, call, b0: int, b1: int) -> Tensor:
        """1 / ‖p‖ in the order of the kernel's tiles, for as long as the launch is not made."""
        plan = call.plan
        columns = self.phi.new_empty(plan.groups * plan.chunks * plan.width)
        mask = None if self.mask is None else self.mask[b0:b1]
        call.make_columns(
            inverse_norms=self.inv_p[b0 * self.n :].data_ptr(),
            mask=0 if mask is None else mask.data_ptr(),
            mask_strides=(0, 0) if mask is None else mask.stride(),
            columns=columns.data_ptr(),
        )
        return columns


def _aligned(x: Tensor) -> Tensor:
    """`x`, or a copy as the copy engine wants it: rows contiguous, everything else at multiples of 16 bytes."""
    fits = x.stride(-1) == 1 and x.data_ptr() % 16 == 0
    fits &= all(stride % 8 == 0 and stride > 0 for stride in x.stride()[:-1])
    if fits:
        return x
    d = x.shape[-1]
    copy = x.new_empty(*x.shape[:-1], tiles.ceil_div(d, 8) * 8)[..., :d]
    return copy.copy_(x)


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
