"""Run the Hopper kernels that store W transposed, by bulk tensor stores, in the emulator; see test_cuda_emulated.py.

They compute what the other kernels compute, so that every bit must be equal.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accuracy import check
from emulated import problem, run, truth
from problems import Case, make

from pacl_kernels.backends.gpu import hopper, order

SHAPES = [
    # b, n, k, d; the id says what is special
    pytest.param(5, 196, 70, 136, {}, id="196, part of a text tile"),
    pytest.param(4, 197, 130, 72, dict(cluster=1), id="197, one block"),
    pytest.param(3, 256, 66, 72, {}, id="256, two warpgroups"),
    pytest.param(3, 144, 140, 200, dict(resident=0, stages=2), id="144, texts with each step"),
    pytest.param(3, 387, 65, 40, {}, id="387, two chunks of 200"),
    pytest.param(2, 577, 66, 40, {}, id="577, three chunks"),
    pytest.param(7, 49, 66, 40, {}, id="49, four images to a tile"),
    pytest.param(9, 15, 66, 40, dict(processors=1), id="15, many images to a tile"),
    pytest.param(2, 1, 3, 8, {}, id="one patch"),
]

MASKED = (197, 387, 49)  # patches of the shapes with a mask, and in `dot` with the temperature's gradient


def room_of(b, n, k):
    """Return W `[texts, rows]` and W `[rows, texts]` with more room than a launch may write, as texts are padded."""
    plain = torch.full((k + 1, -(-b * n // 8) * 8 + 8), 9.0, dtype=torch.bfloat16)
    return plain, torch.full((b * n + 1, -(-k // 8) * 8 + 8), 9.0, dtype=torch.bfloat16)


def assert_equal(plain, transposed, b, n, k):
    assert torch.equal(transposed[: b * n, :k].T, plain[:k, : b * n])
    assert (transposed[b * n :] == 9).all() and (transposed[:, k:] == 9).all(), "wrote behind the weights"


@pytest.mark.parametrize("b, n, k, d, more", SHAPES)
def test_dot(library, b, n, k, d, more):
    patches, texts = problem(b, n, k, d)
    masked = needs_tau = n in MASKED
    mask = None
    if masked:
        mask = torch.rand(b, n, generator=torch.Generator().manual_seed(1)) < 0.6
        mask[0] = False
        patches[~mask] = float("nan")
    _, _, phi, entropy = truth(patches.nan_to_num(1.0), texts, 0.1, mask)
    g = torch.randn(b, k, generator=torch.Generator().manual_seed(2))
    plain, transposed = room_of(b, n, k)
    sums = torch.zeros(2, 8)
    for w, epilogue, of_block in ((plain, "dot_weights", sums[0]), (transposed, "dot_weights_transposed", sums[1])):
        weights = dict(weights=w.data_ptr(), weights_stride=w.stride(0), grad_phi=g.data_ptr())
        weights |= dict(temperature_sums=of_block.data_ptr() if needs_tau else 0)
        options = dict(tau=0.1, mask=mask, weights=weights, epilogue=epilogue, **more)
        run(library, patches, texts, phi.float(), entropy.float(), **options)
    assert_equal(plain, transposed, b, n, k)
    assert torch.equal(sums[0], sums[1]) and (sums.any() or not needs_tau)


@pytest.mark.parametrize("b, n, k, d, more", SHAPES)
def test_cosine(library, b, n, k, d, more):
    tau, masked = 0.1, n in MASKED
    patches, texts = problem(b, n, k, d)
    mask = torch.rand(b, n, generator=torch.Generator().manual_seed(1)) < 0.6 if masked else None
    if masked:
        patches[~mask] = float("nan")
    clean = patches.nan_to_num(1.0)
    unit = torch.nn.functional.normalize(clean.double(), dim=-1) * (1.0 if mask is None else mask[..., None])
    gram = torch.zeros(b, n, -(-n // 16) * 16, dtype=torch.float16)
    gram[..., :n] = unit @ unit.mT
    s, a, _, _ = truth(clean, texts, tau, mask)
    lse = (a * (s / tau - a.clamp_min(1e-300).log())).sum(-1).float() / torch.log(torch.tensor(2.0))
    g = torch.randn(b, k, generator=torch.Generator().manual_seed(2))
    one_tile = library.cuda_fits_one_tile(n)
    epilogue = "cosine_weights" if one_tile else "cosine_weights_from_attention"
    pitch = -(-n // 8) * 8
    kept = torch.full((2, b + 1, k, pitch + 8), 9.0, dtype=torch.bfloat16 if one_tile else torch.float16)
    options = dict(tau=tau, mask=mask, **more)
    if not one_tile:
        for attention in kept:
            run(library, patches, texts, None, lse, attention=attention, epilogue="attention", **options)
    found = torch.full((2, b * k + 1), 9.0)
    plain, transposed = room_of(b, n, k)
    for i, (w, name) in enumerate(((plain, epilogue), (transposed, f"{epilogue}_transposed"))):
        weights = dict(weights=w.data_ptr(), weights_stride=w.stride(0), grad_phi=g.data_ptr(), temperature_sums=0)
        buffers = dict(gram=gram, attention=kept[i], norm_factor=found[i])
        run(library, patches, texts, None, lse, weights=weights, epilogue=name, **buffers, **options)
    assert_equal(plain, transposed, b, n, k)
    assert torch.equal(kept[0], kept[1]) and (kept[1, :b, :, :pitch] != 9).all() and (kept[1, b] == 9).all()
    assert torch.equal(found[0], found[1]) and found[1, :-1].any()


def test_what_is_not_stored(library):
    """Without an address of W, `cosine_weights` stores neither W nor the attention, as the experiments need."""
    b, n, k = 3, 100, 66
    patches, texts = problem(b, n, k, 40)
    gram = torch.zeros(b, n, 112, dtype=torch.float16)
    attention, norm_factor = torch.full((b, k, 104), 9.0, dtype=torch.bfloat16), torch.empty(b * k)
    lse, g, (w, _) = torch.zeros(b, k), torch.ones(b, k), room_of(b, n, k)
    for address, stored in ((w.data_ptr(), True), (0, False)):
        w.fill_(9.0)
        weights = dict(weights=address, weights_stride=w.stride(0), grad_phi=g.data_ptr(), temperature_sums=0)
        buffers = dict(gram=gram, norm_factor=norm_factor, epilogue="cosine_weights", weights=weights)
        run(library, patches, texts, None, lse, attention=attention, **buffers)
        assert (attention != 9).all() == stored and (w[:k, : b * n] != 9).all() == stored
        attention.fill_(9.0)


@pytest.mark.parametrize(
    "case, form",
    [
        (Case(B=3, N=196, D=72), "dot"),
        (Case(B=3, N=144, D=40, K=70, mask="random"), "cosine"),
        (Case(B=2, N=387, D=33, layout="strided"), "cosine"),
        (Case(B=6, N=49, D=40, mask="random"), "dot"),
    ],
    ids=str,
)
def test_backend(library, monkeypatch, case, form):
    """The whole backend is accurate with W transposed, and launches no kernel that stores it otherwise."""
    library.configure()
    launched = []

    class Watched:
        def __getattr__(self, name):
            return getattr(library, name)

        @staticmethod
        def CudaLaunch(**fields):
            launched.append(fields["epilogue"].name)
            return library.CudaLaunch(**fields)

    monkeypatch.setattr(hopper, "native", Watched)
    monkeypatch.setattr(hopper, "why_not", lambda device=None, dtype=None: None)
    monkeypatch.setattr(hopper.settings, "transposed_weights", True)
    check(make(case, form, "compatibility" if case.K else "infonce", torch.bfloat16), "cuda")
    of_weights = {name for name in launched if "weights" in name}
    assert of_weights and all(name.endswith("_transposed") for name in of_weights)


@pytest.mark.parametrize("form", ["dot", "cosine"])
def test_the_experiments_launch(library, monkeypatch, form):
    """Every run of benchmarks/cuda_experiments.py launches on a small problem."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
    import cuda_experiments

    library.configure()
    monkeypatch.setattr(hopper, "native", lambda: library)
    patches, texts = problem(3, 100, 70, 40)
    p = order.prepare(patches, texts, None, 0.1, *torch.empty(2, 3, 70))
    names = set()
    for name, images, run_it in cuda_experiments.runs_of(p, form):
        assert images == 3
        run_it()
        names.add(name)
    assert names >= {run for pair in cuda_experiments.PARTS.values() for run in pair} | {"transposed, bulk stores"}
