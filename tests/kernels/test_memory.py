"""The memory of a step, beyond its inputs and gradients, has a bound that leaves no room for a [B, K, N] array."""

import json
import subprocess
import sys
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from gpu import on_gpu, random_inputs, step

import pacl_kernels

MIB = 2**20
SHAPES = [(1024, 64, 256), (16, 1369, 1024)]
FORMS = ("dot", "cosine", "max")
THREADS = (1, 4)
WIDTH = {"float32": 4, "bfloat16": 2}
PROBE = """
import json, sys, torch
from pacl_kernels import fused_pacl_loss

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

def growth(backend, form, threads, dtype, b, n, d, loss="infonce", patch_lengths=None, text_lengths=None, **options):
    torch.set_num_threads(threads)
    if patch_lengths:
        options["patch_lengths"] = patch_lengths
    if text_lengths:
        options["text_lengths"] = text_lengths
    shapes = (sum(patch_lengths), d) if patch_lengths else (b, n, d), (sum(text_lengths or [b]), d)
    patches, texts = (torch.randn(*shape).to(getattr(torch, dtype)).requires_grad_() for shape in shapes)
    scale, tau = torch.tensor(10.0, requires_grad=True), torch.tensor(0.07, requires_grad=True)
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # forget the highest resident size so far
    before = status("VmRSS")
    options |= dict(attn_temperature=tau, form=form, loss=loss, backend=backend)
    fused_pacl_loss(patches, texts, scale, **options).backward()
    grew = status("VmHWM") - before
    assert patches.grad.isfinite().all() and texts.grad.isfinite().all()
    return grew

steps = json.loads(sys.argv[1])
for step, options in steps:
    some = {name: [2, 0, 1] if name.endswith("lengths") else value for name, value in options.items()}
    growth(*step[:4], 3, 5, 7, *step[7:], **some)  # code and tables that are loaded once
print(json.dumps([growth(*step, **options) for step, options in steps]))
"""


@cache
def _growth(backend: str) -> dict[tuple, int]:
    """Return the rise in bytes of the resident size for every kind of step, all measured in one process."""
    steps = [(backend, *rest) for rest in product(FORMS, THREADS, WIDTH)]
    steps = [(*step, *shape) for step in steps for shape in SHAPES]
    return dict(zip(steps, _run(steps), strict=True))


def _run(steps, **options) -> list[int]:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no /proc/self/clear_refs, which resets the peak")
    # Without the threshold, memory freed by one step stays in the heap and hides the needs of the next one.
    environment = {"PYTHONPATH": str(Path(pacl_kernels.__path__[0]).parent), "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", PROBE, json.dumps([(step, options) for step in steps])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", WIDTH)
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("b, n, d", SHAPES)
def test_peak_of_a_step(b, n, d, form, threads, dtype, cpu_backend):
    """A step needs its gradients, a float32 [K, D], four float32 [B, K], for cosine [N, N] per thread, and ≤ 64 MiB."""
    grew = _growth(cpu_backend)[cpu_backend, form, threads, dtype, b, n, d]
    gradients = WIDTH[dtype] * (b * n * d + b * d)
    allowed = gradients + 4 * b * d + 4 * 4 * b * b + (4 * threads * n * n if form == "cosine" else 0)
    assert grew > 0.9 * gradients, "the gradients alone need more: the measurement is wrong"
    assert grew <= allowed + 64 * MIB, f"{(grew - allowed) / MIB:.0f} MiB besides those, allowed 64"


def test_the_sigmoid_loss_has_no_array_of_all_pairs(cpu_backend):
    b, n, d = 4096, 2, 16
    steps = [("dot", "float32", "sigmoid"), ("cosine", "bfloat16", "sigmoid"), ("dot", "float32", "infonce")]
    dot, cosine, infonce = _run([(cpu_backend, form, 2, dtype, b, n, d, loss) for form, dtype, loss in steps])
    assert infonce > 3 * 4 * b * b, "the probe does not see the arrays of the other loss"
    assert max(dot, cosine) < 3 * b * b, "expected less than one array of float32"


@pytest.mark.long
def test_texts_of_many_tokens(cpu_backend):
    """Beyond inputs and gradients: two float32 [ΣL, D] for the texts' gradient, four [B, K], and at most 64 MiB."""
    b, n, d, tokens = 512, 2, 64, 65536
    (grew,) = _run([(cpu_backend, "dot", 2, "float32", b, n, d)], text_lengths=[tokens // b] * b, text_pool="logsumexp")
    allowed = 4 * (b * n * d + tokens * d) + 2 * 4 * tokens * d + 4 * 4 * b * b + 64 * MIB
    assert grew <= allowed, f"{(grew - allowed) / MIB:.0f} MiB above"
    assert allowed < 0.6 * 2 * 4 * b * tokens + 3 * 4 * tokens * d, "a [B, ΣL] array would go unseen"


@pytest.mark.sampled(2)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_packed_patches_need_memory_in_proportion_to_their_number(backend):
    """One image of 4,096 patches among many of one patch costs no more than its own rows."""
    d, lengths = 256, [4096] + [1] * 511
    (grew,) = _run([(backend, "dot", 2, "float32", len(lengths), None, d)], patch_lengths=lengths)
    rows, b = sum(lengths), len(lengths)
    allowed = 4 * d * (rows + b) + 4 * d * b + 4 * 4 * b * b + 80 * MIB
    assert grew <= allowed, f"{(grew - allowed) / MIB:.0f} MiB above"
    assert allowed < 4 * d * 4096 * b / 2, "a padded array would go unseen"


def test_the_probe_sees_what_the_formula_needs():
    """The probe sees that the plain formula holds [B, K, N] more than once; a blind probe would pass any backend."""
    b, n, d = 256, 64, 32
    (grew,) = _run([("reference", "dot", 2, "float32", b, n, d)])
    assert grew > 2 * 4 * b * b * n


@on_gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("b", [4096, 32768])
def test_memory_of_a_step(b, form, gigabytes):
    """Beyond inputs and gradients a step needs a float32 [K, D], three float32 [B, K], and at most 512 MiB."""
    n, d = 196, 512
    if torch.cuda.mem_get_info()[0] < 2.2 * 2 * b * n * d + 3 * 4 * b * b + 2**30:
        pytest.skip("too little memory")
    step(random_inputs(64, n, d), form)
    inputs = random_inputs(b, n, d)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    answers = step(inputs, form)
    assert all(x is None or x.isfinite().all() for x in answers[:1] + answers[2:])
    extra = torch.cuda.max_memory_allocated() - before - sum(x.numel() * x.element_size() for x in inputs)
    assert extra <= 4 * b * d + 3 * 4 * b * b + 512 * MIB, f"{extra / MIB:.0f} MiB"
