"""`upsample_argmax` agrees with `F.interpolate` and `argmax` in float64, in every backend and instruction set."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import pacl_kernels
from pacl_kernels import available_backends, upsample_argmax

ISAS = ("baseline", "avx2", "avx512", "avx512bf16")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [  # B, C, h, w, H, W
    (2, 5, 7, 9, 33, 50),
    (1, 21, 6, 6, 96, 95),
    (1, 150, 4, 5, 40, 37),
    (1, 847, 3, 9, 20, 150),  # several tiles of columns
    (1, 3, 40, 50, 13, 17),  # reduced
    (1, 6, 9, 11, 9, 11),
    (2, 4, 1, 30, 16, 7),  # enlarged one way, reduced the other
    (1, 4, 5, 90, 40, 91),
    (1, 3, 2, 2, 70, 200),  # several bands of rows
    (1, 3, 9, 8, 1, 1),
    (1, 1, 1, 1, 5, 6),
]


def noise(b, c, h, w, dtype=torch.float32):
    generator = torch.Generator().manual_seed(c)
    return torch.randn(b, c, h, w, generator=generator).to(dtype)


def truth(scores, size, align_corners=False, logit_scale=3.0):
    """Return the interpolated scores, and the entropy of their softmax, in float64."""
    x = F.interpolate(scores.cpu().double(), size, mode="bilinear", align_corners=align_corners)
    return x, torch.special.entr((logit_scale * x).softmax(1)).sum(1)


def check(scores, size, backend, align_corners=False, logit_scale=3.0):
    """Check labels, best scores and entropy against float64, and return the labels.

    The tolerance of scores is 1e-6 of the largest score (at least 1e-6). Labels are compared where the two best scores
    differ by more, best scores to this tolerance, the entropy to 1e-5, or to `logit_scale` times it if that is larger.
    """
    x, entropy = truth(scores, size, align_corners, logit_scale)
    options = dict(align_corners=align_corners, return_best=True, return_entropy=True, logit_scale=logit_scale)
    labels, best, found = (y.cpu() for y in upsample_argmax(scores, size, backend=backend, **options))
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    assert labels.dtype == torch.int16 and best.dtype == found.dtype == wide
    assert labels.shape == best.shape == found.shape == (len(x), *size)
    tolerance = 1e-6 * max(1.0, x.abs().max().item())
    two = x.topk(min(2, x.shape[1]), 1).values
    sure = two[:, 0] - two[:, -1] > tolerance if x.shape[1] > 1 else torch.ones_like(labels, dtype=torch.bool)
    assert torch.equal(labels[sure].long(), x.argmax(1)[sure])
    assert (best - two[:, 0]).abs().max() <= tolerance
    # Where the label is uncertain, the score of the winner must still be the maximum.
    assert (x.gather(1, labels[:, None].long())[:, 0] - two[:, 0]).abs().max() <= tolerance
    assert (found - entropy).abs().max() <= max(1e-5, logit_scale * tolerance)
    alone = upsample_argmax(scores, size, align_corners=align_corners, backend=backend)
    assert torch.equal(alone.cpu(), labels)
    return labels


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(shape, align_corners, target):
    *sizes, height, width = shape
    check(noise(*sizes, target.dtype).to(target.device), (height, width), target.backend, align_corners)


@pytest.fixture(params=("cpu", "torch", "triton"))
def backend(request) -> str:
    """Return each backend; Triton runs in its interpreter where there is no GPU."""
    reason = available_backends()[request.param]
    if reason is not None:
        pytest.skip(f"backend {request.param!r}: {reason}")
    return request.param


def place(scores, backend):
    return scores.cuda() if backend == "triton" and torch.cuda.is_available() else scores


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] * s[1] * s[4] * s[5] < 20_000], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton(dtype, shape, align_corners):
    if dtype != torch.float32 and (align_corners or shape != SHAPES[0]):
        pytest.skip("one shape for each of the other dtypes")
    if available_backends()["triton"] is not None:
        pytest.skip(f"backend 'triton': {available_backends()['triton']}")
    *sizes, height, width = shape
    check(place(noise(*sizes, dtype), "triton"), (height, width), "triton", align_corners)


def smooth(c, h, w):
    rows, columns = torch.meshgrid(torch.linspace(0, 6, h), torch.linspace(0, 6, w), indexing="ij")
    phase = torch.arange(c)[:, None, None]
    return torch.sin(rows * (1 + phase % 3) + columns + phase)[None]


CONTENTS = {
    "smooth": lambda: smooth(30, 5, 6),
    "offset": lambda: noise(1, 9, 5, 6) + 1000,
    "spikes": lambda: noise(1, 9, 5, 6) * 10 ** noise(1, 9, 5, 6).clamp(-3, 3),
    "below zero": lambda: -noise(1, 9, 5, 6).abs() - 5,
    "near": lambda: 1e-3 * noise(1, 9, 5, 6) + noise(1, 1, 5, 6),
    "tiny": lambda: 1e-30 * noise(1, 9, 5, 6),
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("size", [(40, 48), (11, 13), (3, 4)], ids=str)
def test_contents(content, size, backend):
    check(place(CONTENTS[content](), backend), size, backend, logit_scale=1.0)


@pytest.mark.parametrize("size", [(32, 48), (8, 12), (4, 6), (2, 3)], ids=str)
def test_the_first_of_equal_classes(size, backend):
    """The first of equal classes wins; small integers at power-of-two scales give many ties without rounding."""
    generator = torch.Generator().manual_seed(0)
    for copies in (1, 2):
        scores = torch.randint(0, 4, (2, 6, 4, 6), generator=generator).float().repeat(1, copies, 1, 1)
        labels = upsample_argmax(place(scores, backend), size, backend=backend)
        assert torch.equal(labels.cpu().long(), truth(scores, size)[0].argmax(1))
    assert not upsample_argmax(place(torch.ones(1, 50, 3, 3), backend), (21, 20), backend=backend).any()


@pytest.mark.parametrize("size", [(32, 48), (12, 18), (4, 6), (7, 9), (3, 4)], ids=str)
@pytest.mark.parametrize("align_corners", [False, True])
def test_nan_wins(align_corners, size, backend):
    """The first class with a NaN wins wherever the NaN has a weight, so not where a pixel lies on a neighbour."""
    scores = noise(2, 7, 4, 6)
    scores[0, 3, 1, 2] = scores[0, 5, 1, 3] = scores[0, 0, 3, 5] = scores[0, 1, 2, 2:4] = float("nan")
    share = truth(scores.isnan(), size, align_corners)[0]
    x = truth(scores.nan_to_num(0.0), size, align_corners)[0].masked_fill(share > 1e-9, float("nan"))
    options = dict(return_best=True, return_entropy=True, align_corners=align_corners, backend=backend)
    labels, best, entropy = (y.cpu() for y in upsample_argmax(place(scores, backend), size, **options))
    assert torch.equal(labels.long(), x.argmax(1))
    nan = x.isnan().any(1)
    assert nan.any() and not nan.all()
    assert torch.equal(best.isnan(), nan) and torch.equal(entropy.isnan(), nan)


@pytest.mark.parametrize("logit_scale", [1.0, 100.0, 1000.0])
def test_an_infinite_score_excludes_a_class(logit_scale, backend):
    """A score of -inf excludes a class, even with weight 0, and leaves the other classes unchanged."""
    scores = noise(1, 8, 4, 6).abs()
    for size in ((32, 45), (4, 6)):
        options = dict(return_best=True, return_entropy=True, logit_scale=logit_scale, backend=backend)
        expected = upsample_argmax(place(scores[:, 2:7], backend), size, **options)
        excluded = scores.index_fill(1, torch.tensor([0, 1, 7]), float("-inf"))
        labels, *others = upsample_argmax(place(excluded, backend), size, **options)
        assert torch.equal(labels, expected[0] + 2)
        for one, other in zip(others, expected[1:], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


LAYOUTS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "strided": lambda x: x.repeat_interleave(2, 1).repeat_interleave(3, 3)[:, ::2, :, ::3],
    "offset": lambda x: F.pad(x, (1, 2, 3, 1))[:, :, 3:-1, 1:-2],
    "expanded": lambda x: x[:, :, :1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides(layout, dtype, backend):
    scores = LAYOUTS[layout](noise(2, 5, 4, 7, dtype))
    assert not scores.is_contiguous()
    check(place(scores, backend), (19, 40), backend)


@pytest.mark.parametrize("classes", [1000, 2**15])
def test_many_classes(classes, cpu_backend):
    scores = noise(1, classes, 2, 3)
    scores[:, -1, 1, 2] = 10.0  # the last label is the largest int16
    labels = check(scores, (10, 24), cpu_backend, logit_scale=1.0)
    assert labels[0, -1, -1] == classes - 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_isa(shape, dtype, isa, cpu_backend):
    *sizes, height, width = shape
    check(noise(*sizes, dtype), (height, width), cpu_backend)


def test_isa_ties_and_nan(isa, cpu_backend):
    test_the_first_of_equal_classes((64, 96), cpu_backend)
    test_nan_wins(False, (64, 96), cpu_backend)
    test_nan_wins(True, (4, 6), cpu_backend)


def test_any_number_of_threads(isa, cpu_backend):
    for shape in SHAPES:
        *sizes, height, width = shape
        answers = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            answers.append(
                upsample_argmax(
                    noise(*sizes), (height, width), return_best=True, return_entropy=True, backend=cpu_backend
                )
            )
        for answer in answers[1:]:
            assert all(torch.equal(one, other) for one, other in zip(answer, answers[0], strict=True))


def test_only_its_buffers_are_written(backend):
    scores = place(noise(2, 5, 4, 6), backend)
    whole = [
        torch.full((2 * 19 * 21 + 128,), 77, device=scores.device, dtype=dtype)
        for dtype in (torch.int16,) + 2 * (torch.float32,)
    ]
    labels, best, entropy = (x[64:-64].view(2, 19, 21) for x in whole)
    torch.ops.pacl_kernels.upsample_argmax(scores, False, None, 3.0, backend, labels, best, entropy)
    assert all((x[:64] == 77).all() and (x[-64:] == 77).all() for x in whole)
    expected = upsample_argmax(
        scores, (19, 21), return_best=True, return_entropy=True, logit_scale=3.0, backend=backend
    )
    assert all(torch.equal(one, other) for one, other in zip((labels, best, entropy), expected, strict=True))


def test_what_is_returned():
    scores = noise(2, 5, 4, 6)
    labels = upsample_argmax(scores, (8, 9))
    both = upsample_argmax(scores, [8, 9], return_entropy=True, logit_scale=torch.tensor([3.0]))
    assert torch.equal(labels, both[0]) and len(both) == 2
    assert torch.equal(both[1], upsample_argmax(scores, (8, 9), return_entropy=True, logit_scale=3)[1])
    assert upsample_argmax(scores[:0], (8, 9)).shape == (0, 8, 9)


def test_no_gradient():
    scores = noise(1, 5, 4, 6).requires_grad_()
    assert not any(x.requires_grad for x in upsample_argmax(scores, (8, 9), return_best=True, return_entropy=True))


def test_the_reference_is_the_formula():
    scores = noise(2, 5, 4, 6).double()
    options = dict(return_best=True, return_entropy=True, logit_scale=3.0, backend="reference")
    labels, best, entropy = upsample_argmax(scores, (19, 21), **options)
    x, expected = truth(scores, (19, 21))
    assert torch.equal(labels.long(), x.argmax(1)) and torch.equal(best, x.amax(1)) and torch.equal(entropy, expected)


def test_auto_takes_the_native_one(cpu_backend, monkeypatch):
    scores = noise(2, 5, 4, 6)
    options = dict(return_best=True, return_entropy=True)
    for one, other in zip(
        upsample_argmax(scores, (19, 21), **options),
        upsample_argmax(scores, (19, 21), **options, backend="cpu"),
        strict=True,
    ):
        assert torch.equal(one, other)
    monkeypatch.setenv("PACL_BACKEND", "cuda")
    with pytest.raises(ValueError, match="backend 'cuda' cannot run here"):
        upsample_argmax(scores, (19, 21))


@pytest.mark.parametrize("shape", [(2, 5, 4, 6), (1, 3, 5, 5)], ids=str)
def test_torch_compile_takes_it_whole(shape, target):
    torch.compiler.reset()  # each test would otherwise recompile the code of the one before
    scores = noise(*shape, target.dtype).to(target.device)

    def segment(scores, scale):
        options = dict(return_best=True, return_entropy=True, logit_scale=scale, backend=target.backend)
        labels, best, entropy = upsample_argmax(scores * 2, (19, 21), **options)
        return torch.where(entropy > 1.0, -1, labels), best

    scale = torch.tensor(3.0, device=target.device)
    compiled = torch.compile(segment, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(scores, scale), segment(scores, scale), strict=True):
        assert torch.equal(one, other)


def test_opcheck(target):
    scores = noise(1, 3, 4, 5, target.dtype).to(target.device)
    wide = torch.float64 if target.dtype == torch.float64 else torch.float32
    labels = scores.new_empty(1, 6, 7, dtype=torch.int16)
    best, entropy = (scores.new_empty(1, 6, 7, dtype=wide) for _ in range(2))
    for buffers in ((labels, best, entropy), (labels, None, entropy), (labels, None, None)):
        arguments = (scores, True, None, 2.0, target.backend, *buffers)
        torch.library.opcheck(torch.ops.pacl_kernels.upsample_argmax.default, arguments)


SCORES = torch.zeros(1, 3, 4, 5)


@pytest.mark.parametrize(
    "error, message, scores, size, options",
    [
        (TypeError, "scores is a list", [[[[0.0]]]], (2, 2), {}),
        (TypeError, "scores is a sparse_coo tensor, expected a dense one", SCORES.to_sparse(), (2, 2), {}),
        (TypeError, "scores is torch.int64, expected float32", SCORES.long(), (2, 2), {}),
        (ValueError, r"scores has shape \[3, 4, 5\], expected \[B, C, h, w\]", SCORES[0], (2, 2), {}),
        (ValueError, r"scores has shape \[1, 0, 4, 5\]", SCORES[:, :0], (2, 2), {}),
        (ValueError, r"scores has shape \[1, 3, 0, 5\]", SCORES[:, :, :0], (2, 2), {}),
        (ValueError, "32769 classes, expected at most 32768", SCORES[:, :1].expand(1, 2**15 + 1, 4, 5), (2, 2), {}),
        (TypeError, "size is 7, expected two integers", SCORES, 7, {}),
        (TypeError, r"size is \(2, 3, 4\), expected two integers", SCORES, (2, 3, 4), {}),
        (TypeError, r"size is \(2.0, 3\), expected two integers", SCORES, (2.0, 3), {}),
        (ValueError, r"size is \(0, 3\), expected H and W of at least 1", SCORES, (0, 3), {}),
        (ValueError, "logit_scale is 0", SCORES, (2, 2), {"logit_scale": 0}),
        (ValueError, "logit_scale is nan", SCORES, (2, 2), {"logit_scale": float("nan")}),
        (ValueError, "logit_scale is 1e-46, expected .* that float32 holds", SCORES, (2, 2), {"logit_scale": 1e-46}),
        (ValueError, r"logit_scale is 1e\+39, expected .* that float32 holds", SCORES, (2, 2), {"logit_scale": 1e39}),
        (TypeError, "logit_scale is a str", SCORES, (2, 2), {"logit_scale": "1"}),
        (ValueError, "backend is 'gpu', expected one of", SCORES, (2, 2), {"backend": "gpu"}),
    ],
)
def test_arguments(error, message, scores, size, options):
    with pytest.raises(error, match=message) as caught:
        upsample_argmax(scores, size, **options)
    assert "\n" not in str(caught.value)


PROBE = """
import json, torch
from pacl_kernels import upsample_argmax
import torch.nn.functional as F

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

def growth(function):
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # forget the highest resident size so far
    before = status("VmRSS")
    function()
    return status("VmHWM") - before

torch.set_num_threads(1)
scores, size = torch.randn(1, 300, 8, 16), (128, 256)
ours = lambda: upsample_argmax(scores, size, return_best=True, return_entropy=True, backend="cpu")
upsample_argmax(scores[:, :3], size, return_best=True, return_entropy=True)
print(json.dumps([growth(ours), growth(lambda: F.interpolate(scores, size, mode="bilinear").argmax(1))]))
"""


def test_memory(cpu_backend):
    """The peak is below 8 MiB; the same probe sees over 36 of the 38 MiB that interpolated scores take."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no /proc/self/clear_refs, which resets the peak")
    environment = {"PYTHONPATH": str(Path(pacl_kernels.__path__[0]).parent)}
    command = [sys.executable, "-c", PROBE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ours, plain = json.loads(done.stdout)
    assert plain > 36 * 2**20
    assert ours < 8 * 2**20
