"""Batches beyond memory: a training step in two passes with the gradients of one pass (GradCache, arXiv 2101.06983)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten


def cached_step(
    encode: Callable[[Any], Any],
    batch: Any,
    loss: Callable[..., Tensor],
    *,
    micro_batch: int,
    modules: Iterable[nn.Module] = (),
) -> Tensor:
    """Run forward and backward of `loss(*encode(batch))`, with activations of only `micro_batch` samples in memory.

    The first pass encodes all samples without a graph. The loss of the whole batch then gives the gradients of their
    embeddings, and a second pass encodes each micro-batch but the last again to propagate them. Gradients are added to
    `.grad`, as by `backward()`, and equal those of one pass over the same micro-batches: torch's random numbers are
    replayed, so dropout agrees. Batch normalisation in training mode normalises by micro-batch and updates its
    statistics by micro-batch.

    ```python
    def encode(batch):
        images, tokens = batch
        return embedder(images), text_encoder(tokens), log_scale.exp()

    loss = cached_step(encode, (images, tokens), partial(fused_pacl_loss, group=group), micro_batch=64)
    optimiser.step()
    ```

    Args:
        encode: takes a part of `batch` and returns a tensor or a tuple of tensors: embeddings `[rows, ...]` with any
            number of rows (several texts of an image, say), integers `[rows]` (ids), which need not be as many, or
            floating-point scalars (0-D or one element `[1]`), which must not depend on the samples. `loss` gets the
            rows of all parts in order.
        batch: a tensor, or tuples, lists and dicts of tensors, all with the samples along their first dimension. Every
            part gets the values that are not tensors unchanged.
        loss: takes the outputs of `encode` for the whole batch, one argument each, and returns a scalar. It may
            communicate (`group=`) and may use parameters of its own; their gradients are added to `.grad` as usual.
        micro_batch: number of samples to encode at a time, at least 1.
        modules: the modules under DistributedDataParallel (without `static_graph`) or `fully_shard` that `encode`
            calls. They exchange gradients only after the last micro-batch, and not at all if the caller has switched
            the exchange off (`no_sync`, `set_requires_gradient_sync(False)`). With `fully_shard` every process needs
            the same number of micro-batches.

    Returns:
        The loss, detached.

    Raises:
        TypeError, ValueError: for a bad argument; the message names it, what came and what was expected.
    """
    if isinstance(micro_batch, bool) or not isinstance(micro_batch, int):
        raise TypeError(f"micro_batch is a {type(micro_batch).__name__}, expected an int")
    if micro_batch < 1:
        raise ValueError(f"micro_batch is {micro_batch}, expected at least 1")
    parts = _split(batch, micro_batch)
    modules = tuple(modules)
    _check_modules(modules)
    random: list[tuple[Tensor, list[Tensor]]] = []
    outputs: list[list[Tensor]] = []
    with _no_exchange(modules), torch.no_grad():
        for part in parts[:-1]:
            random.append(_random_state())
            # An encoder that returns its input, or turns gradients on, has a graph even here.
            outputs.append([output.detach() for output in _outputs(encode, part)])
    final = len(parts) == 1  # the next backward is the last, after which processes exchange gradients
    with contextlib.nullcontext() if final else _no_exchange(modules):
        last = _outputs(encode, parts[-1])
        after = _random_state()
        leaves = []
        counts: list[list[int]] = []  # rows of each part; none for a scalar
        for i, example in enumerate(last):
            rows = [output[i] for output in outputs] + [example.detach()]
            counts.append([len(x) for x in rows] if _has_rows(example) else [])
            leaf = torch.cat(rows) if _has_rows(example) else rows[-1].clone()
            leaves.append(leaf.requires_grad_(example.requires_grad))
        del outputs, rows, leaf, example  # the leaves hold copies
        value = loss(*leaves)
        value.backward()
        grads = [
            leaf.grad.split(count) if leaf.grad is not None and count else [leaf.grad] * len(parts)
            for leaf, count in zip(leaves, counts, strict=True)
        ]
        del leaves  # only their gradients are needed
        _pass_on(last, [grad[-1] for grad in grads], scalars=final)
    del last  # and its graph
    for i, (part, state) in enumerate(zip(parts[:-1], random, strict=True)):
        final = i == len(parts) - 2
        with contextlib.nullcontext() if final else _no_exchange(modules):
            _set_random_state(state)
            _pass_on(_outputs(encode, part), [grad[i] for grad in grads], scalars=final)
    _set_random_state(after)
    return value.detach()


def _split(batch: Any, micro_batch: int) -> list[Any]:
    """Split the batch into parts of at most `micro_batch` samples."""
    leaves, structure = tree_flatten(batch)
    counts = {len(x) if x.ndim else 0 for x in leaves if isinstance(x, Tensor)}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(f"batch has tensors of {sorted(counts)} rows, expected the same number of at least 1 in each")
    sizes = [min(micro_batch, counts_left) for counts_left in range(counts.pop(), 0, -micro_batch)]
    columns = [x.split(sizes) if isinstance(x, Tensor) else [x] * len(sizes) for x in leaves]
    return [tree_unflatten([column[i] for column in columns], structure) for i in range(len(sizes))]


def _outputs(encode: Callable[[Any], Any], part: Any) -> tuple[Tensor, ...]:
    # Autocast caches cast weights: those of the first pass have no graph, those of an earlier backward a freed one.
    torch.clear_autocast_cache()
    outputs = encode(part)
    outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
    if not outputs:
        raise ValueError("encode returned no tensor, expected at least one")
    for output in outputs:
        if not isinstance(output, Tensor):
            raise TypeError(f"encode returned a {type(output).__name__}, expected a tensor or a tuple of tensors")
        if not _has_rows(output) and output.numel() != 1:
            raise ValueError(
                f"encode returned {output.dtype} of shape {list(output.shape)}, expected rows [rows, D], integers "
                "[rows], or one element"
            )
    return tuple(outputs)


def _has_rows(output: Tensor) -> bool:
    return output.ndim > 1 or output.ndim == 1 and not output.is_floating_point()


def _pass_on(outputs: tuple[Tensor, ...], grads: list[Tensor | None], scalars: bool) -> None:
    """Propagate gradients through `encode`; scalars join the last backward, where DDP waits for every parameter."""
    pairs = [
        (output, grad)
        for output, grad in zip(outputs, grads, strict=True)
        if output.requires_grad and grad is not None and (scalars or _has_rows(output))
    ]
    if pairs:
        tensors, gradients = zip(*pairs, strict=True)
        torch.autograd.backward(tensors, gradients)


@contextlib.contextmanager
def _no_exchange(modules: tuple[nn.Module, ...]) -> Iterator[None]:
    """Keep the modules' gradients in this process; restore the previous setting on exit."""
    with contextlib.ExitStack() as stack:
        module: Any  # the methods are those of DistributedDataParallel and of `fully_shard`
        for module in modules:
            if hasattr(module, "no_sync"):  # DistributedDataParallel
                stack.enter_context(module.no_sync())
            else:  # fully_shard
                for group in _sharded_groups(module):
                    for flag in ("reduce_grads", "all_reduce_grads"):
                        stack.callback(setattr, group, flag, getattr(group, flag))
                module.set_requires_gradient_sync(False)
        yield


def _sharded_groups(module: nn.Module) -> list[Any]:
    """Return the parameter groups under `fully_shard`; only their private flags tell if gradients are exchanged."""
    parts: Iterable[Any] = module.modules()
    states = [part._get_fsdp_state() for part in parts if hasattr(part, "set_requires_gradient_sync")]
    groups: list[Any] = []
    for state in states:
        # Newer torch has a list, older torch one group or None.
        groups += state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def _check_modules(modules: tuple[nn.Module, ...]) -> None:
    for module in modules:
        name = type(module).__name__
        if not (hasattr(module, "no_sync") or hasattr(module, "set_requires_gradient_sync")):
            raise TypeError(f"modules has a {name}, expected a module under DistributedDataParallel or fully_shard")
        if getattr(module, "static_graph", False):
            raise ValueError(
                f"modules has a {name} with static_graph=True, expected static_graph=False: a step runs several "
                "forwards and backwards, and only the last backward exchanges gradients"
            )


def _random_state() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
