"""The order of launches of a GPU backend, for all forms, forward and backward.

A set of launches chooses the kernels: Triton's in `triton.py`, Hopper's in `hopper.py`. Everything is deterministic:
there are no atomics. If TRITON_INTERPRET=1 is set before triton is imported, Triton's launches run on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...checks import Scalar
from ...pairs import Pairs
from .. import null_patch as null
from . import launch, range_scales, rows, workspace
from .blocks import Block
from .packed import Packed
from .problem import Problem, SigmoidPairs, Upstream
from .workspace import WeightsTile


class Launches(Protocol):
    """The launches of a backend for one problem.

    `block`: the images and texts that a launch takes. `w` `[texts, rows]` has room for whole tiles of W, `attention` is
    `[images, texts, pitch]`, `gram` and `norm_term` are `[images, N, pitch]`, all for the block alone. The launches
    that write W return partial sums of the temperature's gradient, or None unless `upstream.needs_temperature`.
    """

    fits_one_tile: bool  # the cosine form is one launch, without attention in memory
    attention_dtype: torch.dtype  # of the attention in memory

    def max_forward(self) -> None:
        """Write φ and state of the `max` form."""

    def dot_forward(self) -> None:
        """Write φ and state of the `dot` form."""

    def gram(self, block: Block, gram: Tensor) -> None:
        """Write the Gram matrices G of the block's images."""

    def attention(self, block: Block, attention: Tensor, state_is_entropy: bool) -> None:
        """Write the attention up to column N.

        `state_is_entropy`: φ and state are those of the `dot` form; otherwise the state is that of the cosine form.
        """

    def cosine_forward(self, block: Block, gram: Tensor) -> None:
        """Write φ and state of the cosine form; called only if `fits_one_tile`."""

    def cosine_forward_from_attention(self, block: Block, attention: Tensor, gram: Tensor) -> None:
        """Turn φ and state of the `dot` form into those of the cosine form."""

    def weights_tile(self, form: str, needs_temperature: bool) -> WeightsTile:
        """Return the tile of W of a form."""

    def dot_weights(self, block: Block, upstream: Upstream, w: Tensor) -> Tensor | None:
        """Write W of the `dot` form."""

    def cosine_weights(
        self, block: Block, upstream: Upstream, attention: Tensor, gram: Tensor, w: Tensor, norm_factor: Tensor
    ) -> Tensor | None:
        """Write W of the cosine form, attention and factors of the norm term; called only if `fits_one_tile`."""

    def cosine_weights_from_attention(
        self, block: Block, upstream: Upstream, attention: Tensor, gram: Tensor, w: Tensor, norm_factor: Tensor
    ) -> Tensor | None:
        """Write W of the cosine form and the factors of the norm term, from the attention."""

    def sigmoid_tile(self, needs_temperature: bool) -> WeightsTile:
        """Return the tile of W that the sigmoid loss writes."""

    def sigmoid_dot_weights(self, block: Block, pairs: SigmoidPairs, w: Tensor | None) -> Tensor:
        """Write W of the `dot` form with ∂L/∂φ of the sigmoid loss, and the gradient of the pair bias.

        Return partial sums `[parts, SIGMOID_SUMS]`, float32. Those of loss, scale and bias lack the factor 1 / B; that
        of the temperature is as from `dot_weights`, and 0 unless `pairs.needs_temperature`. `w`: None, if no product
        needs W.
        """

    def sigmoid_cosine_weights(
        self, block: Block, pairs: SigmoidPairs, attention: Tensor, gram: Tensor, w: Tensor, norm_factor: Tensor
    ) -> Tensor:
        """Write W of the cosine form, attention and factors of the norm term; return sums, as the `dot` form does."""

    def norm_term(self, block: Block, attention: Tensor, norm_factor: Tensor, norm_term: Tensor) -> None:
        """Write the norm term C of the block's images; every block of texts but the first adds to it."""

    def norm_term_product(self, block: Block, norm_term: Tensor, raw: Tensor) -> None:
        """Add C P / ‖p‖ of each image to `raw` `[rows, D]`."""

    def max_texts(self, grad_phi: Tensor, texts_sum: Tensor) -> None:
        """Write the sum over the winning patches of each text, `[K, D]`."""

    def max_patches(self, block: Block, grad_phi: Tensor, range_scale: Tensor | None, raw: Tensor) -> None:
        """Write the sum over the texts that each patch won, `[rows, D]`."""


