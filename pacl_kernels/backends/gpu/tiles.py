"""Tile sizes of the Triton kernels: tables and arithmetic only."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
from typing import NamedTuple

import torch
from torch import Tensor

PADDED = 64  # images of at most this many patches are padded to a power of two, several to a tile


class Config(NamedTuple):
    """Tile of texts and patches, step along D, and compile options; `per_processor` programs run on one SM."""

    block_t: int
    block_p: int
    block_d: int
    warps: int
    stages: int
    per_processor: int


# "forward" is `compatibility_forward_kernel`, "weights" is `dot_weights_kernel` and `attention_kernel`. "full" means
# with a mask or the gradient of the temperature; that and a running maximum need more registers.
# (kernel, architecture, bytes per element) to configuration; an architecture without an entry takes that of the newest
# older one. On an H200 "forward" and "weights" of two bytes were the fastest of 21; the others have not been timed.
# `benchmarks/kernel_report.py`, which needs no GPU, shows for all of them: no spills, tensor core instructions, and
# registers and shared memory for `per_processor` programs on each SM, so that the epilogue of one program overlaps with
# the product of another.
CONFIGS = {
    ("forward", 80, 2): Config(128, 128, 32, 8, 4, 1),
    ("forward_running_max", 80, 2): Config(128, 128, 32, 8, 4, 1),
    ("weights", 80, 2): Config(128, 128, 32, 8, 4, 1),
    ("weights_full", 80, 2): Config(128, 128, 32, 8, 4, 1),
    ("forward", 80, 4): Config(64, 64, 32, 4, 3, 2),
    ("forward_running_max", 80, 4): Config(64, 64, 32, 8, 3, 1),
    ("weights", 80, 4): Config(64, 64, 32, 4, 3, 2),
    ("weights_full", 80, 4): Config(64, 64, 32, 8, 3, 1),
    ("forward", 90, 2): Config(128, 128, 64, 4, 3, 2),
    ("forward_running_max", 90, 2): Config(128, 128, 64, 8, 4, 1),
    ("weights", 90, 2): Config(128, 128, 64, 4, 3, 2),
    ("weights_full", 90, 2): Config(128, 128, 64, 8, 4, 1),
    ("forward", 90, 4): Config(128, 64, 32, 4, 3, 2),
    ("forward_running_max", 90, 4): Config(128, 64, 32, 8, 3, 1),
    ("weights", 90, 4): Config(128, 64, 32, 4, 3, 2),
    ("weights_full", 90, 4): Config(128, 64, 32, 8, 3, 1),
    ("forward", 100, 2): Config(128, 64, 64, 4, 4, 2),
    ("forward_running_max", 100, 2): Config(128, 64, 64, 4, 4, 2),
    ("weights", 100, 2): Config(128, 64, 64, 4, 4, 2),
    ("weights_full", 100, 2): Config(128, 64, 64, 4, 4, 2),
    ("forward", 100, 4): Config(128, 64, 32, 8, 3, 1),
    ("forward_running_max", 100, 4): Config(128, 64, 32, 8, 3, 1),
    ("weights", 100, 4): Config(128, 64, 32, 8, 3, 1),
    ("weights_full", 100, 4): Config(128, 64, 32, 8, 3, 1),
}
# Configurations by bytes per element where rows are loaded by address, which takes registers: for rows that are not
# evenly spaced, contiguous and aligned, and for padded images where D is not a multiple of the step.
STRIDED = {2: Config(128, 64, 32, 8, 4, 1), 4: Config(64, 64, 32, 8, 3, 1)}


class SigmoidTile(NamedTuple):
    """Tile of texts and whole images, step along D, and compile options.

    `parts`: widths of up to three products that together hold the patches. `pad`: 0 if a tile holds one image,
    otherwise the columns of each of several images in its only part.
    """

    block_t: int
    parts: tuple[int, ...]
    block_d: int
    warps: int
    stages: int
    per_processor: int
    pad: int

    @property
    def images(self) -> int:
        return self.parts[0] // self.pad if self.pad else 1


# (full, architecture, bytes per element) to configuration, as `CONFIGS`, but N chooses the parts. "Full" means with a
# mask, the gradient of the temperature or a running maximum. Not timed.
SIGMOID = {
    (False, 80, 2): Config(64, 0, 32, 8, 3, 1),
    (True, 80, 2): Config(64, 0, 32, 8, 3, 1),
    (False, 80, 4): Config(32, 0, 32, 8, 2, 1),
    (True, 80, 4): Config(32, 0, 32, 8, 2, 1),
    (False, 90, 2): Config(64, 0, 64, 4, 3, 2),
    (True, 90, 2): Config(64, 0, 64, 8, 3, 1),
    (False, 90, 4): Config(64, 0, 32, 8, 2, 1),
    (True, 90, 4): Config(32, 0, 32, 8, 2, 1),
    (False, 100, 2): Config(64, 0, 64, 8, 3, 1),
    (True, 100, 2): Config(64, 0, 32, 8, 3, 1),
    (False, 100, 4): Config(64, 0, 32, 8, 2, 1),
    (True, 100, 4): Config(32, 0, 32, 8, 2, 1),
}
MOST_SIGMOID_PATCHES = 256  # the products of more patches do not fit into registers


@functools.cache
def sigmoid_parts(n: int, most: int) -> tuple[int, ...]:
    """Return widths of at most `most` products, each a power of two, that hold N patches with the least waste."""
    choices = (
        parts
        for count in range(1, most + 1)
        for parts in itertools.combinations_with_replacement((128, 64, 32, 16), count)
    )
    return min((parts for parts in choices if sum(parts) >= n), key=lambda parts: (sum(parts), len(parts)))


def sigmoid_tile(patches: Tensor, texts: Tensor, full: bool, descriptors: bool) -> SigmoidTile:
    """Return the entry of the table for N patches, with smaller tiles for fewer texts or dimensions."""
    n, d = patches.shape[1:]
    entry = SIGMOID[full, newest({number for _, number, _ in SIGMOID}, patches.device), patches.element_size()]
    pad = power_of_two(n) if n <= 32 else 0
    return SigmoidTile(
        min(entry.block_t, max(16, power_of_two(len(texts)))),
        (64,) if pad else sigmoid_parts(n, 3 if descriptors else 2),  # addresses of a third part would spill
        min(entry.block_d, max(16, power_of_two(d))),
        entry.warps,
        entry.stages,
        entry.per_processor,
        pad,
    )


class GramAttention(NamedTuple):
    """Tile of texts and patches for q = G a, step along the other patches, and compile options."""

    block_t: int
    block_m: int
    block_n: int
    warps: int
    stages: int


# (kernel, architecture, bytes per element) to configuration, as `CONFIGS`. If a tile holds all patches of an image,
# "weights" computes q once instead of twice.
GRAM_ATTENTION = {
    ("forward", 80, 2): GramAttention(64, 256, 64, 8, 2),
    ("forward", 80, 4): GramAttention(64, 32, 32, 4, 3),
    ("forward", 90, 2): GramAttention(64, 256, 64, 8, 3),
    ("forward", 90, 4): GramAttention(64, 32, 32, 4, 3),
    ("forward", 100, 2): GramAttention(64, 256, 64, 8, 3),
    ("forward", 100, 4): GramAttention(64, 32, 32, 4, 3),
    ("weights", 80, 2): GramAttention(64, 256, 64, 8, 2),
    ("weights", 80, 4): GramAttention(64, 32, 32, 4, 3),  # three tf32 products need six operands
    ("weights", 90, 2): GramAttention(64, 256, 64, 8, 3),
    ("weights", 90, 4): GramAttention(64, 32, 32, 4, 3),
    ("weights", 100, 2): GramAttention(64, 256, 64, 8, 3),
    ("weights", 100, 4): GramAttention(64, 32, 32, 4, 3),
}
GRAM_ATTENTION_SMALL = {
    2: GramAttention(64, 64, 64, 4, 3),
    4: GramAttention(64, 32, 32, 4, 3),
}  # for images that fit these tiles


def gram_attention_config(kernel: str, n: int, patches: Tensor) -> GramAttention:
    itemsize = patches.element_size()
    if n <= GRAM_ATTENTION_SMALL[itemsize].block_m:
        return GRAM_ATTENTION_SMALL[itemsize]
    entry = GRAM_ATTENTION[kernel, newest({number for _, number, _ in GRAM_ATTENTION}, patches.device), itemsize]
    return entry._replace(block_m=min(entry.block_m, power_of_two(n)))


class Gram(NamedTuple):
    """Side of a square tile of `gram_kernel`, step along D, and compile options."""

    block: int
    block_d: int
    warps: int
    stages: int


GRAM = {2: Gram(128, 64, 8, 3), 4: Gram(64, 32, 8, 3)}  # by bytes per element
GRAM_SMALL = {2: Gram(64, 64, 4, 3), 4: Gram(64, 32, 8, 3)}  # for images that would leave larger tiles half empty


def gram_config(n: int, itemsize: int) -> Gram:
    return GRAM[itemsize] if n > GRAM_SMALL[itemsize].block else GRAM_SMALL[itemsize]


class NormTerm(NamedTuple):
    """Side of a square tile of `norm_term_kernel`, step along the texts, and compile options.

    `registers`: the limit per thread that lets two programs share an SM; 0 leaves it to the compiler.
    """

    block: int
    block_k: int
    warps: int
    stages: int
    registers: int = 0


# (architecture, bytes per element) to configuration, as `CONFIGS`.
NORM_TERM = {
    (80, 2): NormTerm(128, 32, 8, 4),
    (80, 4): NormTerm(64, 32, 4, 3),
    (90, 2): NormTerm(128, 32, 8, 4, 128),
    (90, 4): NormTerm(64, 32, 4, 3),
    (100, 2): NormTerm(128, 64, 8, 3),
    (100, 4): NormTerm(64, 32, 4, 3),
}
NORM_TERM_SMALL = {
    2: NormTerm(64, 64, 4, 3),
    4: NormTerm(64, 32, 4, 3),
}  # for images that would leave larger tiles half empty
NORM_TERM_ALIGNMENT = 8  # rows of the matrices C are a multiple of this many elements
PACKED_ALIGNMENT = 16  # rows of attention, Gram matrices and C of packed images are a multiple of this many elements


class PatchTile(NamedTuple):
    """Tile of patches and dimensions of a gradient, step along the summed axis, and compile options."""

    block_n: int
    block_d: int
    step: int
    warps: int
    stages: int


# By bytes per element of C; the step counts patches.
NORM_TERM_PRODUCT = {2: PatchTile(128, 128, 64, 8, 3), 4: PatchTile(64, 64, 32, 4, 3)}
# By bytes per element of the patches; the step counts texts. Not timed.
MAX_PATCHES = {2: PatchTile(64, 128, 64, 4, 3), 4: PatchTile(64, 64, 32, 4, 3)}
# Packed patches have a run of rows each, which takes registers: the other tiles would spill.
MAX_PATCHES_PACKED = {2: PatchTile(64, 128, 32, 8, 3), 4: PatchTile(64, 64, 32, 8, 3)}


def max_texts(d: int) -> dict[str, int]:
    """Return the tile of `max_texts_kernel`, with eight elements of each image per thread."""
    block_d = min(128, max(16, power_of_two(d)))
    return dict(TEXTS=1024 // block_d, IMAGES=4, BLOCK_D=block_d)


def listed(n: int) -> tuple[int, int]:
    """Return the pairs and patches of a tile of scores in memory, 16 elements per thread."""
    block_n = min(256, max(16, power_of_two(n)))
    return 2048 // block_n, block_n


def sum_rows(d: int) -> tuple[int, int]:
    """Return the rows that `sum_rows_kernel` adds at once and their dimensions, eight elements per thread."""
    block_d = min(128, max(16, power_of_two(d)))
    return 1024 // block_d, block_d


def norm_term_config(n: int, itemsize: int, device: torch.device) -> NormTerm:
    """Return the entry for N patches; `itemsize`: bytes per element of the operands of the product."""
    entry = NORM_TERM[newest({number for number, _ in NORM_TERM}, device), itemsize]
    return entry if n > NORM_TERM_SMALL[itemsize].block else NORM_TERM_SMALL[itemsize]


def config(kernel: str, patches: Tensor, texts: Tensor, padded: bool = False) -> Config:
    """Return the entry of the table, with smaller tiles for fewer texts or dimensions."""
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
    """Return the newest of them that is not newer than the device, or the oldest if all are newer."""
    return max(x for x in architectures if x <= max(architecture(device), min(architectures)))


@functools.lru_cache(maxsize=1024)
def images_per_run(b: int, n: int, text_tiles: int, block_p: int, programs: int) -> int:
    """Return the images per run of a program with the fewest rounds of tiles, counting the waste of the last tile."""

    def rounds(run: int) -> int:
        return ceil_div(text_tiles * ceil_div(b, run), programs) * ceil_div(run * n, block_p)

    return min(range(1, min(b, 64) + 1), key=rounds)


def images_of_a_tile(n: int, block_p: int) -> int:
    """Return the most images that a tile of rows can touch, if the first tile starts with an image."""
    return 1 if n % block_p == 0 else (block_p - 2) // n + 2


def interpreted() -> bool:
    """Return True if Triton's interpreter runs the kernels, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


@functools.cache
def architecture(device: torch.device) -> int:
    """Return ten times the compute capability; AMD and the interpreter have none and count as an A100."""
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
    """Return True if both are matrices of evenly spaced, contiguous rows that are aligned to 16 bytes."""

    def aligned(x: Tensor) -> bool:
        rows = x.stride(-2)
        return (
            x.stride(-1) == 1 and rows >= x.shape[-1] and rows * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
        )

    flat = len(patches) == 1 or patches.stride(0) == patches.shape[1] * patches.stride(1)
    return flat and aligned(patches) and aligned(texts)


def alignment(x: Tensor) -> int:
    """Return the number of elements in 16 bytes."""
    return 16 // x.element_size()


def pitch(n: int, itemsize: int) -> int:
    """Return the stride of rows of `n` elements that makes each row begin at a multiple of 16 bytes."""
    return ceil_div(n * itemsize, 16) * 16 // itemsize


def power_of_two(x: int) -> int:
    return 1 << (x - 1).bit_length() if x > 1 else 1


def ceil_div(x: int, y: int) -> int:
    return -(-x // y)
