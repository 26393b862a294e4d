"""Run the source of the Hopper kernels thread by thread on the host; cuda/emulator.h says what that can show.

The emulator is compiled for tiles of one image with 144, 200 and 256 columns, and for all tiles of several images.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from accuracy import check
from emulated import problem, run, truth
from paths import path_to_kernel
from problems import Case, make

from pacl_kernels import fused_pacl_loss
from pacl_kernels.backends.gpu import hopper

FORWARD = [
    # b, n, k, d; the id says what is special
    pytest.param(5, 196, 70, 136, {}, id="odd batch, part of a text tile"),
    pytest.param(3, 200, 130, 512, dict(cluster=1), id="one block"),
    pytest.param(2, 144, 200, 64, {}, id="one step"),
    pytest.param(3, 400, 65, 72, {}, id="two chunks"),
    pytest.param(3, 387, 129, 72, {}, id="two chunks, odd"),
    pytest.param(7, 49, 66, 72, {}, id="several images to a tile"),
    pytest.param(70, 8, 64, 40, dict(processors=2), id="many images to a tile"),
    pytest.param(1, 1, 1, 1, {}, id="ones"),
    pytest.param(4, 197, 140, 200, dict(resident=0), id="texts with each step"),
    pytest.param(5, 196, 140, 200, dict(stages=2), id="a ring of two"),
    pytest.param(5, 196, 140, 200, dict(stages=3), id="a ring of three"),
    pytest.param(6, 196, 300, 72, dict(processors=1), id="one processor"),
    pytest.param(9, 196, 300, 72, dict(processors=3), id="three processors"),
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("tau", [1.0, 0.05, 0.02], ids="tau{}".format)
@pytest.mark.parametrize("b, n, k, d, more", FORWARD)
def test_forward(library, b, n, k, d, more, tau):
    patches, texts = problem(b, n, k, d)
    phi, state = torch.full((b, k), float("nan")), torch.full((b, k), float("nan"))
    run(library, patches, texts, phi, state, tau=tau, **more)
    _, _, expected, entropy = truth(patches, texts, tau)
    assert (phi - expected).abs().max() < 1e-5
    assert (state - entropy).abs().max() < 1e-4


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_any_order_of_threads_gives_the_same_bits(library, dtype, seed):
    patches, texts = problem(5, 196, 150, 136, dtype)
    results = []
    for order in (seed, seed + 100):
        phi, state = torch.full((5, 150), float("nan")), torch.full((5, 150), float("nan"))
        run(library, patches, texts, phi, state, tau=0.1, seed=order, stages=3)
        results.append((phi, state))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert (results[0][0] - truth(patches, texts, 0.1)[2]).abs().max() < 1e-5


@pytest.mark.parametrize("tau", [0.5, 0.02], ids="tau{}".format)
@pytest.mark.parametrize("b, n, k, d", [(5, 196, 70, 72), (9, 49, 66, 40), (3, 400, 65, 40)], ids=str)
def test_masks_hide_anything(library, b, n, k, d, tau):
    patches, texts = problem(b, n, k, d)
    mask = torch.rand(b, n, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[0] = False
    mask[1] = torch.arange(n) == n - 1
    patches[~mask] = float("nan")
    phi, state = torch.full((b, k), float("nan")), torch.full((b, k), float("nan"))
    run(library, patches, texts, phi, state, tau=tau, mask=mask)
    _, _, expected, entropy = truth(patches.nan_to_num(1.0), texts, tau, mask)
    assert (phi - expected).abs().max() < 1e-5
    assert (state - entropy).abs().max() < 1e-4
    assert not phi[0].any()


def weights_of(patches, texts, tau, phi, a, s, g, mask=None):
    """Return W = g ∂φ/∂s / (‖p‖ ‖t‖) `[K, B, N]`, and the sum that gives the temperature's gradient."""
    ds = g[:, :, None] * a * (1 + (s - phi[:, :, None]) / tau)
    w = ds / patches.double().norm(dim=-1)[:, None] / texts.double().norm(dim=-1)[None, :, None]
    centred = torch.where(a > 0, s - phi[:, :, None], 0.0)
    return w.permute(1, 0, 2), (a * g[:, :, None] * centred**2).sum()


