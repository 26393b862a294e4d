"""The public functions: check the arguments, choose dtypes and backend, call the autograd Functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import groups, reference
from .autograd import (
    CompatibilityFunction,
    Options,
    PaclFunction,
    PairLossFunction,
    SigmoidFunction,
    first_output,
    in_functorch,
    keeping,
    needed,
)
from .backends import computes_sigmoid_step, resolve
from .checks import (
    EXCHANGES,
    FORMS,
    LOSSES,
    BackendName,
    Exchange,
    Form,
    Loss,
    check_choice,
    check_not_empty,
    check_pair,
    check_scalar,
    without_autocast,
)
from .distributed import global_compatibility, global_loss
from .groups import GroupName
from .pair_checks import check_pairs


def fused_pacl_loss(
    patches: Tensor,
    texts: Tensor,
    logit_scale: float | Tensor,
    *,
    patch_mask: Tensor | None = None,
    attn_temperature: float | Tensor = 1.0,
    form: Form = "dot",
    loss: Loss = "infonce",
    logit_bias: float | Tensor | None = None,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    targets: Tensor | None = None,
    pair_bias: Tensor | None = None,
    group: dist.ProcessGroup | GroupName | None = None,
    exchange: Exchange = "auto",
    backend: BackendName = "auto",
) -> Tensor:
    """Return the Patch Aligned Contrastive Learning loss of all B × B pairs, without a `[B, B, N]` tensor.

    It equals

    ```python
    p, t = F.normalize(patches, dim=-1), F.normalize(texts, dim=-1)
    s = torch.einsum("bnd,kd->bkn", p, t)
    phi = ((s / attn_temperature).softmax(-1) * s).sum(-1)          # form="dot"
    logits, target = logit_scale * phi, torch.arange(len(phi))
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    ```

    Gradients flow to patches, texts, and those of logit_scale, logit_bias, attn_temperature and pair_bias that are
    tensors; each is computed only if it is needed. A patch or text with a norm below 1e-12 has similarity 0 and
    gradient 0. Norms may be as large as the dtype allows, but the GPU kernels limit those of patches to 1e25, or to
    1e18 with `form="cosine"`.

    Inside autocast, patches and texts are first cast to the autocast dtype. Of `torch.func`, grad, vjp, jacrev and vmap
    work without a group (vmap computes one sample after the other). Forward mode and second derivatives need
    `backend="reference"`.

    Source: Mukhoti et al., Open Vocabulary Semantic Segmentation with Patch Aligned Contrastive Learning, CVPR 2023.

    Args:
        patches: `[B, N, D]` patch embeddings, not normalised; float32, bfloat16, float16 or float64, any strides.
        texts: `[K, D]` text embeddings, not normalised, same dtype and device. By default K = B, and text i belongs to
            image i; `image_ids`, `text_ids` and `targets` say otherwise, and K may then be any number.
        logit_scale: factor of the logits, already exponentiated: a number or a tensor of one element. Numbers, here and
            below, must be finite in float32 (in float64 for float64 patches). The value of a tensor is not checked,
            because reading it would make the host wait for the device.
        patch_mask: bool `[B, N]`, True at real patches. Masked patches are never read (they may hold NaN) and have
            gradient 0. An image without a real patch has compatibility 0 and gradient 0.
        attn_temperature: τ > 0 of the softmax over patches, a number or a (learnable) tensor of one element. A number
            is at least 1.2e-38, the smallest normal float32 (2.2e-308 for float64 patches), so that 1 / τ is finite.
            `torch.compile` treats a number as a constant and compiles again for every other value; pass a tensor if a
            schedule changes it. `form="max"` ignores τ: the gradient of a learnable τ is then 0 (not None).
        form: `"dot"`, φ = Σ a s (the product of the pooled patch with the text); `"cosine"`, which divides φ by the
            norm of the pooled patch, floored at 1e-6; or `"max"`, φ = max s (MaxSim, the limit of both for τ → 0),
            whose gradient goes to the first of the largest. With `"max"` a step costs little more than its forward.
        loss: `"infonce"`, the mean of row and column cross-entropy, or `"sigmoid"` (SigLIP), summed over all pairs and
            divided by B. With several positives in a row or column, InfoNCE takes their mean, weighted by the targets.
            Rows and columns without a positive are left out of the two averages.
        logit_bias: bias of the logits (SigLIP), a number or a tensor of one element.
        image_ids: int64 or int32 `[B]`, by default `arange(B)`. A pair is positive where the ids of image and text are
            equal; a negative id equals none, so its image or text is an extra negative. With a group ids count in the
            whole batch, and both are needed.
        text_ids: int64 or int32 `[K]`, by default those of the images.
        targets: in place of ids, float32 `[B, K]` (float64 for float64 patches), constant: the weight of each pair as a
            positive, at least 0, and at most 1 for the sigmoid loss.
        pair_bias: float32 `[B, K]` (float64 for float64 patches), added to the logits; -inf takes a pair out of the
            loss, as a positive too. It may require a gradient. With a group, `targets` and `pair_bias` are this
            process's rows `[B_local, K of all processes]`, the texts in the order of the ranks, and the gradient of the
            bias is multiplied by the number of processes, like those of patches and texts. Values of targets and bias
            are checked on a CPU outside of `torch.compile`.
        group: a `torch.distributed` process group. The batch is then that of all its processes, and B is the part of
            this process. `"world"` is the default group, looked up at the call, or this process alone if
            `torch.distributed` is not initialised. `"local"` is this process alone. None is this process alone too,
            with one warning if `torch.distributed` runs several processes; note that `torch.distributed.group.WORLD` is
            None before `init_process_group`.

            Every process returns the loss of the global batch. The gradients of patches and texts are those of the
            global batch times the number of processes. After the averaging of DDP or FSDP every parameter's gradient
            therefore equals that of one process with the whole batch; code that sums gradients instead must divide by
            the number of processes. The gradients of the scalars are exact in each process.

            Parts may differ in size, but on a GPU the first step must have the largest part, and inside
            `torch.compile` all parts must be equal, and no difference between processes is noticed. The incoming
            gradient must be the same in every process, and |logit_scale| + |logit_bias| at most 600 (columns are summed
            in float64 without subtracting their maximum).
        exchange: how texts travel in the group: `"gather"` (all at once), `"ring"` (from neighbour to neighbour, for
            when `[B_global, D]` or `[B, B_global]` does not fit; a step is 5 units of work instead of 4), or `"auto"`,
            which takes the ring once those arrays pass 8 GiB.
        backend: `"auto"`, or one of `available_backends()`; the environment variable PACL_BACKEND replaces `"auto"`.

    Returns:
        The loss, 0-D, float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: for a bad argument; the message names it, what came and what was expected.
        RuntimeError: for a second derivative, and for a group inside `torch.func`.
        NotImplementedError: for forward-mode differentiation.
    """
    patches, texts = check_pair(patches, texts, patch_mask)
    check_not_empty(patches, "BND")
    check_choice("form", form, FORMS)
    check_choice("loss", loss, LOSSES)
    attn_temperature = check_scalar("attn_temperature", attn_temperature, patches, positive=True)
    logit_scale = check_scalar("logit_scale", logit_scale, patches)
    if logit_bias is not None:
        logit_bias = check_scalar("logit_bias", logit_bias, patches)
    check_choice("exchange", exchange, EXCHANGES)
    groups.check(group)
    process_group = groups.lookup(group) if group is None or isinstance(group, str) else group
    if process_group is not None and process_group.size() == 1:
        process_group = None
    pairs = check_pairs(patches, texts, image_ids, text_ids, targets, pair_bias, loss, process_group is not None)
    options = Options(form, loss, resolve(backend, patches.device, patches.dtype))
    if process_group is not None:
        return global_loss(
            *(patches, texts, logit_scale, patch_mask, attn_temperature, logit_bias),
            *(options, process_group, exchange, pairs),
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
            **({} if pairs is None else pairs._asdict()),
        )
    one_pass = loss == "sigmoid" and computes_sigmoid_step(options.backend, form, patches.dtype, patches.shape[1])
    if one_pass and not in_functorch():
        given = (None,) * 4 if pairs is None else pairs
        needs = needed(patches, texts, logit_scale, attn_temperature, logit_bias, given[3])
        options = options._replace(kept=None if torch.compiler.is_compiling() else [])
        scalars = logit_scale, patch_mask, attn_temperature, logit_bias
        return first_output(SigmoidFunction, patches, texts, *scalars, *given, options, needs)
    options = keeping(options, patches, patch_mask)
    if pairs is not None:
        phi = first_output(CompatibilityFunction, patches, texts, patch_mask, attn_temperature, options)
        return first_output(PairLossFunction, phi, logit_scale, logit_bias, *pairs, loss)
    return first_output(PaclFunction, patches, texts, logit_scale, patch_mask, attn_temperature, logit_bias, options)


def compatibility(
    patches: Tensor,
    texts: Tensor,
    *,
    patch_mask: Tensor | None = None,
    attn_temperature: float | Tensor = 1.0,
    form: Form = "dot",
    group: dist.ProcessGroup | GroupName | None = None,
    backend: BackendName = "auto",
) -> Tensor:
    """Return the compatibility φ `[B, K]` of patches `[B, N, D]` with texts `[K, D]`; K need not equal B.

    Args:
        patches: `[B, N, D]` patch embeddings, not normalised; float32, bfloat16, float16 or float64, any strides.
        texts: `[K, D]` text embeddings, not normalised, same dtype and device.
        patch_mask: bool `[B, N]`, True at real patches.
        attn_temperature: τ > 0 of the softmax over patches, a number or a tensor of one element.
        form: `"dot"`, `"cosine"` or `"max"`. This and the other arguments mean the same as in `fused_pacl_loss`.
        group: the processes whose texts are compared: a `torch.distributed` process group, `"world"`, or None or
            `"local"` for this process alone. φ is then `[B_local, K of all processes]`, the texts in the order of the
            ranks. The gradient of a text is the sum over the processes' losses, as with an all-gather that is
            differentiated; the gradient of the temperature is this process's own. After the averaging of DDP, a loss
            that is the mean of the processes' losses has its exact gradients. The number of texts may differ between
            processes. On a GPU it must stay that of the first call.
        backend: `"auto"`, or one of `available_backends()`.

    Returns:
        φ, float32 (float64 for float64 inputs), differentiable. For B = 0 or K = 0 it is empty, `[0, K]` or `[B, 0]`.

    Raises:
        TypeError, ValueError: for a bad argument, as in `fused_pacl_loss`.
    """
    patches, texts = check_pair(patches, texts, patch_mask)
    check_not_empty(patches, "ND")
    check_choice("form", form, FORMS)
    attn_temperature = check_scalar("attn_temperature", attn_temperature, patches, positive=True)
    groups.check(group)
    process_group = groups.lookup(group) if isinstance(group, str) else group
    options = Options(form, None, resolve(backend, patches.device, patches.dtype))
    if process_group is not None and process_group.size() > 1:
        return global_compatibility(patches, texts, patch_mask, attn_temperature, options, process_group)
    if options.backend == "reference":
        return _formula(
            reference.compatibility,
            patches,
            texts,
            patch_mask=patch_mask,
            attn_temperature=attn_temperature,
            form=form,
        )
    options = keeping(options, patches, patch_mask)
    return first_output(CompatibilityFunction, patches, texts, patch_mask, attn_temperature, options)


def _formula(
    function: Callable[..., Tensor], patches: Tensor, texts: Tensor, *scalars: float | Tensor, **options: Any
) -> Tensor:
    """Call a function of the reference in the inputs' dtype, but at least in float32, as the other backends compute."""
    wide, device = torch.promote_types(patches.dtype, torch.float32), patches.device.type
    with without_autocast(device):
        return function(patches.to(wide), texts.to(wide), *scalars, **options)
