"""Lists of texts on a GPU: the order of launches for pairs of each image with the texts of its list.

A block holds images and the texts of their lists, gathered to `[images, M, D]`, so that every product is one of the
library's over all images. The gradient of a text is a sum over the pairs that have it: the pairs are sorted by text,
in the order of the images, and added in that order, without atomics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ... import tolerance
from ...checks import Scalar
from ...lists import transposed
from ...tolerance import KeptPairs, Lists
from .. import null_patch as null
from . import launch, order, range_scales, tiles, workspace
from .problem import Problem, Upstream

LaunchesOf = Callable[[Problem], order.Launches]
Part = tuple[slice | Tensor, Tensor, Tensor]  # images, their lists [images, M], and ∂L/∂φ of these


def compatibility_forward(
    launches_of: LaunchesOf, launches_of_lists: LaunchesOf,
    patches: Tensor, texts: Tensor, patch_mask: Tensor | None, temperature: Scalar, form: str,
    phi: Tensor, state: Tensor, null_patch: bool = False, text_index: Tensor | None = None, **options: Any,
) -> None:  # fmt: skip
    """Write φ and the state: of all pairs by `launches_of`, or by `launches_of_lists` of the lists, int64 `[B, M]`."""
    if text_index is None:
        inputs = patches, texts, patch_mask, temperature, form, phi, state
        order.compatibility_forward(launches_of, *inputs, null_patch=null_patch, **options)
        return
    with launch.on_device(patches):
        p = order.prepare(patches, texts, patch_mask, temperature, phi, state)
        for images in _blocks(p, form, text_index):
            part = _part(p, images, text_index[images])._replace(phi=phi[images], state=state[images])
            if form != "cosine":
                _scores(part, _raw_scores(part), largest=form == "max")
                continue
            launches = launches_of_lists(part)
            gram, attention = _gram(part, launches), _attention(part)
            _scores(part, _raw_scores(part), attention)
            launches.cosine_forward_from_attention(part.pairs, attention, gram)
    if null_patch:
        null.add(phi, state, temperature, form, null.BITS)
    missing = text_index < 0
    phi.masked_fill_(missing, 0.0)
    state.masked_fill_(missing, -1.0 if form == "max" else 0.0)


def compatibility_backward(
    launches_of: LaunchesOf, launches_of_lists: LaunchesOf,
    patches: Tensor, texts: Tensor, patch_mask: Tensor | None, temperature: Scalar, form: str,
    phi: Tensor, state: Tensor, grad_phi: Tensor,
    grad_patches: Tensor | None, grad_texts: Tensor | None, grad_temperature: Tensor | None,
    null_patch: bool = False, text_index: Tensor | None = None, grad_tolerance: float = 0.0, **options: Any,
) -> KeptPairs | None:  # fmt: skip
    """Write the gradients whose buffers are not None, from all pairs, from those of the lists, or from those kept.

    With `grad_tolerance` and all pairs, return what was kept if pairs were left out; the `max` form leaves out none.
    """
    grads = grad_patches, grad_texts, grad_temperature
    if text_index is None and grad_tolerance and form != "max" and not options:
        least, count, mass = tolerance.threshold(grad_phi, grad_tolerance)
        if _lists_are_worth(count, *phi.shape):
            kept = tolerance.lists_from(grad_phi, least)
            with launch.on_device(patches):
                p = order.prepare(patches, texts, patch_mask, temperature, phi, state)
                _backward(
                    launches_of_lists, p, form, _kept_parts(p, form, kept, grad_phi), grad_phi, *grads, null_patch
                )
            if null_patch and form == "dot" and grad_temperature is not None:
                grad_phi = grad_phi.masked_fill(grad_phi.abs() < least, 0.0)
                null.add_to_temperature(grad_temperature, phi, state, grad_phi, temperature, null.BITS)
            return KeptPairs(count, grad_phi.numel(), mass)
    if text_index is None:
        inputs = patches, texts, patch_mask, temperature, form, phi, state, grad_phi
        order.compatibility_backward(launches_of, *inputs, *grads, null_patch=null_patch, **options)
        return None
    grad_phi = grad_phi.masked_fill(text_index < 0, 0.0)
    with launch.on_device(patches):
        p = order.prepare(patches, texts, patch_mask, temperature, phi, state)
        if form == "max":
            _max_backward(p, text_index, grad_phi, grad_patches, grad_texts)
            if grad_temperature is not None:
                grad_temperature.zero_()
        else:
            parts = ((images, text_index[images], grad_phi[images]) for images in _blocks(p, form, text_index))
            _backward(launches_of_lists, p, form, parts, grad_phi, *grads, null_patch)
    if grad_texts is not None:  # the projection of an unlisted text that is NaN
        unlisted = torch.ones(len(texts) + 1, dtype=torch.bool, device=texts.device)
        unlisted[text_index.flatten()] = False  # -1 is the last
        grad_texts.masked_fill_(unlisted[:-1, None], 0.0)
    if null_patch and form == "dot" and grad_temperature is not None:
        null.add_to_temperature(grad_temperature, phi, state, grad_phi, temperature, null.BITS)
    return None


def _lists_are_worth(kept: int, images: int, texts: int) -> bool:
    """Return True if a backward over lists of `kept` pairs should be faster than one over all pairs; not timed."""
    return kept + 48 * images <= 0.25 * images * texts


def _backward(
    launches_of_lists: LaunchesOf,
    p: Problem,
    form: str,
    parts: Iterable[Part],
    grad_phi: Tensor,
    grad_patches: Tensor | None,
    grad_texts: Tensor | None,
    grad_temperature: Tensor | None,
    null_patch: bool,
) -> None:
    """Write the gradients of the `dot` and the cosine form; together, `parts` have every image once.

    φ and the attention are computed anew: the library's products need not have the rounding of those of the forward,
    and their differences would be divided by τ.
    """
    range_scale = range_scales.of_weights(p, form, grad_phi) if p.patches.dtype == torch.float16 else None
    texts_sum = p.phi.new_zeros(p.k, p.d) if grad_texts is not None else None
    tau_sum = p.phi.new_zeros((), dtype=torch.float64)
    for images, index, grad in parts:
        part = _part(p, images, index)
        upstream = Upstream(grad, range_scale, grad_temperature is not None)
        w = p.patches.new_empty(part.k, tiles.ceil_div(part.b * p.n, 16) * 16)  # rows are aligned
        raw_scores = _raw_scores(part)
        if form == "dot":
            _scores(part, raw_scores)
            if null_patch:
                null.add(part.phi, part.state, p.temperature, form, null.BITS)
            tau_parts = _dot_weights(part, raw_scores, upstream, w)
        else:
            launches = launches_of_lists(part)
            gram, attention = _gram(part, launches), _attention(part)
            _scores(part, raw_scores, attention)
            part.state.add_(part.phi / p.temperature / null.BITS)  # the log-sum-exp in bits
            norm_factor = p.phi.new_empty(part.b * part.k)
            tau_parts = launches.cosine_weights_from_attention(part.pairs, upstream, attention, gram, w, norm_factor)
        if tau_parts is not None:
            tau_sum += tau_parts.sum(dtype=torch.float64)
        weights = w[:, : part.b * p.n].unflatten(1, (part.b, p.n)).transpose(0, 1)
        if grad_patches is not None:
            raw = _product(weights.mT, part.texts.transpose(0, 1))
            if form == "cosine":
                norm_term = p.phi.new_empty(part.b, p.n, tiles.ceil_div(p.n, 8) * 8)[:, :, : p.n]
                launches.norm_term(part.pairs, attention, norm_factor, norm_term)
                launches.norm_term_product(part.pairs, norm_term, raw)
            own = grad_patches[images] if isinstance(images, slice) else grad_patches.new_empty(part.b, p.n, p.d)
            order.project_patches(part, part.pairs, raw.view(-1, p.d), own.view(-1, p.d), range_scale)
            if isinstance(images, Tensor):
                grad_patches[images] = own
        if texts_sum is not None:
            rows = _product(weights, order.patch_rows(part, part.pairs).view(part.b, p.n, p.d)).flatten(0, 1)
            places, starts = transposed(index, p.k)
            _sum_rows(rows, places * p.d, None, starts, texts_sum, 1, add=True)
    if grad_texts is not None and texts_sum is not None:
        order.project_texts(p, texts_sum, grad_texts, range_scale)
    if grad_temperature is not None:
        order.write_temperature(p, form, tau_sum, grad_temperature)


def _max_backward(
    p: Problem, index: Tensor, grad_phi: Tensor, grad_patches: Tensor | None, grad_texts: Tensor | None
) -> None:
    """Write the gradients of the `max` form: sums over the winners of a text, and over the texts that a patch won."""
    known = index.clamp_min(0)
    image = torch.arange(p.b, device=index.device)[:, None]
    won = (p.state >= 0.0) & (index >= 0)
    winner = p.state.long().clamp_min(0)
    row = image * p.n + winner  # in [B N]
    weights = torch.where(won, grad_phi * p.inv_p[row], 0.0)
    if grad_texts is not None:
        texts_sum = p.phi.new_empty(p.k, p.d)
        places, starts = transposed(index.masked_fill(~won, -1), p.k)
        at = image * p.patches.stride(0) + winner * p.patches.stride(1)
        own = (weights * p.inv_t[known]).flatten()[places]
        _sum_rows(p.patches, at.flatten()[places], own, starts, texts_sum, p.patches.stride(2))
        order.project_texts(p, texts_sum, grad_texts, None)
    if grad_patches is None:
        return
    weights = weights * p.inv_t[known]
    step = max(1, min(p.b, workspace.WORKSPACE // (4 * p.n * p.d)))
    for images in p.pairs.by_images(step):
        some = slice(images.b0, images.b1)
        count = images.images * p.n
        winners = torch.where(won[some], row[some] - images.b0 * p.n, -1)
        places, starts = transposed(winners, count)
        at = (known[some] * p.texts.stride(0)).flatten()[places]
        patches_sum = p.phi.new_empty(count, p.d)
        own = weights[some].flatten()[places]
        _sum_rows(p.texts, at, own, starts, patches_sum, p.texts.stride(1))
        order.project_patches(p, images, patches_sum, grad_patches[some].view(-1, p.d), None)


def _blocks(p: Problem, form: str, index: Tensor) -> Iterator[slice]:
    """Yield slices of images, each of which fits into the workspace with all that the backward needs of it."""
    step = _images_of_a_block(p, form, index.shape[1])
    for first in range(0, p.b, step):
        yield slice(first, min(first + step, p.b))


def _images_of_a_block(p: Problem, form: str, m: int) -> int:
    """Return the number of images with `m` listed texts each that fit into the workspace."""
    size = p.patches.element_size()
    pairs = m * (p.n * (4 + size) + p.d * (4 + size))  # raw scores, W, texts, and their gradients
    image = 4 * p.n * p.d * 2  # the gradient of the patches, and perhaps patches without the masked ones
    if form == "cosine":
        pairs += m * tiles.pitch(p.n, p.gram_dtype.itemsize) * p.gram_dtype.itemsize
        image += p.n * (p.n + 16) * 8
    step = max(1, workspace.WORKSPACE // (pairs + image))
    return step - step % 16 if step > 16 else step  # so that every block begins at an aligned address


def _kept_parts(p: Problem, form: str, kept: Lists, grad_phi: Tensor) -> Iterator[Part]:
    """Yield images with lists of about the same length, longest first, with -1 where a list is shorter."""
    sizes = kept.starts.diff()
    by_size = sizes.argsort(descending=True, stable=True)
    longest = sizes[by_size].tolist()
    first = 0
    while first < p.b:
        m = max(1, longest[first])
        images = by_size[first : first + _images_of_a_block(p, form, m)]
        entry = torch.arange(m, device=sizes.device)
        missing = entry >= sizes[images, None]
        place = (kept.starts[images, None] + entry).clamp_max(len(kept.texts) - 1)
        known = kept.texts[place].long()
        grad = grad_phi[images[:, None], known].masked_fill(missing, 0.0)
        yield images, known.masked_fill(missing, -1), grad
        first += len(images)


def _part(p: Problem, images: slice | Tensor, index: Tensor) -> Problem:
    """Return the problem of some images and the texts of their lists, with new φ and state.

    Its texts are `[M, images, D]`, a transposed view, and `inv_t` is `[images, M]`; both are 0 where a list has none.
    """
    known, missing = index.clamp_min(0), index < 0
    return p._replace(
        patches=p.patches[images],
        texts=p.texts[known].masked_fill_(missing[..., None], 0.0).transpose(0, 1),
        mask=None if p.mask is None else p.mask[images],
        phi=p.phi.new_empty(index.shape),
        state=p.phi.new_empty(index.shape),
        inv_p=p.inv_p.view(p.b, p.n)[images].flatten(),
        inv_t=p.inv_t[known].masked_fill_(missing, 0.0),
    )


def _raw_scores(part: Problem) -> Tensor:
    """Return the products of the raw texts and patches `[images, M, N]`, float32."""
    return _product(part.texts.transpose(0, 1), part.patches.mT)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return the library's products of `[images, ., .]` in float32, for operands of any dtype."""
    if a.dtype == torch.float32:
        return torch.bmm(a, b)
    if a.is_cuda and "dtype" in torch.ops.aten.bmm.overloads():  # torch 2.8
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def _gram(part: Problem, launches: order.Launches) -> Tensor:
    gram = workspace.gram(part, workspace.BlockSize(part.b, part.k))
    launches.gram(part.pairs, gram)
    return gram


