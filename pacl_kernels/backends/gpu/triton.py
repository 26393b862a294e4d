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
from . import largest, launch, lists, norm_terms, order, sigmoid, tiles
from .blocks import Block
from .layout import attention_strides, by_image, by_row, pitch, strides
from .loss import loss_backward, loss_forward
from .packed import Packed
from .problem import Problem, SigmoidPairs, Upstream
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
        self._patch_strides, self._mask_strides = strides(p)
        self._strides = (*self._patch_strides, *p.texts.stride(), *self._mask_strides)
        self._precision = launch.float32_precision() if p.patches.dtype == torch.float32 else "ieee"

    def max_forward(self) -> None:
        self._forward(1.0, running_max=False, largest=True)  # the kernel ignores the temperature, so any number will do

    def dot_forward(self) -> None:
        for running_max in launch.running_max_variants(self._p.temperature):
            self._forward(self._p.temperature, running_max, largest=False)

    def _forward(self, temperature: float | Tensor, running_max: bool, largest: bool) -> None:
        p = self._p
        if p.packed is not None:
            self._packed_forward(p.packed, temperature, running_max, largest)
            return
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

    def _packed_forward(self, packed: Packed, temperature: float | Tensor, running_max: bool, largest: bool) -> None:
        p = self._p
        chosen = tiles.config("forward_running_max", p.patches, p.texts)  # a loop over images takes as many registers
        # A tile is gone over once for each of its images.
        chosen = chosen._replace(block_p=max(32, min(chosen.block_p, tiles.power_of_two(2 * packed.rows // p.b))))
        programs = launch.programs(p.patches.device, chosen.per_processor)
        text_tiles = tiles.ceil_div(p.k, chosen.block_t)
        runs = packed.runs(chosen.block_p, text_tiles, programs)
        operands, constants = self._operands(chosen, p.texts)
        launch.run(
            launch.kernels().packed_forward_kernel,
            min(programs, text_tiles * len(runs)),
            (*operands, p.mask, temperature, p.inv_p, p.inv_t, packed.on_device, runs, p.phi, p.state)
            + (len(runs), p.k, p.d, *self._patch_strides[1:], *p.texts.stride(), self._mask_strides[1]),
            constants | dict(MAX=largest, RUNNING_MAX=running_max) | _temperature_constants(temperature),
            chosen.warps,
            chosen.stages,
            fma=not running_max,
        )

    def gram(self, block: Block, gram: Tensor) -> None:
        p = self._p
        for chosen, programs, tables in by_image(
            p,
            block,
            lambda n: tiles.gram_config(n, p.patches.element_size()),
            lambda n, chosen: tiles.ceil_div(n, chosen.block) ** 2,
        ):
            launch.run(
                launch.kernels().gram_kernel,
                programs,
                (p.patches, p.mask, p.inv_p, gram, block.b0, p.n, p.d)
                + (*self._patch_strides, *self._mask_strides, pitch(p, gram)),
                dict(
                    BLOCK_N=chosen.block,
                    BLOCK_D=chosen.block_d,
                    HAS_MASK=p.mask is not None,
                    EVEN_D=p.d % chosen.block_d == 0,
                    PRECISION=self._precision,
                )
                | tables,
                chosen.warps,
                chosen.stages,
            )

    def attention(self, block: Block, attention: Tensor, state_is_entropy: bool) -> None:
        p = self._p
        chosen = self._weights_config(needs_temperature=False)
        operands, constants = self._operands(chosen, p.texts[block.k0 : block.k1])
        first, end, n, tables = by_row(p, block)
        if p.packed is not None:
            tables["first_image"] = block.b0
            attention.zero_()
        constants |= dict(ALIGN=math.gcd(n, tiles.alignment(attention)), IMAGES=_images_of_a_quarter(p, chosen))
        launch.run(
            launch.kernels().attention_kernel,
            self._programs(block, chosen),
            (*operands, p.mask, p.temperature, p.inv_p, p.inv_t[block.k0 :])
            + (p.phi[:, block.k0 :] if state_is_entropy else None, p.state[:, block.k0 :], attention)
            + (first, end, n, block.texts, p.d, *self._strides, p.k, *attention_strides(p, attention)),
            constants | tables | _temperature_constants(p.temperature),
            chosen.warps,
            chosen.stages,
            fma=False,
        )

    def cosine_forward_from_attention(self, block: Block, attention: Tensor, gram: Tensor) -> None:
        p = self._p
        for chosen, programs, tables in by_image(
            p,
            block,
            lambda n: tiles.gram_attention_config("forward", n, p.patches),
            lambda n, chosen: tiles.ceil_div(block.texts, chosen.block_t),
        ):
            launch.run(
                launch.kernels().cosine_forward_from_attention_kernel,
                programs,
                (attention, gram, p.temperature, p.phi[:, block.k0 :], p.state[:, block.k0 :], block.b0, p.n)
                + (block.texts, *attention_strides(p, attention), pitch(p, gram), p.k, MIN_POOLED_NORM),
                self._gram_attention_constants(chosen, attention) | tables,
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
        first, end, n, tables = by_row(p, block)
        launch.run(
            launch.kernels().dot_weights_kernel,
            self._programs(block, chosen),
            (*operands, p.mask, p.temperature, p.inv_p, p.inv_t[block.k0 :])
            + (p.phi[:, block.k0 :], p.state[:, block.k0 :], upstream.grad_phi[:, block.k0 :])
            + (upstream.range_scale, w, tau_parts, first, end, n, block.texts, p.d)
            + (*self._strides, p.k, w.stride(0)),
            constants | tables | dict(SCALED=upstream.range_scale is not None) | _temperature_constants(p.temperature),
            chosen.warps,
            chosen.stages,
            fma=False,
        )
        return tau_parts

    def cosine_weights_from_attention(
        self, block: Block, upstream: Upstream, attention: Tensor, gram: Tensor, w: Tensor, norm_factor: Tensor
    ) -> Tensor | None:
        p = self._p
        all_parts: list[Tensor] = []

        def config_of(n: int) -> tuple[tiles.GramAttention, bool]:
            chosen = tiles.gram_attention_config("weights", n, p.patches)
            return chosen, n <= chosen.block_m

        for (chosen, whole), programs, tables in by_image(
            p, block, config_of, lambda n, config: tiles.ceil_div(block.texts, config[0].block_t)
        ):
            tau_parts = p.phi.new_empty(programs) if upstream.needs_temperature else None
            if tau_parts is not None:
                all_parts.append(tau_parts)
            launch.run(
                launch.kernels().cosine_weights_from_attention_kernel,
                programs,
                (attention, gram, p.temperature, p.inv_p, p.inv_t[block.k0 :], p.state[:, block.k0 :])
                + (upstream.grad_phi[:, block.k0 :], upstream.range_scale, w, norm_factor, tau_parts)
                + (block.b0, p.n, block.texts, *attention_strides(p, attention), w.stride(0), pitch(p, gram))
                + (p.k, p.inv_t.stride(0) if p.inv_t.ndim == 2 else 0, MIN_POOLED_NORM),
                self._gram_attention_constants(chosen, attention)
                | dict(
                    N_ALIGN=math.gcd(p.n, 16) if p.packed is None else 1,
                    WHOLE=whole,
                    NEEDS_TAU=upstream.needs_temperature,
                    SCALED=upstream.range_scale is not None,
                )
                | tables,
                chosen.warps,
                chosen.stages,
            )
        return torch.cat(all_parts) if upstream.needs_temperature else None

    def sigmoid_tile(self, needs_temperature: bool) -> WeightsTile:
        # A row of W begins at a multiple of 16.
        return WeightsTile(sigmoid.tile(self._p, needs_temperature).block_t, 16)

    def sigmoid_dot_weights(self, block: Block, pairs: SigmoidPairs, w: Tensor | None) -> Tensor:
        return sigmoid.dot_weights(self._p, block, pairs, w, self._precision)

    def norm_term(self, block: Block, attention: Tensor, norm_factor: Tensor, norm_term: Tensor) -> None:
        norm_terms.write(self._p, block, attention, norm_factor, norm_term, self._precision)

    def norm_term_product(self, block: Block, norm_term: Tensor, raw: Tensor) -> None:
        norm_terms.add_product(self._p, block, norm_term, raw, self._precision)

    def max_texts(self, grad_phi: Tensor, texts_sum: Tensor) -> None:
        largest.texts(self._p, grad_phi, texts_sum)

    def max_patches(self, block: Block, grad_phi: Tensor, range_scale: Tensor | None, raw: Tensor) -> None:
        largest.patches(self._p, block, grad_phi, range_scale, raw, self._precision)

    def _weights_config(self, needs_temperature: bool) -> tiles.Config:
        p = self._p
        full = p.mask is not None or needs_temperature or p.packed is not None
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
    rows = p.rows(block)
    return tiles.ceil_div(rows.stop - rows.start, chosen.block_p) * tiles.ceil_div(block.texts, chosen.block_t)


def _images_of_a_quarter(p: Problem, chosen: tiles.Config) -> int:
    return 1 if p.packed is not None else tiles.images_of_a_tile(p.n, chosen.block_p // 4)


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
_BOTH = TritonLaunches, TritonLaunches  # of all pairs, and of lists
compatibility_forward = functools.partial(lists.compatibility_forward, *_BOTH)  # type: ignore[arg-type]
sigmoid_step = functools.partial(order.sigmoid_step, TritonLaunches)  # type: ignore[arg-type]
compatibility_backward = functools.partial(lists.compatibility_backward, *_BOTH)  # type: ignore[arg-type]
