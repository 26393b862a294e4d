"""Packed patches, texts of many tokens, the null patch and rows that are not normalised, alone and together."""

import random

import pytest
import torch
from layouts import LISTS, MANY, POOLS, RAW, SINGLE, B, D, K, L, Layout, N, layout_with_lists
from problems import FORMS

from pacl_kernels import PaclLoss, cached_step, compatibility, fused_pacl_loss, scoring, tokens


@pytest.mark.parametrize("options", random.Random(28).sample(SINGLE, 24) + random.Random(29).sample(MANY, 36), ids=str)
def test_against_the_reference(options, target):
    Layout(*options).check(target.backend, target.dtype, target.device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", random.Random(30).sample(RAW, 24), ids=str)
def test_rows_that_are_not_normalised(options, dtype):
    Layout(*options).check("torch", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", random.Random(33).sample([x for x in RAW if "none" in x], 16), ids=str)
def test_rows_that_are_not_normalised_on_the_cpu(options, dtype, cpu_backend):
    Layout(*options).check(cpu_backend, dtype)


LISTED = [x for x in MANY if x[-1] != "compatibility"]


@pytest.mark.parametrize("options", random.Random(37).sample(LISTED, 5), ids=str)
def test_lists_of_texts(options, single):
    layout_with_lists(*options).check(single.backend, single.dtype, single.device)


@pytest.mark.parametrize("options", random.Random(38).sample(LISTED, 10), ids=str)
def test_lists_of_texts_in_float64(options):
    layout_with_lists(*options).check("torch", torch.float64)


@pytest.mark.parametrize("pool", POOLS)
def test_compatibility_of_lists(pool, single):
    """φ and its gradients are those of all texts at the listed ones, in blocks of any size; repeats are two entries."""
    patches = {} if pool in ("mean", "max") else {"patch_lengths": [3, 0, 8, 1, 5, 0]}
    inputs = randn(B + N, D) if patches else randn(B, N, D), randn(23, D)
    options = dict(text_lengths=torch.tensor([4, 0, 3, 6, 1, 2, 7]), text_pool=pool, backend=single.backend, **patches)

    def at_lists(*tensors, **more):
        return compatibility(*tensors, **options, **more).gather(1, LISTS.clamp_min(0)).masked_fill(LISTS < 0, 0.0)

    expected = values_and_gradients(at_lists, *inputs)
    for limit in (None, "BLOCK_BYTES", "POOL_BYTES"):
        with pytest.MonkeyPatch.context() as patch:
            for module in (tokens, scoring) if limit else ():
                patch.setattr(module, limit, 0, raising=False)
            answer = values_and_gradients(compatibility, *inputs, text_index=LISTS, **options)
        torch.testing.assert_close(answer, expected)


def values_and_gradients(function, *tensors, **options):
    """Return the value and the gradients of patches, texts and temperature."""
    leaves = [x.clone().requires_grad_() for x in (*tensors, torch.tensor(0.3))]
    value = function(*leaves[:2], attn_temperature=leaves[2], **options)
    upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(5))
    return value.detach(), *torch.autograd.grad((value * upstream).sum(), leaves)


def assert_equal(answers, others):
    for answer, other in zip(answers, others, strict=True):
        torch.testing.assert_close(answer, other, rtol=0, atol=0, equal_nan=True)


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[0]))


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("form", FORMS)
def test_one_token_equals_a_plain_text(form, pool):
    patches, texts = randn(B, N, D), randn(K, D)
    plain = values_and_gradients(compatibility, patches, texts, form=form, backend="cpu")
    value, of_patches, of_texts, of_temperature = values_and_gradients(
        compatibility, patches, texts[:, None], form=form, text_pool=pool, backend="cpu"
    )
    answers = value, of_patches, of_texts[:, 0], of_temperature
    if pool == "logsumexp":  # log(exp(φ)) rounds
        torch.testing.assert_close(answers, plain)
    else:
        assert_equal(answers, plain)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("form", FORMS)
