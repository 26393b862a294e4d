"""The emulator of tests/cuda as a library, with the interface of the native module's `CudaScoreCall`."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from pacl_kernels.backends.gpu import hopper

ROOT = Path(__file__).parent.parent
INT, ADDRESS, DOUBLE = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double


class _Struct(ctypes.Structure):
    _fields_ = [
        *((name, INT) for name in ("images", "patches_per_image", "texts_count", "dim", "epilogue", "half")),
        *((name, ADDRESS) for name in ("patches", "texts")),
        *((name, INT) for name in ("patch_stride_image", "patch_stride_row", "text_stride")),
        *((name, ADDRESS) for name in ("inverse_norms", "inverse_texts", "mask")),
        *((name, INT) for name in ("mask_stride_image", "mask_stride_row")),
        ("temperature", DOUBLE),
        ("temperature_at", ADDRESS),
        *((name, ADDRESS) for name in ("phi", "stat")),
        ("stride_phi", INT),
        *((name, ADDRESS) for name in ("grad_phi", "weights")),
        ("stride_weights", INT),
        *((name, ADDRESS) for name in ("scale", "temperature_sums")),
        ("masked", INT),
        ("gram", ADDRESS),
        ("stride_gram", INT),
        ("attention", ADDRESS),
        ("attention_pitch", INT),
        ("curvature", ADDRESS),
        *((name, INT) for name in ("cluster", "processors", "seed", "stages", "resident")),
        ("message", ctypes.c_char_p),
        ("message_bytes", INT),
    ]


def load(folder: Path) -> ctypes.CDLL:
    """From `folder`, where it is built unless it is there."""
    path = folder / "emulated.so"
    if path.exists():
        return ctypes.CDLL(str(path))
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    sources = [ROOT / "tests/cuda" / name for name in ("emulator.cpp", "emulated.cpp")]
    flags = ["-std=c++20", "-O2", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/cuda'}"]
    # float16 and, where the processor has them, multiply-adds fused as nvcc does, so that tests see what they do.
    flags += ["-march=native", "-ffp-contract=fast"]
    half = path.with_suffix(".half")  # what an interrupted compiler leaves has another name
    subprocess.run([compiler, *flags, *map(str, sources), "-o", str(half)], check=True)
    half.rename(path)
    return ctypes.CDLL(str(path))


class Call:
    """A launch on a device of `processors` (even, and few: each cluster should get several items)."""

    processors = 4

    def __init__(self, library, *, epilogue, sizes, dtype, patch_strides, device, stream, **fields):
        self._library, self._struct, self._epilogue = library, _Struct(**fields, epilogue=int(epilogue)), epilogue
        s = self._struct
        s.images, s.patches_per_image, s.texts_count, s.dim = sizes
        s.half, s.processors, s.resident = dtype == "float16", self.processors, -1
        s.patch_stride_image, s.patch_stride_row = patch_strides

    def plan(self):
        s = self._struct
        sizes = dict(images=s.images, patches=s.patches_per_image, texts=s.texts_count, dim=s.dim)
        return hopper.native().CudaPlan(**sizes, epilogue=self._epilogue, processors=s.processors, cluster=s.cluster)

    def make_columns(self, *, inverse_norms, mask, mask_strides, columns):
        """The emulator makes columns of its own when it launches."""
        self._struct.inverse_norms, self._struct.mask = inverse_norms, mask
        self._struct.mask_stride_image, self._struct.mask_stride_row = mask_strides

    def set_weights(self, *, weights, stride, grad_phi, scale, temperature_sums, masked):
        s = self._struct
        s.masked = masked
        s.weights, s.stride_weights = weights, stride
        s.grad_phi, s.scale, s.temperature_sums = grad_phi, scale, temperature_sums

    def set_gram(self, gram, stride):
        self._struct.gram, self._struct.stride_gram = gram, stride

    def set_attention(self, attention, pitch):
        self._struct.attention, self._struct.attention_pitch = attention, pitch

    def set_curvature(self, curvature):
        self._struct.curvature = curvature

    def launch(self, **settings):
        for name, value in settings.items():
            setattr(self._struct, name, value)
        message = ctypes.create_string_buffer(500)
        self._struct.message = ctypes.cast(message, ctypes.c_char_p)
        self._struct.message_bytes = len(message)
        assert self._library.emulated_score(ctypes.byref(self._struct)) == 0, message.value.decode()
