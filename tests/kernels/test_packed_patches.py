"""Packed patches `[ΣN, D]` give on a CPU the bits of padded and masked ones, and nothing is computed for padding."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from accuracy import assert_accurate
from problems import FORMS
from torch import Tensor
from torch.nn import functional as F

from pacl_kernels import reference
from pacl_kernels.backends import cpu
from pacl_kernels.native import native
from pacl_kernels.pairs import Pairs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Case(NamedTuple):
    lengths: tuple[int, ...]
    D: int = 64
    K: int = 20
    tau: float = 0.1
    mask: bool = False
    spacing: int = 1  # rows of patches are this many rows apart


def uniform(images: int, largest: int) -> tuple[int, ...]:
    return tuple(torch.randint(1, largest + 1, (images,), generator=torch.Generator().manual_seed(0)).tolist())


CASES = [
    Case((0, 3, 1, 0, 0, 7, 0), D=33),
    Case((0, 3, 1, 0, 0, 7, 0), mask=True, spacing=3),
    Case((5,), D=70),
    Case((0,)),
    Case((1, 1, 1), D=7),
    Case((300, 1, 2, 31, 150, 0, 64), spacing=2),  # rows that a matrix unit reads in place
    Case((90, 1, 40, 13), D=33, K=5, tau=0.01),
    Case((9, 130, 0, 2), K=33, mask=True, tau=0.7),  # bfloat16 weights less their mean
    Case(tuple(i % 5 for i in range(99)), tau=0.7),  # more images than a block with means takes
    Case((60, 3, 41), D=48, K=1040),  # several blocks of texts
]
LARGE = [
    Case(uniform(24, 300)),  # several blocks of rows
    Case((2, 2300, 5, 1), D=1000, K=3),  # an image larger than a block of the max form
]


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


class Inputs:
    """Hold the packed patches of a case, and the same ones padded to the largest length with NaN."""

    def __init__(self, case: Case, form: str, dtype: torch.dtype, device: str = "cpu"):
        generator = torch.Generator().manual_seed(1)
        self.case, self.form = case, form
        self.lengths = torch.tensor(case.lengths)
        images, largest = len(case.lengths), max(1, *case.lengths)
        self.valid = torch.arange(largest) < self.lengths[:, None]
        padded = torch.randn(images, largest, case.D, generator=generator).to(dtype)
        padded[~self.valid] = torch.nan
        rows = padded[self.valid]
        self.packed = rows.new_full((len(rows), case.spacing, case.D), torch.nan).to(device)[:, 0].copy_(rows)
        self.texts = torch.randn(case.K, case.D, generator=generator).to(device, dtype)
        self.grad_phi, self.bias = torch.randn(2, images, case.K, generator=generator).to(device)
        kept = (torch.rand(images, largest, generator=generator) < (0.6 if case.mask else 1.0)).to(device)
        self.padded, self.valid = padded.to(device), self.valid.to(device)
        self.padded_mask, self.mask = self.valid & kept, kept[self.valid] if case.mask else None

    def call(self, step, packed: bool) -> dict[str, Tensor]:
        """Return what `step(patches, mask, options)` writes, with the patches' gradient as packed rows."""
        if packed:
            return step(self.packed, self.mask, {"patch_lengths": self.lengths})
        values = step(self.padded, self.padded_mask, {})
        assert (values["patches"][~self.valid] == 0).all()
        return values | {"patches": values["patches"][self.valid]}

    def compatibility(self, packed: bool, backend=cpu) -> dict[str, Tensor]:
        def step(patches: Tensor, mask: Tensor | None, options: dict) -> dict[str, Tensor]:
            inputs = (patches, self.texts, mask, self.case.tau, self.form)
            phi, state = self.grad_phi.new_full((2, *self.grad_phi.shape), torch.nan)
            grad_patches, grad_texts, grad_tau = buffers(patches, self.texts)
            gradients = (self.grad_phi, grad_patches, grad_texts, grad_tau)
            if packed and backend is cpu and cpu.keeps_scores(self.form, patches.dtype):
                backend.compatibility_forward(*inputs, phi, state, grad_patches, **options)
                backend.compatibility_backward(*inputs, phi, state, *gradients, True, **options)
            else:
                backend.compatibility_forward(*inputs, phi, state, **options)
                backend.compatibility_backward(*inputs, phi, state, *gradients, **options)
            return {"phi": phi, "state": state, "patches": grad_patches, "texts": grad_texts, "tau": grad_tau}

        return self.call(step, packed)

    def check(self, backend) -> None:
        """Compare packed patches with the formula for each image by the tolerance of `accuracy.py`."""
        answer = self.compatibility(True, backend)
        truth, plain = (self._formula(wide) for wide in (torch.float64, torch.float32))
        for name, true in truth.items():
            assert_accurate(f"{self.form}, {name}", answer[name].cpu(), true, self.packed.dtype, plain[name])

    def _formula(self, wide: torch.dtype) -> dict[str, Tensor]:
        patches, texts = (x.cpu().to(wide).requires_grad_() for x in (self.packed, self.texts))
        tau = torch.tensor(self.case.tau, dtype=wide, requires_grad=True)
        masks = torch.ones(len(patches), dtype=torch.bool) if self.mask is None else self.mask.cpu()
        rows = []
        for image, mask in zip(*(x.split(self.lengths.tolist()) for x in (patches, masks)), strict=True):
            # And a masked row, because an image may have none.
            image, mask = F.pad(image, (0, 0, 0, 1))[None], F.pad(mask, (0, 1))[None]
            rows.append(reference.compatibility(image, texts, patch_mask=mask, attn_temperature=tau, form=self.form))
        phi, upstream = torch.cat(rows), self.grad_phi.cpu().to(wide)
        grads = torch.autograd.grad(phi, (patches, texts, tau), upstream, materialize_grads=True)
        return {"phi": phi.detach()} | dict(zip(("patches", "texts", "tau"), grads, strict=True))

    def sigmoid_step(self, packed: bool) -> dict[str, Tensor]:
        def step(patches: Tensor, mask: Tensor | None, options: dict) -> dict[str, Tensor]:
            gradients = dict(zip(("patches", "texts", "tau"), buffers(patches, self.texts), strict=True))
            others = {name: torch.full((), torch.nan) for name in ("scale", "bias")}
            others["pair_bias"] = torch.full_like(self.bias, torch.nan)
            value, pairs = torch.full((), torch.nan), Pairs(None, None, None, self.bias)
            inputs = (patches, self.texts, mask, self.case.tau, self.form, 9.0, -2.0, pairs)
            cpu.sigmoid_step(*inputs, value, *gradients.values(), *others.values(), **options)
            return {"value": value} | gradients | others

        return self.call(step, packed)