def test_packed_equals_masked_to_the_bit(form, pool):
    """On the CPU, where masked patches and tokens take part in nothing."""
    of_patches, of_texts = torch.tensor([0, 4, N, 1, 3, 0]), torch.tensor([0, 2, L, 1, 3, 1, 0])
    patch_mask, text_mask = (torch.arange(n) < x[:, None] for n, x in ((N, of_patches), (L, of_texts)))
    patches, texts = randn(B, N, D), randn(K, L, D)
    options = dict(form=form, text_pool=pool, backend="cpu")
    value, *masked, of_temperature = values_and_gradients(
        compatibility, patches, texts, patch_mask=patch_mask, text_mask=text_mask, **options
    )
    packed = values_and_gradients(
        compatibility,
        patches[patch_mask],
        texts[text_mask],
        patch_lengths=of_patches,
        text_lengths=of_texts,
        **options,
    )
    assert_equal((value, masked[0][patch_mask], masked[1][text_mask], of_temperature), packed)
    assert not masked[0][~patch_mask].any() and not masked[1][~text_mask].any()


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_blocks_do_not_change_the_result(backend, monkeypatch):
    """Neither the number of images of a block nor what the forward leaves changes φ."""
    texts, lengths = randn(23, D), torch.tensor([4, 0, 9, 10])
    options = dict(text_lengths=lengths, text_pool="max", backend=backend)
    for patches, packed in ((randn(B, N, D), {}), (randn(B + N, D), {"patch_lengths": [3, 0, 8, 1, 5, 0]})):
        whole = values_and_gradients(compatibility, patches, texts, **options, **packed)
        for limit in ("KEPT_BYTES", "BLOCK_BYTES", "POOL_BYTES"):
            with monkeypatch.context() as patch:
                patch.setattr(tokens, limit, 0)
                patch.setattr(scoring, limit, 0, raising=False)
                answer = values_and_gradients(compatibility, patches, texts, **options, **packed)
            torch.testing.assert_close(answer, whole)
            if backend == "cpu":  # PyTorch's products round by the size of the block
                assert_equal(whole[:1], answer[:1])


@pytest.mark.parametrize("pool", POOLS)
def test_padding_that_stays(pool):
    """Tokens of a mask that only the device can read keep their padding, and give the same as without it."""
    mask = torch.arange(L) < torch.tensor([[0], [2], [L], [1], [3], [1], [0]])
    phi, grad = randn(B, K * L), randn(B, K)
    packed = tokens.tokens_of(randn(K, L, D), mask, None, pool, 2.0)
    whole = tokens.tokens_of(randn(K, L, D), None, None, pool, 2.0)
    padded, phi_with_nan = whole._replace(real=mask.flatten()), phi.masked_fill(~mask.flatten(), float("nan"))
    torch.testing.assert_close(padded.pool(phi_with_nan), packed.pool(phi[:, packed.places]))
    spread = padded.spread(phi_with_nan, grad)
    torch.testing.assert_close(spread[:, packed.places], packed.spread(phi[:, packed.places], grad))
    assert not spread[:, ~mask.flatten()].any()
    pooled = []
    for whole, of_tokens in ((padded, phi_with_nan), (packed, phi[:, packed.places])):
        own, numbers = whole.listed(LISTS, whole.longest(LISTS))
        pooled.append(own.pool(of_tokens.gather(1, numbers.clamp_min(0))))
    torch.testing.assert_close(*pooled)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("pool", POOLS)
