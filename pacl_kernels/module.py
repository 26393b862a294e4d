"""`PaclLoss`: the loss as a module with the call signature of open_clip's losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch.distributed as dist
from torch import Tensor, nn

from . import groups
from .checks import BackendName, Exchange, Form, Loss, Normalize, TextPool
from .groups import GroupName
from .loss import fused_pacl_loss

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Batch(TypedDict, total=False):
    """Arguments of `PaclLoss.forward` that belong to a batch and are given by name."""

    image_ids: Tensor | None
    text_ids: Tensor | None
    targets: Tensor | None
    pair_bias: Tensor | None
    text_index: Tensor | None
    patch_lengths: Sequence[int] | Tensor | None
    text_mask: Tensor | None
    text_lengths: Sequence[int] | Tensor | None


class PaclLoss(nn.Module):
    """`fused_pacl_loss` with the call of open_clip's losses: `loss(image_features, text_features, logit_scale)`.

    The module has no state: its `state_dict` is empty unless the temperature is a Parameter. It can be copied, pickled
    and saved. Copies share a group of some of the processes; such a group cannot be pickled (TypeError). Neither can a
    temperature that was computed from a parameter, nor be deep-copied, because a copy would not follow the parameter.

    Args:
        attn_temperature: as in `fused_pacl_loss`. A tensor moves with the module (`to`, `cuda`) and keeps its dtype,
            but one that requires a gradient and is no Parameter stays where it is. A learnable temperature belongs to
            the model, because an optimiser built from `model.parameters()` does not see the parameters of this module.
            `form="max"` ignores it.
        form: as in `fused_pacl_loss`.
        loss: as in `fused_pacl_loss`.
        rank: this process's number, as in open_clip's losses. It and `world_size` are compared with the group: here or,
            before `init_process_group`, at the call.
        world_size: number of processes, as in open_clip's losses. Above 1 it implies `group="world"`.
        group: as in `fused_pacl_loss`: None, `"world"`, `"local"` or a process group. The default group is kept as
            `"world"`. Names are looked up at each call, so the module may be built before `init_process_group`.
        exchange: as in `fused_pacl_loss`.
        backend: as in `fused_pacl_loss`.
        text_pool: as in `fused_pacl_loss`, for texts of many tokens.
        text_pool_scale: as in `fused_pacl_loss`.
        null_patch: as in `fused_pacl_loss`.
        normalize: as in `fused_pacl_loss`.
        grad_tolerance: as in `fused_pacl_loss`.

    Raises:
        TypeError, ValueError: for a bad group, or for one of another rank or size. The call checks everything else.
    """

    def __init__(
        self,
        attn_temperature: float | Tensor = 1.0,
        form: Form = "dot",
        loss: Loss = "infonce",
        rank: int = 0,
        world_size: int = 1,
        group: dist.ProcessGroup | GroupName | None = None,
        exchange: Exchange = "auto",
        backend: BackendName = "auto",
        text_pool: TextPool | None = None,
        text_pool_scale: float = 1.0,
        null_patch: bool = False,
        normalize: Normalize = "both",
        grad_tolerance: float = 0.0,
    ) -> None:
        super().__init__()
        self.attn_temperature = attn_temperature
        self.form, self.loss = form, loss
        self.rank, self.world_size = rank, world_size
        self.group = "world" if world_size > 1 and group is None else group
        if world_size > 1 and dist.is_available() and dist.is_initialized():
            groups.check_size(self.group, rank, world_size)
        self.exchange, self.backend = exchange, backend
        self.text_pool, self.text_pool_scale = text_pool, text_pool_scale
        self.null_patch, self.normalize, self.grad_tolerance = null_patch, normalize, grad_tolerance

    @property
    def group(self) -> dist.ProcessGroup | GroupName | None:
        return self._group.group if isinstance(self._group, groups.Handle) else self._group

    @group.setter
    def group(self, group: dist.ProcessGroup | GroupName | None) -> None:
        groups.check(group)
        group = groups.named(group)
        self._group = group if group is None or isinstance(group, str) else groups.Handle(group)

    @overload
    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None, patch_mask: Tensor | None = None,
        output_dict: Literal[False] = False, **batch: Unpack[_Batch],
    ) -> Tensor: ...  # fmt: skip

    @overload
    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None, patch_mask: Tensor | None = None,
        *, output_dict: Literal[True], **batch: Unpack[_Batch],
    ) -> dict[str, Tensor]: ...  # fmt: skip

    @overload
    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None, patch_mask: Tensor | None = None,
        output_dict: bool = False, **batch: Unpack[_Batch],
    ) -> Tensor | dict[str, Tensor]: ...  # fmt: skip

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        patch_mask: Tensor | None = None,
        output_dict: bool = False,
        *,
        image_ids: Tensor | None = None,
        text_ids: Tensor | None = None,
        targets: Tensor | None = None,
        pair_bias: Tensor | None = None,
        text_index: Tensor | None = None,
        patch_lengths: Sequence[int] | Tensor | None = None,
        text_mask: Tensor | None = None,
        text_lengths: Sequence[int] | Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Return the loss; the keyword names are open_clip's.

        Args:
            image_features: patches `[B, N, D]`, or packed with `patch_lengths`.
            text_features: texts `[K, D]`, K = B unless ids or targets say otherwise; `[K, L, D]`, or packed with
                `text_lengths`, if the module has a `text_pool`.
            logit_scale: as in `fused_pacl_loss`, like the other arguments and the errors.
            logit_bias: None, or the bias of the logits.
            patch_mask: bool `[B, N]`, True at real patches.
            output_dict: return `{"contrastive_loss": loss}` instead.
            image_ids: ids `[B]`, as in `fused_pacl_loss`.
            text_ids: ids `[K]`.
            targets: weights `[B, K]` of the pairs as positives, in place of ids.
            pair_bias: bias `[B, K]` of the logits.
            text_index: lists of texts `[B, M]`; `targets` and `pair_bias` are then `[B, M]`.
            patch_lengths: lengths `[B]` of packed patches, on the CPU or a list.
            text_mask: bool `[K, L]`, True at real tokens.
            text_lengths: lengths `[K]` of packed texts, on the CPU or a list.

        Returns:
            The loss, 0-D, float32 (float64 for float64 inputs), or the dict with it.
        """
        if self.world_size > 1 and isinstance(self.group, str):  # a process group was compared in __init__
            groups.check_size(self.group, self.rank, self.world_size)
        value = fused_pacl_loss(
            image_features,
            text_features,
            logit_scale,
            patch_mask=patch_mask,
            attn_temperature=self.attn_temperature,
            form=self.form,
            loss=self.loss,
            logit_bias=logit_bias,
            image_ids=image_ids,
            text_ids=text_ids,
            targets=targets,
            pair_bias=pair_bias,
            text_index=text_index,
            patch_lengths=patch_lengths,
            text_mask=text_mask,
            text_lengths=text_lengths,
            text_pool=self.text_pool,
            text_pool_scale=self.text_pool_scale,
            null_patch=self.null_patch,
            normalize=self.normalize,
            grad_tolerance=self.grad_tolerance,
            group=self.group,
            exchange=self.exchange,
            backend=self.backend,
        )
        return {"contrastive_loss": value} if output_dict else value

    if TYPE_CHECKING:
        __call__ = forward

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PaclLoss:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # untyped in torch
        tau = self.attn_temperature
        # Not a buffer: a schedule may replace it by a number, and a cast of the module to 16 bits would round it.
        if isinstance(tau, Tensor) and not tau.requires_grad:
            moved = fn(tau)
            self.attn_temperature = moved if tau.is_meta else tau.to(moved.device)
        return self

    def __copy__(self) -> PaclLoss:
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __getstate__(self) -> dict[str, Any]:
        tau = self.attn_temperature
        if isinstance(tau, Tensor) and not tau.is_leaf:
            raise TypeError(
                "attn_temperature is a tensor computed from others, which cannot be deep-copied or pickled: expected a "
                "number, a Parameter or a tensor without a gradient (pass the computed one to fused_pacl_loss instead)"
            )
        return self.__dict__

    def extra_repr(self) -> str:
        group = self.group
        shown = repr(group) if group is None or isinstance(group, str) else f"<{group.size()} processes>"
        return (
            f"attn_temperature={self.attn_temperature!r}, form={self.form!r}, loss={self.loss!r}, rank={self.rank}, "
            f"world_size={self.world_size}, group={shown}, exchange={self.exchange!r}, backend={self.backend!r}, "
            f"text_pool={self.text_pool!r}, text_pool_scale={self.text_pool_scale!r}, null_patch={self.null_patch!r}, "
            f"normalize={self.normalize!r}, grad_tolerance={self.grad_tolerance!r}"
        )