WEIGHTS = [
    pytest.param(5, 196, 70, 136, {}, id="196"),
    pytest.param(3, 200, 130, 72, dict(cluster=1), id="200"),
    pytest.param(3, 197, 130, 72, {}, id="197"),
    pytest.param(3, 198, 130, 72, {}, id="198"),
    pytest.param(3, 387, 129, 72, {}, id="two chunks"),
    pytest.param(7, 49, 66, 72, {}, id="49"),
    pytest.param(7, 56, 66, 72, {}, id="56"),
    pytest.param(9, 15, 66, 40, dict(processors=1), id="15"),
    pytest.param(2, 1, 3, 8, {}, id="one patch"),
    pytest.param(4, 144, 140, 200, dict(resident=0, stages=2), id="texts with each step"),
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "masked, needs_tau", [(False, False), (False, True), (True, False)], ids=["all", "temperature", "masked"]
)
@pytest.mark.parametrize("b, n, k, d, more", WEIGHTS)
def test_weights(library, b, n, k, d, more, masked, needs_tau, dtype):
    tau = 0.1
    patches, texts = problem(b, n, k, d, dtype)
    mask = None
    if masked:
        mask = torch.rand(b, n, generator=torch.Generator().manual_seed(1)) < 0.6
        mask[0] = False
        patches[~mask] = float("nan")
    clean = patches.nan_to_num(1.0)
    s, a, phi, entropy = truth(clean, texts, tau, mask)
    g = torch.randn(b, k, generator=torch.Generator().manual_seed(2))
    expected, temperature = weights_of(clean, texts, tau, phi, a, s, g.double())
    stride = -(-b * n // 8) * 8 + 8
    w = torch.full((k + 1, stride), 9.0, dtype=dtype)
    scale = torch.tensor([4.0])
    sums = torch.zeros(8)
    addresses = dict(weights=w, grad_phi=g, range_scale=scale, temperature_sums=sums)
    weights = {name: x.data_ptr() for name, x in addresses.items()}
    if not needs_tau:
        weights["temperature_sums"] = 0
    weights |= dict(weights_stride=stride)
    run(library, patches, texts, phi.float(), entropy.float(), tau=tau, mask=mask, weights=weights, **more)
    found = w[:k, : b * n].double().view(k, b, n) / 4
    eps = torch.finfo(dtype).eps
    assert (found - expected).norm() < eps * expected.norm()
    assert (found - expected).abs().max() < 4 * eps * expected.abs().max()
    assert (w[:k, b * n :] == 9).all() and (w[k:] == 9).all(), "wrote behind the weights"
    if masked:
        assert (found.permute(1, 2, 0)[~mask] == 0).all()
    temperature = temperature if needs_tau else 0.0
    assert abs(sums.double().sum() - temperature) < 1e-4 * (a * g[:, :, None].abs()).sum() * tau


@pytest.mark.parametrize("tau", [1.0, 0.01], ids="tau{}".format)
def test_a_temperature_in_memory_chooses_the_launch(library, tau):
    patches, texts = problem(3, 196, 70, 72)
    phi, state = torch.full((3, 70), float("nan")), torch.full((3, 70), float("nan"))
    works, returns = "dot_forward", "dot_forward_running_max"
    if tau < 0.05:
        works, returns = returns, works
    launch = partial(run, library, patches, texts, phi, state, tau=torch.tensor([tau]))
    launch(epilogue=returns)
    assert phi.isnan().all()
    launch(epilogue=works)
    assert (phi - truth(patches, texts, tau)[2]).abs().max() < 1e-5


def test_not_a_number_and_no_direction(library):
    patches, texts = problem(3, 196, 70, 72)
    patches[0, 5, 3] = float("nan")
    phi, state = torch.zeros(3, 70), torch.zeros(3, 70)
    run(library, patches, texts, phi, state, tau=0.1)
    assert phi[0].isnan().all() and not phi[1:].isnan().any()


def test_a_launch_names_what_it_does_not_take(library):
    sizes = dict(images=1, patches=1, texts=1, dim=8, cluster=0, device=0)
    sizes["epilogue"] = library.CudaEpilogue.dot_forward
    with pytest.raises(AttributeError, match="CudaLaunch has no field 'curve'"):
        library.CudaLaunch(**sizes, dtype="bfloat16", curve=0)
    with pytest.raises(AttributeError, match="CudaLaunch has no field 'curve'"):
        library.CudaLaunch(**sizes, dtype="bfloat16").curve = 0
    with pytest.raises(ValueError, match="dtype is 'float32', expected bfloat16 or float16"):
        library.CudaLaunch(**sizes, dtype="float32")


COSINE = [
    pytest.param(5, 196, 70, 136, {}, id="196"),
    pytest.param(3, 200, 130, 64, dict(cluster=1), id="200"),
    pytest.param(4, 193, 130, 72, dict(stages=2), id="193, a ring of two"),
    pytest.param(2, 97, 200, 300, dict(resident=0, stages=3), id="97, texts with each step"),
    pytest.param(7, 144, 140, 72, dict(processors=2), id="144"),
    pytest.param(3, 225, 130, 72, {}, id="225"),
    pytest.param(3, 256, 130, 136, dict(stages=3), id="256"),
]
# Cases with the attention in memory.
IN_MEMORY = [
    pytest.param(3, 387, 130, 72, {}, id="387, two tiles"),
    pytest.param(5, 400, 70, 40, dict(processors=2), id="400, two tiles"),
    pytest.param(2, 577, 66, 40, dict(cluster=1), id="577, three tiles, one block"),
    pytest.param(9, 49, 130, 40, dict(stages=3), id="49, a ring of three"),
    pytest.param(3, 64, 66, 72, {}, id="64"),
    pytest.param(2, 1, 3, 8, {}, id="one patch"),
]


def attention_in_memory(library, patches, texts, phi, state, **options):
    """Return the attention `[images, texts, pitch]` of a launch, and assert that it writes nothing outside."""
    (b, n, _), k = patches.shape, len(texts)
    pitch = -(-n // 8) * 8
    attention = torch.full((b + 1, k, pitch + 8), 9.0, dtype=torch.float16)
    run(library, patches, texts, phi, state, attention=attention, epilogue="attention", **options)
    assert (attention[:b, :, pitch:] == 9).all() and (attention[b] == 9).all(), "wrote behind the attention"
    assert (attention[:b, :, n:pitch] == 0).all(), "what lies past the last patch is read"
    return attention[:b]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("masked, tau", [(True, 1.0), (False, 0.05), (False, 0.01), (True, 0.01)])
@pytest.mark.parametrize("b, n, k, d, more", COSINE + IN_MEMORY)
def test_cosine(library, b, n, k, d, more, masked, tau):
    patches, texts = problem(b, n, k, d)
    mask = None
    if masked:
        mask = torch.rand(b, n, generator=torch.Generator().manual_seed(1)) < 0.4
        mask[0] = False
        patches[~mask] = float("nan")
    clean = patches.nan_to_num(1.0)
    unit = torch.nn.functional.normalize(clean.double(), dim=-1)
    if masked:
        unit = unit * mask[..., None]
    gram = torch.zeros(b, n, -(-n // 16) * 16, dtype=torch.float16)
    gram[..., :n] = unit @ unit.mT
    s, a, phi, entropy = truth(clean, texts, tau, mask)
    lse = (a * (s / tau - a.clamp_min(1e-300).log())).sum(-1) / torch.log(torch.tensor(2.0))
    radius = torch.einsum("bkn,bnm,bkm->bk", a, unit @ unit.mT, a).sqrt().clamp_min(1e-6)
    options = dict(tau=tau, mask=mask, **more)
    if library.cuda_fits_one_tile(n):
        found, state = torch.full((b, k), float("nan")), torch.full((b, k), float("nan"))
        run(library, patches, texts, found, state, gram=gram, epilogue="cosine_forward", **options)
    else:
        found, state = phi.float(), entropy.float()
        attention = attention_in_memory(library, patches, texts, found, state, **options)
        assert (attention[..., :n] - a).abs().max() < 1e-3
        options |= dict(gram=gram, attention=attention, epilogue="cosine_forward_from_attention")
        run(library, patches, texts, found, state, **options)
    assert (found - phi / radius).abs().max() < 2e-3 * (phi / radius).abs().max()  # float16 attention and Gram matrix
    assert (state - lse).abs().max() < 1e-4
    assert not masked or not found[0].any()


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "dtype, masked, tau",
    [
        (torch.bfloat16, True, 1.0),
        (torch.float16, True, 0.05),
        (torch.float16, False, 1.0),
        (torch.bfloat16, False, 0.05),
    ],
    ids=str,
)
@pytest.mark.parametrize("b, n, k, d, more", COSINE + IN_MEMORY)
def test_weights_of_cosine(library, b, n, k, d, more, dtype, masked, tau):
    patches, texts = problem(b, n, k, d, dtype)
    mask = torch.ones(b, n, dtype=torch.bool)
    if masked:
        mask = torch.rand(b, n, generator=torch.Generator().manual_seed(1)) < 0.6
        mask[0] = False
    patches[~mask] = float("nan")
    clean = patches.nan_to_num(1.0)
    unit = torch.nn.functional.normalize(clean.double(), dim=-1) * mask[..., None]
    gram = torch.zeros(b, n, -(-n // 16) * 16, dtype=torch.float16)
    gram[..., :n] = unit @ unit.mT
    s, a, u, _ = truth(clean, texts, tau, mask)
    lse = (a * (s / tau - a.clamp_min(1e-300).log())).sum(-1) / torch.log(torch.tensor(2.0))
    q = torch.einsum("bnm,bkm->bkn", unit @ unit.mT, a)
    radius = (a * q).sum(-1).sqrt()
    g = torch.randn(b, k, generator=torch.Generator().manual_seed(2))
    inside = radius.clamp_min(1e-6)[..., None]
    ds = g[..., None] * a / inside * (1 + (s - (u / inside[..., 0] ** 2)[..., None] * q) / tau)
    w = (ds / clean.double().norm(dim=-1)[:, None] / texts.double().norm(dim=-1)[None, :, None]).permute(1, 0, 2)
    bend = torch.where(radius > 1e-6, g * u / inside[..., 0] ** 3, 0.0)

    stride = -(-b * n // 8) * 8 + 8
    found = torch.full((k + 1, stride), 9.0, dtype=dtype)
    norm_factor, sums = torch.full((b * k + 1,), 9.0), torch.zeros(8)
    weights = dict(weights=found.data_ptr(), weights_stride=stride)
    weights |= dict(grad_phi=g.data_ptr(), temperature_sums=sums.data_ptr() if masked else 0)
    options = dict(tau=tau, mask=mask if masked else None, **more)
    if library.cuda_fits_one_tile(n):
        epilogue, attention = "cosine_weights", torch.full((b + 1, k, -(-n // 8) * 8 + 8), 9.0, dtype=dtype)
    else:
        epilogue = "cosine_weights_from_attention"
        attention = attention_in_memory(library, patches, texts, None, lse.float(), **options)
    options |= dict(gram=gram, weights=weights, attention=attention, norm_factor=norm_factor, epilogue=epilogue)
    run(library, patches, texts, None, lse.float(), **options)
    mine, kept = found[:k, : b * n].double().view(k, b, n), attention[:b, :, :n].double()
    assert (mine - w).norm() < 2 * torch.finfo(dtype).eps * w.norm()  # the attention and the Gram matrix are rounded
    assert (kept - a).abs().max() < 5e-3 * a.max()
    assert (mine.permute(1, 2, 0)[~mask] == 0).all() and (kept.transpose(1, 2)[~mask] == 0).all()
    assert (norm_factor[:-1].view(b, k) - bend).norm() < 2e-3 * bend.norm() and norm_factor[-1] == 9
    assert (found[:k, b * n :] == 9).all() and (found[k:] == 9).all(), "wrote behind the weights"
    assert (attention[:b, :, -(-n // 8) * 8 :] == 9).all() and (attention[b:] == 9).all(), "wrote behind the attention"
    if not masked:
        return
    scores = (s - u[..., None]).where(a > 0, 0.0)
    true = (ds * scores).sum() - (g[..., None] * a / inside * scores).sum()  # Σ ds (s - u) without its first term
    assert abs(sums.double().sum() * tau - true) <= 1e-2 * (ds * scores).abs().sum()


BACKEND = [
    Case(B=3, N=196, D=72),
    Case(B=6, N=49, D=40, mask="random"),
    Case(B=2, N=387, D=33, tau=0.02, layout="strided"),
    Case(B=4, N=7, D=130, data="norms", scale=100.0),
    Case(B=2, N=144, D=64, K=70, mask="random", data="zero_patches"),
    # One patch has all the attention: s - φ must be exactly 0, because τ would magnify any other value.
    *(Case(B=3, N=n, D=40, tau=tau) for n, tau in ((1, 1e-6), (144, 1e-6), (144, 1e-10))),
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "case, form, dtype",
    [
        *((case, form, torch.bfloat16) for form in ("dot", "cosine") for case in BACKEND),
        # The bound of W in `cosine` has a factor 1 / τ, so that W underflows in float16 at τ = 1e-10.
        *((case, "cosine", torch.float16) for case in BACKEND if case.N < 196 and case.tau > 1e-8),
    ],
    ids=str,
)
def test_backend(library, monkeypatch, case, form, dtype):
    """The whole backend is accurate, with launches in the emulator between kernels in Triton's interpreter."""
    library.configure()
    monkeypatch.setattr(hopper, "native", lambda: library)
    monkeypatch.setattr(hopper, "why_not", lambda device=None, dtype=None: None)
    monkeypatch.setattr(hopper.settings, "cosine_from_attention", True)
    check(make(case, form, "compatibility" if case.K else "infonce", dtype), "cuda")


@pytest.mark.parametrize("form", ["dot", "cosine"])
def test_path_of_the_patches(library, monkeypatch, form):
    """The path is as short as tests/kernels/test_path.py requires of the other backends."""
    library.configure()
    monkeypatch.setattr(hopper, "native", lambda: library)
    monkeypatch.setattr(hopper, "why_not", lambda device=None, dtype=None: None)
    patches, texts = torch.randn(3, 100, 64).bfloat16(), torch.randn(3, 64).bfloat16()
    found = path_to_kernel(lambda: fused_pacl_loss(patches, texts, 10.0, form=form, backend="cuda"))
    assert found == [
        "loss.py",
        "autograd.py",
        "ops.py",
        "scoring.py",
        "backends/gpu/lists.py",
        "backends/gpu/order.py",
        "backends/gpu/hopper.py",
    ]


@pytest.mark.parametrize("form", ["dot", "cosine"])
@pytest.mark.parametrize(
    "case",
    [Case(B=3, N=196, D=72), Case(B=4, N=100, D=40, mask="random", scale=20.0), Case(B=3, N=144, D=33, tau=0.02)],
    ids=str,
)
def test_sigmoid_step(library, monkeypatch, case, form):
    """The sigmoid loss in one pass is accurate, with its gradients of the scalars."""
    library.configure()
    monkeypatch.setattr(hopper, "native", lambda: library)
    monkeypatch.setattr(hopper, "why_not", lambda device=None, dtype=None: None)
    check(make(case, form, "sigmoid", torch.bfloat16), "cuda")