def buffers(patches: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return contiguous memory for the gradients, filled with NaN."""
    grad_patches = torch.full(patches.shape, torch.nan, dtype=patches.dtype, device=patches.device)
    return grad_patches, torch.full_like(texts, torch.nan), torch.full((), torch.nan, device=patches.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_the_bits_of_masked_padding(form, dtype, isa):
    for case in CASES:
        inputs = Inputs(case, form, dtype)
        padded = inputs.compatibility(packed=False)
        assert all(x.isfinite().all() for x in padded.values())
        assert_equal(inputs.compatibility(packed=True), padded)
        if form != "max":
            assert_equal(inputs.sigmoid_step(packed=True), inputs.sigmoid_step(packed=False))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_more_than_one_block_and_any_number_of_threads(form, dtype, cpu_backend):
    for case in LARGE:
        inputs = Inputs(case, form, dtype)
        torch.set_num_threads(1)
        padded = inputs.compatibility(packed=False)
        answers = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            answers.append(inputs.compatibility(packed=True))
        assert_equal(*answers)
        if form == "max":  # sums a block of images at a time, and more packed images fit in a block than padded ones
            assert_accurate("texts", answers[0]["texts"], padded.pop("texts"), dtype)
            del answers[0]["texts"]
        assert_equal(answers[0], padded)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_the_formula_for_each_image(form, dtype, cpu_backend):
    Inputs(Case((90, 1, 0, 40, 13), D=70, tau=0.1), form, dtype).check(cpu)


def test_the_backward_reads_kept_scores(cpu_backend):
    inputs = Inputs(Case((90, 1, 0, 40, 13)), "dot", torch.float32)
    arguments = (inputs.packed, inputs.texts, None, 0.1, "dot", *torch.empty(2, *inputs.grad_phi.shape))
    scores = torch.empty_like(inputs.packed)
    cpu.compatibility_forward(*arguments, scores, patch_lengths=inputs.lengths)
    texts = []
    for memory in (scores.clone(), torch.zeros_like(scores)):
        gradients = (memory, torch.empty_like(inputs.texts), None)
        cpu.compatibility_backward(*arguments, inputs.grad_phi, *gradients, True, patch_lengths=inputs.lengths)
        texts.append(gradients[1])
    assert texts[0].isfinite().all() and not torch.equal(*texts)


@pytest.mark.parametrize("form", FORMS)
def test_the_workspace_follows_the_patches_that_are_there(form, cpu_backend):
    """One long image among short ones makes no work of its size for each of them."""
    torch.set_num_threads(1)
    lengths = torch.tensor([4096] + 511 * [1])
    patches, texts = torch.empty(1, 256).expand(int(lengths.sum()), 256), torch.empty(512, 256)
    starts = cpu._patch_starts(lengths)
    pairs = torch.empty(2, 512, 512)
    params = cpu._params(patches, texts, None, 0.1, form, starts, *pairs)
    needed = [native().compatibility_forward(params).workspace_bytes]
    params.set(grad_phi=pairs.data_ptr(), grad_patches=patches.data_ptr())
    needed.append(native().compatibility_backward(params).workspace_bytes)
    allowed = 64 * 2**20 + (2 * 4 * 4096**2 if form == "cosine" else 0)  # G and C of the long image
    assert max(needed) <= allowed
