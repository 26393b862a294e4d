"""The public functions: they check their arguments, settle dtypes and backend, and call the autograd Functions."""

from __future__ import annotations

import contextlib
import math
from numbers import Real

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import distributed, reference
from .dispatch import resolve
from .function import CompatibilityFunction, PaclFunction

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
    group: dist.ProcessGroup | None = None,
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
        logit_scale: the factor of the logits, already exponentiated: a number or a tensor of one element.
        patch_mask: bool `[B, N]`, True at real patches. What a masked patch holds is never read (NaN included) and its
            gradient is 0; an image without a real patch has compatibility 0 and gradient 0.
        attn_temperature: τ > 0 of the softmax over patches, a number or a (learnable) tensor of one element; a tensor's
            value is not checked, because that would make the host wait for the device. To `torch.compile` a number is a
            constant, and every other value compiles again: what a schedule changes is better a tensor. `form="max"`
            ignores it: the gradient of a learnable one is then 0 (not None).
        form: `"dot"`, φ = Σ a s (the product of the pooled patch with the text); `"cosine"`, which divides that by
            the pooled patch's norm, floored at 1e-6; or `"max"`, φ = max s (MaxSim, the limit of both for τ → 0),
            whose gradient goes to the first of the largest. With `"max"` a step costs little more than its forward.
        loss: `"infonce"`, the mean of row and column cross-entropy, or `"sigmoid"` (SigLIP), summed over all pairs and
            divided by B.
        logit_bias: added to the logits (SigLIP), a number or a tensor of one element.
        group: a `torch.distributed` process group: the batch is that of all its processes, B this one's part of it,
            which may differ between them (on a GPU the first step must have the largest part; inside `torch.compile`
            all must be equal, and nothing that differs is noticed). None is this process alone, and so is
            `torch.distributed.group.WORLD` before `init_process_group`, which is None until then. Every process returns
            the loss of the global batch. Gradients of patches and texts are the number of processes times those of the
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
        with a norm below 1e-12 has similarity 0 and gradient 0. Inside autocast, patches and texts are cast to the
        autocast dtype first.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Source: Mukhoti et al., Open Vocabulary Semantic Segmentation with Patch Aligned Contrastive Learning, CVPR 2023.
    """
    patches, texts = _check_pair(patches, texts, patch_mask)
    if len(patches) != len(texts):
        raise ValueError(f"texts has {len(texts)} rows, expected one for each of the {len(patches)} images of patches")
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
    _check_group(group)
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
    return PaclFunction.apply(
        patches, texts, logit_scale, logit_bias, attn_temperature, patch_mask, form, loss, backend
    )


def global_loss(
    patches, texts, logit_scale, logit_bias, attn_temperature, patch_mask, form, loss, backend, group, exchange
) -> Tensor:
    """The loss of a group's batch, of arguments that have been checked."""
    if backend == "reference":
        raise ValueError("backend is 'reference', expected another one with a group: the reference is one process")

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
    return CompatibilityFunction.apply(patches, texts, attn_temperature, patch_mask, form, backend)


class PaclLoss(nn.Module):
    """`fused_pacl_loss` behind the call of open_clip's losses: `loss(image_features, text_features, logit_scale)`.

    `attn_temperature` may be a tensor, but a learnable one belongs to the model: an optimiser that is built from
    `model.parameters()` does not see this module's. `form="max"` ignores it. `group` and `exchange` are those of
    `fused_pacl_loss`; as in open_clip's losses, a `world_size` above 1 (with its `rank`) stands for the default group.
    """

    def __init__(
        self,
        attn_temperature: float | Tensor = 1.0,
        form: str = "dot",
        loss: str = "infonce",
        rank: int = 0,
        world_size: int = 1,
        group: dist.ProcessGroup | None = None,
        exchange: str = "auto",
        backend: str = "auto",
    ):
        super().__init__()
        if world_size > 1:
            group = _open_clip_group(rank, world_size, group)
        self.attn_temperature, self.form, self.loss = attn_temperature, form, loss
        self.group, self.exchange, self.backend = group, exchange, backend

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        patch_mask: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss (0-D) of `image_features` `[B, N, D]` and `text_features` `[B, D]`; open_clip's keyword names."""
        value = fused_pacl_loss(
            image_features,
            text_features,
            logit_scale,
            patch_mask=patch_mask,
            attn_temperature=self.attn_temperature,
            form=self.form,
            loss=self.loss,
            logit_bias=logit_bias,
            group=self.group,
            exchange=self.exchange,
            backend=self.backend,
        )
        return {"contrastive_loss": value} if output_dict else value

    def extra_repr(self) -> str:
        return (
            f"attn_temperature={self.attn_temperature}, form={self.form!r}, loss={self.loss!r}, "
            f"backend={self.backend!r}"
        )


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
            raise ValueError(f"{name} has shape {list(value.shape)}, expected {layout}")
    if texts.device != patches.device:
        raise ValueError(f"texts is on {texts.device}, expected {patches.device} like patches")
    device = patches.device.type
    if _autocasts(device) and torch.float64 not in (patches.dtype, texts.dtype):
        dtype = torch.get_autocast_dtype(device)
        patches, texts = patches.to(dtype), texts.to(dtype)
    if texts.dtype != patches.dtype:
        raise TypeError(f"texts is {texts.dtype}, expected {patches.dtype} like patches")
    if texts.shape[1] != patches.shape[2]:
        raise ValueError(f"texts has D = {texts.shape[1]}, expected {patches.shape[2]} like patches")
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
    if positive and not 0 < value < math.inf:  # NaN fails it too
        raise ValueError(f"{name} is {value}, expected a finite number above 0")
    return float(value)


def _check_group(group) -> None:
    if group is not None and not isinstance(group, getattr(dist, "ProcessGroup", ())):
        raise TypeError(
            f"group is a {type(group).__name__}, expected a torch.distributed process group with this process in it"
        )


def _open_clip_group(rank: int, world_size: int, group):
    """The default group, or `group`, once it is what rank and world size say."""
    if group is None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(f"world_size is {world_size}, expected 1 without an initialised torch.distributed")
        group = dist.group.WORLD
    _check_group(group)
    if (group.rank(), group.size()) != (rank, world_size):
        raise ValueError(
            f"rank is {rank} and world_size {world_size}, expected {group.rank()} and {group.size()} as in the group"
        )
    return group


def _check_choice(name: str, value, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}")
