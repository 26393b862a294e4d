"""Work and memory of a step of the loss, counted from its shape for `plan`. Nothing here runs a kernel."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch

from .backends.gpu import workspace
from .backends.gpu.problem import Problem
from .checks import Form, Loss
from .distributed import GATHER_BYTES, RING_BYTES, gathered_bytes
from .native import native

MIB = 2**20
PROMISED = 64 * MIB  # workspace of the `cpu` backend without a native module to ask, see docs/math.md
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
CPU_BACKENDS = ("cpu", "torch")  # those whose work is counted as on a CPU
TEXTS_OF_A_TASK = 1024  # of the `cpu` backend, which reads the patches once for that many texts
POOLED = 1.4  # time of a product with pooled patches, which do not stay in the L1 cache, over that of another product
# Widths of the tiles of csrc/cuda/plan.h, for one image and for several, and the patches that share no tile.
WIDTHS = (144, 160, 176, 192, 200, 208, 224, 232, 248, 256)
PACKED_WIDTHS = (192, 224, 256)
ONE_TILE = range(97, 257)


class Step(NamedTuple):
    """Shape and options of a step of one process. `texts` counts the texts of all processes."""

    batch: int
    patches: int
    dim: int
    texts: int
    form: Form
    dtype: str
    loss: Loss
    frozen_texts: bool = False
    masked: bool = False
    world_size: int = 1

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def scores(self) -> float:
        """Number of scores, B × K × N."""
        return float(self.batch) * self.patches * self.texts

    @property
    def unit(self) -> float:
        """Floating-point operations of the product of all patches with all texts."""
        return 2 * self.scores * self.dim

    @property
    def rows(self) -> int:
        """Bytes of the patches."""
        return self.batch * self.patches * self.dim * self.itemsize

    @property
    def pairs(self) -> int:
        """Bytes of a float32 array `[B, K]`."""
        return 4 * self.batch * self.texts

    @property
    def own_texts(self) -> int:
        return -(-self.texts // self.world_size)

    @property
    def ring(self) -> bool:
        """True if the texts travel in a ring, by the rule of `exchange="auto"`."""
        return gathered_bytes(self.world_size, self.own_texts, self.dim, self.itemsize) > GATHER_BYTES


class Traits(NamedTuple):
    """Properties of a backend on a machine that change its work.

    Attributes:
        backend: its name.
        speed: rate of 16-bit products over that of float32, by which the `cpu` backend chooses the way of `cosine`.
        attention: time of the product q = G a of the `cosine` form over that of the same product in float32.
        keeps_scores: the forward leaves scores for the backward.
        one_pass: the sigmoid loss is computed in one pass.
    """

    backend: str
    speed: float = 1.0
    attention: float = 1.0
    keeps_scores: bool = False
    one_pass: bool = False


class Work(NamedTuple):
    """Work of a forward or of a backward.

    Attributes:
        products: floating-point operations of the matrix products.
        softmax: scores that the forward sums.
        weights: scores that the backward turns into W.
        cosine_forward: scores of which the `cosine` form makes an operand, in the forward.
        cosine_weights: the same in the backward.
        streamed: bytes that are read or written beside the products.
        fresh: bytes that are written for the first time, whose pages a CPU must map.
    """

    products: float = 0.0
    softmax: float = 0.0
    weights: float = 0.0
    cosine_forward: float = 0.0
    cosine_weights: float = 0.0
    streamed: float = 0.0
    fresh: float = 0.0

    def plus(self, other: Work) -> Work:
        return Work(*(x + y for x, y in zip(self, other, strict=True)))

    def without(self, other: Work) -> Work:
        return Work(*(x - y for x, y in zip(self, other, strict=True)))


def pools(step: Step, traits: Traits) -> bool:
    """Return True if the `cpu` backend takes pooled patches for the `cosine` form, by csrc/cpu/cosine_cost.h."""
    if traits.backend != "cpu" or step.form != "cosine":
        return False
    n, k, d = step.patches, min(step.texts, TEXTS_OF_A_TASK), step.dim
    products = 3 * n * k * d + 1.5 * n * n * d + n * n * k / 2
    return 6 * n * k * d < products / traits.speed + n * n * k * traits.attention


def are_tritons(step: Step) -> bool:
    """Return True if the `cuda` backend runs Triton's kernels for this form."""
    return step.form == "max" or (step.form == "cosine" and step.patches < ONE_TILE.start)


