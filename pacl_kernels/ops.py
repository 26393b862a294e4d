"""The kernels as `torch.library` operators, so that `torch.compile` captures the loss in one graph.

They write into buffers that the caller allocated and return nothing, so the fake implementations are empty. They carry
no autograd formula: the Functions of `autograd.py` differentiate. Each scalar of the public functions is two arguments
of an operator, a tensor of one element or None, and a number or None; `pair` makes them.

A buffer has no default, because torch 2.6 looks for every buffer among the arguments, and defaults are left out there.
Their namespace is the name of the package: `pacl_kernels`, or the name under which a loader imports a second copy.
"""

# Without `from __future__ import annotations`: torch.library of torch 2.6 does not find the names below in a string.
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor

from . import backends, lists, pairs, scoring
from .checks import Scalar, check_sum, without_autocast
from .contrastive import scalar

OptionalTensor = Optional[Tensor]  # noqa: UP045  (torch.library accepts `Tensor | None` only from torch 2.8 on)
OptionalFloat = Optional[float]  # noqa: UP045
OptionalStr = Optional[str]  # noqa: UP045


_library = torch.library.Library(__package__, "FRAGMENT")


def _operator(*buffers: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a function that writes into the arguments `buffers`: return it as an operator of its name.

    `torch.library.custom_op` would do the same, but a call then takes twice as long, because it passes through Python
    three times instead of once.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        name = function.__name__
        schema = torch.library.infer_schema(function, op_name=name, mutates_args=buffers)
        _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{__package__}::{name}", lambda *_: None, lib=_library)
        operator: Callable[..., None] = getattr(getattr(torch.ops, __package__), name).default
        return operator

    return register


def pair(value: Scalar | None) -> tuple[Tensor | None, float | None]:
    """Return a scalar as two arguments of an operator: (tensor, None) or (None, number); (None, None) for None."""
    return (value, None) if isinstance(value, Tensor) else (None, value)


def _join(tensor: Tensor | None, value: float | None, dtype: torch.dtype) -> Any:
    """Return the `Scalar` (None for None) that `pair` split; a tensor becomes 0-D in `dtype`."""
    return scalar(value if tensor is None else tensor, dtype)


@_operator("phi", "state", "scores")
def compatibility_forward(
    patches: Tensor,
    texts: Tensor,
    patch_mask: OptionalTensor,
    temperature: OptionalTensor,
    temperature_value: OptionalFloat,
    form: str,
    backend: str,
    phi: Tensor,
    state: Tensor,
    scores: OptionalTensor,
    patch_lengths: OptionalTensor = None,
    text_mask: OptionalTensor = None,
    text_lengths: OptionalTensor = None,
    text_pool: OptionalStr = None,
    text_pool_scale: float = 1.0,
    null_patch: bool = False,
    normalize: str = "both",
    text_index: OptionalTensor = None,
    all_texts: int = 0,
    first_text: int = 0,
) -> None:
    """Write compatibility φ `[B, K]` and `state` `[B, K]`, which the backward of the same backend reads.

    `patches` `[B, N, D]`, `texts` `[K, D]`, `patch_mask` bool `[B, N]`. The state is the log-sum-exp over patches of
    s / τ, or another number from which the backend can recompute the attention. For form "max" it is the index n of
    the winning patch (exact in float32 for N < 2**24), -1 where none wins. `scores`, for a backend with `keeps_scores`,
    is memory like the patches in which scores stay for the backward, as many as there is room for. Several forwards may
    keep the scores of one backward there: `all_texts` is then the number of its texts, otherwise 0, and `first_text`
    the place of the first of these, a multiple of 32.

    The other arguments are those of `fused_pacl_loss`; `checks.Inputs` has the shapes. With `text_pool` the state has
    one dimension, of `tokens.kept_pairs` elements: φ and the state of all tokens, or nothing. With `text_index`, int64
    `[B, M]` in range or -1, φ and state are `[B, M]`, those of the listed texts, and φ is 0 at -1. The backend must be
    one with `backends.takes_lists`. With both the state has no element.
    """
    if phi.numel():
        tau = _join(temperature, temperature_value, phi.dtype)
        call = scoring.Call(
            *(backend, patches, texts, patch_mask, tau, form, patch_lengths, text_mask, text_lengths, text_pool),
            *(text_pool_scale, null_patch, normalize, text_index),
        )
        with without_autocast(patches.device.type):
            call.forward(phi, state, scores, (all_texts, first_text))


@_operator("grad_patches", "grad_texts", "grad_temperature", "kept_pairs")
def compatibility_backward(
    patches: Tensor,
    texts: Tensor,
    patch_mask: OptionalTensor,
    temperature: OptionalTensor,
    temperature_value: OptionalFloat,
    form: str,
    backend: str,
    phi: Tensor,
    state: Tensor,
    grad_phi: Tensor,
    grad_patches: OptionalTensor,
    grad_texts: OptionalTensor,
    grad_temperature: OptionalTensor,
    kept_pairs: OptionalTensor,
    keeps_scores: bool = False,
    patch_lengths: OptionalTensor = None,
    text_mask: OptionalTensor = None,
    text_lengths: OptionalTensor = None,
    text_pool: OptionalStr = None,
    text_pool_scale: float = 1.0,
    null_patch: bool = False,
    normalize: str = "both",
    text_index: OptionalTensor = None,
    grad_tolerance: float = 0.0,
) -> None:
    """Write gradients from ∂L/∂φ `[B, K]` into the buffers that are not None: like patches, like texts, and 0-D.

    The buffer of the texts' gradient may be float32 for texts of any dtype. `keeps_scores`: the buffer of the patches'
    gradient holds the scores of the forward. With `text_index` φ, state and ∂L/∂φ are `[B, M]`. `kept_pairs`, float64
    `[3]` on the CPU: what `tolerance.KeptPairs` holds.
    """
    if not phi.numel():
        for grad in (grad_patches, grad_texts, grad_temperature):
            if grad is not None:
                grad.zero_()
        return
    tau = _join(temperature, temperature_value, phi.dtype)
    call = scoring.Call(
        *(backend, patches, texts, patch_mask, tau, form, patch_lengths, text_mask, text_lengths, text_pool),
        *(text_pool_scale, null_patch, normalize, text_index),
    )
    with without_autocast(patches.device.type):
        kept = call.backward(
            phi, state, grad_phi, grad_patches, grad_texts, grad_temperature, keeps_scores, grad_tolerance
        )
    if kept_pairs is not None:
        kept_pairs.copy_(torch.tensor(kept or (phi.numel(), phi.numel(), 0.0)))


@_operator("value", "statistics")
def loss_forward(
    phi: Tensor,
    scale: OptionalTensor,
    scale_value: OptionalFloat,
    bias: OptionalTensor,
    bias_value: OptionalFloat,
    loss: str,
    backend: str,
    value: Tensor,
    statistics: OptionalTensor,
) -> None:
    """Write the loss (0-D) of φ `[B, B]`, and for InfoNCE the statistics `[4, B]` that its backward needs."""
    scalars = _join(scale, scale_value, phi.dtype), _join(bias, bias_value, phi.dtype)
    with without_autocast(phi.device.type):
        backends.get(backend).loss_forward(phi, *scalars, loss, value, statistics)


@_operator("grad_phi", "grad_scale", "grad_bias")
def loss_backward(
    phi: Tensor,
    scale: OptionalTensor,
    scale_value: OptionalFloat,
    bias: OptionalTensor,
    bias_value: OptionalFloat,
    loss: str,
    backend: str,
    statistics: OptionalTensor,
    grad_loss: Tensor,
    grad_phi: Tensor,
    grad_scale: OptionalTensor,
    grad_bias: OptionalTensor,
) -> None:
    """Write ∂L/∂φ `[B, B]` and, where buffers are given, the gradients of logit scale and bias (0-D)."""
    scalars = _join(scale, scale_value, phi.dtype), _join(bias, bias_value, phi.dtype)
    with without_autocast(phi.device.type):
        backends.get(backend).loss_backward(phi, *scalars, loss, statistics, grad_loss, grad_phi, grad_scale, grad_bias)
        if grad_bias is not None and loss == "infonce":
            grad_bias.mul_(0.0)  # the loss does not depend on the bias: the sum is rounding error or NaN


@_operator("value", "row_statistics", "column_statistics")
def pair_loss_forward(
    phi: Tensor,
    scale: OptionalTensor,
    scale_value: OptionalFloat,
    bias: OptionalTensor,
    bias_value: OptionalFloat,
    image_ids: OptionalTensor,
    text_ids: OptionalTensor,
    targets: OptionalTensor,
    pair_bias: OptionalTensor,
    loss: str,
    value: Tensor,
    row_statistics: OptionalTensor,
    column_statistics: OptionalTensor,
    text_index: OptionalTensor = None,
) -> None:
    """Write the loss (0-D) of φ `[B, K]` with any positives, and for InfoNCE the statistics `[4, B]` and `[4, K]`.

    With `text_index`, int64 `[B, M]` in range or -1, φ, targets and pair bias are `[B, M]`, those of the listed texts.
    No text is twice in a list.
    """
    scalars = _join(scale, scale_value, phi.dtype), _join(bias, bias_value, phi.dtype)
    given = pairs.Pairs(image_ids, text_ids, targets, pair_bias)
    with without_autocast(phi.device.type):
        statistics = row_statistics, column_statistics
        if text_index is None:
            pairs.loss_forward(phi, *scalars, given, loss, value, *statistics)
        else:
            lists.loss_forward(phi, *scalars, given, text_index, loss, value, *statistics)


@_operator("grad_phi", "grad_scale", "grad_bias", "grad_pair_bias")
def pair_loss_backward(
    phi: Tensor,
    scale: OptionalTensor,
    scale_value: OptionalFloat,
    bias: OptionalTensor,
    bias_value: OptionalFloat,
    image_ids: OptionalTensor,
    text_ids: OptionalTensor,
    targets: OptionalTensor,
    pair_bias: OptionalTensor,
    loss: str,
    row_statistics: OptionalTensor,
    column_statistics: OptionalTensor,
    grad_loss: Tensor,
    grad_phi: Tensor,
    grad_scale: OptionalTensor,
    grad_bias: OptionalTensor,
    grad_pair_bias: OptionalTensor,
    text_index: OptionalTensor = None,
) -> None:
    """Write ∂L/∂φ, like φ, and, where buffers are given, the gradients of logit scale and bias (0-D) and pair bias."""
    scalars = _join(scale, scale_value, phi.dtype), _join(bias, bias_value, phi.dtype)
    given = pairs.Pairs(image_ids, text_ids, targets, pair_bias)
    with without_autocast(phi.device.type):
        statistics, grads = (row_statistics, column_statistics), (grad_scale, grad_bias, grad_pair_bias)
        if text_index is None:
            pairs.loss_backward(phi, *scalars, given, loss, *statistics, grad_loss, grad_phi, *grads)
        else:
            lists.loss_backward(phi, *scalars, given, text_index, loss, *statistics, grad_loss, grad_phi, *grads)
        if grad_bias is not None and loss == "infonce":
            grad_bias.mul_(0.0)  # the loss does not depend on the bias: the sum is rounding error or NaN


@_operator("value", "grad_patches", "grad_texts", "grad_temperature", "grad_scale", "grad_bias", "grad_pair_bias")
def sigmoid_step(
    patches: Tensor,
    texts: Tensor,
    patch_mask: OptionalTensor,
    temperature: OptionalTensor,
    temperature_value: OptionalFloat,
    scale: OptionalTensor,
    scale_value: OptionalFloat,
    bias: OptionalTensor,
    bias_value: OptionalFloat,
    image_ids: OptionalTensor,
    text_ids: OptionalTensor,
    targets: OptionalTensor,
    pair_bias: OptionalTensor,
    form: str,
    backend: str,
    value: Tensor,
    grad_patches: OptionalTensor,
    grad_texts: OptionalTensor,
    grad_temperature: OptionalTensor,
    grad_scale: OptionalTensor,
    grad_bias: OptionalTensor,
    grad_pair_bias: OptionalTensor,
    patch_lengths: OptionalTensor = None,
) -> None:
    """Write the sigmoid loss (0-D) of all pairs, and its gradients where buffers are given.

    Only for a backend with `backends.computes_sigmoid_step`; packed patches only for one that takes them. Without ids
    and targets text i belongs to image i.
    """
    tau, *scalars = (
        _join(*x, value.dtype) for x in ((temperature, temperature_value), (scale, scale_value), (bias, bias_value))
    )
    given = pairs.Pairs(image_ids, text_ids, targets, pair_bias)
    grads = grad_patches, grad_texts, grad_temperature, grad_scale, grad_bias, grad_pair_bias
    implementation: Any = backends.get_for(backend, patches)
    with without_autocast(patches.device.type):
        packed = {}
        if patch_lengths is not None:
            check_sum("patch_lengths", patch_lengths, "patches", len(patches))
            packed = {"patch_lengths": patch_lengths}
        implementation.sigmoid_step(patches, texts, patch_mask, tau, form, *scalars, given, value, *grads, **packed)


@_operator("labels", "best", "entropy")
def upsample_argmax(
    scores: Tensor,
    align_corners: bool,
    scale: OptionalTensor,
    scale_value: OptionalFloat,
    backend: str,
    labels: Tensor,
    best: OptionalTensor,
    entropy: OptionalTensor,
) -> None:
    """Write labels (int16) of scores `[B, C, h, w]`, and best scores and entropies if given; `[B, H, W]` each."""
    if not labels.numel():
        return
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    rows, columns = (
        _positions(source, size, align_corners, scores.device, wide)
        for source, size in zip(scores.shape[2:], labels.shape[1:], strict=True)
    )
    factor = _join(scale, scale_value, wide)
    backends.get_for(backend, scores).upsample_argmax(scores, rows, columns, factor, labels, best, entropy)


def _positions(
    source: int, size: int, align_corners: bool, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return, for each of `size` pixels, the element before it (int32) and the fraction to the next one, in [0, 1).

    Integer arithmetic is exact; a float32 coordinate would be off by 1e-5 in the middle of a large picture.
    """
    pixels = torch.arange(size, device=device)
    if align_corners:
        above, below = pixels * (source - 1), max(size - 1, 1)
    else:
        above, below = ((2 * pixels + 1) * source - size).clamp_min(0), 2 * size
    return (above // below).int(), (above % below).to(dtype) / below
