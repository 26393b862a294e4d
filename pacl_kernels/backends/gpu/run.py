"""What the Triton backend's launches share: the kernels, how one is started, and the small ones around each product."""

from __future__ import annotations

import contextlib
import functools
from types import ModuleType

import torch
from torch import Tensor

from . import tiles

_INTERPRETER_PROGRAMS = 3  # fewer than items, so that programs of the interpreter loop as those of a GPU do


@functools.cache
def kernels() -> ModuleType:
    """The kernels' package, which imports triton: not before a kernel is needed."""
    from . import kernels as package

    return package


def run(
    kernel, programs: int, arguments: tuple, constants: dict, warps=4, stages=3, registers: int = 0, fused: bool = True
) -> None:
    """`fused`: whether a product may be added without being rounded."""
    limit = {"maxnreg": registers} if registers else {}  # of NVIDIA's alone
    options = dict(num_warps=warps, num_stages=stages, enable_fp_fusion=fused)
    kernel[(programs,)](*arguments, **constants, **options, **limit)


def programs(device: torch.device, per_processor: int) -> int:
    return _INTERPRETER_PROGRAMS if device.type == "cpu" else processors(device) * per_processor


@functools.cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_device(x: Tensor):
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def ranges(size: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(start + step, size)) for start in range(0, size, step)]


def mask_strides(mask: Tensor | None) -> tuple[int, int]:
    return (0, 0) if mask is None else mask.stride()


def images_of_a_tile(n: int, block_p: int) -> int:
    """Most images that a tile of rows touches, where tiles start at the border of an image."""
    return 1 if n % block_p == 0 else (block_p - 2) // n + 2


def variants(temperature) -> tuple[bool, ...]:
    """Whether with a running maximum: a temperature on the device is not read, both are launched and one returns."""
    if isinstance(temperature, Tensor):
        return (False, True)
    return (temperature < kernels().PLAIN_TEMPERATURE.value,)


def float32_precision() -> str:
    """How products of float32 are computed: in one tf32 product where torch's own setting allows it, else in three."""
    if torch.version.hip is not None:
        return "ieee"
    if hasattr(
        torch.backends.cuda.matmul, "fp32_precision"
    ):  # torch 2.9; once it is set, the older setting is an error
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def operands(patches: Tensor, texts: Tensor, chosen: tiles.Config) -> tuple:
    """Patches and texts as the kernels take them, and whether as descriptors of bulk copies (TMA)."""
    (b, n, d), k = patches.shape, len(texts)
    if not (tiles.has_bulk_copies(patches.device) and tiles.are_describable(patches, texts)):
        return patches, texts, False
    from triton.tools.tensor_descriptor import TensorDescriptor

    return (
        TensorDescriptor(patches, [b * n, d], [patches.stride(1), 1], [chosen.block_p, chosen.block_d]),
        TensorDescriptor(texts, [k, d], [texts.stride(0), 1], [chosen.block_t, chosen.block_d]),
        True,
    )


def inverse_norms(x: Tensor, mask: Tensor | None, scaled: tuple = (None, None)) -> Tensor:
    """1 / ‖x‖ `[B N]` of `[B, N, D]`; `scaled`: room for rows whose norm is near 1, and for their 1 / ‖x‖."""
    rows_count, d = x.shape[0] * x.shape[1], x.shape[2]
    inverse = x.new_empty(rows_count, dtype=torch.float32)
    block_d, rows = _row_blocks(d)
    arguments = (x, mask, inverse, *scaled, rows_count, x.shape[1], d, *x.stride(), *mask_strides(mask))
    constants = dict(ROWS=rows, BLOCK_D=block_d, HAS_MASK=mask is not None)
    run(kernels().inverse_norms_kernel, tiles.ceil_div(rows_count, rows), arguments, constants)
    return inverse


def project_out(
    grad: Tensor, x: Tensor, inverse: Tensor, out: Tensor, mask: Tensor | None, scale: Tensor | None, scaled_x=False
) -> None:
    """`inverse`: 1 / ‖x‖ of the rows; `scaled_x`: whether `grad` is that of the rows which `inverse_norms` scaled."""
    rows_count, d = grad.shape
    block_d, rows = _row_blocks(d)
    arguments = (grad, x, inverse, out, mask, scale, rows_count, x.shape[1], d, *x.stride(), *mask_strides(mask))
    constants = dict(ROWS=rows, BLOCK_D=block_d, HAS_MASK=mask is not None, SCALED=scale is not None, SCALED_X=scaled_x)
    run(kernels().project_out_kernel, tiles.ceil_div(rows_count, rows), arguments, constants)


def _row_blocks(d: int) -> tuple[int, int]:
    """Step along D, and rows of a program."""
    block_d = min(512, max(16, tiles.power_of_two(d)))
    return block_d, 2048 // block_d


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, whatever their dtype."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda and "dtype" in torch.ops.aten.mm.overloads():  # torch 2.8
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
