"""Packed patches `[ΣN, D]` in the Triton kernels, on a GPU if there is one, otherwise in Triton's interpreter."""

import pytest
import torch
from problems import FORMS
from test_packed_patches import Case, Inputs, assert_equal, uniform
from torch.utils._python_dispatch import TorchDispatchMode

from pacl_kernels import available_backends, scoring
from pacl_kernels.backends import takes_packed_patches
from pacl_kernels.backends.gpu import hopper, launch, order, tiles, triton, workspace
from pacl_kernels.backends.gpu.packed import Packed

pytestmark = pytest.mark.skipif(available_backends()["triton"] is not None, reason=str(available_backends()["triton"]))

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    (Case((0, 70, 1, 2, 131, 0, 0), D=24, K=5, tau=0.03), torch.float32),
    (Case((33, 1, 0, 90), D=20, K=5, mask=True, spacing=2), torch.bfloat16),
    (Case((0, 3, 1, 0, 9, 0), D=12, K=3), torch.float16),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case, dtype", CASES, ids=str)
def test_the_formula_for_each_image(case, dtype, form):
    Inputs(case, form, dtype, DEVICE).check(triton)


def test_a_long_image_among_short_ones():
    long = 4100 if DEVICE == "cuda" else 300  # for which the interpreter would take many seconds
    Inputs(Case((1, 257, long, 0, 1), D=8, K=3), "dot", torch.bfloat16, DEVICE).check(triton)


@pytest.mark.parametrize("form", FORMS)
def test_blocks_of_images_and_of_texts(form, monkeypatch):
    """A small workspace divides images into blocks, some without a patch, and for large K also texts."""
    monkeypatch.setattr(workspace, "WORKSPACE", 2**12)
    case = Case((40, 0, 0, 3, 1, 20, 0), D=16, K=150 if form == "cosine" else 7)
    Inputs(case, form, torch.bfloat16, DEVICE).check(triton)


@pytest.mark.parametrize("form", ["dot", "max"])
def test_the_bits_of_masked_padding(form):
    """The padded kernel sums in the same order if images begin with a tile; a maximum has no order."""
    lengths = (256, 0, 128, 5) if form == "dot" else (70, 0, 1, 131)
    inputs = Inputs(Case(lengths, D=16, K=5), form, torch.bfloat16, DEVICE)
    packed, padded = (inputs.compatibility(packed, triton) for packed in (True, False))
    assert_equal(*({name: x[name] for name in ("phi", "state")} for x in (packed, padded)))


@pytest.mark.parametrize("form", FORMS)
def test_same_bits_on_every_run(form):
    inputs = Inputs(Case((33, 0, 5), D=16, K=5, mask=True), form, torch.bfloat16, DEVICE)
    assert_equal(inputs.compatibility(True, triton), inputs.compatibility(True, triton))


def test_no_patch_at_all():
    for form in FORMS:
        answer = Inputs(Case((0, 0), K=3), form, torch.float32, DEVICE).compatibility(True, triton)
        assert not any(x.any() for name, x in answer.items() if name != "state")
        assert (answer["state"] == (-1.0 if form == "max" else 0.0)).all()


@pytest.mark.parametrize("form", FORMS)
def test_padded_groups_are_never_made(form, monkeypatch):
    monkeypatch.setattr(scoring, "groups", None)
    call = scoring.Call("triton", torch.randn(9, 8, device=DEVICE), torch.randn(3, 8, device=DEVICE), None, 0.1, form)
    phi, state = torch.empty(2, 3, 3, device=DEVICE)
    call._replace(patch_lengths=torch.tensor([7, 0, 2])).forward(phi, state)
    assert phi[0].all() and not phi[1].any()


def test_the_hopper_backend_hands_them_to_triton(monkeypatch):
    """Except for `cosine`, which comes in padded groups, see docs/cuda.md."""
    monkeypatch.setattr(launch, "run", lambda *_, **__: None)
    patches, texts, pairs = torch.empty(9, 8), torch.empty(3, 8), torch.empty(2, 2, 3)
    packed = order.prepare(patches, texts, None, 0.1, *pairs, torch.tensor([7, 2]))
    assert isinstance(hopper._launches(packed), triton.TritonLaunches)
    assert [takes_packed_patches("cuda", form) for form in ("dot", "cosine", "max")] == [True, False, True]


@pytest.mark.parametrize("form", FORMS)
def test_memory_follows_the_patches_that_are_there(form, monkeypatch):
    """On tensors without data: a long image among short ones allocates nothing of its size for each of them."""
    monkeypatch.setattr(launch, "run", lambda *_, **__: None)
    monkeypatch.setattr(launch, "processors", lambda device: 132)
    allocated = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function in (torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default):
                allocated.append(result.nbytes)
            return result

    def of(lengths):
        allocated.clear()
        b, k, d = len(lengths), 512, 64
        patches = torch.empty(int(lengths.sum()), d, dtype=torch.bfloat16, device="meta")
        texts = torch.empty(k, d, dtype=torch.bfloat16, device="meta")
        phi, state, grad = torch.empty(3, b, k, device="meta")
        grads = torch.empty_like(patches), torch.empty_like(texts), phi.new_empty(())
        with Sizes():
            triton.compatibility_forward(patches, texts, None, 0.1, form, phi, state, patch_lengths=lengths)
            triton.compatibility_backward(
                *(patches, texts, None, 0.1, form, phi, state, grad, *grads), patch_lengths=lengths
            )
        return sum(allocated), max(allocated)

    long, short = torch.tensor([4096]), torch.ones(512, dtype=torch.int64)
    total, largest = of(torch.cat((long, short)))
    alone, of_short = of(long)[0], of(short)[0]
    assert 0 < total <= 1.1 * (alone + of_short) and largest <= workspace.WORKSPACE


def test_runs_have_all_images_and_share_the_tiles():
    for lengths in (uniform(4096, 256), (4096,) + 511 * (1,), (0,) * 9 + (3,) + (0,) * 9, (1,) * 1000):
        packed = Packed(torch.tensor(lengths), torch.device("cpu"))
        runs = packed.runs(128, text_tiles := 8, programs := 132)
        rows = packed.starts[runs[:, 1].long()] - packed.starts[runs[:, 0].long()]
        assert sorted(i for first, end in runs.tolist() for i in range(first, end)) == list(range(len(lengths)))
        assert rows.tolist() == sorted(rows.tolist(), reverse=True) or len(runs) < 2 or rows[0] >= rows[-1]
        tiles_of = (rows + 127) // 128
        ideal = max(sum(lengths) / 128 * text_tiles / programs, -(-max(lengths) // 128))
        assert int(tiles_of.clamp_min(1).sum()) * text_tiles / programs + int(tiles_of.max()) <= 2.2 * ideal + 2


def test_every_image_of_a_block_has_its_tiles():
    packed = Packed(torch.tensor([7, 300, 0, 64, 65, 1]), torch.device("cpu"))
    block = triton.Block(1, 6, 0, 1)
    found = {}
    for config, programs, tables in packed.launches(block, lambda n: n > 64, lambda n, _: tiles.ceil_div(n, 32)):
        assert len(tables["ITEMS"]) == programs
        for image, tile in tables["ITEMS"].tolist():
            found.setdefault((image, config), []).append(tile)
    assert found == {(0, True): [*range(10)], (3, True): [0, 1, 2], (2, False): [0, 1], (4, False): [0]}
