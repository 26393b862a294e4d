"""The public functions: they check their arguments, settle dtypes and backend, and call the autograd Functions."""

from __future__ import annotations

import contextlib
from numbers import Real

import torch
import torch.distributed as dist
from torch import Tensor

from . import distributed, groups, reference
from .autograd import CompatibilityFunction, PaclFunction, first_output
from .backends import resolve

FORMS = ("dot", "cosine", "max")
LOSSES = ("infonce", "sigmoid")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
    patches, texts = _check_pair(patches, texts, patch_mask)
    b, k = patches.shape[0], texts.shape[0]  # not len(), which torch.export would take for a constant
    if b != k:
        raise ValueError(f"texts has {k} rows, expected one for each of the {b} images of patches")
    for name, size in zip("BND", patches.shape, strict=True):
        if size == 0:
            raise ValueError(f"patches has shape {list(patches.shape)}, expected [B, N, D] with {name} of at least 1")
    _check_choice("form", form, FORMS)
    _check_choice("loss", loss, LOSSES)
    attn_temperature = check_scalar("attn_temperature", attn_temperature, patches, positive=True)
    logit_scale = check_scalar("logit_scale", logit_scale, patches)
    if logit_bias is not None:
        logit_bias = check_scalar("logit_bias", logit_bias, patches)
    _check_choice("exchange", exchange, distributed.EXCHANGES)
    groups.check(group)
    if group is None or isinstance(group, str):
        group = groups.lookup(group)
    backend = resolve(backend, patches.device, patches.dtype)
    if group is not None and group.size() > 1:
        return global_loss(
            *(patches, texts, logit_scale, logit_bias, attn_temperature, patch_mask),
            *(form, loss, backend, group, exchange),
        )
    if backend == "reference":
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
    return first_output(
        PaclFunction, patches, texts, logit_scale, logit_bias, attn_temperature, patch_mask, form, loss, backend
    )


def global_loss(
    patches, texts, logit_scale, logit_bias, attn_temperature, patch_mask, form, loss, backend, group, exchange
) -> Tensor:
    """The loss of a group's batch, of arguments that have been checked."""
    if backend == "reference":
        raise ValueError("backend is 'reference', expected another one with a group: the reference is one process")
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "group is one of several processes, expected None or 'local' inside a transform of torch.func"
        )

    setting = distributed.Setting
    settings = {
        "form": setting(form, FORMS),
        "loss": setting(loss, LOSSES),
        "exchange": setting(exchange, distributed.EXCHANGES),
        "patches' D": setting(patches.shape[2], int),
        "patches' dtype": setting(patches.dtype, DTYPES),
        "attn_temperature": setting(attn_temperature, float),
        "logit_scale": setting(logit_scale, float),
        "logit_bias": setting(logit_bias, float),
    }
    for name, value in (
        ("texts", texts),
        ("attn_temperature", attn_temperature),
        ("logit_scale", logit_scale),
        ("logit_bias", logit_bias),
    ):
        # The collectives of the backward depend on it.
        needed = torch.is_grad_enabled() and isinstance(value, Tensor) and value.requires_grad
        settings[f"{name}.requires_grad"] = setting(needed, bool)
    plan, headers = distributed.make_plan(group, texts, settings)
    return distributed.GlobalPaclFunction.apply(
        patches, texts, logit_scale, logit_bias, attn_temperature, patch_mask, form, loss, backend, plan, headers
    )


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
    patches, texts = _check_pair(patches, texts, patch_mask)
    for name, size in zip("ND", patches.shape[1:], strict=True):
        if size == 0:
            raise ValueError(f"patches has shape {list(patches.shape)}, expected [B, N, D] with {name} of at least 1")
    _check_choice("form", form, FORMS)
    attn_temperature = check_scalar("attn_temperature", attn_temperature, patches, positive=True)
    backend = resolve(backend, patches.device, patches.dtype)
    if backend == "reference":
        options = {"patch_mask": patch_mask, "attn_temperature": attn_temperature, "form": form}
        return _formula(reference.compatibility, patches, texts, **options)
    return first_output(CompatibilityFunction, patches, texts, attn_temperature, patch_mask, form, backend)


