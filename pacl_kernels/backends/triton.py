"""The two fused functions in Triton, for every GPU that it supports; `triton_kernels` holds the kernels.

Forward: the inverse norms, then one persistent product whose epilogue sums the softmax. Backward: for blocks of images,
the product again with an epilogue that writes W `[texts, rows]` into a workspace of fixed size, then ∂P = Wᵀ T and
∂T += W P as the library's products, and the projection that takes the norms into account. No atomics: the result is
deterministic. With TRITON_INTERPRET=1 set before triton is imported, the same kernels run on CPU tensors.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import math
import os
from types import ModuleType

import torch
from torch import Tensor

from ..reference import LARGEST_SCORE, MIN_POOLED_NORM
from . import triton_tiles as tiles

_MIN_TRITON = (3, 3)
_INTERPRETER_PROGRAMS = 3  # fewer than items, so that programs of the interpreter loop as those of a GPU do


def why_not(device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
    version = _triton_version()
    if version is None:
        return "triton is not installed; `pip install triton`"
    if version < _MIN_TRITON:
        return f"triton is {'.'.join(map(str, version))}, expected at least {'.'.join(map(str, _MIN_TRITON))}"
    if dtype is not None and dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, not {dtype}"
    if interpreted():
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


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


@functools.cache
def kernels() -> ModuleType:
    """The kernels' package, which imports triton: not before a kernel is needed."""
    from . import triton_kernels

    return triton_kernels


def score_forward(patches, texts, patch_mask, temperature, form, phi, stat) -> None:
    forward(Call, patches, texts, patch_mask, temperature, form, phi, stat)


def forward(kind: type[Call], patches, texts, patch_mask, temperature, form, phi, stat) -> None:
    """`kind`: whose launches are made, this backend's or those of one that is built on it."""
    if not phi.numel():
        return
    with _on_device(patches):
        kind(patches, texts, patch_mask, temperature, phi, stat).forward(form)


def score_backward(
    patches, texts, patch_mask, temperature, form, phi, stat, grad_phi, grad_patches, grad_texts, grad_temperature
) -> None:
    gradients = (grad_phi, grad_patches, grad_texts, grad_temperature)
    backward(Call, patches, texts, patch_mask, temperature, form, phi, stat, gradients)


def backward(kind: type[Call], patches, texts, patch_mask, temperature, form, phi, stat, gradients) -> None:
    with _on_device(patches):
        kind(patches, texts, patch_mask, temperature, phi, stat).backward(form, *gradients)


def loss_forward(phi: Tensor, scale, bias, loss: str, value: Tensor, statistics: Tensor | None) -> None:
    """Write the loss of φ `[B, B]`; for InfoNCE also `statistics` `[4, B]`, maximum and log-sum of rows and columns."""
    b = len(phi)
    with _on_device(phi):
        constants = _loss_constants(scale, bias)
        if loss == "sigmoid":
            sums = phi.new_empty(tiles.ceil_div(b, constants["ROWS"]))
            _launch(kernels().sigmoid_loss_kernel, len(sums), (phi, scale, bias, sums, b), constants, fused=False)
            value.copy_(sums.sum() / b)
            return
        row_largest, row_log, column_largest, column_log = statistics
        arguments = (phi, scale, bias, row_largest, row_log, b, b, b, 1)
        # The pair's logit is subtracted below: all are rounded alike.
        rows = tiles.ceil_div(b, constants["ROWS"])
        _launch(kernels().shifted_logsumexp_kernel, rows, arguments, constants, fused=False)
        # A column's neighbours in memory are other columns, so a program takes 32 of them.
        arguments, constants = (phi, scale, bias, column_largest, column_log, b, b, 1, b), constants | _COLUMN_TILE
        columns = tiles.ceil_div(b, constants["ROWS"])
        _launch(kernels().shifted_logsumexp_kernel, columns, arguments, constants, fused=False)
        pair = phi.diagonal() * scale
        if bias is not None:
            pair = pair + bias
        value.copy_(((row_largest - pair + row_log).mean() + (column_largest - pair + column_log).mean()) / 2)


