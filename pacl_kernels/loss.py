"""The public functions: check the arguments, choose dtypes and backend, call the autograd Functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import groups, reference
from .autograd import (
    OPTIONS_OF_PHI,
    CompatibilityFunction,
    Options,
    PaclFunction,
    PairLossFunction,
    first_output,
    in_functorch,
    keeping,
    needed,
)
from .backends import resolve
from .checks import (
    EXCHANGES,
    FORMS,
    LOSSES,
    NORMALIZE,
    BackendName,
    Exchange,
    Form,
    Inputs,
    Loss,
    Normalize,
    TextPool,
    check_choice,
    check_inputs,
    check_not_empty,
    check_scalar,
    without_autocast,
)
from .distributed import global_compatibility, global_loss
from .groups import GroupName
from .list_autograd import listed_compatibility, listed_loss
from .pair_checks import check_pairs, check_text_index
from .sigmoid_autograd import SigmoidFunction, in_one_pass


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
    text_index: Tensor | None = None,
    patch_lengths: Sequence[int] | Tensor | None = None,
    text_mask: Tensor | None = None,
    text_lengths: Sequence[int] | Tensor | None = None,
    text_pool: TextPool | None = None,
    text_pool_scale: float = 1.0,
    null_patch: bool = False,
    normalize: Normalize = "both",
    grad_tolerance: float = 0.0,
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
        text_index: int64 or int32 `[B, M]`, a list of texts for each image, -1 for none: the image is compared with
            those alone, and the loss equals that with a `pair_bias` of -inf on all other pairs, for columns too. A step
            costs about M/K of the step over all pairs. A text that is twice in a list counts once, in its first place.
            `targets` and `pair_bias` are then `[B, M]`, one for each entry of the lists, and ids keep their meaning. An
            index beyond the texts is an error on a CPU outside of `torch.compile`, elsewhere it counts as -1. With a
            group, an index counts in the texts of all processes in the order of the ranks, and texts are gathered: a
            ring avoids arrays of all pairs, which lists do not have. With `text_pool` a list names texts of many
            tokens; on a GPU the host then waits for the longest list if texts are packed. `mine` makes lists of hard
            negatives.
        patch_lengths: int64 `[B]` on the CPU, or a list of integers: the number of patches of each image, 0 allowed.
            `patches` are then packed, `[ΣN, D]`, image after image and without padding, and `patch_mask` is `[ΣN]`.
        text_mask: bool `[K, L]` for texts `[K, L, D]`, True at real tokens. Masked tokens may hold anything.
        text_lengths: int64 `[K]` on the CPU, or a list of integers, 0 allowed: the number of tokens of each text.
            `texts` are then packed, `[ΣL, D]`.
        text_pool: how φ of a text's tokens becomes φ of the text: `"mean"`, `"sum"`, `"max"` or `"logsumexp"`, which is
            `log Σ exp(γ φ) / γ` with γ = `text_pool_scale`. It is needed for texts of many tokens and only for them:
            `[K, L, D]`, or packed with `text_lengths`. A text without a token has φ = 0 and gradient 0, and `"max"`
            takes the first of the largest. With `form="max"` this is the late interaction of FILIP and ColBERT. φ of
            all tokens is in memory for a block of images at a time, and a step is 5 units of work instead of 4.
        text_pool_scale: γ of `"logsumexp"`, a number above 0.
        null_patch: give each image one more patch with s = 0 and value 0, where the attention goes if nothing matches.
            `form="max"` becomes at least 0. `form="cosine"` does not change, as the pooled patch keeps its direction.
        normalize: `"both"` uses cosines everywhere. With `"values"` the attention is a softmax of the products of rows
            as they are, and with `"none"` φ is made of them too (in `form="cosine"`: the pooled patch is, and φ remains
            its cosine with the text). Such products have no bound, so τ is usually 1 or √D. `"values"` has no
            kernels: `"auto"` takes the backend `torch` for it, and on a GPU for `"none"` as well.
        grad_tolerance: the share of Σ |∂L/∂φ| that the backward may leave out, from 0 (the default, exact) to below 1.
            It takes the pairs above one threshold. The error of any gradient is then at most `grad_tolerance` ·
            Σ |∂L/∂φ| · max ‖∂φ/∂·‖. The loss and the gradients of logit scale, bias and pair bias stay exact. 2^-9 is
            the rounding of bfloat16. With CLIP's logit scale most pairs have next to no gradient, and a step costs
            little more than its forward. The backward stays exact where too few pairs can be left out, on the backends
            `torch` and `reference`, with `text_pool` and with `text_index`, and on a GPU for `form="max"`. On a GPU
            the host waits for the forward, to read the threshold. `kept_pairs(loss)` says what was used. With a group
            each process takes a threshold of its own.
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
            when `[B_global, D]` or `[B, B_global]` does not fit), or `"auto"`, which takes the ring once those arrays
            pass 8 GiB. In the ring a step is 5 units of work instead of 4, and no more than 4 for the sigmoid loss.
        backend: `"auto"`, or one of `available_backends()`; the environment variable PACL_BACKEND replaces `"auto"`.

    Returns:
        The loss, 0-D, float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: for a bad argument; the message names it, what came and what was expected.
        RuntimeError: for a second derivative, and for a group inside `torch.func`.
        NotImplementedError: for forward-mode differentiation.
    """
    inputs = check_inputs(
        patches, texts, attn_temperature, patch_mask, patch_lengths, text_mask, text_lengths, text_pool
    )
    check_not_empty(inputs, "BND")
    check_choice("loss", loss, LOSSES)
    options = _options(inputs, form, loss, backend, text_pool, text_pool_scale, null_patch, normalize, grad_tolerance)
    logit_scale = check_scalar("logit_scale", logit_scale, patches)
    if logit_bias is not None:
        logit_bias = check_scalar("logit_bias", logit_bias, patches)
    check_choice("exchange", exchange, EXCHANGES)
    groups.check(group)
    process_group = groups.lookup(group) if group is None or isinstance(group, str) else group
    if process_group is not None and process_group.size() == 1:
        process_group = None
    in_group = process_group is not None
    if text_index is not None:
        if exchange == "ring":
            raise ValueError(
                "exchange is 'ring', expected 'gather' or 'auto' with text_index: the ring avoids arrays of all pairs, "
                "which lists do not have"
            )
        exchange = "gather"
    text_index = check_text_index(text_index, inputs, None if in_group else inputs.text_count)
    pairs = check_pairs(inputs, image_ids, text_ids, targets, pair_bias, loss, in_group, text_index)
    if process_group is not None:
        return global_loss(inputs, logit_scale, logit_bias, options, process_group, exchange, pairs, text_index)
    if options.backend == "reference":
        return _formula(
            reference.pacl_loss,
            inputs,
            options,
            logit_scale,
            loss=loss,
            logit_bias=logit_bias,
            **({} if pairs is None else pairs._asdict()),
            text_index=text_index,
        )
    if text_index is not None and pairs is not None:
        return listed_loss(inputs, logit_scale, logit_bias, pairs, text_index, options)
    if loss == "sigmoid" and in_one_pass(options, inputs) and not in_functorch():
        given = (None,) * 4 if pairs is None else pairs
        needs = needed(inputs.patches, inputs.texts, logit_scale, inputs.attn_temperature, logit_bias, given[3])
        options = options._replace(kept=None if torch.compiler.is_compiling() else [])
        return first_output(SigmoidFunction, *inputs, logit_scale, logit_bias, *given, options, needs)
    options = keeping(options, inputs)
    if pairs is not None:
        phi = first_output(CompatibilityFunction, *inputs, options)
        return first_output(PairLossFunction, phi, logit_scale, logit_bias, *pairs, None, phi.shape[1], loss)
    return first_output(PaclFunction, *inputs, logit_scale, logit_bias, options)


