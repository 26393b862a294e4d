"""The sigmoid loss in one pass on Triton: what the tests of all losses do not ask."""

import pytest
import torch
from accuracy import check
from problems import Case, make

from pacl_kernels import available_backends, fused_pacl_loss
from pacl_kernels.backends import computes_sigmoid_step
from pacl_kernels.backends.gpu import launch, order, tiles, triton, workspace

pytestmark = pytest.mark.skipif(available_backends()["triton"] is not None, reason=str(available_backends()["triton"]))

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """Return the names of the kernels that were launched, in order."""
    seen, run = [], launch.run

    def spy(kernel, *arguments, **options):
        seen.append(kernel.fn.__name__)
        run(kernel, *arguments, **options)

    monkeypatch.setattr(launch, "run", spy)
    return seen


@pytest.mark.parametrize(
    "case, dtype",
    [
        (Case(3, 5, 17, mask="random"), torch.float32),  # eight images in a tile
        (Case(5, 30, 40), torch.bfloat16),  # two in a tile
        (Case(3, 49, 24, tau=0.01, scale=100.0), torch.float32),
        (Case(2, 100, 40, mask="random", tau=0.01), torch.float32),  # two parts, one of them short
        (Case(3, 196, 64), torch.bfloat16),  # three parts, by descriptors
        (Case(2, 196, 20, mask="first"), torch.float32),
        (Case(2, 256, 16), torch.float32),
        (Case(4, 33, 33, data="zero_patches"), torch.float32),
        (Case(4, 33, 20, data="nan"), torch.float32),
        (Case(4, 40, 20, mask="none"), torch.float32),
        (Case(3, 70, 40, layout="permuted"), torch.bfloat16),
    ],
    ids=str,
)
def test_any_shape(case, dtype, launched):
    check(make(case, "dot", "sigmoid", dtype, DEVICE), "triton")
    assert "sigmoid_weights_kernel" in launched and "compatibility_forward_kernel" not in launched


def _inputs(b=5, n=40, d=20, k=5):
    generator = torch.Generator().manual_seed(0)
    patches, texts = (torch.randn(shape, generator=generator).to(DEVICE) for shape in ((b, n, d), (k, d)))
    return patches.requires_grad_(), texts.requires_grad_()


