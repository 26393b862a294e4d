"""Which tiles the Triton kernels use, and how much of a batch is in memory at once: tables and arithmetic only."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

WORKSPACE = 256 * 2**20  # bytes of W in memory at once
ALIGNED_ROWS = 8  # patches in a block are a multiple of this, but for the last block
PADDED = 64  # patches of an image up to which it is padded to a power of two, several images to a tile


class Config(NamedTuple):
    """Tile of texts and patches, step along D, and how Triton compiles it; `per_processor` programs run on one SM."""

    block_t: int
    block_p: int
    block_d: int
    warps: int
    stages: int
    per_processor: int


# "safe" is with a running maximum, "full" with a mask or the temperature's gradient: both need more registers.
# (kernel, architecture, bytes of an element) to configuration; an architecture without an entry takes that of the
# newest older one. On an H200 "forward" and "backward" of two bytes were the fastest of 21; the others have not been
# timed. What `benchmarks/kernel_report.py` shows without a GPU: no spills, the tensor cores' own instructions, and
# registers and shared memory for `per_processor` programs on each SM, so that one's epilogue hides behind another's
# product.
CONFIGS = {
    ("forward", 80, 2): Config(128, 128, 32, 8, 4, 1),
    ("forward_safe", 80, 2): Config(128, 128, 32, 8, 4, 1),
    ("backward", 80, 2): Config(128, 128, 32, 8, 4, 1),
    ("backward_full", 80, 2): Config(128, 128, 32, 8, 4, 1),
    ("forward", 80, 4): Config(64, 64, 32, 4, 3, 2),
    ("forward_safe", 80, 4): Config(64, 64, 32, 8, 3, 1),
    ("backward", 80, 4): Config(64, 64, 32, 4, 3, 2),
    ("backward_full", 80, 4): Config(64, 64, 32, 8, 3, 1),
    ("forward", 90, 2): Config(128, 128, 64, 4, 3, 2),
    ("forward_safe", 90, 2): Config(128, 128, 64, 8, 4, 1),
    ("backward", 90, 2): Config(128, 128, 64, 4, 3, 2),
    ("backward_full", 90, 2): Config(128, 128, 64, 8, 4, 1),
    ("forward", 90, 4): Config(128, 64, 32, 4, 3, 2),
    ("forward_safe", 90, 4): Config(128, 64, 32, 8, 3, 1),
    ("backward", 90, 4): Config(128, 64, 32, 4, 3, 2),
    ("backward_full", 90, 4): Config(128, 64, 32, 8, 3, 1),
    ("forward", 100, 2): Config(128, 64, 64, 4, 4, 2),
    ("forward_safe", 100, 2): Config(128, 64, 64, 4, 4, 2),
    ("backward", 100, 2): Config(128, 64, 64, 4, 4, 2),
    ("backward_full", 100, 2): Config(128, 64, 64, 4, 4, 2),
    ("forward", 100, 4): Config(128, 64, 32, 8, 3, 1),
    ("forward_safe", 100, 4): Config(128, 64, 32, 8, 3, 1),
    ("backward", 100, 4): Config(128, 64, 32, 8, 3, 1),
    ("backward_full", 100, 4): Config(128, 64, 32, 8, 3, 1),
}
# By bytes of an element, where rows are loaded by address, which takes registers: rows that are not evenly spaced,
# contiguous and aligned, and padded images whose dimensions do not fill the steps along D.
STRIDED = {2: Config(128, 64, 32, 8, 4, 1), 4: Config(64, 64, 32, 8, 3, 1)}


class Pool(NamedTuple):
    """Tile of q = G a, texts and patches, step along the other patches, and how Triton compiles it."""

    block_t: int
    block_m: int
    block_n: int
    warps: int
    stages: int


# (kernel, architecture, bytes of an element) to configuration, as `CONFIGS`. Where a tile holds all patches of an image
# the backward takes q once instead of twice.
POOL = {
    ("forward", 80, 2): Pool(64, 256, 64, 8, 2),
    ("forward", 80, 4): Pool(64, 32, 32, 4, 3),
    ("forward", 90, 2): Pool(64, 256, 64, 8, 3),
    ("forward", 90, 4): Pool(64, 32, 32, 4, 3),
    ("forward", 100, 2): Pool(64, 256, 64, 8, 3),
    ("forward", 100, 4): Pool(64, 32, 32, 4, 3),
    ("backward", 80, 2): Pool(64, 256, 64, 8, 2),
    ("backward", 80, 4): Pool(64, 32, 32, 4, 3),  # three tf32 products keep six operands
    ("backward", 90, 2): Pool(64, 256, 64, 8, 3),
    ("backward", 90, 4): Pool(64, 32, 32, 4, 3),
    ("backward", 100, 2): Pool(64, 256, 64, 8, 3),
    ("backward", 100, 4): Pool(64, 32, 32, 4, 3),
}
POOL_SMALL = {2: Pool(64, 64, 64, 4, 3), 4: Pool(64, 32, 32, 4, 3)}  # up to so many patches


def pool_config(kernel: str, n: int, patches: Tensor) -> Pool:
    itemsize = patches.element_size()
    if n <= POOL_SMALL[itemsize].block_m:
        return POOL_SMALL[itemsize]
    entry = POOL[kernel, newest({number for _, number, _ in POOL}, patches.device), itemsize]
    return entry._replace(block_m=min(entry.block_m, power_of_two(n)))


class Gram(NamedTuple):
    """Side of a square tile of `gram_kernel`, step along D, and how Triton compiles it."""

    block: int
    block_d: int
    warps: int
    stages: int


GRAM = {2: Gram(128, 64, 8, 3), 4: Gram(64, 32, 8, 3)}  # by bytes of an element
GRAM_SMALL = {2: Gram(64, 64, 4, 3), 4: Gram(64, 32, 8, 3)}  # where larger tiles would be half empty


def gram_config(n: int, itemsize: int) -> Gram:
    return GRAM[itemsize] if n > GRAM_SMALL[itemsize].block else GRAM_SMALL[itemsize]


class Curvature(NamedTuple):
    """Side of a square tile of `curvature_kernel`, step along the texts, and how Triton compiles it.

    `registers`: at most so many of a thread, so that two programs share an SM; 0 leaves it to the compiler.
    """

    block: int
    block_k: int
    warps: int
    stages: int
    registers: int = 0


# (architecture, bytes of an element) to configuration, as `CONFIGS`.
CURVATURE = {
    (80, 2): Curvature(128, 32, 8, 4),
    (80, 4): Curvature(64, 32, 4, 3),
    (90, 2): Curvature(128, 32, 8, 4, 128),
    (90, 4): Curvature(64, 32, 4, 3),
    (100, 2): Curvature(128, 64, 8, 3),
    (100, 4): Curvature(64, 32, 4, 3),
}
CURVATURE_SMALL = {2: Curvature(64, 64, 4, 3), 4: Curvature(64, 32, 4, 3)}  # where larger tiles would be half empty
POOLED_ALIGNMENT = 8  # elements between rows of the matrices that it writes


class Pooled(NamedTuple):
    """Tile of `add_pooled_kernel`, patches and dimensions, step along the other patches, and how Triton compiles it."""

    block_n: int
    block_d: int
    block_m: int
    warps: int
    stages: int


POOLED = {2: Pooled(128, 128, 64, 8, 3), 4: Pooled(64, 64, 32, 4, 3)}  # by bytes of an element of C

MAX_PATCHES = {2: Pooled(64, 128, 64, 4, 3), 4: Pooled(64, 64, 32, 4, 3)}  # steps along the texts; not timed


def max_texts(d: int) -> dict:
    """Tile of `max_texts_kernel`: eight elements of each image to a thread."""
    block_d = min(128, max(16, power_of_two(d)))
    return dict(TEXTS=1024 // block_d, IMAGES=4, BLOCK_D=block_d)


def curvature_config(n: int, itemsize: int, device: torch.device) -> Curvature:
    """`itemsize`: bytes of an element of the product's operands."""
    entry = CURVATURE[newest({number for number, _ in CURVATURE}, device), itemsize]
    return entry if n > CURVATURE_SMALL[itemsize].block else CURVATURE_SMALL[itemsize]