def compatibility(
    patches: Tensor,
    texts: Tensor,
    *,
    patch_mask: Tensor | None = None,
    attn_temperature: float | Tensor = 1.0,
    form: Form = "dot",
    text_index: Tensor | None = None,
    patch_lengths: Sequence[int] | Tensor | None = None,
    text_mask: Tensor | None = None,
    text_lengths: Sequence[int] | Tensor | None = None,
    text_pool: TextPool | None = None,
    text_pool_scale: float = 1.0,
    null_patch: bool = False,
    normalize: Normalize = "both",
    grad_tolerance: float = 0.0,
    group: dist.ProcessGroup | GroupName | None = None,
    backend: BackendName = "auto",
) -> Tensor:
    """Return the compatibility φ `[B, K]` of patches `[B, N, D]` with texts `[K, D]`; K need not equal B.

    Args:
        patches: `[B, N, D]` patch embeddings, not normalised; float32, bfloat16, float16 or float64, any strides. With
            `patch_lengths` they are packed, `[ΣN, D]`.
        texts: `[K, D]` text embeddings, not normalised, same dtype and device. With `text_pool` a text has many tokens.
        patch_mask: bool `[B, N]`, True at real patches.
        attn_temperature: τ > 0 of the softmax over patches, a number or a tensor of one element.
        form: `"dot"`, `"cosine"` or `"max"`. This and the arguments up to `grad_tolerance` mean the same as in
            `fused_pacl_loss`.
        text_index: int64 or int32 `[B, M]`, lists of texts, -1 for none, as in `fused_pacl_loss`. φ is then `[B, M]`,
            of the listed texts alone, and 0 where there is none.
        patch_lengths: int64 `[B]` on the CPU, or a list: lengths of packed patches.
        text_mask: bool `[K, L]`, True at real tokens.
        text_lengths: int64 `[K]` on the CPU, or a list: lengths of packed texts.
        text_pool: `"mean"`, `"sum"`, `"max"` or `"logsumexp"`, for texts of many tokens.
        text_pool_scale: γ of `"logsumexp"`.
        null_patch: add a patch with s = 0 and value 0 to each image.
        normalize: `"both"`, `"values"` or `"none"`.
        grad_tolerance: share of Σ |∂L/∂φ| that the backward may leave out; `kept_pairs(phi)` says what it used.
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
    inputs = check_inputs(
        patches, texts, attn_temperature, patch_mask, patch_lengths, text_mask, text_lengths, text_pool
    )
    check_not_empty(inputs, "ND")
    options = _options(inputs, form, None, backend, text_pool, text_pool_scale, null_patch, normalize, grad_tolerance)
    groups.check(group)
    process_group = groups.lookup(group) if isinstance(group, str) else group
    text_index = check_text_index(text_index, inputs, inputs.text_count)
    if process_group is not None and process_group.size() > 1:
        if text_index is not None:
            raise ValueError("text_index is given with a group of several processes, expected group=None or 'local'")
        return global_compatibility(inputs, options, process_group)
    if options.backend == "reference":
        phi = _formula(reference.compatibility, inputs, options)
        return phi if text_index is None else reference.listed(phi, text_index)
    if text_index is not None:
        return listed_compatibility(inputs, text_index, options)
    return first_output(CompatibilityFunction, *inputs, keeping(options, inputs))


def _options(
    inputs: Inputs, form: str, loss: Any, backend: str, text_pool: Any, text_pool_scale: float, null_patch: bool,
    normalize: str, grad_tolerance: Any = 0.0,
) -> Options:  # fmt: skip
    """Check the options of φ and return them, with the backend that will run."""
    check_choice("form", form, FORMS)
    check_choice("normalize", normalize, NORMALIZE)
    if isinstance(grad_tolerance, bool) or not isinstance(grad_tolerance, int | float):
        raise TypeError(f"grad_tolerance is a {type(grad_tolerance).__name__}, expected a number")
    if not 0 <= grad_tolerance < 1:
        raise ValueError(f"grad_tolerance is {grad_tolerance:g}, expected a number from 0 to below 1")
    if not isinstance(null_patch, bool):
        raise TypeError(f"null_patch is a {type(null_patch).__name__}, expected True or False")
    if isinstance(text_pool_scale, Tensor):
        raise TypeError("text_pool_scale is a tensor, expected a number")
    scale: Any = check_scalar("text_pool_scale", text_pool_scale, inputs.patches, positive=True)
    if text_pool != "logsumexp" and scale != 1.0:
        raise ValueError(f"text_pool_scale is {scale:g}, expected 1 unless text_pool is 'logsumexp'")
    name = resolve(backend, inputs.patches.device, inputs.patches.dtype, normalize)
    choices: Any = form, loss, name, None, float(grad_tolerance), text_pool, scale, null_patch, normalize
    return Options(*choices)


def _formula(
    function: Callable[..., Tensor], inputs: Inputs, options: Options, *scalars: float | Tensor, **of_loss: Any
) -> Tensor:
    """Call a function of the reference in the inputs' dtype, but at least in float32, as the other backends compute."""
    patches, texts = inputs.patches, inputs.texts
    wide, device = torch.promote_types(patches.dtype, torch.float32), patches.device.type
    rest = inputs._asdict() | {name: getattr(options, name) for name in OPTIONS_OF_PHI}
    del rest["patches"], rest["texts"]
    with without_autocast(device):
        return function(patches.to(wide), texts.to(wide), *scalars, **rest, **of_loss)
