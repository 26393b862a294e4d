"""Backend `cuda`: launches of CUDA C++ for Hopper (csrc/cuda), bfloat16 and float16; docs/cuda.md draws the kernel.

`order.py` has the order of the launches. csrc/cuda has kernels for φ and W of the `dot` form, and of the cosine form
for images of 97 patches or more (for fewer see `Settings`). Everything else is Triton's: the norms, the Gram matrices,
the norm term, the `max` form, the loss and `upsample_argmax`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from ...native import native
from . import launch, lists, order, tiles, triton
from .blocks import Block
from .loss import loss_backward, loss_forward
from .problem import SIGMOID_SUMS, Problem, SigmoidPairs, Upstream
from .upsample import upsample_argmax
from .workspace import WeightsTile

__all__ = [
    "HopperLaunches",
    "Settings",
    "compatibility_backward",
    "compatibility_forward",
    "loss_backward",
    "loss_forward",
    "settings",
    "sigmoid_step",
    "upsample_argmax",
    "why_not",
]


@dataclasses.dataclass
class Settings:
    """Choices between kernels; tests and benchmarks/tune_cuda.py change them."""

    cluster: int = 0  # thread blocks per cluster; 0: the choice of csrc/cuda/plan.h
    # True: kernels of csrc/cuda, not Triton's, for the cosine form of images that do not fit one tile (fewer than 97
    # patches or more than 256). None: only for more than 256, where a step was measured to be 1.3 to 2.2 times as fast.
    cosine_from_attention: bool | None = None
    # True: W leaves by bulk tensor stores, transposed (bfloat16 only). None: the choice of csrc/cuda/plan.h.
    transposed_weights: bool | None = None


settings = Settings()


def why_not(device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
    if not hasattr(native(), "CudaLaunch"):
        return "not built; install from source with nvcc 12.3 or newer on PATH and PACL_CUDA=ON in the environment"
    if dtype is not None and dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {dtype}"
    if device is not None and device.type != "cuda":
        return f"it takes tensors on a GPU, not on {device.type}"
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "torch finds no NVIDIA GPU"
    index = device if device is not None else torch.device("cuda", torch.cuda.current_device())
    if torch.cuda.get_device_capability(index) != (9, 0):
        return f"{torch.cuda.get_device_name(index)} is not of compute capability 9.0 (Hopper)"
    reason = triton.why_not(device, dtype)
    return None if reason is None else f"it also needs the Triton backend: {reason}"


class HopperLaunches:
    """Hopper's launches for one problem, and Triton's where csrc/cuda has no kernel; see `order.Launches`."""

    def __init__(self, problem: Problem) -> None:
        self._p = p = problem
        self._triton = triton.TritonLaunches(p)
        self._patches, self._texts = _aligned(p.patches), _aligned(p.texts)
        self._device = p.patches.device.index or 0
        self._stream = torch.cuda.current_stream(p.patches.device).cuda_stream if p.patches.is_cuda else 0
        self.fits_one_tile: bool = _module().cuda_fits_one_tile(p.n)
        self._from_attention = settings.cosine_from_attention
        if self._from_attention is None:
            self._from_attention = p.n > 256
        transposes = settings.transposed_weights
        if transposes is None:
            transposes = _module().cuda_transposed_weights
        self._transposes: bool = transposes and p.patches.dtype == torch.bfloat16  # there are no others
        # If the cosine form is one launch, only the norm term reads the attention.
        self.attention_dtype = p.patches.dtype if self.fits_one_tile else p.gram_dtype

    def max_forward(self) -> None:
        self._triton.max_forward()

    def dot_forward(self) -> None:
        p = self._p
        for running_max in launch.running_max_variants(p.temperature):
            epilogue = "dot_forward_running_max" if running_max else "dot_forward"
            self._run(self._call(epilogue, p.pairs, p.phi), p.pairs)

    def gram(self, block: Block, gram: Tensor) -> None:
        self._triton.gram(block, gram)

    def attention(self, block: Block, attention: Tensor, state_is_entropy: bool) -> None:
        if not self._from_attention:
            self._triton.attention(block, attention, state_is_entropy)
            return
        call = self._call("attention", block, self._p.phi if state_is_entropy else None)
        _set_attention(call, attention)
        self._run(call, block)

    def cosine_forward(self, block: Block, gram: Tensor) -> None:
        call = self._call("cosine_forward", block, self._p.phi)
        _set_gram(call, gram)
        self._run(call, block)

    def cosine_forward_from_attention(self, block: Block, attention: Tensor, gram: Tensor) -> None:
        if not self._from_attention:
            self._triton.cosine_forward_from_attention(block, attention, gram)
            return
        call = self._call("cosine_forward_from_attention", block, self._p.phi)
        _set_gram(call, gram)
        _set_attention(call, attention)
        call.run()

    def weights_tile(self, form: str, needs_temperature: bool) -> WeightsTile:
        if self._transposes and (form == "dot" or self.fits_one_tile or self._from_attention):
            return WeightsTile(8, 1, transposed=True)  # rows begin at multiples of 16 bytes
        return self._triton.weights_tile(form, needs_temperature)

    def dot_weights(self, block: Block, upstream: Upstream, w: Tensor) -> Tensor | None:
        return self._run_weights(self._weights_call("dot_weights", block, self._p.phi), block, upstream, w)

    def cosine_weights(
        self, block: Block, upstream: Upstream, attention: Tensor, gram: Tensor, w: Tensor, norm_factor: Tensor
    ) -> Tensor | None:
        return self._cosine_weights("cosine_weights", block, upstream, attention, gram, w, norm_factor)

    def cosine_weights_from_attention(
        self, block: Block, upstream: Upstream, attention: Tensor, gram: Tensor, w: Tensor, norm_factor: Tensor
    ) -> Tensor | None:
        if not self._from_attention:
            return self._triton.cosine_weights_from_attention(block, upstream, attention, gram, w, norm_factor)
        return self._cosine_weights("cosine_weights_from_attention", block, upstream, attention, gram, w, norm_factor)

    def sigmoid_tile(self, needs_temperature: bool) -> WeightsTile:
        return WeightsTile(1, 8)  # nothing is stored outside of W, whose rows begin at multiples of 16 bytes

    def sigmoid_dot_weights(self, block: Block, pairs: SigmoidPairs, w: Tensor | None) -> Tensor:
        return self._run_sigmoid(self._call("dot_sigmoid_weights", block, None), block, pairs, w)

    def sigmoid_cosine_weights(
        self, block: Block, pairs: SigmoidPairs, attention: Tensor, gram: Tensor, w: Tensor, norm_factor: Tensor
    ) -> Tensor:
        call = self._call("cosine_sigmoid_weights", block, None)
        _set_gram(call, gram)
        _set_attention(call, attention)
        call.norm_factor = norm_factor.data_ptr()
        return self._run_sigmoid(call, block, pairs, w)

    def norm_term(self, block: Block, attention: Tensor, norm_factor: Tensor, norm_term: Tensor) -> None:
        self._triton.norm_term(block, attention, norm_factor, norm_term)

    def norm_term_product(self, block: Block, norm_term: Tensor, raw: Tensor) -> None:
        self._triton.norm_term_product(block, norm_term, raw)

    def max_texts(self, grad_phi: Tensor, texts_sum: Tensor) -> None:
        self._triton.max_texts(grad_phi, texts_sum)

    def max_patches(self, block: Block, grad_phi: Tensor, range_scale: Tensor | None, raw: Tensor) -> None:
        self._triton.max_patches(block, grad_phi, range_scale, raw)

    def _cosine_weights(
        self, epilogue: str, block: Block, upstream: Upstream,
        attention: Tensor, gram: Tensor, w: Tensor, norm_factor: Tensor,
    ) -> Tensor | None:  # fmt: skip
        call = self._weights_call(epilogue, block, None)
        _set_gram(call, gram)
        _set_attention(call, attention)
        call.norm_factor = norm_factor.data_ptr()
        return self._run_weights(call, block, upstream, w)

    def _weights_call(self, epilogue: str, block: Block, phi: Tensor | None) -> Any:
        return self._call(epilogue + "_transposed" if self._transposes else epilogue, block, phi)

    def _run_weights(self, call: Any, block: Block, upstream: Upstream, w: Tensor) -> Tensor | None:
        tau_parts = None
        if upstream.needs_temperature:  # one per launched thread block; the others stay 0
            tau_parts = self._p.phi.new_zeros(2 * call.plan.clusters)
            call.temperature_sums = tau_parts.data_ptr()
        call.weights, call.weights_stride = w.data_ptr(), w.stride(1 if self._transposes else 0)
        call.grad_phi = upstream.grad_phi[block.b0 : block.b1, block.k0 :].data_ptr()
        call.range_scale = 0 if upstream.range_scale is None else upstream.range_scale.data_ptr()
        call.full = upstream.needs_temperature or self._p.mask is not None
        self._run(call, block)
        return tau_parts

    def _run_sigmoid(self, call: Any, block: Block, pairs: SigmoidPairs, w: Tensor | None) -> Tensor:
        sums = self._p.inv_t.new_empty(call.plan.clusters * call.plan.cluster, SIGMOID_SUMS)
        if w is not None:
            call.weights, call.weights_stride = w.data_ptr(), w.stride(0)
        call.full = pairs.needs_temperature or self._p.mask is not None
        call.share, call.own_text, call.loss_sums = 1.0 / self._p.b, block.b0 - block.k0, sums.data_ptr()
        for name, scalar in (("logit_scale", pairs.scale), ("logit_bias", pairs.bias)):
            if isinstance(scalar, Tensor):
                setattr(call, f"{name}_at", scalar.data_ptr())
            elif scalar is not None:
                setattr(call, name, scalar)
        image_ids, text_ids, targets, pair_bias = pairs.given
        if image_ids is not None and text_ids is not None:
            call.image_ids, call.text_ids = image_ids[block.b0 :].data_ptr(), text_ids[block.k0 :].data_ptr()
        for name, x in (("targets", targets), ("pair_bias", pair_bias), ("grad_pair_bias", pairs.grad_pair_bias)):
            if x is not None:
                setattr(call, name, x[block.b0 :, block.k0 :].data_ptr())
        self._run(call, block)
        return sums

    def _call(self, epilogue: str, block: Block, phi: Tensor | None) -> Any:
        p, temperature = self._p, self._p.temperature
        patches, texts = self._patches[block.b0 : block.b1], self._texts[block.k0 : block.k1]
        return _module().CudaLaunch(
            epilogue=getattr(_module().CudaEpilogue, epilogue),
            images=block.images,
            patches=p.n,
            texts=block.texts,
            dim=p.d,
            dtype=str(patches.dtype).removeprefix("torch."),
            cluster=settings.cluster,
            device=self._device,
            stream=self._stream,
            patch_rows=patches.data_ptr(),
            patch_stride_image=patches.stride(0),
            patch_stride_row=patches.stride(1),
            text_rows=texts.data_ptr(),
            text_stride=texts.stride(0),
            inverse_texts=p.inv_t[block.k0 :].data_ptr(),
            temperature=0.0 if isinstance(temperature, Tensor) else temperature,
            temperature_at=temperature.data_ptr() if isinstance(temperature, Tensor) else 0,
            phi=0 if phi is None else phi[block.b0 : block.b1, block.k0 :].data_ptr(),
            state=p.state[block.b0 : block.b1, block.k0 :].data_ptr() if p.state.numel() else 0,
            phi_stride=p.k,
        )

    def _run(self, call: Any, block: Block) -> None:
        """Launch with temporary `columns`, 1 / ‖p‖ in the order of the kernel's tiles.

        Freeing them at once is safe, since the allocator reuses memory in stream order.
        """
        p, plan = self._p, call.plan
        columns = p.phi.new_empty(plan.groups * plan.chunks * plan.width)
        mask = None if p.mask is None else p.mask[block.b0 : block.b1]
        call.make_columns(
            inverse_norms=p.inv_p[block.b0 * p.n :].data_ptr(),
            mask=0 if mask is None else mask.data_ptr(),
            mask_strides=launch.mask_strides(mask),
            columns=columns.data_ptr(),
        )
        call.run()


def _module() -> Any:
    """Return the native module, which `why_not` has found."""
    return native()


def _set_gram(call: Any, gram: Tensor) -> None:
    call.gram, call.gram_stride = gram.data_ptr(), gram.stride(1)


def _set_attention(call: Any, attention: Tensor) -> None:
    call.attention, call.attention_stride = attention.data_ptr(), attention.stride(1)


def _aligned(x: Tensor) -> Tensor:
    """Return `x`, or a copy with the layout of bulk copies: contiguous rows that start at multiples of 16 bytes."""
    fits = x.stride(-1) == 1 and x.data_ptr() % 16 == 0
    fits &= all(stride % 8 == 0 and stride > 0 for stride in x.stride()[:-1])
    if fits:
        return x
    d = x.shape[-1]
    copy = x.new_empty(*x.shape[:-1], tiles.ceil_div(d, 8) * 8)[..., :d]
    return copy.copy_(x)


def fits_sigmoid(n: int) -> bool:
    """Return True if a tile holds the patches of an image and no others, which `sigmoid_step` needs."""
    fits: bool = _module().cuda_fits_one_tile(n)
    return fits


def takes_packed_patches(form: str) -> bool:
    """Return True if packed patches go to Triton's kernels as they are; otherwise they come in padded groups.

    For `cosine` kernels of csrc/cuda on padded groups cost less than Triton's without padding, see docs/cuda.md.
    """
    return form != "cosine"


def _launches(problem: Problem) -> order.Launches:
    if problem.packed is None:
        return HopperLaunches(problem)
    return triton.TritonLaunches(problem)  # type: ignore[return-value]  # see triton.py


# Triton's launches take the lists.
_BOTH = _launches, triton.TritonLaunches
compatibility_forward = functools.partial(lists.compatibility_forward, *_BOTH)  # type: ignore[arg-type]
compatibility_backward = functools.partial(lists.compatibility_backward, *_BOTH)  # type: ignore[arg-type]
sigmoid_step = functools.partial(order.sigmoid_step, HopperLaunches)