def prepare(
    patches: Tensor, texts: Tensor, patch_mask: Tensor | None, temperature: float | Tensor, phi: Tensor, state: Tensor,
    patch_lengths: Tensor | None = None,
) -> Problem:  # fmt: skip
    """Launch the inverse norms and return the problem."""
    packed = None
    if patch_lengths is not None:
        packed, patches = Packed(patch_lengths, patches.device), patches[None]
        patch_mask = None if patch_mask is None else patch_mask[None]
    inv_p = rows.inverse_norms(patches, patch_mask)
    if texts.dtype == torch.float16:  # its products and weights fit the range of float32
        scaled = texts
        inv_t = raw_inv_t = rows.inverse_norms(texts[:, None], None)
    else:  # scaling keeps W, which is divided by both norms, in range for texts of any norm
        scaled, inv_t = texts.new_empty(texts.shape), phi.new_empty(len(texts))
        raw_inv_t = rows.inverse_norms(texts[:, None], None, (scaled, inv_t))
    return Problem(patches, scaled, texts, patch_mask, temperature, phi, state, inv_p, inv_t, raw_inv_t, packed)


def compatibility_forward(
    launches_of: Callable[[Problem], Launches],
    patches: Tensor, texts: Tensor, patch_mask: Tensor | None, temperature: Scalar, form: str,
    phi: Tensor, state: Tensor, null_patch: bool = False, patch_lengths: Tensor | None = None,
) -> None:  # fmt: skip
    """Write φ `[B, K]` and the state `[B, K]`, both float32. With lengths, patches are `[ΣN, D]`, the mask `[ΣN]`."""
    if not patches.numel():
        phi.zero_()
        state.fill_(-1.0 if form == "max" else 0.0)
    else:
        with launch.on_device(patches):
            p = prepare(patches, texts, patch_mask, temperature, phi, state, patch_lengths)
            forward(p, launches_of(p), form)
    if null_patch:
        null.add(phi, state, temperature, form, null.BITS)


def forward(p: Problem, launches: Launches, form: str) -> None:
    if form == "max":
        launches.max_forward()
    elif form == "dot":
        launches.dot_forward()
    elif launches.fits_one_tile:
        _cosine_forward(p, launches)
    else:
        launches.dot_forward()
        _cosine_forward_from_attention(p, launches)


def _cosine_forward(p: Problem, launches: Launches) -> None:
    size = workspace.gram_blocks(p)
    gram = workspace.gram(p, size)
    for images in size.of_images(p):
        launches.gram(images, gram)
        launches.cosine_forward(images, gram)


def _cosine_forward_from_attention(p: Problem, launches: Launches) -> None:
    """Recompute the attention, whose sum is now known, and compute r² = aᵀ G a from it."""
    size = workspace.attention_blocks(p)
    gram, room = workspace.gram(p, size), workspace.attention(p, size, launches.attention_dtype)
    for images in size.of_images(p):
        launches.gram(images, gram)
        for block in images.by_texts(size.texts):
            attention = workspace.attention_of(block, room)
            launches.attention(block, attention, state_is_entropy=True)
            launches.cosine_forward_from_attention(block, attention, gram)


def compatibility_backward(
    launches_of: Callable[[Problem], Launches],
    patches: Tensor, texts: Tensor, patch_mask: Tensor | None, temperature: Scalar, form: str,
    phi: Tensor, state: Tensor, grad_phi: Tensor,
    grad_patches: Tensor | None, grad_texts: Tensor | None, grad_temperature: Tensor | None, null_patch: bool = False,
    patch_lengths: Tensor | None = None,
) -> None:  # fmt: skip
    """Write the gradients of patches, texts and temperature to the buffers that are not None."""
    if not patches.numel():
        for grad in (grad_texts, grad_temperature):
            if grad is not None:
                grad.zero_()
        return
    with launch.on_device(patches):
        p = prepare(patches, texts, patch_mask, temperature, phi, state, patch_lengths)
        launches = launches_of(p)
        if form == "max":
            _max_backward(p, launches, grad_phi, grad_patches, grad_texts)
            if grad_temperature is not None:
                grad_temperature.zero_()
        else:
            _backward(p, launches, form, grad_phi, grad_patches, grad_texts, grad_temperature)
    if null_patch and form == "dot" and grad_temperature is not None:
        null.add_to_temperature(grad_temperature, phi, state, grad_phi, temperature, null.BITS)


