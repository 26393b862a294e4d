"""Tests of the Triton kernels, on a GPU if there is one, otherwise in Triton's interpreter on CPU tensors."""

import inspect
import random
from dataclasses import replace

import pytest
import torch
from accuracy import check, evaluate, winners
from layouts import MANY, SINGLE, Layout
from problems import CONTENTS, FORMS, LAYOUTS, SHAPES, Case, make

from pacl_kernels import available_backends, backends, fused_pacl_loss
from pacl_kernels.backends.gpu import launch, order, tiles, workspace
from pacl_kernels.backends.gpu.hopper import HopperLaunches
from pacl_kernels.backends.gpu.problem import Block
from pacl_kernels.backends.gpu.triton import TritonLaunches

pytestmark = pytest.mark.skipif(available_backends()["triton"] is not None, reason=str(available_backends()["triton"]))

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    Case(1, 1, 1),
    Case(3, 5, 2),
    Case(5, 49, 67),  # padded images, two in a tile
    Case(3, 64, 17, mask="random"),
    Case(2, 196, 64),  # a tile ends in the middle of an image; descriptors
    Case(3, 65, 40, K=7, mask="first"),  # three images in a tile
    Case(1, 257, 9, K=131),
    Case(1, 300, 16, K=3, tau=0.01),
    Case(9, 15, 64, tau=0.01, scale=100.0),
    Case(5, 70, 20, tau=10.0, scale=100.0),
    Case(6, 30, 70, data="norms"),
    Case(4, 9, 33, data="zero_patches"),
    Case(4, 9, 33, data="zero_texts"),
    Case(4, 72, 33, data="nan"),
    Case(4, 80, 48, mask="random"),
    Case(4, 80, 48, mask="none"),
    Case(3, 70, 40, layout="permuted"),
    Case(3, 70, 48, layout="strided", mask="one"),
    Case(3, 66, 40, layout="offset"),
    Case(4, 9, 33, data="duplicated"),
    Case(0, 3, 4, K=5),
    Case(5, 3, 4, K=0),
]


SMALL = [  # small enough for the interpreter, also with a Gram matrix of each image
    case
    for case in (*SHAPES, *CONTENTS, *LAYOUTS)
    if case.B * case.N * case.D * (case.B if case.K is None else case.K) < 100_000
    if max(case.B, case.N) < 100 and case not in CASES
]
# The 16-bit dtypes and the forms take turns; on a GPU test_accuracy.py tests all combinations.
CANCELLING = (Case(layout="expanded_last"), "cosine")
SMALL_FORMS = [(case, FORMS[i % 3]) for i, case in enumerate(SMALL)]
SMALL_FORMS += [CANCELLING] * (CANCELLING not in SMALL_FORMS)
COMPATIBILITIES = [
    *((case, torch.float32, form) for form in FORMS for case in CASES),
    *((case, (torch.bfloat16, torch.float16)[i % 2], FORMS[i % 3]) for i, case in enumerate(CASES)),
]


@pytest.fixture
def launches(monkeypatch) -> list[tuple[str, dict]]:
    """Return the list of (name, constants) of the launched kernels, in order."""
    seen, run = [], launch.run

    def spy(kernel, programs, arguments, constants, *config, **options):
        assert programs > 0
        seen.append((kernel.fn.__name__, constants))
        run(kernel, programs, arguments, constants, *config, **options)

    monkeypatch.setattr(launch, "run", spy)
    return seen


@pytest.mark.sampled(3)
@pytest.mark.parametrize("case, dtype, form", COMPATIBILITIES, ids=str)
def test_compatibility(case, dtype, form):
    check(make(case, form, "compatibility", dtype, DEVICE), "triton")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case, form", SMALL_FORMS, ids=str)
def test_the_small_ones_of_every_backend(case, form, request):
    if (case, form) == CANCELLING:
        # All patches are p or -p: r² = aᵀ G a keeps the float32 rounding of G, 1.4 times the tolerance.
        # Not strict, because the interpreter's products come from the CPU's own library.
        request.applymarker(pytest.mark.xfail(strict=False, reason="float32 Gram matrix of patches that cancel"))
    check(make(case, form, "compatibility", device=DEVICE), "triton")