def loss_backward(phi, scale, bias, loss: str, statistics, grad_loss, grad_phi, grad_scale, grad_bias) -> None:
    """Write ∂L/∂φ `[B, B]` and, 0-D, the gradients of logit scale and bias."""
    with _on_device(phi):
        constants = _loss_constants(scale, bias)
        programs = tiles.ceil_div(len(phi), constants["ROWS"])
        sums = phi.new_empty(2, programs)
        statistics = (None,) * 4 if statistics is None else tuple(statistics)
        arguments = (phi, scale, bias, *statistics, grad_loss, grad_phi, *sums, len(phi))
        _launch(
            *(kernels().loss_backward_kernel, programs, arguments, constants | dict(SIGMOID=loss == "sigmoid")),
            stages=2,
            fused=False,
        )
        grad_scale.copy_(sums[0].sum())
        grad_bias.copy_(sums[1].sum())


def upsample_argmax(scores, rows, columns, scale, labels, best, entropy) -> None:
    """As `backends/torch.py` says; a program takes a block of an image's pixels."""
    with _on_device(scores):
        arguments = (scores, *rows, *columns, scale, labels, best, entropy)
        arguments += (*scores.shape[1:], *labels.shape[1:], *scores.stride())
        constants = dict(SCALE_IS_TENSOR=isinstance(scale, Tensor), LARGEST=LARGEST_SCORE, BLOCK=_PIXELS)
        programs = len(scores) * tiles.ceil_div(labels[0].numel(), _PIXELS)
        _launch(kernels().upsample_argmax_kernel, programs, arguments, constants)


_PIXELS = 512
_ROW_TILE = dict(ROWS=4, BLOCK=512)
_COLUMN_TILE = dict(ROWS=32, BLOCK=64)


def _loss_constants(scale, bias) -> dict:
    return _ROW_TILE | dict(SCALE_IS_TENSOR=isinstance(scale, Tensor), BIAS_IS_TENSOR=isinstance(bias, Tensor))


