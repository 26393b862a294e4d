"""The loss over the batch of every process of a group, on `torch.distributed`: texts travel, patches stay.

Each process computes its rows of φ, `[B_local, B_global]`. It finishes their log-sum-exp at home; those of the columns
need one all-reduce. Two ways for the texts to come round:

- "gather": one all-gather of the texts (the local ones are scored meanwhile), and in the backward one reduce-scatter
  of their gradient.
- "ring": texts, and in the backward their gradient, go from neighbour to neighbour, and each block of φ is made again
  in the backward (5 units of work instead of 4). Nothing grows with the global batch but a few numbers for each text,
  and no block of φ is larger than `_RING_BYTES` allow.

No step waits for the device: texts are padded to the largest local batch that the processes agreed on, the number of
real ones is a tensor, and padding is masked out of every sum.
"""

from __future__ import annotations

import functools
import struct
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from . import contrastive
from .autograd import (
    as_like,
    first_order,
    like,
    logits_of,
    operator_arguments,
    score,
    score_gradients,
    tensor_or_number,
)

EXCHANGES = ("auto", "gather", "ring")
_GATHER_BYTES = 8 * 2**30  # of what grows with the global batch in one process, up to which "auto" gathers
_RING_BYTES = 2 * 2**30  # of the four float32 arrays `[B_local, texts]` of a block
_NONE, _A_TENSOR, _A_NUMBER = -1, -2, -3  # codes of settings, see `Setting`


class Plan(NamedTuple):
    """How the texts of a step travel; alike in every process but for the rank."""

    group: str
    rank: int
    world: int
    capacity: int  # rows of texts that each process sends
    ring: bool
    scatters: bool  # whether the group's backend has a reduce-scatter

    def columns(self, rank: int) -> slice:
        """Where that process's texts stand in the global batch."""
        return slice(rank * self.capacity, (rank + 1) * self.capacity)


class Setting(NamedTuple):
    """What must not differ between processes, and how a number stands for it: its type, or the values it may have."""

    value: object
    kind: type | tuple

    def code(self, numbers: bool = True) -> int:
        """Without `numbers` they are all alike."""
        if self.value is None or isinstance(self.value, Tensor):
            return _NONE if self.value is None else _A_TENSOR
        if self.kind is float:
            return struct.unpack("q", struct.pack("d", self.value))[0] if numbers else _A_NUMBER
        return int(self.value) if self.kind in (int, bool) else self.kind.index(self.value)

    def name(self, code: int) -> str:
        if code in (_NONE, _A_TENSOR):  # as floating-point numbers these are NaN
            return "None" if code == _NONE else "a tensor"
        if self.kind is float:
            return repr(struct.unpack("d", struct.pack("q", code))[0])
        return repr(self.kind(code) if isinstance(self.kind, type) else self.kind[code])


def make_plan(group: dist.ProcessGroup, texts: Tensor, settings: dict[str, Setting]) -> tuple[Plan, Tensor]:
    """The plan for `texts` `[B_local, D]`, and what each process said, `[world, 1 + settings]`, to be waited for.

    First in a row is the number of texts. Settings that differ are a ValueError in every process that looks: on a CPU
    at every call, and there the capacity is what this step needs. Elsewhere looking would make the host wait for the
    device, so processes look at their first call (numbers, which a schedule may change, aside) and the capacity stays:
    smaller batches may follow, a larger one is a ValueError. Inside `torch.compile` nobody looks, and every process
    must bring as many texts.
    """
    world, capacity, d, device = group.size(), texts.shape[0], texts.shape[1], texts.device
    compiling, agreed = torch.compiler.is_compiling(), None
    # While compiling, a number may be a symbol that has no bits.
    codes = tuple(setting.code(numbers=not compiling) for setting in settings.values())
    if compiling or _may_read(device):
        header = torch.tensor((capacity, *codes), device=device)
    else:
        key = tuple(setting.code(numbers=False) for setting in settings.values())
        capacities = _capacities.setdefault(group, {})
        agreed = capacities.get(key)
        header = _on_device((capacity, *(codes if agreed is None else key)), device)
    headers = _all_gather(header, world, group.group_name).view(world, -1)
    if not compiling:
        if agreed is None:
            agreed = _compare(_wait(headers).tolist(), settings)
            if not _may_read(device):
                capacities[key] = agreed
        if capacity > agreed:
            raise ValueError(
                f"texts has {capacity} rows, expected at most {agreed}, the largest local batch of the first step with "
                "this group (pacl_kernels.distributed.forget(group) in every process allows more)"
            )
        capacity = agreed
    exchange = settings["exchange"].value
    ring = exchange == "ring"
    if exchange == "auto":
        ring = gathered_bytes(world, capacity, d, texts.element_size()) > _GATHER_BYTES
    scatters = device.type != "cpu" and (compiling or dist.get_backend(group) != "gloo")
    return Plan(group.group_name, group.rank(), world, capacity, ring, scatters), headers