def _check_pair(patches, texts, patch_mask) -> tuple[Tensor, Tensor]:
    """patches and texts, in the autocast dtype where autocast is on."""
    for name, value, layout in (("patches", patches, "[B, N, D]"), ("texts", texts, "[K, D]")):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}, expected a tensor of shape {layout}")
        if hasattr(value, "full_tensor"):
            raise TypeError(f"{name} is a DTensor, expected this process's own rows as a plain tensor (to_local())")
        check_dense(name, value)
        if value.dtype not in DTYPES:
            raise TypeError(f"{name} is {value.dtype}, expected float32, bfloat16, float16 or float64")
        if value.ndim != layout.count(",") + 1:
            hint = _layout_hint(patches, texts) if name == "patches" else ""
            raise ValueError(f"{name} has shape {list(value.shape)}, expected {layout}{hint}")
    if texts.device != patches.device:
        raise ValueError(f"texts is on {texts.device}, expected {patches.device} like patches")
    device = patches.device.type
    if _autocasts(device) and torch.float64 not in (patches.dtype, texts.dtype):
        dtype = torch.get_autocast_dtype(device)
        patches, texts = patches.to(dtype), texts.to(dtype)
    if texts.dtype != patches.dtype:
        raise TypeError(f"texts is {texts.dtype}, expected {patches.dtype} like patches")
    if texts.shape[1] != patches.shape[2]:
        hint = _layout_hint(patches, texts)
        raise ValueError(f"texts has D = {texts.shape[1]}, expected {patches.shape[2]} like patches{hint}")
    if patch_mask is not None:
        if not isinstance(patch_mask, Tensor):
            raise TypeError(f"patch_mask is a {type(patch_mask).__name__}, expected a bool tensor of shape [B, N]")
        check_dense("patch_mask", patch_mask)
        if patch_mask.dtype != torch.bool:
            raise TypeError(f"patch_mask is {patch_mask.dtype}, expected torch.bool")
        if patch_mask.shape != patches.shape[:2]:
            raise ValueError(
                f"patch_mask has shape {list(patch_mask.shape)}, expected {list(patches.shape[:2])} like patches"
            )
        if patch_mask.device != patches.device:
            raise ValueError(f"patch_mask is on {patch_mask.device}, expected {patches.device} like patches")
    return patches, texts


def _layout_hint(patches: Tensor, texts) -> str:
    """How to make `[B, N, D]` of patches that are laid out otherwise, where the texts' D tells."""
    d = texts.shape[1] if isinstance(texts, Tensor) and texts.ndim == 2 else None
    sizes = list(patches.shape)
    if len(sizes) == 3 and sizes[1] == d:
        return ": patches.transpose(1, 2) makes it of [B, D, N]"
    if len(sizes) == 4 and sizes[3] == d:
        return ": patches.flatten(1, 2) makes it of [B, h, w, D]"
    if len(sizes) == 4 and sizes[1] == d:
        return ": patches.flatten(2).transpose(1, 2) makes it of [B, D, h, w]"
    return ""


def _formula(function, patches: Tensor, texts: Tensor, *scalars, **options) -> Tensor:
    """The reference, which computes in the dtype of its inputs, in float32 at least, as the other backends do."""
    wide, device = torch.promote_types(patches.dtype, torch.float32), patches.device.type
    with torch.autocast(device, enabled=False) if _autocasts(device) else contextlib.nullcontext():
        return function(patches.to(wide), texts.to(wide), *scalars, **options)


def _autocasts(device: str) -> bool:
    """Whether autocast is on; of "meta", which has none, torch does not let one ask."""
    return device != "meta" and torch.is_autocast_enabled(device)


def check_dense(name: str, value: Tensor) -> None:
    if value.is_nested or value.layout != torch.strided:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name} is a {kind} tensor, expected a dense one")


def check_scalar(name: str, value, like: Tensor, like_name: str = "patches", positive: bool = False) -> float | Tensor:
    """A tensor of one element as it is, a number as a float that the dtype computed in can hold.

    That dtype is float32, or float64 where `like` is. Positive numbers are its normal ones: 1 / value is then finite.
    """
    if isinstance(value, Tensor):
        if hasattr(value, "full_tensor"):  # a parameter under FSDP; the gradient is the same on every rank, as it asks
            value = value.full_tensor()
        if not value.dtype.is_floating_point:
            raise TypeError(f"{name} is a {value.dtype} tensor, expected a floating-point one")
        if value.numel() != 1:
            raise ValueError(f"{name} has shape {list(value.shape)}, expected one element")
        if value.device != like.device:
            raise ValueError(f"{name} is on {value.device}, expected {like.device} like {like_name}")
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a number or a tensor of one element")
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    limits = torch.finfo(wide)
    smallest, kind = (limits.tiny, "finite number above 0") if positive else (-limits.max, "finite number")
    if not smallest <= value <= limits.max:  # NaN fails it too
        dtype = str(wide).removeprefix("torch.")
        raise ValueError(
            f"{name} is {_shown(value)}, expected a {kind} that {dtype} holds ({smallest:.2g} to {limits.max:.2g})"
        )
    return float(value)


def _shown(value: Real) -> str:
    """A number in a sentence: an integer may have more digits than anybody reads, or Python prints."""
    try:
        float(value)
    except OverflowError:
        return "a number beyond float64"
    return str(value)


def _check_choice(name: str, value, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}")
