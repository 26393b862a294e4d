"""Packed patches, texts of many tokens and the options of the attention in many processes."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch
from gloo_loss import EXCHANGES
from layouts import POOLS

from pacl_kernels import compatibility, fused_pacl_loss

D, L = 9, 4
IMAGES, TEXTS = [3, 1, 4, 2], [2, 4, 3, 1]  # of each process
PATCH_LENGTHS = [[2, 0, 5], [3], [1, 1, 0, 4], [2, 6]]
TEXT_LENGTHS = [[2, 0], [1, 3, 0, 4], [2, 1, 1], [3]]
KINDS = ("single", "tokens", "mask", "packed")
SAMPLE = random.Random(34).sample(
    list(product(KINDS, POOLS, ("dot", "max", "cosine"), ("infonce", "sigmoid"), EXCHANGES, ("both", "none"))), 24
)


def inputs_of(kind, world):
    """Return the patches, texts, ids and layouts of the whole batch, and of each process."""
    generator = torch.Generator().manual_seed(world)
    every, parts = [], []
    for rank in range(world):
        patches = torch.randn(sum(PATCH_LENGTHS[rank]), D, generator=generator, dtype=torch.float64)
        many = torch.randn(TEXTS[rank], L, D, generator=generator, dtype=torch.float64)
        mask = torch.arange(L) < torch.tensor(TEXT_LENGTHS[rank])[:, None]
        texts = {"single": many[:, 0], "packed": many[mask]}.get(kind, many)
        ids = torch.randint(-1, 6, (TEXTS[rank],), generator=generator)
        image_ids = torch.arange(IMAGES[rank]) + sum(IMAGES[:rank])
        parts.append([patches, texts, image_ids, ids, mask])
    every = [torch.cat(x) for x in zip(*parts, strict=True)]
    lengths = (
        [*PATCH_LENGTHS[:world], sum(PATCH_LENGTHS[:world], [])],
        [
            *TEXT_LENGTHS[:world],
            sum(TEXT_LENGTHS[:world], []),
        ],
    )
    answers = []
    for part, of_patches, of_texts in zip([*parts, every], *lengths, strict=True):
        options = dict(patch_lengths=of_patches)
        if kind == "packed":
            options["text_lengths"] = of_texts
        if kind == "mask":
            options["text_mask"] = part[4]
        answers.append((part[:4], options))
    return answers


def evaluate(function, part, options, upstream=None, **more):
    """Return the value and the gradients of patches, texts, temperature and logit scale."""
    patches, texts, *ids = part
    leaves = [x.clone().requires_grad_() for x in (patches, texts, torch.tensor(0.3), torch.tensor(3.0))]
    arguments = leaves[:2]
    if function is fused_pacl_loss:
        arguments, more = leaves[:2] + leaves[3:], more | dict(zip(("image_ids", "text_ids"), ids, strict=True))
    else:
        leaves.pop()
    value = function(*arguments, attn_temperature=leaves[2], **options, **more)
    grads = torch.autograd.grad((value if upstream is None else value * upstream).sum(), leaves)
    return value.detach(), *grads


def rows_of(x, parts, rank, index):
    """Return the rows of a whole array that belong to the process."""
    return x.split([len(part[0][index]) for part in parts[:-1]])[rank]


@pytest.mark.parametrize("kind, pool, form, loss, exchange, normalize", SAMPLE, ids=str)
def test_loss(kind, pool, form, loss, exchange, normalize, group):
    """The loss and its gradients equal those of one process."""
    world, rank = group.size(), group.rank()
    parts = inputs_of(kind, world)
    options = dict(form=form, loss=loss, null_patch=True, normalize=normalize)
    if kind != "single":
        options["text_pool"] = pool
    value, *expected = evaluate(fused_pacl_loss, *parts[-1], **options)
    mine, *grads = evaluate(fused_pacl_loss, *parts[rank], **options, group=group, exchange=exchange)
    torch.testing.assert_close(mine, value)
    for index in (0, 1):
        torch.testing.assert_close(grads[index], world * rows_of(expected[index], parts, rank, index))
    torch.testing.assert_close(grads[2:], expected[2:])


@pytest.mark.parametrize("kind, loss", product(KINDS[1:], ("infonce", "sigmoid")))
def test_lists_of_texts(kind, loss, group):
    """Lists count in the texts of all processes, whose packed tokens travel with padding."""
    world, rank = group.size(), group.rank()
    parts = inputs_of(kind, world)
    index = torch.randint(-1, sum(TEXTS[:world]), (sum(IMAGES[:world]), 3), generator=torch.Generator().manual_seed(4))
    options = dict(form="cosine", loss=loss, text_pool="logsumexp", text_pool_scale=3.0)
    value, *expected = evaluate(fused_pacl_loss, *parts[-1], **options, text_index=index)
    own = index[sum(IMAGES[:rank]) :][: IMAGES[rank]]
    mine, *grads = evaluate(fused_pacl_loss, *parts[rank], **options, text_index=own, group=group)
    torch.testing.assert_close(mine, value)
    for at in (0, 1):
        torch.testing.assert_close(grads[at], world * rows_of(expected[at], parts, rank, at))
    torch.testing.assert_close(grads[2:], expected[2:])


@pytest.mark.parametrize("kind", KINDS)
def test_compatibility(kind, group):
    """φ has the columns of all processes, and gradients of texts are summed over processes."""
    world, rank = group.size(), group.rank()
    parts = inputs_of(kind, world)
    options = dict(null_patch=True) | ({} if kind == "single" else {"text_pool": "logsumexp", "text_pool_scale": 3.0})
    images, texts = sum(IMAGES[:world]), sum(TEXTS[:world])
    upstream = torch.randn(images, texts, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    phi, of_patches, of_texts, _ = evaluate(compatibility, *parts[-1], upstream, **options)
    own = slice(sum(IMAGES[:rank]), sum(IMAGES[: rank + 1]))
    mine, *grads = evaluate(compatibility, *parts[rank], upstream[own], **options, group=group)
    torch.testing.assert_close(mine, phi[own])
    torch.testing.assert_close(grads[0], rows_of(of_patches, parts, rank, 0))
    torch.testing.assert_close(grads[1], rows_of(of_texts, parts, rank, 1))


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_logits_without_a_bound(exchange, group):
    """The sum over tokens may be far above 1: exponentials of such logits need the maximum of their column."""
    texts = torch.eye(D).double()[2 * group.rank() : 2 * group.rank() + 2]
    leaves = [x.clone().requires_grad_() for x in (texts[:, None] + 0.1, texts[:, None].repeat(1, L, 1))]
    value = fused_pacl_loss(*leaves, 400.0, text_pool="sum", group=group, exchange=exchange)
    torch.testing.assert_close(value, torch.zeros(()).double())  # each pair is certain
    assert all(x.isfinite().all() for x in torch.autograd.grad(value, leaves))


def test_settings_differ(group):
    if group.size() == 1:
        pytest.skip("one process cannot differ")
    (part, options), *_ = inputs_of("single", group.size())
    for name, value in (("null_patch", group.rank() == 0), ("normalize", "none" if group.rank() else "both")):
        with pytest.raises(ValueError, match=f"{name} is .* on rank 0 of the group and .*, expected the same in every"):
            fused_pacl_loss(
                *part[:2], 10.0, image_ids=part[2], text_ids=part[3], **options, **{name: value}, group=group
            )