def _backward(
    p: Problem,
    launches: Launches,
    form: str,
    grad_phi: Tensor,
    grad_patches: Tensor | None,
    grad_texts: Tensor | None,
    grad_temperature: Tensor | None,
) -> None:
    """Write the gradients of the `dot` and the cosine form."""
    range_scale = range_scales.of_weights(p, form, grad_phi) if p.patches.dtype == torch.float16 else None
    upstream = Upstream(grad_phi, range_scale, grad_temperature is not None)

    def write_weights(block: Block, w: Tensor, cosine: _Cosine | None) -> Tensor | None:
        if cosine is None:
            return launches.dot_weights(block, upstream, w)
        attention = cosine.attention_of(block)
        if launches.fits_one_tile:
            return launches.cosine_weights(block, upstream, attention, cosine.gram, w, cosine.norm_factor)
        launches.attention(block, attention, state_is_entropy=False)
        return launches.cosine_weights_from_attention(block, upstream, attention, cosine.gram, w, cosine.norm_factor)

    # The gradient of the temperature changes only the tile of `dot_weights`.
    tile = launches.weights_tile(form, form == "dot" and upstream.needs_temperature)
    tau_sum = _gradients(p, launches, form, write_weights, tile, range_scale, grad_patches, grad_texts)
    if grad_temperature is not None and tau_sum is not None:
        write_temperature(p, form, tau_sum, grad_temperature)


def sigmoid_step(
    launches_of: Callable[[Problem], Launches],
    patches: Tensor, texts: Tensor, patch_mask: Tensor | None, temperature: Scalar, form: str,
    scale: Scalar, bias: Scalar | None, pairs: Pairs | None, value: Tensor,
    grad_patches: Tensor | None, grad_texts: Tensor | None, grad_temperature: Tensor | None,
    grad_scale: Tensor | None, grad_bias: Tensor | None, grad_pair_bias: Tensor | None,
) -> None:  # fmt: skip
    """Write the sigmoid loss (0-D) and the gradients whose buffers are not None, without an array of all pairs."""
    nothing = value.new_empty(0)  # in place of φ and state
    with launch.on_device(patches):
        p = prepare(patches, texts, patch_mask, temperature, nothing, nothing)
        launches = launches_of(p)
        given = Pairs(*(None if x is None else x.contiguous() for x in pairs or (None,) * 4))
        sigmoid = SigmoidPairs(scale, bias, given, grad_pair_bias, grad_temperature is not None)

        def write_weights(block: Block, w: Tensor, cosine: _Cosine | None) -> Tensor | None:
            if cosine is None:
                return launches.sigmoid_dot_weights(block, sigmoid, w)
            attention = cosine.attention_of(block)
            return launches.sigmoid_cosine_weights(block, sigmoid, attention, cosine.gram, w, cosine.norm_factor)

        if form == "dot" and grad_patches is None and grad_texts is None:
            sums = launches.sigmoid_dot_weights(p.pairs, sigmoid, None).sum(0, dtype=torch.float64)
        else:
            tile = launches.sigmoid_tile(sigmoid.needs_temperature)
            total = _gradients(p, launches, form, write_weights, tile, None, grad_patches, grad_texts)
            assert total is not None
            sums = total
        for to, mean in zip((value, grad_scale, grad_bias), sums / p.b, strict=False):
            if to is not None:
                to.copy_(mean)
        if grad_temperature is not None:
            write_temperature(p, form, sums[3], grad_temperature)


class _Cosine(NamedTuple):
    """Buffers of a block of the cosine form."""

    gram: Tensor
    room: Tensor  # of the attention
    norm_factor: Tensor
    norm_term: Tensor

    def attention_of(self, block: Block) -> Tensor:
        return workspace.attention_of(block, self.room)


