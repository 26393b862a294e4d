"""The launches of the `cosine` form: the attention in memory, Gram matrices, and the products with them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...reference import MIN_POOLED_NORM
from . import run as launch
from . import tiles


class CosineLaunches:
    """Of a `Call`, whose attributes and tiles of scores these use, for images [b0, b1) and texts [k0, k1)."""

    def divide_by_pooled_norm(self) -> None:
        """φ of `dot` to that of `cosine`: the attention again, now that its sum is known, and r² = aᵀ G a from that."""
        itemsize = self.attention_dtype.itemsize
        image_bytes = self.gram_bytes + self.padding_bytes(itemsize)
        blocks = tiles.plan_blocks(self.b, self.n, self.k, itemsize, image_bytes)
        attention = self.attention_workspace(blocks)
        gram = self.gram_workspace(blocks)
        for b0, b1 in launch.ranges(self.b, blocks.images):
            self.gram(b0, b1, gram)
            for k0, k1 in launch.ranges(self.k, blocks.texts):
                by_image = self.by_image(attention, b1 - b0, k1 - k0)
                self.attention(b0, b1, k0, k1, by_image, entropy_over=self.phi)
                self.cosine_forward(b0, b1, k0, k1, by_image, gram)

    def gram(self, b0, b1, gram: Tensor) -> None:
        chosen = tiles.gram_config(self.n, self.patches.element_size())
        launch.run(
            launch.kernels().gram_kernel,
            (b1 - b0) * tiles.ceil_div(self.n, chosen.block) ** 2,
            (self.patches, self.mask, self.inv_p, gram, b0, self.n, self.d)
            + (*self.patches.stride(), *launch.mask_strides(self.mask), gram.stride(1)),
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

    def attention(self, b0, b1, k0, k1, attention: Tensor, entropy_over: Tensor | None = None) -> None:
        """The attention into `attention` `[images, texts, pitch]`, but for what lies past column N.

        `entropy_over`: the `dot` φ that STAT is relative to; without it STAT is the log-sum-exp.
        """
        self._weights(b0, b1, k0, k1, attention, attention.stride()[:2], entropy_over, None, False)

    def cosine_forward(self, b0, b1, k0, k1, attention: Tensor, gram: Tensor) -> None:
        chosen = tiles.pool_config("forward", self.n, self.patches)
        launch.run(
            launch.kernels().cosine_forward_kernel,
            (b1 - b0) * tiles.ceil_div(k1 - k0, chosen.block_t),
            (attention, gram, self.temperature, self.phi[:, k0:], self.state[:, k0:], b0, self.n, k1 - k0)
            + (*attention.stride()[:2], gram.stride(1), self.k, MIN_POOLED_NORM),
            *self._pool_tile(chosen, attention),
        )

    def cosine_weights(self, b0, b1, k0, k1, attention, gram, grad_phi, w, curvature, needs_tau) -> Tensor | None:
        """The attention, from it W of the cosine form, and the factors of Σ a aᵀ; returns the temperature's sums."""
        self.attention(b0, b1, k0, k1, attention)
        chosen = tiles.pool_config("backward", self.n, self.patches)
        items = (b1 - b0) * tiles.ceil_div(k1 - k0, chosen.block_t)
        sums = self.phi.new_empty(items) if needs_tau else None
        launch.run(
            launch.kernels().cosine_backward_kernel,
            items,
            (attention, gram, self.temperature, self.inv_p, self.inv_t[k0:], self.state[:, k0:], grad_phi[:, k0:])
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
        launch.run(
            launch.kernels().curvature_kernel,
            (b1 - b0) * tiles.ceil_div(self.n, chosen.block) ** 2,
            (attention, curvature, self.inv_p, pooled, b0, self.n, k1 - k0)
            + (attention.stride(0), attention.stride(1), pooled.stride(1)),
            dict(
                BLOCK=chosen.block,
                BLOCK_K=chosen.block_k,
                A_ALIGN=tiles.alignment(attention),
                C_ALIGN=tiles.POOLED_ALIGNMENT,
                ADD=k0 > 0,
                OPERANDS=launch.kernels().DTYPES[torch.float32 if wide else torch.bfloat16],
                PRECISION=precision,
            ),
            chosen.warps,
            chosen.stages,
            chosen.registers,
        )

    def add_pooled(self, b0, b1, pooled: Tensor, raw: Tensor) -> None:
        """C P / ‖p‖ of each image onto `raw` `[rows, D]`; C `[images, N, N]` and `raw` have one dtype."""
        wide = pooled.dtype == torch.float32
        chosen = tiles.POOLED[pooled.element_size()]
        precision = self.precision
        if wide and self.patches.dtype != torch.float32 and torch.version.hip is None:
            precision = "tf32"  # holds patches of 16 bits exactly
        block_d = min(chosen.block_d, max(16, tiles.power_of_two(self.d)))
        launch.run(
            launch.kernels().add_pooled_kernel,
            (b1 - b0) * tiles.ceil_div(self.n, chosen.block_n) * tiles.ceil_div(self.d, block_d),
            (pooled, self.patches, self.inv_p, self.mask, raw, b0, self.n, self.d)
            + (pooled.stride(1), *self.patches.stride(), *launch.mask_strides(self.mask)),
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

    def _pool_tile(self, chosen: tiles.Pool, attention: Tensor, **constants) -> tuple[dict, int, int]:
        """Constants, warps and stages of the products with the Gram matrix."""
        constants |= dict(BLOCK_T=chosen.block_t, BLOCK_M=chosen.block_m, BLOCK_N=chosen.block_n)
        constants |= dict(A_ALIGN=tiles.alignment(attention), PRECISION=self.precision)
        return constants | self.tau, chosen.warps, chosen.stages
