"""One call of the fused functions in Triton: the order of its launches, and those of the `dot` and `max` forms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import run as launch
from . import tiles
from .cosine import CosineLaunches


class Call(CosineLaunches):
    """The inputs of one call, and the launches that are made of them for images [b0, b1) and texts [k0, k1)."""

    def __init__(self, patches: Tensor, texts: Tensor, patch_mask: Tensor | None, temperature, phi, state):
        (self.b, self.n, self.d), self.k = patches.shape, len(texts)
        self.patches, self.mask, self.temperature = patches, patch_mask, temperature
        self.raw_texts, self.texts = texts, texts
        self.phi, self.state = phi, state
        self.full = patch_mask is not None  # whether the epilogue of the backward needs more registers
        self.inv_p = launch.inverse_norms(patches, patch_mask)
        if texts.dtype == torch.float16:  # whose products and weights are in the range of float32
            self.raw_inv_t = self.inv_t = launch.inverse_norms(texts[:, None], None)
        else:  # W, which is divided by both norms, is in range whatever the texts' norms are
            self.texts, self.inv_t = texts.new_empty(texts.shape), phi.new_empty(self.k)
            self.raw_inv_t = launch.inverse_norms(texts[:, None], None, (self.texts, self.inv_t))
        self.strides = (*patches.stride(), *self.texts.stride(), *launch.mask_strides(patch_mask))
        # In float16, because a <= 1 and its rounding is divided by r τ: bfloat16 loses too much.
        self.attention_dtype = torch.float32 if patches.dtype == torch.float32 else torch.float16
        self.tau = dict(TAU_IS_TENSOR=isinstance(temperature, Tensor))
        self.precision = launch.float32_precision() if patches.dtype == torch.float32 else "ieee"

    def forward(self, form: str) -> None:
        self.scores(form)
        if form == "cosine":
            self.divide_by_pooled_norm()

    def scores(self, form: str) -> None:
        """φ and STAT of the `max` form, or of `dot`."""
        largest = form == "max"  # reads no temperature, so nothing depends on where that is
        temperature = 1.0 if largest else self.temperature
        pad = tiles.power_of_two(self.n) if self.n <= tiles.PADDED else 0
        for safe in launch.variants(temperature):
            chosen = tiles.config("forward_safe" if safe else "forward", self.patches, self.texts, padded=pad > 0)
            images = max(1, chosen.block_p // pad) if pad else launch.images_of_a_tile(self.n, chosen.block_p)
            programs = launch.programs(self.patches.device, chosen.per_processor)
            text_tiles = tiles.ceil_div(self.k, chosen.block_t)
            run = images if pad else tiles.images_per_run(self.b, self.n, text_tiles, chosen.block_p, programs)
            p, t, tile = self._operands(chosen, self.texts, descriptors=not pad)
            tile |= dict(PAD=pad, IMAGES=images, MAX=largest, SAFE=safe)
            launch.run(
                launch.kernels().score_forward_kernel,
                min(programs, text_tiles * tiles.ceil_div(self.b, run)),
                (p, t, self.mask, temperature, self.inv_p, self.inv_t, self.phi, self.state)
                + (self.b, self.n, self.k, self.d, *self.strides, run),
                tile | dict(TAU_IS_TENSOR=isinstance(temperature, Tensor)),
                chosen.warps,
                chosen.stages,
                fused=not safe,
            )

    def backward(self, form: str, grad_phi, grad_patches, grad_texts, grad_temperature) -> None:
        if form == "max":
            self.max_backward(grad_phi, grad_patches, grad_texts)
            if grad_temperature is not None:
                grad_temperature.zero_()
            return
        cosine, dtype = form == "cosine", self.patches.dtype
        self.full |= form == "dot" and grad_temperature is not None
        self.scale = self._weight_scale(form, grad_phi) if dtype == torch.float16 else None
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

        for b0, b1 in launch.ranges(self.b, blocks.images):
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
            for k0, k1 in launch.ranges(self.k, blocks.texts):
                if cosine:
                    by_image = self.by_image(attention, b1 - b0, k1 - k0)
                    sums = self.cosine_weights(
                        b0, b1, k0, k1, by_image, gram, grad_phi, w, curvature, grad_temperature is not None
                    )
                else:
                    sums = self.weights(b0, b1, k0, k1, w, grad_phi, grad_temperature is not None)
                if grad_temperature is not None:
                    tau_sum += sums.sum(dtype=torch.float64)
                weights = w[: k1 - k0, :rows]
                if grad_patches is not None:
                    if not widened:
                        torch.mm(weights.T, self.texts[k0:k1], out=raw)
                    elif k0 == 0:
                        raw.copy_(launch.product(weights.T, self.texts[k0:k1]))
                    else:
                        raw += launch.product(weights.T, self.texts[k0:k1])
                    if cosine:
                        self.curvature(b0, b1, k0, k1, by_image, curvature, pooled)
                if grad_texts is not None:
                    texts_sum[k0:k1] += launch.product(weights, some_patches)
            if grad_patches is not None:
                if cosine:
                    self.add_pooled(b0, b1, pooled, raw)
                mask = None if self.mask is None else self.mask[b0:b1]
                inverse = self.inv_p[b0 * self.n :]
                launch.project_out(raw, self.patches[b0:b1], inverse, into, mask, self.scale)
        if grad_texts is not None:
            self.texts_gradient(texts_sum, grad_texts, self.scale)
        if grad_temperature is not None:
            if not cosine:
                tau_sum = tau_sum / self.temperature / self.temperature
            grad_temperature.copy_(-tau_sum)

    def weights(self, b0, b1, k0, k1, w: Tensor, grad_phi: Tensor, needs_tau=False) -> Tensor | None:
        """W of the `dot` form into `w`; returns the temperature's sums if needed."""
        return self._weights(b0, b1, k0, k1, w, (0, w.stride(0)), self.phi, grad_phi, needs_tau)

    def _weights(self, b0, b1, k0, k1, w, strides, phi, grad_phi, needs_tau) -> Tensor | None:
        attention = grad_phi is None
        chosen = self.backward_config()
        rows = (b1 - b0) * self.n
        items = tiles.ceil_div(rows, chosen.block_p) * tiles.ceil_div(k1 - k0, chosen.block_t)
        sums = self.phi.new_empty(items) if needs_tau else None
        some = self.texts[k0:k1]
        p, t, tile = self._operands(chosen, some)
        launch.run(
            launch.kernels().score_backward_kernel,
            min(launch.programs(self.patches.device, chosen.per_processor), items),
            (p, t, self.mask, self.temperature, self.inv_p, self.inv_t[k0:])
            + (None if phi is None else phi[:, k0:], self.state[:, k0:], None if attention else grad_phi[:, k0:])
            + (None if attention else self.scale, w, sums, b0, b1, self.n, k1 - k0, self.d)
            + (*self.strides, self.k, *strides),
            tile
            | dict(ALIGN=math.gcd(self.n, tiles.alignment(w)) if attention else 1)
            | dict(IMAGES=launch.images_of_a_tile(self.n, chosen.block_p // 4))
            | dict(ATTENTION=attention, NEEDS_TAU=needs_tau)
            | dict(SCALED=not attention and self.scale is not None),
            chosen.warps,
            chosen.stages,
            fused=False,
        )
        return sums

    def max_backward(self, grad_phi: Tensor, grad_patches: Tensor | None, grad_texts: Tensor | None) -> None:
        """Gradients of the `max` form: sums over the winners, in float32 until they are projected."""
        itemsize = self.patches.element_size()
        if grad_texts is not None:
            texts_sum = self.phi.new_empty(self.k, self.d)
            chosen = tiles.max_texts(self.d)
            launch.run(
                launch.kernels().max_texts_kernel,
                tiles.ceil_div(self.k, chosen["TEXTS"]) * tiles.ceil_div(self.d, chosen["BLOCK_D"]),
                (self.patches, self.inv_p, self.inv_t, self.state, grad_phi, texts_sum)
                + (self.b, self.n, self.k, self.d, *self.patches.stride()),
                chosen,
            )
            self.texts_gradient(texts_sum, grad_texts, None)
        if grad_patches is None:
            return
        scale = _power_of_two_below(grad_phi, self.inv_t) if self.patches.dtype == torch.float16 else None
        images = max(1, min(self.b, tiles.WORKSPACE // (4 * self.n * self.d)))
        raw = self.phi.new_empty(images * self.n, self.d)
        chosen = tiles.MAX_PATCHES[itemsize]
        block_d = min(chosen.block_d, max(16, tiles.power_of_two(self.d)))
        for b0, b1 in launch.ranges(self.b, images):
            some = raw[: (b1 - b0) * self.n]
            launch.run(
                launch.kernels().max_patches_kernel,
                (b1 - b0) * tiles.ceil_div(self.n, chosen.block_n) * tiles.ceil_div(self.d, block_d),
                (self.texts, self.inv_p, self.inv_t, self.state, grad_phi, scale, some)
                + (b0, self.n, self.k, self.d, *self.texts.stride()),
                dict(
                    BLOCK_N=chosen.block_n,
                    BLOCK_D=block_d,
                    BLOCK_K=chosen.block_m,
                    SCALED=scale is not None,
                    EVEN_D=self.d % block_d == 0,
                    PRECISION=self.precision,
                ),
                chosen.warps,
                chosen.stages,
            )
            mask = None if self.mask is None else self.mask[b0:b1]
            inverse, into = self.inv_p[b0 * self.n :], grad_patches[b0:b1].view(-1, self.d)
            launch.project_out(some, self.patches[b0:b1], inverse, into, mask, None)

    def texts_gradient(self, texts_sum: Tensor, grad_texts: Tensor, scale: Tensor | None) -> None:
        scaled = self.texts is not self.raw_texts
        launch.project_out(texts_sum, self.raw_texts[:, None], self.raw_inv_t, grad_texts, None, scale, scaled)

    def backward_config(self) -> tiles.Config:
        return tiles.config("backward_full" if self.full else "backward", self.patches, self.texts)

    def workspace(self, blocks: tiles.Blocks, dtype: torch.dtype) -> Tensor:
        """Room for whole tiles `[texts, rows]` of a block."""
        chosen = self.backward_config()
        rows, texts = min(self.b, blocks.images) * self.n, min(self.k, blocks.texts)
        texts, rows = (tiles.ceil_div(x, step) * step for x, step in ((texts, chosen.block_t), (rows, chosen.block_p)))
        return self.patches.new_empty(texts, rows, dtype=dtype)

    def _operands(self, chosen: tiles.Config, texts: Tensor, descriptors: bool = True) -> tuple:
        """Patches and texts as the kernels take them, and the constants of their tiles."""
        p, t = self.patches, texts
        if descriptors:
            p, t, descriptors = launch.operands(p, t, chosen)
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

    def _weight_scale(self, form: str, grad_phi: Tensor) -> Tensor:
        """The power of two that brings the bound of |W|, max|g| (1 + c) max 1/‖p‖ max 1/‖t‖, to 2¹⁴.

        c bounds a |s - φ| / τ: 2 / τ, and in the `dot` form ln N too, since that is a |ln a + H| with the entropy H.
        Computed on the device. In the cosine form W may reach 1 / r times that bound; infinity begins at 4 times it.
        """
        bend = 2.0 / self.temperature
        if form == "dot":
            most = math.log(self.n)
            bend = bend.clamp(max=most) if isinstance(bend, Tensor) else min(bend, most)
        return _power_of_two_below(grad_phi, self.inv_p, self.inv_t, 1.0 + bend)


def _power_of_two_below(*factors: Tensor | float) -> Tensor:
    """The power of two that brings the product of the factors' largest values to at most 2¹⁴."""
    bound = 1.0
    for factor in factors:
        bound = bound * (factor.abs().amax() if isinstance(factor, Tensor) else factor)
    exponent = torch.floor(14.0 - torch.log2(bound)).nan_to_num(0.0, 100.0, -100.0).clamp_(-100.0, 100.0)
    return torch.exp2(exponent)