class Call:
    """The inputs of one call, and the launches that are made of them for images [b0, b1) and texts [k0, k1)."""

    def __init__(self, patches: Tensor, texts: Tensor, patch_mask: Tensor | None, temperature, phi, stat):
        (self.b, self.n, self.d), self.k = patches.shape, len(texts)
        self.patches, self.texts, self.mask, self.temperature = patches, texts, patch_mask, temperature
        self.phi, self.stat = phi, stat
        self.full = patch_mask is not None  # whether the epilogue of the backward needs more registers
        self.inv_p, self.inv_t = _inverse_norms(patches, patch_mask), _inverse_norms(texts[:, None], None)
        self.strides = (*patches.stride(), *texts.stride(), *_mask_strides(patch_mask))
        # In float16, because a <= 1 and its rounding is divided by r τ: bfloat16 loses too much.
        self.attention_dtype = torch.float32 if patches.dtype == torch.float32 else torch.float16
        self.tau = dict(TAU_IS_TENSOR=isinstance(temperature, Tensor))
        self.precision = _float32_precision() if patches.dtype == torch.float32 else "ieee"

    def forward(self, form: str) -> None:
        self.scores(form)
        if form == "cosine":
            self.divide_by_pooled_norm()

    def divide_by_pooled_norm(self) -> None:
        """φ of `dot` to that of `cosine`: the attention again, now that its sum is known, and r² = aᵀ G a from that."""
        itemsize = self.attention_dtype.itemsize
        image_bytes = self.gram_bytes + self.padding_bytes(itemsize)
        blocks = tiles.plan_blocks(self.b, self.n, self.k, itemsize, image_bytes)
        attention = self.attention_workspace(blocks)
        gram = self.gram_workspace(blocks)
        for b0, b1 in ranges(self.b, blocks.images):
            self.gram(b0, b1, gram)
            for k0, k1 in ranges(self.k, blocks.texts):
                by_image = self.by_image(attention, b1 - b0, k1 - k0)
                self.attention(b0, b1, k0, k1, by_image, entropy_over=self.phi)
                self.cosine_forward(b0, b1, k0, k1, by_image, gram)

    def scores(self, form: str) -> None:
        """φ and STAT of the `max` form, or of `dot`."""
        largest = form == "max"  # reads no temperature, so nothing depends on where that is
        temperature = 1.0 if largest else self.temperature
        pad = tiles.power_of_two(self.n) if self.n <= tiles.PADDED else 0
        for safe in _variants(temperature):
            chosen = tiles.config("forward_safe" if safe else "forward", self.patches, self.texts, padded=pad > 0)
            images = max(1, chosen.block_p // pad) if pad else _images_of_a_tile(self.n, chosen.block_p)
            programs = _programs(self.patches.device, chosen.per_processor)
            text_tiles = tiles.ceil_div(self.k, chosen.block_t)
            run = images if pad else tiles.images_per_run(self.b, self.n, text_tiles, chosen.block_p, programs)
            p, t, tile = self._operands(chosen, self.texts, descriptors=not pad)
            tile |= dict(PAD=pad, IMAGES=images, MAX=largest, SAFE=safe)
            _launch(
                kernels().score_forward_kernel,
                min(programs, text_tiles * tiles.ceil_div(self.b, run)),
                (p, t, self.mask, temperature, self.inv_p, self.inv_t, self.phi, self.stat)
                + (self.b, self.n, self.k, self.d, *self.strides, run),
                tile | dict(TAU_IS_TENSOR=isinstance(temperature, Tensor)),
                chosen.warps,
                chosen.stages,
            )

    def backward(self, form: str, grad_phi, grad_patches, grad_texts, grad_temperature) -> None:
        cosine, dtype = form == "cosine", self.patches.dtype
        self.full |= form == "dot" and grad_temperature is not None
        self.scale = self._weight_scale(grad_phi) if dtype == torch.float16 else None
        itemsize = dtype.itemsize + (self.attention_dtype.itemsize if cosine else 0)
        # float16 may overflow before the scale is undone; a sum over blocks of texts would be rounded each time.
        widened = self.scale is not None or self.k > tiles.text_block(self.n, self.k, itemsize)
        image_bytes = 4 * self.d * widened + dtype.itemsize * self.d * (self.mask is not None)
        image_bytes += (self.n + 16) * (4 + self.attention_dtype.itemsize) * cosine
        image_bytes = self.n * image_bytes + self.padding_bytes(itemsize) * cosine
        blocks = tiles.plan_blocks(self.b, self.n, self.k, itemsize, image_bytes)
        w = self.workspace(blocks, dtype)
        texts_sum = self.phi.new_zeros(self.k, self.d) if grad_texts is not None else None
        tau_sum = self.phi.new_zeros((), dtype=torch.float64) if grad_temperature is not None else None
        if cosine:
            attention, gram = self.attention_workspace(blocks), self.gram_workspace(blocks)
            curvature = self.phi.new_empty(blocks.images * blocks.texts)
            pooled = self.pooled_workspace(blocks, torch.float32 if widened else dtype)
        if grad_patches is not None and widened:
            patches_sum = self.phi.new_empty(blocks.images * self.n, self.d)

        for b0, b1 in ranges(self.b, blocks.images):
            rows = (b1 - b0) * self.n
            if grad_patches is not None:
                into = grad_patches[b0:b1].view(rows, self.d)
                raw = patches_sum[:rows] if widened else into
            if grad_texts is not None:
                some_patches = self.patches[b0:b1]
                if self.mask is not None:  # 0 times the NaN behind a mask is not 0
                    some_patches = some_patches.masked_fill(~self.mask[b0:b1, :, None], 0.0)
                some_patches = some_patches.reshape(rows, self.d)
            if cosine:
                self.gram(b0, b1, gram)
            for k0, k1 in ranges(self.k, blocks.texts):
                if cosine:
                    by_image = self.by_image(attention, b1 - b0, k1 - k0)
                    sums = self.cosine_weights(
                        b0, b1, k0, k1, by_image, gram, grad_phi, w, curvature, grad_temperature is not None
                    )
                elif form == "max":
                    self.max_weights(b0, b1, k0, k1, w, grad_phi)
                else:
                    sums = self.weights(b0, b1, k0, k1, w, grad_phi, grad_temperature is not None)
                if grad_temperature is not None and form != "max":
                    tau_sum += sums.sum(dtype=torch.float64)
                weights = w[: k1 - k0, :rows]
                if grad_patches is not None:
                    if not widened:
                        torch.mm(weights.T, self.texts[k0:k1], out=raw)
                    elif k0 == 0:
                        raw.copy_(_product(weights.T, self.texts[k0:k1]))
                    else:
                        raw += _product(weights.T, self.texts[k0:k1])
                    if cosine:
                        self.curvature(b0, b1, k0, k1, by_image, curvature, pooled)
                if grad_texts is not None:
                    texts_sum[k0:k1] += _product(weights, some_patches)
            if grad_patches is not None:
                if cosine:
                    self.add_pooled(b0, b1, pooled, raw)
                mask = None if self.mask is None else self.mask[b0:b1]
                _project_out(raw, self.patches[b0:b1], into, mask, self.scale)
        if grad_texts is not None:
            _project_out(texts_sum, self.texts[:, None], grad_texts, None, self.scale)
        if grad_temperature is not None:
            grad_temperature.copy_(-tau_sum / self.temperature**2)

    def weights(self, b0, b1, k0, k1, w: Tensor, grad_phi: Tensor, needs_tau=False) -> Tensor | None:
        """W of the `dot` form into `w`; returns the temperature's sums if needed."""
        return self._weights(b0, b1, k0, k1, w, (0, w.stride(0)), self.phi, grad_phi, needs_tau)

    def attention(self, b0, b1, k0, k1, attention: Tensor, entropy_over: Tensor | None = None) -> None:
        """The attention into `attention` `[images, texts, pitch]`, but for what lies past column N.

        `entropy_over`: the `dot` φ that STAT is relative to; without it STAT is the log-sum-exp.
        """
        self._weights(b0, b1, k0, k1, attention, attention.stride()[:2], entropy_over, None, False)

    def _weights(self, b0, b1, k0, k1, w, strides, phi, grad_phi, needs_tau) -> Tensor | None:
        attention = grad_phi is None
        chosen = self.backward_config()
        rows = (b1 - b0) * self.n
        items = tiles.ceil_div(rows, chosen.block_p) * tiles.ceil_div(k1 - k0, chosen.block_t)
        sums = self.phi.new_empty(items) if needs_tau else None
        some = self.texts[k0:k1]
        p, t, tile = self._operands(chosen, some)
        _launch(
            kernels().score_backward_kernel,
            min(_programs(self.patches.device, chosen.per_processor), items),
            (p, t, self.mask, self.temperature, self.inv_p, self.inv_t[k0:])
            + (None if phi is None else phi[:, k0:], self.stat[:, k0:], None if attention else grad_phi[:, k0:])
            + (None if attention else self.scale, w, sums, b0, b1, self.n, k1 - k0, self.d)
            + (*self.strides, self.k, *strides),
            tile
            | dict(ALIGN=math.gcd(self.n, tiles.alignment(w)) if attention else 1)
            | dict(IMAGES=_images_of_a_tile(self.n, chosen.block_p // 4), ATTENTION=attention, NEEDS_TAU=needs_tau)
            | dict(SCALED=not attention and self.scale is not None),
            chosen.warps,
            chosen.stages,
        )
        return sums

    def max_weights(self, b0, b1, k0, k1, w: Tensor, grad_phi: Tensor) -> None:
        chosen = self.backward_config()
        block_t, block_p = min(64, chosen.block_t), min(64, chosen.block_p)
        _launch(
            kernels().max_weights_kernel,
            tiles.ceil_div((b1 - b0) * self.n, block_p) * tiles.ceil_div(k1 - k0, block_t),
            (self.inv_p, self.inv_t[k0:], self.stat[:, k0:], grad_phi[:, k0:], self.scale, w, b0, b1, self.n, k1 - k0)
            + (self.k, w.stride(0)),
            dict(BLOCK_T=block_t, BLOCK_P=block_p, SCALED=self.scale is not None),
            8,
        )

    def gram(self, b0, b1, gram: Tensor) -> None:
        chosen = tiles.gram_config(self.n, self.patches.element_size())
        _launch(
            kernels().gram_kernel,
            (b1 - b0) * tiles.ceil_div(self.n, chosen.block) ** 2,
            (self.patches, self.mask, self.inv_p, gram, b0, self.n, self.d)
            + (*self.patches.stride(), *_mask_strides(self.mask), gram.stride(1)),
            dict(
                BLOCK_N=chosen.block,
                BLOCK_D=chosen.block_d,
                HAS_MASK=self.mask is not None,
                EVEN_D=self.d % chosen.block_d == 0,
                PRECISION=self.precision,
            ),
            chosen.warps,
            chosen.stages,
        )

    def cosine_forward(self, b0, b1, k0, k1, attention: Tensor, gram: Tensor) -> None:
        chosen = tiles.pool_config("forward", self.n, self.patches)
        _launch(
            kernels().cosine_forward_kernel,
            (b1 - b0) * tiles.ceil_div(k1 - k0, chosen.block_t),
            (attention, gram, self.temperature, self.phi[:, k0:], self.stat[:, k0:], b0, self.n, k1 - k0)
            + (*attention.stride()[:2], gram.stride(1), self.k, MIN_POOLED_NORM),
            *self._pool_tile(chosen, attention),
        )

    def cosine_weights(self, b0, b1, k0, k1, attention, gram, grad_phi, w, curvature, needs_tau) -> Tensor | None:
        """The attention, from it W of the cosine form, and the factors of Σ a aᵀ; returns the temperature's sums."""
        self.attention(b0, b1, k0, k1, attention)
        chosen = tiles.pool_config("backward", self.n, self.patches)
        items = (b1 - b0) * tiles.ceil_div(k1 - k0, chosen.block_t)
        sums = self.phi.new_empty(items) if needs_tau else None
        _launch(
            kernels().cosine_backward_kernel,
            items,
            (attention, gram, self.temperature, self.inv_p, self.inv_t[k0:], self.stat[:, k0:], grad_phi[:, k0:])
            + (self.scale, w, curvature, sums, b0, self.n, k1 - k0)
            + (*attention.stride()[:2], w.stride(0), gram.stride(1), self.k, MIN_POOLED_NORM),
            *self._pool_tile(
                chosen,
                attention,
                N_ALIGN=math.gcd(self.n, 16),
                WHOLE=self.n <= chosen.block_m,
                NEEDS_TAU=needs_tau,
                SCALED=self.scale is not None,
            ),
        )
        return sums

    def curvature(self, b0, b1, k0, k1, attention, curvature, pooled) -> None:
        """C into `pooled` `[images, N, N]`, from the attention `[images, texts, pitch]`."""
        # The factors are beyond the range of float16, and bfloat16 would lose its last three bits.
        wide, precision = self.patches.dtype != torch.bfloat16, self.precision
        if self.patches.dtype == torch.float16 and torch.version.hip is None:
            precision = "tf32"
        chosen = tiles.curvature_config(self.n, 4 if wide else 2, self.patches.device)
        _launch(
            kernels().curvature_kernel,
            (b1 - b0) * tiles.ceil_div(self.n, chosen.block) ** 2,
            (attention, curvature, self.inv_p, pooled, b0, self.n, k1 - k0)
            + (attention.stride(0), attention.stride(1), pooled.stride(1)),
            dict(
                BLOCK=chosen.block,
                BLOCK_K=chosen.block_k,
                A_ALIGN=tiles.alignment(attention),
                C_ALIGN=tiles.POOLED_ALIGNMENT,
                ADD=k0 > 0,
                OPERANDS=kernels().DTYPES[torch.float32 if wide else torch.bfloat16],
                PRECISION=precision,
            ),
            chosen.warps,
            chosen.stages,
            chosen.registers,
        )

    def add_pooled(self, b0, b1, pooled: Tensor, raw: Tensor) -> None:
        """C P of each image onto `raw` `[rows, D]`; C `[images, N, N]` and `raw` have one dtype."""
        wide = pooled.dtype == torch.float32
        chosen = tiles.POOLED[pooled.element_size()]
        precision = self.precision
        if wide and self.patches.dtype != torch.float32 and torch.version.hip is None:
            precision = "tf32"  # holds patches of 16 bits exactly
        block_d = min(chosen.block_d, max(16, tiles.power_of_two(self.d)))
        _launch(
            kernels().add_pooled_kernel,
            (b1 - b0) * tiles.ceil_div(self.n, chosen.block_n) * tiles.ceil_div(self.d, block_d),
            (pooled, self.patches, self.mask, raw, b0, self.n, self.d)
            + (pooled.stride(1), *self.patches.stride(), *_mask_strides(self.mask)),
            dict(
                BLOCK_N=chosen.block_n,
                BLOCK_D=block_d,
                BLOCK_M=chosen.block_m,
                C_ALIGN=tiles.POOLED_ALIGNMENT,
                HAS_MASK=self.mask is not None,
                EVEN_D=self.d % block_d == 0,
                PRECISION=precision,
            ),
            chosen.warps,
            chosen.stages,
        )

    def backward_config(self) -> tiles.Config:
        return tiles.config("backward_full" if self.full else "backward", self.patches, self.texts)

    def workspace(self, blocks: tiles.Blocks, dtype: torch.dtype) -> Tensor:
        """Room for whole tiles `[texts, rows]` of a block."""
        chosen = self.backward_config()
        rows, texts = min(self.b, blocks.images) * self.n, min(self.k, blocks.texts)
        texts, rows = (tiles.ceil_div(x, step) * step for x, step in ((texts, chosen.block_t), (rows, chosen.block_p)))
        return self.patches.new_empty(texts, rows, dtype=dtype)

    def attention_workspace(self, blocks: tiles.Blocks, dtype: torch.dtype | None = None) -> Tensor:
        """`[images, texts, pitch]`, rows at multiples of 16 bytes.

        Zeros, for rows are read whole: what lies past column N stays as it is.
        """
        dtype = dtype or self.attention_dtype
        return self.patches.new_zeros(*blocks, tiles.pitch(self.n, dtype.itemsize), dtype=dtype)

    def by_image(self, attention: Tensor, images: int, texts: int) -> Tensor:
        """The part of that workspace for a block, without gaps."""
        return attention.flatten(0, 1)[: images * texts].unflatten(0, (images, texts))

    def padding_bytes(self, itemsize: int) -> int:
        """Of one image in `attention_workspace`, past column N."""
        texts = tiles.text_block(self.n, self.k, itemsize)
        size = self.attention_dtype.itemsize
        return (tiles.pitch(self.n, size) - self.n) * texts * size

    @property
    def gram_bytes(self) -> int:
        """Of one image's Gram matrix."""
        return self.n * tiles.ceil_div(self.n, 16) * 16 * self.attention_dtype.itemsize

    def gram_workspace(self, blocks: tiles.Blocks) -> Tensor:
        return self.patches.new_empty(
            blocks.images, self.n, tiles.ceil_div(self.n, 16) * 16, dtype=self.attention_dtype
        )

    def pooled_workspace(self, blocks: tiles.Blocks, dtype: torch.dtype) -> Tensor:
        """C `[images, N, N]`, rows at multiples of 16 bytes."""
        step = tiles.POOLED_ALIGNMENT
        rows = self.patches.new_empty(blocks.images, self.n, tiles.ceil_div(self.n, step) * step, dtype=dtype)
        return rows[:, :, : self.n]

    def _operands(self, chosen: tiles.Config, texts: Tensor, descriptors: bool = True) -> tuple:
        """Patches and texts as the kernels take them, and the constants of their tiles."""
        p, t, descriptors = _operands(self.patches, texts, chosen) if descriptors else (self.patches, texts, False)
        return (
            p,
            t,
            self.tau
            | dict(
                BLOCK_T=chosen.block_t,
                BLOCK_P=chosen.block_p,
                BLOCK_D=chosen.block_d,
                DESCRIPTORS=descriptors,
                HAS_MASK=self.mask is not None,
                EVEN_D=self.d % chosen.block_d == 0,
                PRECISION=self.precision,
            ),
        )

    def _pool_tile(self, chosen: tiles.Pool, attention: Tensor, **constants) -> tuple[dict, int, int]:
        """Constants, warps and stages of the products with the Gram matrix."""
        constants |= dict(BLOCK_T=chosen.block_t, BLOCK_M=chosen.block_m, BLOCK_N=chosen.block_n)
        constants |= dict(A_ALIGN=tiles.alignment(attention), PRECISION=self.precision)
        return constants | self.tau, chosen.warps, chosen.stages

    def _weight_scale(self, grad_phi: Tensor) -> Tensor:
        """The power of two that brings the bound of |W|, max|g| (1 + 2 / τ) max 1/‖p‖ max 1/‖t‖, to 2¹⁴.

        Computed on the device. In the cosine form W may reach 1 / r times that bound; infinity begins at 4 times it.
        """
        bound = grad_phi.abs().amax() * self.inv_p.amax() * self.inv_t.amax() * (1.0 + 2.0 / self.temperature)
        exponent = torch.floor(14.0 - torch.log2(bound)).nan_to_num(0.0, 100.0, -100.0).clamp_(-100.0, 100.0)
        return torch.exp2(exponent)


def ranges(size: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(start + step, size)) for start in range(0, size, step)]


def _images_of_a_tile(n: int, block_p: int) -> int:
    """Most images that a tile of rows touches, where tiles start at the border of an image."""
    return 1 if n % block_p == 0 else (block_p - 2) // n + 2


def _float32_precision() -> str:
    """How products of float32 are computed: in one tf32 product where torch's own setting allows it, else in three."""
    if torch.version.hip is not None:
        return "ieee"
    if hasattr(
        torch.backends.cuda.matmul, "fp32_precision"
    ):  # torch 2.9; once it is set, the older setting is an error
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _operands(patches: Tensor, texts: Tensor, chosen: tiles.Config) -> tuple:
    """Patches and texts as the kernels take them, and whether as descriptors of bulk copies (TMA)."""
    (b, n, d), k = patches.shape, len(texts)
    if not (tiles.has_bulk_copies(patches.device) and tiles.are_describable(patches, texts)):
        return patches, texts, False
    from triton.tools.tensor_descriptor import TensorDescriptor

    return (
        TensorDescriptor(patches, [b * n, d], [patches.stride(1), 1], [chosen.block_p, chosen.block_d]),
        TensorDescriptor(texts, [k, d], [texts.stride(0), 1], [chosen.block_t, chosen.block_d]),
        True,
    )


def _variants(temperature) -> tuple[bool, ...]:
    """Whether with a running maximum: a temperature on the device is not read, both are launched and one returns."""
    if isinstance(temperature, Tensor):
        return (False, True)
    return (temperature < kernels().PLAIN_TEMPERATURE.value,)


def _inverse_norms(x: Tensor, mask: Tensor | None) -> Tensor:
    """1 / ‖x‖ `[B N]` of `[B, N, D]`."""
    rows_count, d = x.shape[0] * x.shape[1], x.shape[2]
    inverse = x.new_empty(rows_count, dtype=torch.float32)
    block_d, rows = _row_blocks(d)
    arguments = (x, mask, inverse, rows_count, x.shape[1], d, *x.stride(), *_mask_strides(mask))
    constants = dict(ROWS=rows, BLOCK_D=block_d, HAS_MASK=mask is not None)
    _launch(kernels().inverse_norms_kernel, tiles.ceil_div(rows_count, rows), arguments, constants)
    return inverse


def _project_out(grad: Tensor, x: Tensor, out: Tensor, mask: Tensor | None, scale: Tensor | None) -> None:
    rows_count, d = grad.shape
    block_d, rows = _row_blocks(d)
    arguments = (grad, x, out, mask, scale, rows_count, x.shape[1], d, *x.stride(), *_mask_strides(mask))
    constants = dict(ROWS=rows, BLOCK_D=block_d, HAS_MASK=mask is not None, SCALED=scale is not None)
    _launch(kernels().project_out_kernel, tiles.ceil_div(rows_count, rows), arguments, constants)


def _row_blocks(d: int) -> tuple[int, int]:
    """Step along D, and rows of a program."""
    block_d = min(512, max(16, tiles.power_of_two(d)))
    return block_d, 2048 // block_d


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, whatever their dtype."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda and "dtype" in torch.ops.aten.mm.overloads():  # torch 2.8
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _launch(
    kernel, programs: int, arguments: tuple, constants: dict, warps=4, stages=3, registers: int = 0, fused: bool = True
) -> None:
    """`fused`: whether a product may be added without being rounded."""
    limit = {"maxnreg": registers} if registers else {}  # of NVIDIA's alone
    options = dict(num_warps=warps, num_stages=stages, enable_fp_fusion=fused)
    kernel[(programs,)](*arguments, **constants, **options, **limit)


def _programs(device: torch.device, per_processor: int) -> int:
    return _INTERPRETER_PROGRAMS if device.type == "cpu" else _processors(device) * per_processor


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _on_device(x: Tensor):
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _mask_strides(mask: Tensor | None) -> tuple[int, int]:
    return (0, 0) if mask is None else mask.stride()