def config(kernel: str, patches: Tensor, texts: Tensor, padded: bool = False) -> Config:
    """The table's entry, with smaller tiles where there are fewer texts or dimensions."""
    d = patches.shape[2]
    if are_describable(patches, texts) and not (padded and d % min(64, power_of_two(d))):
        entry = CONFIGS[kernel, newest({number for _, number, _ in CONFIGS}, patches.device), patches.element_size()]
    else:
        entry = STRIDED[patches.element_size()]
    return entry._replace(
        block_t=min(entry.block_t, max(16, power_of_two(len(texts)))),
        block_d=min(entry.block_d, max(16, power_of_two(d))),
    )


def newest(architectures: set[int], device: torch.device) -> int:
    """The newest of them that is no newer than the device, else the oldest."""
    return max(x for x in architectures if x <= max(architecture(device), min(architectures)))


class Blocks(NamedTuple):
    """Images and texts whose W is in memory at once."""

    images: int
    texts: int


def text_block(n: int, k: int, itemsize: int) -> int:
    """Texts against which one image at least fits into the workspace."""
    return min(k, max(128, WORKSPACE // (itemsize * n) // 128 * 128))


def plan_blocks(b: int, n: int, k: int, itemsize: int, image_bytes: int = 0) -> Blocks:
    """What fits into the workspace with `itemsize` bytes for each score and `image_bytes` for each image."""
    texts = text_block(n, k, itemsize)
    tile = min(128, max(16, power_of_two(texts)))
    images = WORKSPACE // (itemsize * n * ceil_div(texts, tile) * tile + image_bytes)
    if images > ALIGNED_ROWS:  # the library takes half as long for the products of a block with whole vectors of rows
        images -= images % (ALIGNED_ROWS // math.gcd(n, ALIGNED_ROWS))
    return Blocks(max(1, min(b, images)), texts)


@functools.lru_cache(maxsize=1024)
def images_per_run(b: int, n: int, text_tiles: int, block_p: int, programs: int) -> int:
    """Images that a program walks through: fewest rounds of tiles over all programs, the last tile's waste included."""

    def rounds(run: int) -> int:
        return ceil_div(text_tiles * ceil_div(b, run), programs) * ceil_div(run * n, block_p)

    return min(range(1, min(b, 64) + 1), key=rounds)


def interpreted() -> bool:
    """True where Triton's interpreter runs the kernels, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


@functools.cache
def architecture(device: torch.device) -> int:
    """Compute capability times ten; that of an A100 for what has none (AMD, the interpreter)."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def has_bulk_copies(device: torch.device) -> bool:
    if importlib.util.find_spec("triton.tools.tensor_descriptor") is None:
        return False
    return device.type == "cpu" or architecture(device) >= 90


def are_describable(patches: Tensor, texts: Tensor) -> bool:
    """Whether both are matrices of evenly spaced rows, contiguous and aligned to 16 bytes."""

    def aligned(x: Tensor) -> bool:
        rows = x.stride(-2)
        return (
            x.stride(-1) == 1 and rows >= x.shape[-1] and rows * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
        )

    flat = len(patches) == 1 or patches.stride(0) == patches.shape[1] * patches.stride(1)
    return flat and aligned(patches) and aligned(texts)


def alignment(x: Tensor) -> int:
    """Elements in 16 bytes."""
    return 16 // x.element_size()


def pitch(n: int, itemsize: int) -> int:
    """Elements from row to row of `n`, so that each begins at a multiple of 16 bytes."""
    return ceil_div(n * itemsize, 16) * 16 // itemsize


def power_of_two(x: int) -> int:
    return 1 << (x - 1).bit_length() if x > 1 else 1


def ceil_div(x: int, y: int) -> int:
    return -(-x // y)
