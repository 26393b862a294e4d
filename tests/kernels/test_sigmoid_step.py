"""The sigmoid loss in one pass: what the tests of all losses do not ask."""

import pytest
import torch

from pacl_kernels import fused_pacl_loss

FORMS = ("dot", "cosine")


def _inputs(b=9, n=13, d=40, k=9):
    generator = torch.Generator().manual_seed(0)
    patches, texts = (torch.randn(shape, generator=generator).requires_grad_() for shape in ((b, n, d), (k, d)))
    return patches, texts


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [-30.0, -3.0, 0.0, 25.0])
def test_small_losses_keep_their_digits(bias, form, cpu_backend):
    """A loss of e^-30 for each pair is as precise as one of 30: no logarithm of a rounded 1 + e."""
    patches, texts = _inputs()
    ids = torch.full((9,), -1)  # no positives, whose terms would hide the others
    for sign in (1.0, -1.0):  # negatives far below, positives far above
        options = {"form": form, "loss": "sigmoid", "logit_bias": sign * bias, "attn_temperature": 0.1}
        options |= {"image_ids": ids, "text_ids": ids} if sign > 0 else {"targets": torch.ones(9, 9)}
        value = fused_pacl_loss(patches, texts, 5.0, **options, backend=cpu_backend)
        wide = {name: x.double() if name == "targets" else x for name, x in options.items()}
        truth = fused_pacl_loss(patches.double(), texts.double(), 5.0, **wide, backend="reference")
        assert value.item() == pytest.approx(truth.item(), rel=3e-6)


@pytest.mark.parametrize("form", FORMS)
def test_the_incoming_gradient_comes_later(form, cpu_backend):
    """Gradients are made before the factor is known; a factor of 2 doubles them to the bit, and repeatedly so."""
    patches, texts = _inputs()
    value = fused_pacl_loss(patches, texts, 10.0, form=form, loss="sigmoid", backend=cpu_backend)
    one = torch.autograd.grad(value, (patches, texts), retain_graph=True)
    for _ in range(2):
        two = torch.autograd.grad(2 * value, (patches, texts), retain_graph=True)
        assert all(torch.equal(2 * a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_frozen_texts_and_patches(form, cpu_backend):
    """Leaving a gradient out changes no bits of the rest."""
    patches, texts = _inputs()
    options = {"form": form, "loss": "sigmoid", "backend": cpu_backend}
    both = torch.autograd.grad(fused_pacl_loss(patches, texts, 10.0, **options), (patches, texts))
    (first,) = torch.autograd.grad(fused_pacl_loss(patches, texts.detach(), 10.0, **options), patches)
    (second,) = torch.autograd.grad(fused_pacl_loss(patches.detach(), texts, 10.0, **options), texts)
    assert torch.equal(first, both[0]) and torch.equal(second, both[1])


def test_an_image_without_patches_counts(cpu_backend):
    """Its φ is 0, so each of its pairs has the loss of the bias alone."""
    patches, texts = _inputs(b=2, k=5)
    mask = torch.zeros(2, 13, dtype=torch.bool)
    bias = torch.tensor(-1.5, requires_grad=True)
    ids = {"image_ids": torch.tensor([0, 1]), "text_ids": torch.tensor([0, 1, 7, 7, -1])}
    options = {"patch_mask": mask, "loss": "sigmoid", "logit_bias": bias, "backend": cpu_backend}
    value = fused_pacl_loss(patches, texts, 10.0, **options, **ids)
    value.backward()
    positive, negative = (torch.nn.functional.softplus(torch.tensor(x)).item() for x in (1.5, -1.5))
    assert value.item() == pytest.approx((2 * positive + 8 * negative) / 2, rel=1e-6)
    assert bias.grad.item() == pytest.approx((10 * torch.sigmoid(torch.tensor(-1.5)).item() - 2) / 2, rel=1e-6)
    assert not patches.grad.any() and not texts.grad.any()