def gathered_bytes(world: int, capacity: int, d: int, itemsize: int) -> int:
    """What grows with the global batch: texts, two float32 arrays of their gradient, four of [B_local, B_global]."""
    return world * capacity * (d * (itemsize + 8) + 16 * capacity)


# By settings: the largest local batch of any process (not for a CPU, where every step asks).
_capacities: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[tuple, int]] = weakref.WeakKeyDictionary()


def _may_read(device: torch.device) -> bool:
    """Whether the host may read what a collective on this device returned, at every step."""
    return device.type == "cpu"


def forget(group: dist.ProcessGroup) -> None:
    """Lets the next step on a GPU agree anew on the largest local batch; to be called in every process of the group."""
    _capacities.pop(group, None)


@functools.lru_cache(maxsize=256)
def _on_device(codes: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(codes, device=device)  # kept: a copy from the host may wait for the device


def _compare(headers: list[list[int]], settings: dict[str, Setting]) -> int:
    """The largest local batch; ValueError if settings differ."""
    for rank, header in enumerate(headers):
        for (name, setting), first, other in zip(settings.items(), headers[0][1:], header[1:], strict=True):
            if first != other and _A_NUMBER not in (first, other):
                raise ValueError(
                    f"{name} is {setting.name(first)} on rank 0 of the group and {setting.name(other)} on rank {rank}, "
                    "expected the same in every process"
                )
    return max(header[0] for header in headers)


class GlobalPaclFunction(torch.autograd.Function):
    """The loss (0-D) of the global batch, the same in every process.

    Gradients of patches and texts are `world` times those of the whole batch, so that the mean over processes, which
    DDP and FSDP take of the parameters' gradients, is right; those of the scalars are exact in every process.
    """

    @staticmethod
    def forward(
        ctx, patches, texts, logit_scale, logit_bias, temperature, patch_mask, form, loss, backend, plan, headers
    ):
        ctx.plan, ctx.loss = plan, loss
        inputs, ctx.options = operator_arguments(patches, texts, patch_mask, temperature, form, backend)
        scale, ctx.scale = tensor_or_number(logit_scale)
        bias, ctx.bias = tensor_or_number(logit_bias)
        sums = _GlobalSums(plan, loss, logit_scale, logit_bias, headers)
        if plan.ring:
            arrays = ()

            def visit(blocks):
                for at, block in blocks:
                    sums.add(at, _score(inputs, block, ctx.options)[0])

            _send_round(_padded(texts, plan), plan, patches.shape[0], visit)
        else:
            gathered, phi, _ = arrays = _gather_and_score(inputs, ctx.options, plan)
            sums.add(slice(0, gathered.shape[0]), phi)
        value, statistics = sums.finish()
        ctx.save_for_backward(*inputs, scale, bias, sums.sizes, *arrays, *statistics)
        return value

    @staticmethod
    @first_order
    def backward(ctx, saved, grad_loss):
        plan, needs = ctx.plan, ctx.needs_input_grad
        *inputs, scale, bias, sizes = saved[:7]
        first = 7 if plan.ring else 10  # a ring saves no gathered texts, φ and state
        arrays, statistics = saved[7:first], saved[first:]
        texts, temperature = inputs[1], inputs[3]
        scalars = ctx.scale if scale is None else scale, ctx.bias if bias is None else bias
        valid, factor = _valid(sizes, plan), grad_loss * plan.world / sizes.sum()
        sums = torch.zeros(3, dtype=torch.float64, device=texts.device)  # gradients of scale, bias and temperature

        def gradients(at: slice, block: Tensor, phi: Tensor, state: Tensor) -> tuple[Tensor | None, Tensor | None]:
            """Of the patches and of a block of texts, in float32; those of the scalars are added up."""
            grad = _gradient(_logits(phi, valid[at], *scalars), ctx.loss, statistics, _pairs(at, plan), at).mul_(factor)
            if needs[2]:
                sums[0] += (grad * phi).sum()
            if needs[3] and ctx.loss == "sigmoid":  # InfoNCE does not depend on it
                sums[1] += grad.sum()
            grad_phi = grad.mul_(as_like(scalars[0], phi))
            grad_patches, grad_texts, grad_temperature = score_gradients(
                _with_texts(inputs, block), ctx.options, phi, state, grad_phi, needs[0], needs[1], needs[4], phi.dtype
            )
            if needs[4]:
                sums[2] += grad_temperature
            return grad_patches, grad_texts

        if plan.ring:
            grad_patches, grad_texts = _ring_gradients(gradients, inputs, ctx.options, needs, plan)
        else:
            grad_patches, grad_texts = gradients(slice(0, arrays[0].shape[0]), *arrays)
            grad_texts = _reduce_scatter(grad_texts, plan) if needs[1] else None
        if needs[1]:
            grad_texts = grad_texts[: texts.shape[0]].to(texts.dtype, copy=True)
        if any(needs[2:5]):
            sums = _wait(_all_reduce(sums / plan.world, plan))
        likes = scale, bias, temperature
        grads = (like(sums[i] if needs[2 + i] else None, likes[i]) for i in range(3))
        return grad_patches, grad_texts, *grads, None, None, None, None, None, None


def _with_texts(inputs, texts: Tensor) -> tuple:
    patches, _, patch_mask, temperature = inputs
    return patches, texts, patch_mask, temperature


def _score(inputs, texts: Tensor, options) -> tuple[Tensor, Tensor]:
    return score(_with_texts(inputs, texts), options)


def _gather_and_score(inputs, options, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """All texts `[B_global, D]`, and φ and what the backward needs, `[B_local, B_global]`; the local texts first."""
    sent = _padded(inputs[1], plan)
    gathered = _all_gather(sent, plan.world, plan.group)
    local = _score(inputs, sent, options)
    gathered = _wait(gathered)
    phi, state = (x.new_empty(x.shape[0], gathered.shape[0]) for x in local)
    own = plan.columns(plan.rank)
    phi[:, own], state[:, own] = local
    for at in (slice(0, own.start), slice(own.stop, gathered.shape[0])):
        if at.start < at.stop:
            phi[:, at], state[:, at] = _score(inputs, gathered[at], options)
    return gathered, phi, state


Blocks = list[tuple[slice, Tensor]]  # columns and texts whose scores with the images are in memory at once


def _send_round(texts: Tensor, plan: Plan, images: int, visit: Callable[[Blocks], None]) -> None:
    """Calls `visit` with the texts of each process, the own first; the next ones travel meanwhile."""
    size = max(1, _RING_BYTES // (16 * images))
    size -= size % 128 if size > 128 else 0
    for step in range(plan.world):
        coming = _hop(texts, plan) if step + 1 < plan.world else None
        first = plan.columns((plan.rank - step) % plan.world).start
        blocks = zip(range(first, first + texts.shape[0], size), texts.split(size), strict=True)
        visit([(slice(at, at + x.shape[0]), x) for at, x in blocks])
        texts = texts if coming is None else _wait(coming)


def _ring_gradients(gradients, inputs, options, needs, plan: Plan) -> tuple[Tensor | None, Tensor | None]:
    """∂L/∂P, summed here, and ∂L/∂T `[capacity, D]`, to which every process adds while it travels with its texts."""
    patches, texts = inputs[:2]
    patches_sum, travelling, wide = None, None, torch.promote_types(patches.dtype, torch.float32)

    def visit(blocks: Blocks) -> None:
        nonlocal patches_sum, travelling
        parts = []
        for at, block in blocks:
            grad_patches, grad_texts = gradients(at, block, *_score(inputs, block, options))
            parts.append(grad_texts)
            if needs[0]:
                patches_sum = grad_patches.to(wide) if patches_sum is None else patches_sum.add_(grad_patches)
        if needs[1]:
            grad_texts = torch.cat(parts) if len(parts) > 1 else parts[0]
            travelling = _hop(grad_texts if travelling is None else grad_texts.add_(_wait(travelling)), plan)

    _send_round(_padded(texts, plan), plan, patches.shape[0], visit)
    return patches_sum.to(patches.dtype) if needs[0] else None, _wait(travelling) if needs[1] else None


class _GlobalSums:
    """Takes φ a block of columns at a time and makes the loss of the global batch of it."""

    def __init__(self, plan: Plan, loss: str, logit_scale, logit_bias, headers: Tensor):
        self.plan, self.loss, self.scalars, self.headers = plan, loss, (logit_scale, logit_bias), headers
        self.valid = self.rows = None
        self.pairs: list[Tensor] = []
        self.columns: list[tuple[slice, contrastive.Sums]] = []
        self.total = 0.0

    def add(self, at: slice, phi: Tensor) -> None:
        if self.valid is None:  # not before the first block has been scored
            self.sizes = _wait(self.headers)[:, 0].clone()
            self.valid, self.dtype = _valid(self.sizes, self.plan), phi.dtype
        logits, pairs = _logits(phi, self.valid[at], *self.scalars), _pairs(at, self.plan)
        if self.loss == "sigmoid":
            self.total = self.total + contrastive.sigmoid(logits, pairs).double()
            return
        if pairs is not None:
            self.pairs.append(logits.diagonal(pairs).double())
        rows = contrastive.sums(logits, 1)
        self.rows = rows if self.rows is None else contrastive.merge(self.rows, rows)
        self.columns.append((at, contrastive.sums(logits, 0)))

    def finish(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss, and for InfoNCE the log-sums of the own rows and of all columns; one all-reduce."""
        count = self.sizes.sum()
        if self.loss == "sigmoid":
            return (_wait(_all_reduce(self.total, self.plan)) / count).to(self.dtype), ()
        rows, pair = self.rows.finish(), torch.cat(self.pairs)
        # Without a common maximum, which would be one more exchange: |φ| <= 1, and float64 holds exp(±600).
        shares = pair.new_empty(self.valid.shape[0] + 2)
        for at, columns in self.columns:
            shares[at] = columns.total.double() * columns.largest.double().exp()
        shares[-2] = contrastive.cross_entropy(pair, rows).sum()
        shares[-1] = pair.sum()
        shares = _wait(_all_reduce(shares, self.plan))
        columns = shares[:-2].log().masked_fill(~self.valid, 0.0)
        value = (shares[-2] + (columns.sum() - shares[-1])) / (2 * count)
        largest = columns.to(self.dtype)
        return value.to(self.dtype), (*rows, largest, (columns - largest).to(self.dtype))


def _gradient(logits: Tensor, loss: str, statistics: tuple[Tensor, ...], pairs: int | None, at: slice) -> Tensor:
    """B ∂L/∂logits of a block of columns, in place of `logits`."""
    if loss == "sigmoid":
        return contrastive.sigmoid_gradient(logits, pairs)
    rows, columns = statistics[:2], (x[at] for x in statistics[2:])
    grad = contrastive.infonce_gradient(logits, contrastive.LogSumExp(*rows), contrastive.LogSumExp(*columns), pairs)
    return grad.div_(2)


def _logits(phi: Tensor, valid: Tensor, scale, bias) -> Tensor:
    return logits_of(phi, scale, bias).masked_fill_(~valid, float("-inf"))


def _pairs(at: slice, plan: Plan) -> int | None:
    """The diagonal of the block on which the pairs lie; None if the block is of other processes."""
    own = plan.columns(plan.rank)
    return own.start - at.start if at.start < own.stop and own.start < at.stop else None


def _valid(sizes: Tensor, plan: Plan) -> Tensor:
    """Bool `[B_global]`: False for padding."""
    return (torch.arange(plan.capacity, device=sizes.device) < sizes[:, None]).flatten()


def _padded(texts: Tensor, plan: Plan) -> Tensor:
    return F.pad(texts, (0, 0, 0, plan.capacity - texts.shape[0])).contiguous()


# The functional collectives, by name: `torch.compile` takes them, and they are under way until `_wait`.


def _all_gather(x: Tensor, world: int, group: str) -> Tensor:
    return torch.ops._c10d_functional.all_gather_into_tensor(x, world, group)


def _all_reduce(x: Tensor, plan: Plan) -> Tensor:
    return torch.ops._c10d_functional.all_reduce(x, "sum", plan.group)


def _reduce_scatter(x: Tensor, plan: Plan) -> Tensor:
    """The own rows of the sum over processes."""
    if plan.scatters:
        return _wait(torch.ops._c10d_functional.reduce_scatter_tensor(x, "sum", plan.world, plan.group))
    return _wait(_all_reduce(x, plan))[plan.columns(plan.rank)]


def _hop(x: Tensor, plan: Plan) -> Tensor:
    """Sends `[capacity, D]` to the next process of the ring; returns what comes from the previous one."""
    previous, following = ((plan.rank + way) % plan.world for way in (-1, 1))
    received, sent = ([x.shape[0] * (rank == peer) for rank in range(plan.world)] for peer in (previous, following))
    return torch.ops._c10d_functional.all_to_all_single(x, received, sent, plan.group)


def _wait(x: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(x)