def work(step: Step, traits: Traits) -> tuple[Work, Work]:
    """Return the work of forward and backward, without the exchange among processes."""
    forward, backward = (_cpu_work if traits.backend in CPU_BACKENDS else _gpu_work)(step, traits)
    if step.ring and step.loss == "infonce":  # φ of each block is computed once more
        backward = backward.plus(forward)
    return forward, backward


def _cpu_work(step: Step, traits: Traits) -> tuple[Work, Work]:
    b, n, d, k = step.batch, step.patches, step.dim, step.texts
    unit, scores, rows, learns = step.unit, step.scores, step.rows, not step.frozen_texts
    if step.form == "max":  # the backward adds a row of D, which is in a cache, for each pair and gradient
        forward = Work(unit, softmax=scores, streamed=rows + 8 * step.pairs)
        return forward, Work((1 + learns) * unit / n, streamed=(1 + learns) * rows + 6 * step.pairs, fresh=rows)
    one_pass = step.loss == "sigmoid" and traits.one_pass
    kept = 0.0
    if traits.keeps_scores and not (one_pass or step.world_size > 1):
        kept = min(1.0, d * step.itemsize / 4 // 32 * 32 / k)
    tasks = math.ceil(k / TEXTS_OF_A_TASK)
    forward = Work(unit, softmax=scores, streamed=rows * tasks, fresh=4 * kept * scores)
    streamed = rows * tasks + 4 * kept * scores + k * d * step.itemsize * learns
    backward = Work((2 - kept + learns) * unit, weights=scores, streamed=streamed, fresh=rows * (1 - kept))
    if step.form == "cosine" and pools(step, traits):
        forward = forward.plus(Work(POOLED * unit, cosine_forward=scores))
        backward = backward.plus(Work(POOLED * (3 + learns) * unit, cosine_weights=scores))
    elif step.form == "cosine":
        square, attention = 2.0 * b * n * n, traits.attention * traits.speed
        # Matrices [N, N] that do not fit into the L2 cache are read again for each panel of texts.
        again = 4.0 * b * n * n * math.ceil(k / 32) if 4 * n * n > MIB else 0.0
        triangles = 1.25 * square * (d / 2 * tasks + k / 2 * attention)
        forward = forward.plus(Work(triangles, cosine_forward=scores, streamed=again / 2))
        products = square * (1.5 * d + k / 2 + k * attention)
        backward = backward.plus(Work(products, cosine_weights=scores, streamed=2 * again))
    if one_pass:  # nothing is computed twice, and there is no array of all pairs
        again_work = forward if step.form == "cosine" else Work(unit, streamed=rows * tasks)
        return Work(), forward.plus(backward).without(again_work)
    return forward.plus(Work(streamed=8 * step.pairs)), backward.plus(Work(streamed=6 * step.pairs))


def _gpu_work(step: Step, traits: Traits) -> tuple[Work, Work]:
    n, d, k = step.patches, step.dim, step.texts
    unit, scores, learns = step.unit, step.scores, not step.frozen_texts
    tiled = unit / tile_use(n, traits.backend)
    forward = Work(tiled, softmax=scores, streamed=step.rows + 4 * step.pairs)
    # Norms, and the projection, which reads the product and the patches and writes the gradient.
    backward = Work(streamed=4 * step.rows + 4 * step.pairs)
    if step.form == "max":
        split = 2 if step.itemsize == 2 else 1  # a weight is two numbers of 16 bits
        gathered = step.itemsize * float(step.batch) * k * d * learns
        return forward, backward.plus(Work(split * unit, streamed=gathered))
    blocks = math.ceil(step.batch / _gpu_blocks(step).images)
    sums = 12.0 * k * d * blocks * learns
    backward = backward.plus(Work(tiled + (1 + learns) * unit, weights=scores, streamed=sums))
    if step.form == "cosine":
        square = 2.0 * step.batch * n * n
        again = not (traits.backend == "cuda" and n in ONE_TILE)  # the attention goes through memory
        stored = 2 * scores * again
        extra = square * (d + k) + tiled * again
        forward = forward.plus(Work(extra, cosine_forward=scores, streamed=2 * stored))
        extra = square * (2 * d + (1.5 + again) * k)
        backward = backward.plus(Work(extra, cosine_weights=scores, streamed=3 * stored))
    if step.loss == "sigmoid" and traits.one_pass:
        return Work(), forward.plus(backward).without(Work(tiled, streamed=step.rows + 8 * step.pairs))
    return forward, backward


def tile_use(patches: int, backend: str) -> float:
    """Return the share of the columns of a GPU's tiles that hold patches."""
    if backend != "cuda":
        return 1.0 if patches > 64 else patches / (1 << (patches - 1).bit_length())
    if patches <= 128:
        pitch = math.ceil(patches / 8) * 8
        return max(width // pitch * patches / width for width in PACKED_WIDTHS)
    chunks = math.ceil(patches / WIDTHS[-1])
    return max(patches / c / min(w for w in WIDTHS if w >= patches / c) for c in (chunks, chunks + 1))


@functools.lru_cache(maxsize=256)
def _gpu_blocks(step: Step) -> workspace.BlockSize:
    return workspace.backward_blocks(_problem(step), step.form, _widens(step))


def _problem(step: Step) -> Problem:
    """Return the problem as tensors without data, for which the GPU backends plan their blocks."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    dtype = getattr(torch, step.dtype)
    patches, texts = empty(step.batch, step.patches, step.dim, dtype=dtype), empty(step.texts, step.dim, dtype=dtype)
    mask = empty(step.batch, step.patches, dtype=torch.bool) if step.masked else None
    pairs, norms = empty(step.batch, step.texts), empty(step.batch * step.patches)
    return Problem(patches, texts, texts, mask, 1.0, pairs, pairs, norms, empty(step.texts), empty(step.texts))


def _widens(step: Step) -> bool:
    score_bytes = workspace.score_bytes(_problem(step), step.form)
    return step.dtype == "float16" or step.texts > workspace.text_block(step.patches, step.texts, score_bytes)


def sent_bytes(step: Step, scatters: bool) -> float:
    """Return the bytes that a process sends in a step by ring algorithms, as in docs/distributed.md.

    `scatters`: the group can reduce-scatter; without it, the texts' gradient takes twice the bytes.
    """
    others, texts = step.world_size - 1, step.own_texts * step.dim
    gradient = 4 * texts * (not step.frozen_texts)
    sums = 2 * others / step.world_size * 8 * (step.texts + 2)
    if step.ring:
        return 2 * others * texts * step.itemsize + step.world_size * gradient + sums
    return others * (texts * step.itemsize + gradient * (1 if scatters else 2)) + sums


def hops(step: Step) -> int:
    """Return the messages that follow one another in the exchange of a step."""
    others = step.world_size - 1
    return (3 if step.ring else 2) * others + 2 * math.ceil(math.log2(step.world_size)) if others else 0


def memory(step: Step, traits: Traits, threads: int) -> dict[str, int]:
    """Return the bytes of a step at its peak, by use; the sum is the peak."""
    own = step.own_texts * step.dim * step.itemsize
    one_pass = step.loss == "sigmoid" and traits.one_pass
    parts = {
        "patches and texts": step.rows + own,
        "their gradients": step.rows + own * (not step.frozen_texts),
        "pairs": 0 if one_pass else 3 * step.pairs,
    }
    if step.world_size == 1:
        parts["sum over texts"] = 0 if step.frozen_texts else 4 * step.texts * step.dim
    elif step.ring:
        parts["pairs"] = min(16 * step.batch * step.own_texts, RING_BYTES)
        parts["texts of all processes"] = 4 * step.own_texts * step.dim * (2 + step.itemsize)
    else:
        parts["pairs"] = parts["pairs"] * 4 // 3
        parts["texts of all processes"] = step.texts * step.dim * (step.itemsize + 8)
    parts["workspace"] = (
        _cpu_workspace(step, traits, threads) if traits.backend in CPU_BACKENDS else _gpu_workspace(step)
    )
    return parts


def _cpu_workspace(step: Step, traits: Traits, threads: int) -> int:
    """Return the workspace that the native module plans, for the instruction set that it would choose here."""
    module = native() if traits.backend == "cpu" else None
    if module is None:
        return PROMISED + (4 * threads * step.patches**2 if step.form == "cosine" else 0)
    b, n, d, k = step.batch, step.patches, step.dim, step.texts
    anywhere = 64  # planning looks at which addresses there are, and reads none of them
    fields: dict[str, Any] = {"images": b, "patches_per_image": n, "text_count": k, "dim": d, "threads": threads}
    fields |= {"dtype": step.dtype, "form": step.form, "temperature": 0.1, "openmp": (0, 0, 0)}
    fields |= {"patches": anywhere, "patch_strides": (n * d, d, 1), "texts": anywhere, "text_strides": (d, 1)}
    params = module.CompatibilityParams(**fields, phi=anywhere, state=anywhere)
    forward: int = module.compatibility_forward(params).workspace_bytes
    params.set(grad_phi=anywhere, grad_patches=anywhere)
    if not step.frozen_texts:
        params.set(grad_texts=anywhere, grad_texts_dtype=step.dtype, texts_sum=anywhere)
    backward: int = module.compatibility_backward(params).workspace_bytes
    return max(forward, backward)


def _gpu_workspace(step: Step) -> int:
    """Return the bytes of a block of the backward, of the copy of the texts, and of the norms."""
    problem, texts = _problem(step), step.texts * step.dim
    fixed = 4 * step.batch * step.patches + texts * (0 if step.dtype == "float16" else step.itemsize)
    fixed += 0 if step.frozen_texts else 4 * texts  # a block's part of the sum over the texts
    if step.form == "max":
        images = max(1, min(step.batch, workspace.WORKSPACE // (4 * step.patches * step.dim)))
        return fixed + 4 * images * step.patches * step.dim
    size, widens = _gpu_blocks(step), _widens(step)
    buffers = [workspace.weights(problem, size, workspace.WeightsTile(128, 128))]
    if widens:
        buffers.append(problem.phi.new_empty(size.images * step.patches, step.dim))
    if step.form == "cosine":
        dtype = torch.float32 if widens else problem.patches.dtype
        buffers += [workspace.gram(problem, size), workspace.attention(problem, size, problem.gram_dtype)]
        buffers.append(workspace.norm_term(problem, size, dtype))
    return fixed + sum(x.numel() * x.element_size() for x in buffers)


def eager_products(step: Step) -> float:
    """Return the floating-point operations of plain PyTorch, which keeps the scores and computes nothing twice."""
    products = (3 - step.frozen_texts) * step.unit
    if step.form == "cosine":
        products += 3 * 2.0 * step.batch * step.patches**2 * (step.texts + step.dim)
    return products


def eager_memory(step: Step, on_cpu: bool) -> int:
    """Return the peak in bytes of plain PyTorch: `weighted_scores` or `largest_score` of benchmarks/peers.py.

    The counts of arrays at the peak are those measured on a CPU and on an H100.
    """
    texts = step.texts * step.dim * step.itemsize
    scores = int(step.scores) * step.itemsize
    of_scores = {"dot": 6 * scores + step.rows, "cosine": 5 * scores + 3 * step.rows, "max": 2 * scores + 2 * step.rows}
    growth = max(of_scores[step.form], 5 * step.rows)  # the latter while `normalize` has its backward
    if on_cpu and step.itemsize == 2:
        growth += growth * 3 // 10  # temporaries in float32
    return step.rows + texts + growth + 4 * step.pairs