def _attention(part: Problem) -> Tensor:
    return workspace.attention(part, workspace.BlockSize(part.b, part.k), part.gram_dtype)


def _scores(part: Problem, raw: Tensor, attention: Tensor | None = None, largest: bool = False) -> None:
    """Write φ and state of the `dot` form, or with `largest` of the `max` form, and the attention if it is given."""
    block_t, block_n = tiles.listed(part.n)
    launch.run(
        launch.kernels().listed_forward_kernel,
        part.b * tiles.ceil_div(part.k, block_t),
        (raw, part.mask, 1.0 if largest else part.temperature, part.inv_p, part.inv_t, part.phi, part.state, attention)
        + (part.n, part.k, *launch.mask_strides(part.mask), *((0, 0) if attention is None else attention.stride()[:2])),
        dict(MAX=largest, **_constants(part, block_t, block_n, largest)),
        fma=False,
    )


def _dot_weights(part: Problem, raw: Tensor, upstream: Upstream, w: Tensor) -> Tensor | None:
    """Write W of the `dot` form; return partial sums of the temperature's gradient, see `order.Launches`."""
    block_t, block_n = tiles.listed(part.n)
    programs = part.b * tiles.ceil_div(part.k, block_t)
    tau_parts = part.phi.new_empty(programs) if upstream.needs_temperature else None
    launch.run(
        launch.kernels().listed_weights_kernel,
        programs,
        (raw, part.mask, part.temperature, part.inv_p, part.inv_t, part.phi, part.state, upstream.grad_phi)
        + (upstream.range_scale, w, tau_parts, part.n, part.k, *launch.mask_strides(part.mask), w.stride(0)),
        dict(
            NEEDS_TAU=upstream.needs_temperature,
            SCALED=upstream.range_scale is not None,
            **_constants(part, block_t, block_n),
        ),
        fma=False,
    )
    return tau_parts


def _constants(part: Problem, block_t: int, block_n: int, without_temperature: bool = False) -> launch.Constants:
    return dict(
        BLOCK_T=block_t,
        BLOCK_N=block_n,
        TAU_IS_TENSOR=isinstance(part.temperature, Tensor) and not without_temperature,
        HAS_MASK=part.mask is not None,
    )


def _sum_rows(
    x: Tensor, places: Tensor, weights: Tensor | None, starts: Tensor, out: Tensor, stride_d: int, add: bool = False
) -> None:
    """Write, or add, the sums of the rows of `x` at `places` to `out`; see `sum_rows_kernel`."""
    count, d = out.shape
    rows, block_d = tiles.sum_rows(d)
    launch.run(
        launch.kernels().sum_rows_kernel,
        count * tiles.ceil_div(d, block_d),
        (x, places, weights, starts, out, count, d, stride_d),
        dict(ROWS=rows, BLOCK_D=block_d, ADD=add),
    )