def _gradients(
    p: Problem,
    launches: Launches,
    form: str,
    write_weights: Callable[[Block, Tensor, _Cosine | None], Tensor | None],
    tile: workspace.WeightsTile,
    range_scale: Tensor | None,
    grad_patches: Tensor | None,
    grad_texts: Tensor | None,
) -> Tensor | None:
    """Write the gradients of patches and texts: W of each block, then ∂P = Wᵀ T and ∂T += W P.

    The cosine form adds C P to ∂P, where C is the norm term. The last step projects out the part along each row. Return
    the sum of the partial sums that `write_weights` returns, in float64, or None where it returns none.
    """
    dtype = p.patches.dtype
    # In float16 the scaled sum may overflow, and a sum over several blocks of texts would be rounded after each.
    widened = range_scale is not None or p.k > workspace.text_block(p.n, p.k, workspace.score_bytes(p, form))
    size = workspace.backward_blocks(p, form, widened)
    w = workspace.weights(p, size, tile)
    cosine = None
    if form == "cosine":
        cosine = _Cosine(
            workspace.gram(p, size),
            workspace.attention(p, size, launches.attention_dtype),
            p.phi.new_empty(size.images * size.texts),  # packed images without a patch have a place as well
            workspace.norm_term(p, size, torch.float32 if widened else dtype),
        )
    patches_sum = p.phi.new_empty(size.most(p), p.d) if grad_patches is not None and widened else None
    texts_sum = p.phi.new_zeros(p.k, p.d) if grad_texts is not None else None
    total: Tensor | None = None

    for images in size.of_images(p):
        rows_count = len(p.inv_p[p.rows(images)])
        if grad_patches is not None:
            into = grad_patches.view(-1, p.d)[p.rows(images)]
            raw = into if patches_sum is None else patches_sum[:rows_count]
        if grad_texts is not None:
            own_rows = patch_rows(p, images)
        if cosine is not None:
            launches.gram(images, cosine.gram)
        for block in images.by_texts(size.texts):
            parts = write_weights(block, w, cosine)
            if parts is not None:
                part = parts.sum(0, dtype=torch.float64)
                total = part if total is None else total + part
            weights, texts = w[: block.texts, :rows_count], p.texts[block.k0 : block.k1]
            if grad_patches is not None:
                if not widened:
                    torch.mm(weights.T, texts, out=raw)
                elif block.k0 == 0:
                    raw.copy_(_product(weights.T, texts))
                else:
                    raw += _product(weights.T, texts)
                if cosine is not None:
                    launches.norm_term(block, cosine.attention_of(block), cosine.norm_factor, cosine.norm_term)
            if texts_sum is not None:
                texts_sum[block.k0 : block.k1] += _product(weights, own_rows)
        if grad_patches is not None:
            if cosine is not None:
                launches.norm_term_product(images, cosine.norm_term, raw)
            project_patches(p, images, raw, into, range_scale)
    if grad_texts is not None and texts_sum is not None:
        project_texts(p, texts_sum, grad_texts, range_scale)
    return total


def write_temperature(p: Problem, form: str, tau_sum: Tensor, grad_temperature: Tensor) -> None:
    if form == "dot":
        tau_sum = tau_sum / p.temperature / p.temperature
    grad_temperature.copy_(-tau_sum)


def _max_backward(
    p: Problem, launches: Launches, grad_phi: Tensor, grad_patches: Tensor | None, grad_texts: Tensor | None
) -> None:
    """Write the gradients of the `max` form: sums over the winners, in float32 until the projection."""
    if grad_texts is not None:
        texts_sum = p.phi.new_empty(p.k, p.d)
        launches.max_texts(grad_phi, texts_sum)
        project_texts(p, texts_sum, grad_texts, None)
    if grad_patches is None:
        return
    range_scale = range_scales.power_of_two_below(grad_phi, p.inv_t) if p.patches.dtype == torch.float16 else None
    size = workspace.max_blocks(p)
    patches_sum = p.phi.new_empty(size.most(p), p.d)
    for images in size.of_images(p):
        into = grad_patches.view(-1, p.d)[p.rows(images)]
        raw = patches_sum[: len(into)]
        launches.max_patches(images, grad_phi, range_scale, raw)  # divides the scale out
        project_patches(p, images, raw, into, None)


def patch_rows(p: Problem, images: Block) -> Tensor:
    """Return the patches of a block `[rows, D]`, zeros where masked, because a masked patch may be NaN."""
    some, mask = p.of_images(images)
    if mask is not None:
        some = some.masked_fill(~mask[:, :, None], 0.0)
    return some.reshape(-1, p.d)


def project_patches(p: Problem, images: Block, raw: Tensor, into: Tensor, range_scale: Tensor | None) -> None:
    some, mask = p.of_images(images)
    rows.project_out(raw, some, p.inv_p[p.rows(images)], into, mask, range_scale)


def project_texts(p: Problem, texts_sum: Tensor, into: Tensor, range_scale: Tensor | None) -> None:
    scaled = p.texts is not p.raw_texts
    rows.project_out(texts_sum, p.raw_texts[:, None], p.raw_inv_t, into, None, range_scale, scaled)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return the library's product a b in float32, for operands of any dtype."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda and "dtype" in torch.ops.aten.mm.overloads():  # torch 2.8
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