@pytest.mark.parametrize("options", random.Random(31).sample(SINGLE, 8) + random.Random(32).sample(MANY, 8), ids=str)
def test_layouts(options):
    layout = Layout(*options)
    layout.check("triton", torch.float32, DEVICE)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("form", FORMS)
def test_torch_compile_takes_it_whole(form):
    problem = make(Case(3, 70, 20, mask="random"), form, "infonce", device=DEVICE)
    inputs = [x.detach().requires_grad_() for x in (problem.patches, problem.texts, problem.logit_scale)]

    def loss(patches, texts, scale):
        return fused_pacl_loss(
            patches, texts, scale, patch_mask=problem.patch_mask, attn_temperature=0.1, form=form, backend="triton"
        )

    eager, compiled = loss(*inputs), torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs)
    assert torch.equal(eager, compiled)
    for one, other in zip(torch.autograd.grad(eager, inputs), torch.autograd.grad(compiled, inputs), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("objective", ["infonce", "sigmoid"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 2, 3),
        Case(4, 70, 40),
        Case(4, 9, 33, scale=100.0, data="aligned", mask="random"),
    ],
    ids=str,
)
def test_losses(case, form, objective):
    check(make(case, form, objective, device=DEVICE), "triton")


@pytest.mark.parametrize("objective", ["infonce", "sigmoid"])
def test_a_loss_of_more_than_a_block_of_columns(objective):
    check(make(Case(520, 1, 2), "dot", objective, device=DEVICE), "triton", ("logit_scale", "logit_bias"))


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
@pytest.mark.parametrize("bias", [None, -3.0, torch.tensor(-3.0, device=DEVICE)])
@pytest.mark.parametrize("scale", [20.0, torch.tensor([100.0], device=DEVICE)])
def test_scalars_as_numbers_and_as_tensors(loss, bias, scale):
    problem = make(Case(33, 3, 8), "dot", loss, device=DEVICE)
    check(replace(problem, logit_scale=scale, logit_bias=bias, attn_temperature=0.2), "triton")


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_scalars_without_a_gradient(loss):
    """The gradient of φ has the same bits with and without the gradients of scale and bias."""
    phi = torch.tensor([[0.3, -0.2], [0.1, 0.4]], device=DEVICE)
    scale, bias = torch.tensor([7.0, -1.0], device=DEVICE)
    statistics = phi.new_empty(4, 2) if loss == "infonce" else None
    backend = backends.get("triton")
    backend.loss_forward(phi, scale, bias, loss, phi.new_empty(()), statistics)
    results = []
    for needs_scale, needs_bias in ((True, True), (True, False), (False, True), (False, False)):
        grads = torch.empty_like(phi), phi.new_zeros(()), phi.new_zeros(())
        asked = grads[0], grads[1] if needs_scale else None, grads[2] if needs_bias else None
        backend.loss_backward(phi, scale, bias, loss, statistics, phi.new_tensor(1.0), *asked)
        results.append(grads)
    (every, scale_grad, bias_grad), *others = results
    assert scale_grad != 0 and bias_grad != 0
    assert all(torch.equal(every, grads[0]) for grads in others)
    assert [grads[1] for grads in others] == [scale_grad, 0, 0]
    assert [grads[2] for grads in others] == [0, bias_grad, 0]


