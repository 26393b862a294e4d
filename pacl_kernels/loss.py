"""The public functions: they check their arguments, settle dtypes and backend, and call the autograd Functions."""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
from torch import Tensor

from . import groups, reference
from .autograd import CompatibilityFunction, Options, PaclFunction, first_output
from .backends import resolve
from .checks import (
    EXCHANGES,
    FORMS,
    LOSSES,
    autocasts,
    check_choice,
    check_not_empty,
    check_pair,
    check_scalar,
)
from .distributed import global_loss


def fused_pacl_loss(
    patches: Tensor,
    texts: Tensor,
    logit_scale: float | Tensor,
    *,
    patch_mask: Tensor | None = None,
    attn_temperature: float | Tensor = 1.0,
    form: str = "dot",
    loss: str = "infonce",
    logit_bias: float | Tensor | None = None,
    group: dist.ProcessGroup | str | None = None,
    exchange: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """Patch Aligned Contrastive Learning loss of all B × B pairs, without a `[B, B, N]` tensor. Equals

    ```python
    p, t = F.normalize(patches, dim=-1), F.normalize(texts, dim=-1)
    s = torch.einsum("bnd,kd->bkn", p, t)
    phi = ((s / attn_temperature).softmax(-1) * s).sum(-1)          # form="dot"
    logits, target = logit_scale * phi, torch.arange(len(phi))
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    ```

    Args:
        patches: `[B, N, D]` patch embeddings, not normalised; float32, bfloat16, float16 or float64, any strides.
        texts: `[B, D]` text embeddings, not normalised, same dtype and device; text i belongs to image i.
        logit_scale: the factor of the logits, already exponentiated: a number or a tensor of one element. Numbers, here
            and below, have to be finite in float32 (float64 for float64 patches); a tensor's value is not checked,
            because that would make the host wait for the device.
        patch_mask: bool `[B, N]`, True at real patches. What a masked patch holds is never read (NaN included) and its
            gradient is 0; an image without a real patch has compatibility 0 and gradient 0.
        attn_temperature: τ > 0 of the softmax over patches, a number or a (learnable) tensor of one element. A number
            is at least 1.2e-38, the smallest normal float32 (2.2e-308 for float64 patches), so that 1 / τ is finite. To
            `torch.compile` a number is a constant, and every other value compiles again: what a schedule changes is
            better a tensor. `form="max"` ignores it: the gradient of a learnable one is then 0 (not None).
        form: `"dot"`, φ = Σ a s (the product of the pooled patch with the text); `"cosine"`, which divides that by
            the pooled patch's norm, floored at 1e-6; or `"max"`, φ = max s (MaxSim, the limit of both for τ → 0),
            whose gradient goes to the first of the largest. With `"max"` a step costs little more than its forward.
        loss: `"infonce"`, the mean of row and column cross-entropy, or `"sigmoid"` (SigLIP), summed over all pairs and
            divided by B.
        logit_bias: added to the logits (SigLIP), a number or a tensor of one element.
        group: a `torch.distributed` process group: the batch is that of all its processes, B this one's part of it,
            which may differ between them (on a GPU the first step must have the largest part; inside `torch.compile`
            all must be equal, and nothing that differs is noticed). `"world"` is the default group, looked up at the
            call; without an initialised `torch.distributed` it is this process alone. `"local"` is this process alone.
            So is None, with one warning where `torch.distributed` runs several processes; note that
            `torch.distributed.group.WORLD` is None before `init_process_group`. Every process returns the loss of the
            global batch. Gradients of patches and texts are the number of processes times those of the
            global batch, so that the averaging of DDP and FSDP makes every parameter's gradient that of one process
            with the whole batch; whoever sums gradients instead divides by it. Gradients of the scalars are exact in
            each process. The gradient that comes from above must be the same everywhere, and |logit_scale| +
            |logit_bias| at most 600 (columns are summed in float64 without their maximum).
        exchange: how texts travel in the group: `"gather"` (all at once), `"ring"` (from neighbour to neighbour, for
            when `[B_global, D]` or `[B, B_global]` does not fit; a step is 5 units of work instead of 4), or `"auto"`,
            which takes the ring once those arrays pass 8 GiB.
        backend: `"auto"`, or one of `available_backends()`; the environment variable PACL_BACKEND replaces `"auto"`.

    Returns:
        The loss, 0-D, float32 (float64 for float64 inputs). Gradients flow to patches, texts, and whichever of
        logit_scale, logit_bias and attn_temperature are tensors; each is computed only if it is needed. A patch or text
        with a norm below 1e-12 has similarity 0 and gradient 0. Larger norms may be whatever the dtype holds, but on a
        GPU the kernels hold patches only up to a norm of 1e25, or of 1e18 with `form="cosine"`. Inside autocast,
        patches and texts are cast to the autocast dtype first. Of `torch.func`, grad, vjp, jacrev and vmap work (vmap
        computes one sample after the other) without a group; forward mode and second derivatives need
        `backend="reference"`.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        RuntimeError: in forward mode (NotImplementedError), at a second derivative, and for a group in `torch.func`.

    Source: Mukhoti et al., Open Vocabulary Semantic Segmentation with Patch Aligned Contrastive Learning, CVPR 2023.
    """
    patches, texts = check_pair(patches, texts, patch_mask)
    b, k = patches.shape[0], texts.shape[0]  # not len(), which torch.export would take for a constant
    if b != k:
        raise ValueError(f"texts has {k} rows, expected one for each of the {b} images of patches")
    check_not_empty(patches, "BND")
    check_choice("form", form, FORMS)
    check_choice("loss", loss, LOSSES)
    attn_temperature = check_scalar("attn_temperature", attn_temperature, patches, positive=True)
    logit_scale = check_scalar("logit_scale", logit_scale, patches)
    if logit_bias is not None:
        logit_bias = check_scalar("logit_bias", logit_bias, patches)
    check_choice("exchange", exchange, EXCHANGES)
    groups.check(group)
    if group is None or isinstance(group, str):
        group = groups.lookup(group)
    options = Options(form, loss, resolve(backend, patches.device, patches.dtype))
    if group is not None and group.size() > 1:
        return global_loss(
            patches, texts, logit_scale, patch_mask, attn_temperature, logit_bias, options, group, exchange
        )
    if options.backend == "reference":
        return _formula(
            reference.pacl_loss,
            patches,
            texts,
            logit_scale,
            patch_mask=patch_mask,
            attn_temperature=attn_temperature,
            form=form,
            loss=loss,
            logit_bias=logit_bias,
        )
    return first_output(PaclFunction, patches, texts, logit_scale, patch_mask, attn_temperature, logit_bias, options)


def compatibility(
    patches: Tensor,
    texts: Tensor,
    *,
    patch_mask: Tensor | None = None,
    attn_temperature: float | Tensor = 1.0,
    form: str = "dot",
    backend: str = "auto",
) -> Tensor:
    """Compatibility φ `[B, K]` of patches `[B, N, D]` with texts `[K, D]`, differentiable; K need not equal B.

    The arguments are those of `fused_pacl_loss`; the result is float32 (float64 for float64 inputs), and `[0, K]` or
    `[B, 0]` for an empty side.
    """
    patches, texts = check_pair(patches, texts, patch_mask)
    check_not_empty(patches, "ND")
    check_choice("form", form, FORMS)
    attn_temperature = check_scalar("attn_temperature", attn_temperature, patches, positive=True)
    options = Options(form, None, resolve(backend, patches.device, patches.dtype))
    if options.backend == "reference":
        return _formula(
            reference.compatibility,
            patches,
            texts,
            patch_mask=patch_mask,
            attn_temperature=attn_temperature,
            form=form,
        )
    return first_output(CompatibilityFunction, patches, texts, patch_mask, attn_temperature, options)


def _formula(function, patches: Tensor, texts: Tensor, *scalars, **options) -> Tensor:
    """The reference, which computes in the dtype of its inputs, in float32 at least, as the other backends do."""
    wide, device = torch.promote_types(patches.dtype, torch.float32), patches.device.type
    with torch.autocast(device, enabled=False) if autocasts(device) else contextlib.nullcontext():
        return function(patches.to(wide), texts.to(wide), *scalars, **options)
