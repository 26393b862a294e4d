"""Run the epilogues of the sigmoid loss of the Hopper kernels in the emulator, as test_cuda_emulated.py does others."""

from __future__ import annotations

import pytest
import torch
from emulated import problem, run, truth

SCALE, BIAS = 5.0, -1.5
CASES = [
    # b, n, k, d, pairs, τ, masked, and settings of the launch; the id says what is special
    pytest.param(5, 196, 70, 136, "own", 0.1, False, {}, id="196, part of a text tile"),
    pytest.param(3, 97, 130, 72, "shifted", 1.0, False, dict(cluster=1), id="97, one block"),
    pytest.param(3, 256, 70, 72, "ids", 0.1, True, {}, id="256, ids"),
    pytest.param(5, 144, 130, 40, "targets", 0.05, True, dict(processors=2), id="144, targets and a bias"),
    pytest.param(4, 199, 140, 200, "ids", 0.02, False, dict(resident=0, stages=3), id="199, a small temperature"),
]


def pairs_of(kind, b, k):
    """Return targets and bias `[B, K]` of the pairs, and the fields of a launch with their tensors."""
    generator = torch.Generator().manual_seed(3)
    targets, bias = torch.zeros(b, k), torch.zeros(b, k)
    if kind == "targets":
        targets, bias = torch.rand(b, k, generator=generator), torch.randn(b, k, generator=generator)
        bias[torch.rand(b, k, generator=generator) < 0.2] = -float("inf")
        return targets, bias, dict(targets=targets, pair_bias=bias, grad_pair_bias=torch.full((b, k), float("nan")))
    if kind == "ids":
        image_ids, text_ids = torch.arange(b) + 2**40, torch.arange(k) % (b + 3) + 2**40
        image_ids[1] = text_ids[1] = text_ids[9] = -1  # equal, but negative ids match nothing
        equal = (image_ids[:, None] == text_ids) & (image_ids >= 0)[:, None]
        return equal.float(), bias, dict(image_ids=image_ids, text_ids=text_ids)
    own = torch.arange(b) + (63 if kind == "shifted" else -1)  # as in a block of images and texts
    inside = (own >= 0) & (own < k)
    targets[torch.arange(b)[inside], own[inside]] = 1.0
    return targets, bias, {}