@pytest.mark.parametrize("needs", [("patches",), ("texts",), ("attn_temperature",), ("patches", "texts")], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_only_what_is_needed(form, needs):
    check(make(Case(3, 70, 20), form, "infonce", device=DEVICE), "triton", needs)


def _launched(launches, name):
    return [constants for kernel, constants in launches if kernel == name]


@pytest.mark.parametrize("tau, running_max", [(0.07, [False]), (0.05, [False]), (0.049, [True])])
def test_a_number_chooses_the_kernel(tau, running_max, launches):
    problem = make(Case(2, 70, 20), "dot", "compatibility", device=DEVICE)
    call = backends.get("triton").compatibility_forward
    phi, state = problem.patches.new_empty(2, 2), problem.patches.new_empty(2, 2)
    call(problem.patches, problem.texts, None, tau, "dot", phi, state)
    launched = _launched(launches, "compatibility_forward_kernel")
    assert [constants["RUNNING_MAX"] for constants in launched] == running_max


@pytest.mark.parametrize("tau", [0.02, 0.5])
def test_a_tensor_launches_both_and_one_works(tau, launches):
    problem = make(Case(2, 70, 20, tau=tau), "dot", "compatibility", device=DEVICE)
    check(problem, "triton", ())
    launched = _launched(launches, "compatibility_forward_kernel")
    assert {constants["RUNNING_MAX"] for constants in launched} == {False, True}


@pytest.mark.parametrize(
    "case, expected",
    [
        (Case(3, 64, 16), dict(PAD=64, IMAGES=2, HAS_MASK=False, DESCRIPTORS=False)),
        (Case(3, 10, 24, mask="one"), dict(PAD=16, IMAGES=4, HAS_MASK=True, EVEN_D=False)),
        (Case(3, 65, 64), dict(PAD=0, IMAGES=3, EVEN_D=True)),
        (Case(2, 128, 64), dict(PAD=0, IMAGES=1)),
        (Case(2, 196, 64), dict(PAD=0, IMAGES=2)),
        (Case(2, 196, 60), dict(EVEN_D=False)),
    ],
    ids=str,
)
def test_the_shape_chooses_the_tile(case, expected, launches):
    check(make(case, "dot", "compatibility", torch.bfloat16, DEVICE), "triton")
    for constants in _launched(launches, "compatibility_forward_kernel"):
        assert expected.items() <= constants.items()


@pytest.mark.parametrize(
    "case, dtype, expected",
    [
        (Case(2, 70, 8), torch.bfloat16, True),
        (Case(2, 70, 12), torch.bfloat16, False),  # rows have 24 bytes
        (Case(2, 70, 12), torch.float32, True),
        (Case(2, 70, 16, layout="offset"), torch.float32, False),
        (Case(2, 70, 16, layout="permuted"), torch.float32, False),
        (Case(2, 70, 16, layout="expanded"), torch.float32, False),
    ],
    ids=str,
)
def test_descriptors_where_alignment_allows(case, dtype, expected, launches):
    if not tiles.has_bulk_copies(torch.device(DEVICE)):
        pytest.skip("no bulk copies here")
    check(make(case, "dot", "compatibility", dtype, DEVICE), "triton")
    for name in ("compatibility_forward_kernel", "dot_weights_kernel"):
        assert _launched(launches, name) and all(x["DESCRIPTORS"] == expected for x in _launched(launches, name))


@pytest.mark.long
def test_strides_whose_multiples_need_64_bits():
    """Offsets need 64 bits if dimensions lie 2³⁰ elements apart; only the ends of that memory are touched."""
    problem = make(Case(2, 70, 3), "dot", "compatibility", torch.float16, DEVICE)
    room = torch.empty(2**31 + 142, dtype=torch.float16, device=DEVICE)
    patches, texts = room.as_strided((2, 70, 3), (70, 1, 2**30)), room.as_strided((2, 3), (1, 2**30), 140)
    patches.copy_(problem.patches), texts.copy_(problem.texts)
    check(replace(problem, patches=patches, texts=texts), "triton", ())


@pytest.mark.sampled(3)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k, dtype", [(7, torch.float32), (7, torch.float16), (150, torch.bfloat16)], ids=str)
def test_blocks_of_images_and_of_texts(k, dtype, form, launches, monkeypatch):
    """A small workspace divides images into blocks, and for large K also texts, whose blocks are summed in float32."""
    monkeypatch.setattr(workspace, "WORKSPACE", 2**12)
    check(make(Case(3, 70, 20, K=k, mask="random"), form, "compatibility", dtype, DEVICE), "triton")
    assert workspace.text_block(70, k, 4) == (7 if k == 7 else 128)
    kernel = {"dot": "dot_weights_kernel", "cosine": "attention_kernel", "max": "max_patches_kernel"}[form]
    assert len(_launched(launches, kernel)) >= 2


@pytest.mark.parametrize("n", [7, 131])
@pytest.mark.parametrize(
    "dtype, attention, tolerance",
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float16, 2**-7),
        (torch.bfloat16, torch.bfloat16, 2**-7),
    ],
    ids=str,
)
def test_norm_term(dtype, attention, tolerance, n):
    """-Σ_k c a aᵀ / ‖p‖ over two blocks of texts agrees with float64, whatever pads the rows of the attention."""
    torch.manual_seed(0)
    images, k = 2, 75
    patches, texts = torch.randn(1 + images, n, 8, device=DEVICE).to(dtype), torch.randn(k, 8, device=DEVICE).to(dtype)
    problem = order.prepare(patches, texts, None, 0.1, *torch.empty(2, 1 + images, k, device=DEVICE))
    launches, size = TritonLaunches(problem), workspace.BlockSize(images, k)
    a = torch.rand(images, k, n, device=DEVICE).to(attention)
    factors = torch.randn(images, k, device=DEVICE)
    room = workspace.attention(problem, size, attention).fill_(9.0)
    room[:, :, :n] = a
    c = workspace.norm_term(problem, size, torch.float32)
    for k0, k1 in ((0, 70), (70, k)):
        launches.norm_term(Block(1, 1 + images, k0, k1), room[:, k0:k1], factors[:, k0:k1].contiguous(), c)
    inverse = 1 / patches[1:].double().norm(dim=2)
    weighted = torch.einsum("bk,bkn->bkn", factors.double(), a.double())
    others = torch.einsum("bkm,bm->bkm", a.double(), inverse)
    size = torch.einsum("bkn,bkm->bnm", weighted.abs(), others)
    assert ((c + torch.einsum("bkn,bkm->bnm", weighted, others)).abs() <= tolerance * size).all()
    assert not c.as_strided((images, n, c.stride(1)), c.stride())[:, :, n:].any()


