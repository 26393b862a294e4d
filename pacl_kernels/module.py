"""`PaclLoss`: the loss as a module, with the call of open_clip's losses."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from . import groups
from .loss import fused_pacl_loss


class PaclLoss(nn.Module):
    """`fused_pacl_loss` behind the call of open_clip's losses: `loss(image_features, text_features, logit_scale)`.

    The module has no state: its `state_dict` is empty unless the temperature is a Parameter. It can be copied, pickled
    and saved; a group of some of the processes is shared by its copies and cannot be pickled (a TypeError).

    Args:
        attn_temperature: as in `fused_pacl_loss`. A tensor moves with the module (`to`, `cuda`) and keeps its dtype. A
            learnable one belongs to the model: an optimiser that is built from `model.parameters()` does not see this
            module's. A tensor that requires a gradient and is no Parameter stays where it is. `form="max"` ignores it.
        form, loss, exchange, backend: as in `fused_pacl_loss`.
        rank, world_size: those of open_clip's losses. A `world_size` above 1 stands for `group="world"`; both are
            compared with the group, here or, before `init_process_group`, at the call.
        group: as in `fused_pacl_loss`: None, `"world"`, `"local"` or a process group. The default group is kept as
            `"world"`. The names are looked up at each call, so the module may be built before `init_process_group`.

    Raises:
        TypeError, ValueError: a group that is none, or not of this rank and size. The rest is checked at the call.
    """

    def __init__(
        self,
        attn_temperature: float | Tensor = 1.0,
        form: str = "dot",
        loss: str = "infonce",
        rank: int = 0,
        world_size: int = 1,
        group: dist.ProcessGroup | str | None = None,
        exchange: str = "auto",
        backend: str = "auto",
    ):
        super().__init__()
        self.attn_temperature, self.form, self.loss = attn_temperature, form, loss
        self.rank, self.world_size = rank, world_size
        self.group = "world" if world_size > 1 and group is None else group
        if world_size > 1 and dist.is_available() and dist.is_initialized():
            groups.check_size(self.group, rank, world_size)
        self.exchange, self.backend = exchange, backend

    @property
    def group(self) -> dist.ProcessGroup | str | None:
        return self._group.group if isinstance(self._group, groups.Handle) else self._group

    @group.setter
    def group(self, group: dist.ProcessGroup | str | None) -> None:
        groups.check(group)
        group = groups.named(group)
        self._group = group if group is None or isinstance(group, str) else groups.Handle(group)

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
        if self.world_size > 1 and isinstance(self.group, str):  # another group was compared when it came
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
            group=self.group,
            exchange=self.exchange,
            backend=self.backend,
        )
        return {"contrastive_loss": value} if output_dict else value

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        tau = self.attn_temperature
        # Not a buffer: a schedule may put a number in its place, and 16 bits would round it.
        if isinstance(tau, Tensor) and not tau.requires_grad:
            moved = fn(tau)
            self.attn_temperature = moved if tau.is_meta else tau.to(moved.device)
        return self

    def extra_repr(self) -> str:
        group = self.group
        group = repr(group) if group is None or isinstance(group, str) else f"<{group.size()} processes>"
        return (
            f"attn_temperature={self.attn_temperature!r}, form={self.form!r}, loss={self.loss!r}, rank={self.rank}, "
            f"world_size={self.world_size}, group={group}, exchange={self.exchange!r}, backend={self.backend!r}"
        )