@pytest.mark.parametrize("form", ["dot", "cosine"])
@pytest.mark.parametrize("b, n, k, d, kind, tau, masked, more", CASES)
def test_loss_and_weights(library, b, n, k, d, kind, tau, masked, more, form):
    patches, texts = problem(b, n, k, d)
    mask = torch.ones(b, n, dtype=torch.bool)
    if masked:
        mask = torch.rand(b, n, generator=torch.Generator().manual_seed(1)) < 0.6
        mask[0] = False
        patches[~mask] = float("nan")
    targets, bias, tensors = pairs_of(kind, b, k)
    clean = patches.nan_to_num(1.0)
    unit = torch.nn.functional.normalize(clean.double(), dim=-1) * mask[..., None]
    s, a, u, _ = truth(clean, texts, tau, mask)
    q = torch.einsum("bnm,bkm->bkn", unit @ unit.mT, a)
    radius = torch.ones_like(u)[..., None] if form == "dot" else (a * q).sum(-1).sqrt().clamp_min(1e-6)[..., None]
    bend = u[..., None] if form == "dot" else (u[..., None] / radius**2) * q
    # The loss by autograd in float64, and W by the formula.
    phi = (u / radius[..., 0]).requires_grad_()
    scale, shift = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (SCALE, BIAS))
    out = bias == -float("inf")
    z = scale * phi + shift + bias.double().masked_fill(out, 0.0)
    terms = -targets * torch.nn.functional.logsigmoid(z) - (1 - targets) * torch.nn.functional.logsigmoid(-z)
    value = terms.masked_fill(out, 0.0).sum()
    g, by_scale, by_bias, by_logit = torch.autograd.grad(value, (phi, scale, shift, z))
    share = 1 / 64  # of more images than these, as in a block
    ds = share * g[..., None] * a / radius * (1 + (s - bend) / tau)
    w = (ds / clean.double().norm(dim=-1)[:, None] / texts.double().norm(dim=-1)[None, :, None]).permute(1, 0, 2)

    stride = -(-b * n // 8) * 8 + 8
    found = torch.full((k + 1, stride), 9.0, dtype=torch.bfloat16)
    sums = torch.full((9, 4), 9.0)  # at most eight blocks run
    on_device = torch.tensor([SCALE, BIAS])  # of two numbers, the launch reads one from memory
    loss = dict(logit_scale_at=on_device.data_ptr(), logit_bias=BIAS, share=share, loss_sums=sums.data_ptr())
    loss |= dict(own_text=63 if kind == "shifted" else -1, full=masked or tau == 0.1)
    loss |= dict(weights=found.data_ptr(), weights_stride=stride)
    loss |= {name: x.data_ptr() for name, x in tensors.items()}
    options = dict(tau=tau, mask=mask if masked else None, loss=loss, epilogue=f"{form}_sigmoid_weights", **more)
    if form == "cosine":
        gram = torch.zeros(b, n, -(-n // 16) * 16, dtype=torch.float16)
        gram[..., :n] = unit @ unit.mT
        attention = torch.full((b + 1, k, -(-n // 8) * 8 + 8), 9.0, dtype=torch.bfloat16)
        norm_factor = torch.full((b * k + 1,), 9.0)
        options |= dict(gram=gram, attention=attention, norm_factor=norm_factor)
    run(library, patches, texts, None, None, **options)

    eps = torch.finfo(torch.bfloat16).eps * (1 if form == "dot" else 2)  # attention and Gram matrix are rounded too
    mine = found[:k, : b * n].double().view(k, b, n)
    assert (mine - w).norm() < eps * w.norm()
    assert (mine.permute(1, 2, 0)[~mask] == 0).all()
    assert (found[:k, b * n :] == 9).all() and (found[k:] == 9).all(), "wrote behind the weights"
    written = (sums != 9).any(1)
    total = sums[written].double().sum(0)
    assert not written[-1] and not sums[written].isnan().any()
    close = 1e-5 if form == "dot" else 5e-4
    assert abs(total[0] - value) < close * value
    assert abs(total[1] - by_scale) < close * (by_logit * phi).abs().sum()
    assert abs(total[2] - by_bias) < close * by_logit.abs().sum()
    if loss["full"]:
        scores = (s - u[..., None]).where(a > 0, 0.0)
        if form == "dot":
            true = (share * g[..., None] * a * scores**2).sum()
        else:
            true = (ds * scores).sum() / tau - (share * g[..., None] * a / radius * scores).sum() / tau
        assert abs(total[3] - true) <= 100 * close * (ds * scores).abs().sum() / (tau if form == "cosine" else 1.0)
    elif tau >= 0.05:  # below, the kernel takes the full variant by itself
        assert total[3] == 0
    if kind == "targets":
        assert (tensors["grad_pair_bias"] - share * by_logit).abs().max() < 10 * close * share
        assert (tensors["grad_pair_bias"][out] == 0).all() and out.any()
    if form == "cosine":
        factor = torch.where(radius[..., 0] > 1e-6, share * g * u / radius[..., 0] ** 3, 0.0)
        assert (norm_factor[:-1].view(b, k) - factor).norm() < 1e-2 * factor.norm() and norm_factor[-1] == 9
        assert (attention[:b, :, :n].double() - a).abs().max() < 5e-3 * a.max()
        assert (attention[:b, :, -(-n // 8) * 8 :] == 9).all() and (attention[b:] == 9).all()


def test_weights_may_be_left_out(library):
    """The sums keep their bits where no product needs W, and no order of threads changes them."""
    patches, texts = problem(5, 196, 70, 136)
    found, w = [], torch.full((70, 5 * 196), 9.0, dtype=torch.bfloat16)
    for seed, weights in ((0, w.data_ptr()), (1, 0)):
        sums = torch.zeros(8, 4)
        loss = dict(logit_scale=SCALE, logit_bias=BIAS, share=1 / 5, full=True, loss_sums=sums.data_ptr())
        loss |= dict(weights=weights, weights_stride=w.stride(0))
        run(library, patches, texts, None, None, tau=0.1, loss=loss, epilogue="dot_sigmoid_weights", seed=seed)
        found.append(sums)
    assert torch.equal(*found) and found[0].any() and (w != 9).all()