@pytest.mark.parametrize("form", FORMS)
def test_same_bits_on_every_run(form):
    problem = make(Case(3, 70, 20, mask="random"), form, "infonce", torch.bfloat16, DEVICE)
    first, second = (evaluate(problem, "triton") for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("form", FORMS)
def test_permuting_the_batch_permutes_the_answer(form):
    """An image's place in a tile changes its results only by rounding."""
    problem = make(Case(5, 70, 20, K=5), form, "compatibility", device=DEVICE)
    order = torch.tensor([3, 0, 1, 4, 2], device=DEVICE)
    moved = replace(problem, patches=problem.patches[order], upstream=problem.upstream[order])
    here, there = evaluate(problem, "triton"), evaluate(moved, "triton")
    torch.testing.assert_close(here["value"][order], there["value"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(here["patches"][order], there["patches"], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(torch.version.hip is not None, reason="NVIDIA's setting")
def test_float32_follows_torchs_setting():
    """Both interfaces of torch are obeyed, although the older one cannot be read after the newer one was used."""
    before = torch.get_float32_matmul_precision()
    try:
        for setting, expected in (("highest", "tf32x3"), ("high", "tf32"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert launch.float32_precision() == expected
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
            for setting, expected in (("ieee", "tf32x3"), ("tf32", "tf32")):
                torch.backends.cuda.matmul.fp32_precision = setting
                assert launch.float32_precision() == expected
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", [Case(5, 70, 20, tau=0.01), Case(5, 70, 20, mask="random"), Case(3, 196, 16)], ids=str)
@pytest.mark.parametrize("run", [1, 2, 64])
def test_any_run_of_images(run, case, form, monkeypatch):
    """The answer is right for any number of images per program, which decides where in a tile an image begins."""
    monkeypatch.setattr(tiles, "images_per_run", lambda *_: run)
    check(make(case, form, "compatibility", device=DEVICE), "triton", ())


@pytest.mark.parametrize("n", [5, 64, 150, 300])
def test_the_first_of_equals_wins(n):
    """The first of equal patches wins, within one tile and over several."""
    problem = make(Case(3, n, 20, data="duplicated"), "max", "compatibility", device=DEVICE)
    # Whole numbers give equal patches equal scores, in whatever order the interpreter's library sums.
    problem = replace(problem, patches=(4 * problem.patches).round(), texts=(4 * problem.texts).round())
    assert (winners(problem, "triton") == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_winners_of_one_direction(dtype):
    """Gradients are accurate near a common direction, as with CLIP, where they are small differences of large sums."""
    problem = make(Case(5, 70, 24, scale=5.0), "max", "infonce", dtype, DEVICE)
    direction = torch.linspace(-1, 1, 24, device=DEVICE)
    patches, texts = direction + 0.01 * problem.patches, direction + 0.1 * problem.texts
    check(replace(problem, patches=patches.to(dtype), texts=texts.to(dtype)), "triton")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("form, dtype", [("dot", torch.float32), ("cosine", torch.float32), ("cosine", torch.bfloat16)])
@pytest.mark.parametrize("n, tau", [(1, 1e-6), (66, 1e-6), (5, 1e-10)])
def test_a_temperature_near_zero(n, tau, form, dtype):
    """When one patch has all the attention, s - φ is exactly 0; the temperature would magnify any other value."""
    check(make(Case(3, n, 7, tau=tau), form, "infonce", dtype, DEVICE), "triton")


@pytest.mark.sampled(6)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_powers_of_two_are_exact(dtype, form):
    """Rows times 2ⁿ have gradients times 2⁻ⁿ, to the bit, although float32 may not hold their squared norms."""
    problem = make(Case(3, 66, 20, mask="first"), form, "compatibility", dtype, DEVICE)
    plain = evaluate(problem, "triton")
    for of_patches, of_texts in ((60, 110), (60, -30), (-30, 60)):
        large = replace(problem, patches=problem.patches * 2.0**of_patches, texts=problem.texts * 2.0**of_texts)
        scaled = evaluate(large, "triton")
        assert torch.equal(plain["value"], scaled["value"])
        assert torch.equal(plain["texts"], scaled["texts"] * 2.0**of_texts)
        assert torch.equal(plain["patches"], scaled["patches"] * 2.0**of_patches)


def test_runs_of_images_waste_nothing():
    """At the benchmark's shape the tiles of a run are full, and small batches use all programs."""
    run = tiles.images_per_run(4096, 196, 32, 128, 264)
    assert run * 196 / (tiles.ceil_div(run * 196, 128) * 128) > 0.97
    assert tiles.images_per_run(256, 196, 2, 128, 264) < 4


@pytest.mark.parametrize("image_bytes", [0, 200_000])
@pytest.mark.parametrize(
    "b, n, k, itemsize",
    [(4096, 196, 4096, 2), (32768, 196, 32768, 2), (3, 1369, 2**20, 4), (9999, 196, 3, 6), (1, 1, 1, 2)],
)
def test_workspace_is_bounded(b, n, k, itemsize, image_bytes):
    blocks = workspace.plan_blocks(b, n, k, itemsize, image_bytes)
    assert 1 <= blocks.images <= b and 1 <= blocks.texts <= k
    taken = blocks.images * (n * blocks.texts * itemsize + image_bytes)
    assert taken <= workspace.WORKSPACE + (image_bytes if blocks.images == 1 else 0)


@pytest.mark.parametrize("k", [1, 17, 129, 4096])
def test_whole_tiles_fit_into_the_workspace(k, monkeypatch):
    """The workspace holds whole tiles of texts, however few texts the last tile has."""
    monkeypatch.setattr(launch, "run", lambda *_, **__: None)
    patches, texts = (torch.empty(*shape, 64, dtype=torch.bfloat16, device="meta") for shape in ((800_000, 196), (k,)))
    problem = order.prepare(patches, texts, None, 0.1, *torch.empty(2, len(patches), k, device="meta"))
    size = workspace.plan_blocks(len(patches), 196, k, 2)
    w = workspace.weights(problem, size, TritonLaunches(problem).weights_tile("dot", needs_temperature=False))
    assert 0.95 * workspace.WORKSPACE <= w.nbytes <= 1.01 * workspace.WORKSPACE


@pytest.mark.parametrize("kind", [TritonLaunches, HopperLaunches])
def test_a_set_of_launches_has_what_the_order_asks_for(kind):
    asked = {name: x for name, x in vars(order.Launches).items() if inspect.isfunction(x) and name[0] != "_"}
    absent = {"sigmoid_cosine_weights"} | ({"cosine_forward", "cosine_weights"} if kind is TritonLaunches else set())
    for name in asked.keys() - absent:
        assert inspect.signature(getattr(kind, name)) == inspect.signature(asked[name]), name


def test_a_tensor_on_the_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(tiles, "interpreted", lambda: False)
    with pytest.raises(ValueError, match="'triton' cannot run here: .*on a GPU, not on cpu"):
        backends.resolve("triton", torch.device("cpu"), torch.float32)


def test_float64_is_refused():
    with pytest.raises(ValueError, match="'triton' cannot run here: .*float64"):
        backends.resolve("triton", torch.device(DEVICE), torch.float64)