def _check_pairs(patches, texts, options, tolerance=2e-5):
    """Compare the loss and all gradients with the formula in float64."""
    leaves = {name: x for name, x in options.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    value = fused_pacl_loss(patches, texts, **options, loss="sigmoid", backend="triton")
    grads = torch.autograd.grad(value, (patches, texts, *leaves.values()))
    wide = {
        name: x.detach().double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in options.items()
    }
    for name in leaves:
        wide[name].requires_grad_()
    inputs = [x.detach().double().requires_grad_() for x in (patches, texts)]
    truth = fused_pacl_loss(*inputs, **wide, loss="sigmoid", backend="reference")
    expected = torch.autograd.grad(truth, (*inputs, *(wide[name] for name in leaves)))
    assert value.item() == pytest.approx(truth.item(), rel=3e-6)
    for grad, right in zip(grads, expected, strict=True):
        assert (grad - right).abs().max() <= tolerance * right.abs().max()


@pytest.mark.parametrize("words", ["ids", "targets"])
@pytest.mark.parametrize("n, k", [(20, 7), (40, 7)])
def test_ids_targets_and_bias(n, k, words, monkeypatch):
    """Every scalar is a learned tensor; a small workspace divides the images into blocks, and k the texts."""
    monkeypatch.setattr(workspace, "WORKSPACE", 2**12)
    patches, texts = _inputs(n=n, k=k)
    generator = torch.Generator().manual_seed(1)
    pair_bias = torch.randn(5, k, generator=generator)
    pair_bias[1, 2] = pair_bias[0, 0] = float("-inf")
    options = {
        name: torch.tensor(x, device=DEVICE, requires_grad=True)
        for name, x in (("logit_scale", 20.0), ("logit_bias", -2.0), ("attn_temperature", 0.3))
    }
    options["pair_bias"] = pair_bias.to(DEVICE).requires_grad_()
    if words == "ids":
        ids = torch.tensor([3, 0, -1, 3, 9], device=DEVICE)
        options |= {"image_ids": ids, "text_ids": torch.tensor([0, 3, 3, -1, 9, 7, 3], device=DEVICE)}
    else:
        options["targets"] = torch.rand(5, k, generator=generator).to(DEVICE)
    _check_pairs(patches, texts, options)


def test_blocks_of_texts_keep_their_numbers(monkeypatch):
    """The second block of texts finds its own positives: by default text i belongs to image i."""
    monkeypatch.setattr(workspace, "text_block", lambda n, k, itemsize: min(k, 16))
    _check_pairs(*_inputs(b=20, n=5, d=8, k=20), {"logit_scale": 20.0, "logit_bias": -2.0, "attn_temperature": 0.3})


@pytest.mark.parametrize("bias", [-30.0, 25.0])
def test_small_losses_keep_their_digits(bias):
    """A loss of e^-30 for each pair is as precise as one of 30."""
    patches, texts = _inputs()
    ids = torch.full((5,), -1, device=DEVICE)
    options = {"logit_scale": 5.0, "logit_bias": bias, "attn_temperature": 0.1}
    _check_pairs(patches, texts, options | {"image_ids": ids, "text_ids": ids})
    _check_pairs(patches, texts, options | {"logit_bias": -bias, "targets": torch.ones(5, 5, device=DEVICE)})


def test_leaving_out_a_gradient_changes_no_bits_of_the_rest():
    patches, texts = _inputs()
    options = {"loss": "sigmoid", "backend": "triton"}
    value = fused_pacl_loss(patches, texts, 10.0, **options)
    both = torch.autograd.grad(value, (patches, texts))
    (first,) = torch.autograd.grad(fused_pacl_loss(patches, texts.detach(), 10.0, **options), patches)
    (second,) = torch.autograd.grad(fused_pacl_loss(patches.detach(), texts, 10.0, **options), texts)
    assert torch.equal(first, both[0]) and torch.equal(second, both[1])
    with torch.no_grad():
        assert torch.equal(value, fused_pacl_loss(patches, texts, 10.0, **options))


def test_the_incoming_gradient_comes_later():
    patches, texts = _inputs()
    value = fused_pacl_loss(patches, texts, 10.0, loss="sigmoid", backend="triton")
    one = torch.autograd.grad(value, (patches, texts), retain_graph=True)
    for _ in range(2):
        two = torch.autograd.grad(2 * value, (patches, texts), retain_graph=True)
        assert all(torch.equal(2 * a, b) for a, b in zip(one, two, strict=True))


def test_an_array_of_all_pairs_is_never_made(monkeypatch):
    """On tensors without data, no buffer has as many elements as there are pairs; W is cut to the workspace."""
    monkeypatch.setattr(launch, "run", lambda *_, **__: None)
    monkeypatch.setattr(launch, "processors", lambda device: 132)
    # Only on a GPU does the library's product give float32 without a copy of its operands.
    monkeypatch.setattr(order, "_product", lambda a, b: a.new_empty(len(a), b.shape[1], dtype=torch.float32))
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                sizes.append(result.untyped_storage().nbytes())
            return result

    b = 20_000
    patches = torch.empty(b, 196, 64, dtype=torch.bfloat16, device="meta")
    texts, value = torch.empty(b, 64, dtype=torch.bfloat16, device="meta"), torch.empty((), device="meta")
    buffers = torch.empty_like(patches), torch.empty_like(texts), None, value, value, None
    with Sizes():
        triton.sigmoid_step(patches, texts, None, 0.07, "dot", 10.0, -10.0, None, value, *buffers)
    assert sizes and max(sizes) <= max(patches.nbytes, 1.01 * workspace.WORKSPACE) < 4 * b * b


def test_the_parts_of_an_image_waste_little():
    assert tiles.sigmoid_parts(196, 3) == (128, 64, 16) and tiles.sigmoid_parts(196, 2) == (128, 128)
    for n in range(1, 257):
        for most in (2, 3):
            parts = tiles.sigmoid_parts(n, most)
            assert n <= sum(parts) and len(parts) <= most and list(parts) == sorted(parts, reverse=True)
            assert n <= 32 or sum(parts) < 1.5 * n


def test_what_does_not_fit_takes_two_passes():
    assert computes_sigmoid_step("triton", "dot", torch.bfloat16, 256)
    assert not computes_sigmoid_step("triton", "dot", torch.bfloat16, 257)
    assert not computes_sigmoid_step("triton", "dot", torch.float16, 196)
    assert not computes_sigmoid_step("triton", "cosine", torch.bfloat16, 196)