def test_threads_do_not_change_a_bit(pool, threads):
    patches, texts, lengths = randn(40, D), randn(2000, D), [700, 0, 1, 1299]
    options = dict(patch_lengths=[9, 20, 0, 11], text_lengths=lengths, text_pool=pool, null_patch=True, backend="cpu")
    expected = values_and_gradients(compatibility, patches, texts, **options)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_equal(values_and_gradients(compatibility, patches, texts, **options), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("form", FORMS)
def test_nothing_at_all(form, backend):
    """Batches in which no image has a patch or no text has a token, and empty ones."""
    patches, texts = randn(3, D).requires_grad_(), randn(4, D).requires_grad_()
    none = torch.zeros(0, D, requires_grad=True)
    options = dict(form=form, backend=backend)
    for arguments, shape, given in (
        ((none, texts), (2, 4), dict(patch_lengths=[0, 0])),
        ((patches, none), (3, 2), dict(patch_lengths=[1, 1, 1], text_lengths=[0, 0], text_pool="mean")),
        ((none, none), (1, 1), dict(patch_lengths=[0], text_lengths=[0], text_pool="max")),
        ((patches[None], texts.new_zeros(2, 0, D)), (1, 2), dict(text_pool="sum")),
        ((none, texts), (0, 4), dict(patch_lengths=[])),
        ((patches, none), (2, 0), dict(patch_lengths=[2, 1], text_lengths=[], text_pool="max")),
    ):
        phi = compatibility(*arguments, **given, **options)
        assert phi.shape == shape and not phi.any()
        phi.sum().backward()
        for x in (patches, texts, none):
            assert x.grad is None or not x.grad.any()
    null = compatibility(none, texts, patch_lengths=[0], null_patch=True, **options)
    assert not null.any()


def test_a_null_patch_that_wins():
    """The null patch has all the attention if all patches are far below 0 and τ is small: φ is 0."""
    patches, texts = torch.ones(2, 3, D), -torch.ones(1, D)
    for backend in ("cpu", "torch", "reference"):
        for tau in (0.1, 0.02, 1e-6):
            options = dict(attn_temperature=tau, backend=backend)
            phi = compatibility(patches, texts, null_patch=True, **options)
            # At τ = 0.1 the three patches keep 3 exp(-10) = 1.4e-4 of the attention.
            torch.testing.assert_close(phi, torch.zeros(2, 1), atol=2e-4, rtol=0)
            torch.testing.assert_close(compatibility(patches, texts, **options), -torch.ones(2, 1))


@pytest.mark.parametrize("form", FORMS)
def test_the_null_patch_is_a_patch_of_zeros(form):
    patches, texts = randn(B, N, D), randn(K, D)
    with_null = compatibility(patches, texts, form=form, attn_temperature=0.3, null_patch=True)
    with_zeros = compatibility(torch.cat((patches, torch.zeros(B, 1, D)), 1), texts, form=form, attn_temperature=0.3)
    torch.testing.assert_close(with_null, with_zeros)


def test_the_module_and_autocast():
    patches, texts, ids = randn(17, D), randn(9, D), torch.tensor([0, 0, 1, 2])
    lengths = dict(patch_lengths=[6, 0, 11], text_lengths=torch.tensor([2, 2, 1, 4]))
    options = dict(text_pool="logsumexp", text_pool_scale=5.0, null_patch=True, attn_temperature=0.2)
    module = PaclLoss(**options)
    expected = fused_pacl_loss(patches, texts, 10.0, text_ids=ids, **lengths, **options)
    assert torch.equal(module(patches, texts, 10.0, text_ids=ids, **lengths), expected)
    assert "text_pool='logsumexp'" in repr(module) and "null_patch=True" in repr(module)
    with torch.autocast("cpu", torch.bfloat16):
        cast = module(patches, texts, 10.0, text_ids=ids, **lengths)
    rounded = (x.bfloat16() for x in (patches, texts))
    assert torch.equal(cast, fused_pacl_loss(*rounded, 10.0, text_ids=ids, **lengths, **options))


def test_compiled():
    patches, texts = randn(17, D).requires_grad_(), randn(K, L, D).requires_grad_()
    lengths, mask = torch.tensor([6, 0, 11]), torch.arange(L) < torch.tensor([[1], [3], [0], [2], [5], [1], [4]])

    def loss(patches, texts):
        ids = torch.tensor([0, 1, 2, 0, 1, 2, -1])
        options = dict(patch_lengths=lengths, text_mask=mask, text_pool="max", null_patch=True, text_ids=ids)
        return fused_pacl_loss(patches, texts, 10.0, attn_temperature=0.3, **options)

    expected = loss(patches, texts)
    grads = torch.autograd.grad(expected, (patches, texts))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(patches, texts)
    assert torch.equal(compiled, expected)
    assert_equal(torch.autograd.grad(compiled, (patches, texts)), grads)


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
@pytest.mark.parametrize("wrong", ["patch_lengths", "text_lengths"])
@pytest.mark.parametrize("lengths", [[2, 4], [6, -1]])
def test_compiled_lengths_are_checked(wrong, lengths, loss):
    """The kernels trust lengths, whose values a trace does not read."""
    given = {"patch_lengths": [2, 3], "text_lengths": [1, 4]} | {wrong: lengths}
    given = {name: torch.tensor(x) for name, x in given.items()}
    if loss == "sigmoid" and wrong == "patch_lengths":
        del given["text_lengths"]
    texts, pool = (randn(5, D), "mean") if "text_lengths" in given else (randn(2, D), None)

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(patches, texts):
        return fused_pacl_loss(patches, texts, 10.0, loss=loss, text_pool=pool, **given)

    with pytest.raises(ValueError, match=f"{wrong} (add up to 6, expected 5|has -1, expected lengths of at least 0)"):
        compiled(randn(5, D).requires_grad_(), texts)


def test_a_cached_step_concatenates_lengths():
    patches, lengths = randn(17, D), torch.tensor([6, 0, 8, 3])
    weight = torch.nn.Parameter(torch.eye(D))
    starts = [0, *lengths.cumsum(0).tolist()]
    texts = randn(4, D)

    def encode(part):
        rows = torch.cat([patches[starts[i] : starts[i + 1]] for i in part.tolist()])
        return rows @ weight, texts[part] @ weight, lengths[part]

    def loss(patches, texts, lengths):
        return fused_pacl_loss(patches, texts, 10.0, patch_lengths=lengths, attn_temperature=0.3)

    whole = loss(patches @ weight, texts @ weight, lengths)
    (expected,) = torch.autograd.grad(whole, weight)
    cached = cached_step(encode, torch.arange(4), loss, micro_batch=3)
    torch.testing.assert_close(cached, whole.detach())
    torch.testing.assert_close(weight.grad, expected)


PLAIN, MANY_TOKENS = (torch.ones(2, 3, 4), torch.ones(2, 4)), (torch.ones(2, 3, 4), torch.ones(2, 5, 4))
PACKED = torch.ones(5, 4), torch.ones(2, 4)


@pytest.mark.parametrize(
    "tensors, options, error, message",
    [
        (MANY_TOKENS, {}, ValueError, "texts has shape [2, 5, 4], expected [K, D], or text_pool, which says how"),
        (PLAIN, {"text_pool": "mean"}, ValueError, "expected [K, L, D], or text_lengths, which say how many rows"),
        (PLAIN, {"text_pool": "median"}, ValueError, "text_pool is 'median', expected one of 'mean', 'sum', 'max'"),
        (PLAIN, {"text_mask": torch.ones(2, 5) > 0}, ValueError, "text_mask is given and text_pool is None, expected"),
        (PLAIN, {"text_lengths": [1, 1]}, ValueError, "text_lengths is given and text_pool is None, expected one of"),
        (
            MANY_TOKENS,
            {"text_pool": "max", "text_mask": torch.ones(2, 5) > 0, "text_lengths": [5, 5]},
            ValueError,
            "text_mask and text_lengths are both given, expected one of them",
        ),
        (
            MANY_TOKENS,
            {"text_pool": "max", "text_mask": torch.ones(2, 4) > 0},
            ValueError,
            "text_mask has shape [2, 4], expected [2, 5] like texts",
        ),
        (
            MANY_TOKENS,
            {"text_pool": "max", "text_mask": torch.ones(2, 5)},
            TypeError,
            "text_mask is torch.float32, expected torch.bool",
        ),
        (PLAIN, {"text_pool": "max", "text_lengths": [1, 2]}, ValueError, "text_lengths add up to 3, expected 2, the"),
        (PACKED, {"patch_lengths": [2, 2]}, ValueError, "patch_lengths add up to 4, expected 5, the number of rows"),
        (PACKED, {"patch_lengths": [6, -1]}, ValueError, "patch_lengths has -1, expected lengths of at least 0"),
        (PACKED, {"patch_lengths": [2.0, 3]}, TypeError, "patch_lengths has a float, expected integers"),
        (PACKED, {"patch_lengths": 5}, TypeError, "patch_lengths is a int, expected a list of integers or an int64"),
        (PACKED, {"patch_lengths": torch.ones(2)}, TypeError, "patch_lengths is torch.float32, expected torch.int64"),
        (
            PACKED,
            {"patch_lengths": torch.ones(1, 2).long()},
            ValueError,
            "patch_lengths has shape [1, 2], expected",
        ),
        (
            PACKED,
            {"patch_lengths": torch.ones(2, device="meta").long()},
            ValueError,
            "patch_lengths is on meta, expected a list or a tensor on the CPU",
        ),
        (PLAIN, {"patch_lengths": [3, 3]}, ValueError, "patches has shape [2, 3, 4], expected [ΣN, D]"),
        (
            PACKED,
            {"patch_lengths": [2, 3], "patch_mask": torch.ones(2, 3) > 0},
            ValueError,
            "patch_mask has shape [2, 3], expected [5] like patches",
        ),
        (PLAIN, {"null_patch": 1}, TypeError, "null_patch is a int, expected True or False"),
        (PLAIN, {"normalize": "rows"}, ValueError, "normalize is 'rows', expected one of 'both', 'values', 'none'"),
        (
            PLAIN,
            {"normalize": "values", "backend": "cpu"},
            ValueError,
            "backend is 'cpu', expected 'auto' or 'torch'",
        ),
        (
            PLAIN,
            {"text_pool_scale": 2.0},
            ValueError,
            "text_pool_scale is 2, expected 1 unless text_pool is",
        ),
        (
            MANY_TOKENS,
            {"text_pool": "logsumexp", "text_pool_scale": 0.0},
            ValueError,
            "text_pool_scale is 0.0, expected a finite number above 0",
        ),
        (
            MANY_TOKENS,
            {"text_pool": "logsumexp", "text_pool_scale": torch.ones(())},
            TypeError,
            "text_pool_scale is a tensor, expected a number",
        ),
    ],
)
def test_errors(tensors, options, error, message):
    for call in (compatibility, lambda *tensors, **options: fused_pacl_loss(*tensors, 10.0, **options)):
        with pytest.raises(error) as caught:
            call(*tensors, **options)
        assert str(caught.value).startswith(message) or message in str(caught.value)
