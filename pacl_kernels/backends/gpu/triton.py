"""Backend `triton`: launches of Triton's kernels on every GPU that it supports; `order.py` has their order."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import math
from typing import Any

import torch
from torch import Tensor

from ...constants import MIN_POOLED_NORM
from . import launch, order, sigmoid, tiles
from .loss import loss_backward, loss_forward
from .problem import Block, Problem, SigmoidPairs, Upstream
from .upsample import upsample_argmax
from .workspace import WeightsTile

__all__ = [
    "TritonLaunches",
    "compatibility_backward",
    "compatibility_forward",
    "loss_backward",
    "loss_forward",
    "sigmoid_step",
    "upsample_argmax",
    "why_not",
]

_MIN_TRITON = (3, 3)


def why_not(device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
    version = _triton_version()
    if version is None:
        return "triton is not installed; `pip install triton`"
    if version < _MIN_TRITON:
        return f"triton is {'.'.join(map(str, version))}, expected at least {'.'.join(map(str, _MIN_TRITON))}"
    if dtype is not None and dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, not {dtype}"
    if tiles.interpreted():
        return None
    if device is not None and device.type != "cuda":
        return f"it takes tensors on a GPU, not on {device.type} (unless TRITON_INTERPRET=1, which is slow)"
    if not torch.cuda.is_available():
        return "torch finds no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    index = device if device is not None else torch.device("cuda", torch.cuda.current_device())
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0):
        return f"{torch.cuda.get_device_name(index)} is older than compute capability 8.0"
    return None


@functools.cache
def _triton_version() -> tuple[int, ...] | None:
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return tuple(int(part) for part in importlib.metadata.version(name).split(".")[:2])
    return None


class TritonLaunches:
    """Triton's launches for one problem, see `order.Launches`."""

    fits_one_tile = False  # the cosine form always keeps its attention in memory

    def __init__(self, problem: Problem) -> None:
        self._p = p = problem
        self.attention_dtype = p.gram_dtype
        self._strides = (*p.patches.stride(), *p.texts.stride(), *launch.mask_strides(p.mask))
        self._precision = launch.float32_precision() if p.patches.dtype == torch.float32 else "ieee"

    def max_forward(self) -> None:
        self._forward(1.0, running_max=False, largest=True)  # the kernel ignores the temperature, so any number will do

    def dot_forward(self) -> None:
        for running_max in launch.running_max_variants(self._p.temperature):
            self._forward(self._p.temperature, running_max, largest=False)

    def _forward(self, temperature: float | Tensor, running_max: bool, largest: bool) -> None:
        p = self._p
        pad = tiles.power_of_two(p.n) if p.n <= tiles.PADDED else 0
        kernel = "forward_running_max" if running_max else "forward"
        chosen = tiles.config(kernel, p.patches, p.texts, padded=pad > 0)
        images = max(1, chosen.block_p // pad) if pad else tiles.images_of_a_tile(p.n, chosen.block_p)
        programs = launch.programs(p.patches.device, chosen.per_processor)
        text_tiles = tiles.ceil_div(p.k, chosen.block_t)
        run = images if pad else tiles.images_per_run(p.b, p.n, text_tiles, chosen.block_p, programs)
        operands, constants = self._operands(chosen, p.texts, descriptors=not pad)
        constants |= dict(PAD=pad, IMAGES=images, MAX=largest, RUNNING_MAX=running_max)
        launch.run(
            launch.kernels().compatibility_forward_kernel,
            min(programs, text_tiles * tiles.ceil_div(p.b, run)),
            (*operands, p.mask, temperature, p.inv_p, p.inv_t, p.phi, p.state)
            + (p.b, p.n, p.k, p.d, *self._strides, run),
            constants | _temperature_constants(temperature),
            chosen.warps,
            chosen.stages,
            fma=not running_max,
        )

    def gram(self, block: Block, gram: Tensor) -> None:
        p = self._p
        chosen = tiles.gram_config(p.n, p.patches.element_size())
        launch.run(
            launch.kernels().gram_kernel,
            block.images * tiles.ceil_div(p.n, chosen.block) ** 2,
            (p.patches, p.mask, p.inv_p, gram, block.b0, p.n, p.d)
            + (*p.patches.stride(), *launch.mask_strides(p.mask), gram.stride(1)),
            dict(
                BLOCK_N=chosen.block,
                BLOCK_D=chosen.block_d,
                HAS_MASK=p.mask is not None,
                EVEN_D=p.d % chosen.block_d == 0,
                PRECISION=self._precision,
            ),
            chosen.warps,
            chosen.stages,
        )

    def attention(self, block: Block, attention: Tensor, state_is_entropy: bool) -> None:
        p = self._p
        chosen = self._weights_config(needs_temperature=False)
        operands, constants = self._operands(chosen, p.texts[block.k0 : block.k1])
        constants |= dict(ALIGN=math.gcd(p.n, tiles.alignment(attention)), IMAGES=_images_of_a_quarter(p, chosen))
        launch.run(
            launch.kernels().attention_kernel,
            self._programs(block, chosen),
            (*operands, p.mask, p.temperature, p.inv_p, p.inv_t[block.k0 :])
            + (p.phi[:, block.k0 :] if state_is_entropy else None, p.state[:, block.k0 :], attention)
            + (block.b0, block.b1, p.n, block.texts, p.d, *self._strides, p.k, *attention.stride()[:2]),
            constants | _temperature_constants(p.temperature),
            chosen.warps,
            chosen.stages,
            fma=False,
        )

    def cosine_forward_from_attention(self, block: Block, attention: Tensor, gram: Tensor) -> None:
        p = self._p
        chosen = tiles.gram_attention_config("forward", p.n, p.patches)
        launch.run(
            launch.kernels().cosine_forward_from_attention_kernel,
            block.images * tiles.ceil_div(block.texts, chosen.block_t),
            (attention, gram, p.temperature, p.phi[:, block.k0 :], p.state[:, block.k0 :], block.b0, p.n, block.texts)
            + (*attention.stride()[:2], gram.stride(1), p.k, MIN_POOLED_NORM),
            self._gram_attention_constants(chosen, attention),
            chosen.warps,
            chosen.stages,
        )

    def weights_tile(self, form: str, needs_temperature: bool) -> WeightsTile:
        chosen = self._weights_config(needs_temperature)
        return WeightsTile(chosen.block_t, chosen.block_p)

    def dot_weights(self, block: Block, upstream: Upstream, w: Tensor) -> Tensor | None:
        p = self._p
        chosen = self._weights_config(upstream.needs_temperature)
        tau_parts = p.phi.new_empty(_weight_tiles(p, block, chosen)) if upstream.needs_temperature else None
        operands, constants = self._operands(chosen, p.texts[block.k0 : block.k1])
        constants |= dict(IMAGES=_images_of_a_quarter(p, chosen), NEEDS_TAU=upstream.needs_temperature)
        launch.run(
            launch.kernels().dot_weights_kernel,
            self._programs(block, chosen),
            (*operands, p.mask, p.temperature, p.inv_p, p.inv_t[block.k0 :])
            + (p.phi[:, block.k0 :], p.state[:, block.k0 :], upstream.grad_phi[:, block.k0 :])
            + (upstream.range_scale, w, tau_parts, block.b0, block.b1, p.n, block.texts, p.d)
            + (*self._strides, p.k, w.stride(0)),
            constants | dict(SCALED=upstream.range_scale is not None) | _temperature_constants(p.temperature),
            chosen.warps,
            chosen.stages,
            fma=False,
        )
        return tau_parts

    def cosine_weights_from_attention(
        self, block: Block, upstream: Upstream, attention: Tensor, gram: Tensor, w: Tensor, norm_factor: Tensor
    ) -> Tensor | None:
        p = self._p
        chosen = tiles.gram_attention_config("weights", p.n, p.patches)
        items = block.images * tiles.ceil_div(block.texts, chosen.block_t)
        tau_parts = p.phi.new_empty(items) if upstream.needs_temperature else None
        launch.run(
            launch.kernels().cosine_weights_from_attention_kernel,
            items,
            (attention, gram, p.temperature, p.inv_p, p.inv_t[block.k0 :], p.state[:, block.k0 :])
            + (upstream.grad_phi[:, block.k0 :], upstream.range_scale, w, norm_factor, tau_parts)
            + (block.b0, p.n, block.texts, *attention.stride()[:2], w.stride(0), gram.stride(1), p.k, MIN_POOLED_NORM),
            self._gram_attention_constants(chosen, attention)
            | dict(
                N_ALIGN=math.gcd(p.n, 16),
                WHOLE=p.n <= chosen.block_m,
                NEEDS_TAU=upstream.needs_temperature,
                SCALED=upstream.range_scale is not None,
            ),
            chosen.warps,
            chosen.stages,
        )
        return tau_parts

    def sigmoid_tile(self, needs_temperature: bool) -> WeightsTile:
        # A row of W begins at a multiple of 16.
        return WeightsTile(sigmoid.tile(self._p, needs_temperature).block_t, 16)

    def sigmoid_dot_weights(self, block: Block, pairs: SigmoidPairs, w: Tensor | None) -> Tensor:
        return sigmoid.dot_weights(self._p, block, pairs, w, self._precision)

    def norm_term(self, block: Block, attention: Tensor, norm_factor: Tensor, norm_term: Tensor) -> None:
        p = self._p
        # The factors exceed the range of float16, and bfloat16 would lose the last three bits of float16 operands.
        wide, precision = p.patches.dtype != torch.bfloat16, self._precision
        if p.patches.dtype == torch.float16 and torch.version.hip is None:
            precision = "tf32"
        chosen = tiles.norm_term_config(p.n, 4 if wide else 2, p.patches.device)
        launch.run(
            launch.kernels().norm_term_kernel,
            block.images * tiles.ceil_div(p.n, chosen.block) ** 2,
            (attention, norm_factor, p.inv_p, norm_term, block.b0, p.n, block.texts)
            + (*attention.stride()[:2], norm_term.stride(1)),
            dict(
                BLOCK=chosen.block,
                BLOCK_K=chosen.block_k,
                A_ALIGN=tiles.alignment(attention),
                C_ALIGN=tiles.NORM_TERM_ALIGNMENT,
                ADD=block.k0 > 0,
                OPERANDS=launch.kernels().DTYPES[torch.float32 if wide else torch.bfloat16],
                PRECISION=precision,
            ),
            chosen.warps,
            chosen.stages,
            chosen.registers,
        )

    def norm_term_product(self, block: Block, norm_term: Tensor, raw: Tensor) -> None:
        p = self._p
        wide, precision = norm_term.dtype == torch.float32, self._precision
        if wide and p.patches.dtype != torch.float32 and torch.version.hip is None:
            precision = "tf32"  # holds patches of 16 bits exactly
        chosen = tiles.NORM_TERM_PRODUCT[norm_term.element_size()]
        block_d = min(chosen.block_d, max(16, tiles.power_of_two(p.d)))
        launch.run(
            launch.kernels().norm_term_product_kernel,
            block.images * tiles.ceil_div(p.n, chosen.block_n) * tiles.ceil_div(p.d, block_d),
            (norm_term, p.patches, p.inv_p, p.mask, raw, block.b0, p.n, p.d)
            + (norm_term.stride(1), *p.patches.stride(), *launch.mask_strides(p.mask)),
            dict(
                BLOCK_N=chosen.block_n,
                BLOCK_D=block_d,
                BLOCK_M=chosen.step,
                C_ALIGN=tiles.NORM_TERM_ALIGNMENT,
                HAS_MASK=p.mask is not None,
                EVEN_D=p.d % block_d == 0,
                PRECISION=precision,
            ),
            chosen.warps,
            chosen.stages,
        )

    def max_texts(self, grad_phi: Tensor, texts_sum: Tensor) -> None:
        p = self._p
        constants = tiles.max_texts(p.d)
        launch.run(
            launch.kernels().max_texts_kernel,
            tiles.ceil_div(p.k, constants["TEXTS"]) * tiles.ceil_div(p.d, constants["BLOCK_D"]),
            (p.patches, p.inv_p, p.inv_t, p.state, grad_phi, texts_sum, p.b, p.n, p.k, p.d, *p.patches.stride()),
            constants,
        )

    def max_patches(self, block: Block, grad_phi: Tensor, range_scale: Tensor | None, raw: Tensor) -> None:
        p = self._p
        chosen = tiles.MAX_PATCHES[p.patches.element_size()]
        block_d = min(chosen.block_d, max(16, tiles.power_of_two(p.d)))
        launch.run(
            launch.kernels().max_patches_kernel,
            block.images * tiles.ceil_div(p.n, chosen.block_n) * tiles.ceil_div(p.d, block_d),
            (p.texts, p.inv_p, p.inv_t, p.state, grad_phi, range_scale, raw)
            + (block.b0, p.n, p.k, p.d, *p.texts.stride()),
            dict(
                BLOCK_N=chosen.block_n,
                BLOCK_D=block_d,
                BLOCK_K=chosen.step,
                SCALED=range_scale is not None,
                EVEN_D=p.d % block_d == 0,
                PRECISION=self._precision,
            ),
            chosen.warps,
            chosen.stages,
        )

    def _weights_config(self, needs_temperature: bool) -> tiles.Config:
        p = self._p
        full = p.mask is not None or needs_temperature
        return tiles.config("weights_full" if full else "weights", p.patches, p.texts)

    def _programs(self, block: Block, chosen: tiles.Config) -> int:
        """Return the number of programs that share the tiles of W, or of the attention, of a block."""
        p = self._p
        return min(launch.programs(p.patches.device, chosen.per_processor), _weight_tiles(p, block, chosen))

    def _operands(
        self, chosen: tiles.Config, texts: Tensor, descriptors: bool = True
    ) -> tuple[tuple[Any, Any], launch.Constants]:
        """Return patches and texts as arguments of the kernels, and the constants of their tiles.

        `descriptors`: pass them as descriptors of bulk copies (TMA), where that is possible.
        """
        p = self._p
        operands: tuple[Any, Any] = p.patches, texts
        descriptors &= tiles.has_bulk_copies(p.patches.device) and tiles.are_describable(p.patches, texts)
        if descriptors:
            operands = _descriptors(p.patches, texts, chosen)
        return operands, dict(
            BLOCK_T=chosen.block_t,
            BLOCK_P=chosen.block_p,
            BLOCK_D=chosen.block_d,
            DESCRIPTORS=descriptors,
            HAS_MASK=p.mask is not None,
            EVEN_D=p.d % chosen.block_d == 0,
            PRECISION=self._precision,
        )

    def _gram_attention_constants(self, chosen: tiles.GramAttention, attention: Tensor) -> launch.Constants:
        """Return the constants of the kernels that compute q = G a."""
        return dict(
            BLOCK_T=chosen.block_t,
            BLOCK_M=chosen.block_m,
            BLOCK_N=chosen.block_n,
            A_ALIGN=tiles.alignment(attention),
            PRECISION=self._precision,
        ) | _temperature_constants(self._p.temperature)


def _temperature_constants(temperature: float | Tensor) -> launch.Constants:
    return dict(TAU_IS_TENSOR=isinstance(temperature, Tensor))


def _weight_tiles(p: Problem, block: Block, chosen: tiles.Config) -> int:
    return tiles.ceil_div(block.images * p.n, chosen.block_p) * tiles.ceil_div(block.texts, chosen.block_t)


def _images_of_a_quarter(p: Problem, chosen: tiles.Config) -> int:
    return tiles.images_of_a_tile(p.n, chosen.block_p // 4)


def _descriptors(patches: Tensor, texts: Tensor, chosen: tiles.Config) -> tuple[Any, Any]:
    from triton.tools.tensor_descriptor import TensorDescriptor

    (b, n, d), k = patches.shape, len(texts)
    return (
        TensorDescriptor(patches, [b * n, d], [patches.stride(1), 1], [chosen.block_p, chosen.block_d]),
        TensorDescriptor(texts, [k, d], [texts.stride(0), 1], [chosen.block_t, chosen.block_d]),
    )


def fits_sigmoid(form: str, n: int) -> bool:
    """Return True if a tile holds the patches of an image, which `sigmoid_step` needs.

    One product of padded images then replaces two, of which the second is not padded; as the padding is less than
    half of an image (for 32 patches or fewer the forward pads as well), it is never dearer.
    """
    return form == "dot" and n <= tiles.MOST_SIGMOID_PATCHES


# mypy is right that TritonLaunches lacks launches, but these are called only if `fits_one_tile`.
compatibility_forward = functools.partial(order.compatibility_forward, TritonLaunches)  # type: ignore[arg-type]
sigmoid_step = functools.partial(order.sigmoid_step, TritonLaunches)  # type: ignore[arg-type]
compatibility_backward = functools.partial(order.compatibility_backward, TritonLaunches)  # type: ignore[arg-type]
