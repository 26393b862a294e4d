"""Build the emulator of tests/kernels/cuda as a module: the CUDA part of `pacl_kernels._native`, run on the host."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
SOURCES = ("tests/kernels/cuda/emulator.cpp", "tests/kernels/cuda/emulated.cpp")
FLAGS = ("-std=c++20", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-DPACL_CUDA")  # as in a build with nvcc
# Enable float16 and FMA contraction where the processor has them, so that tests see the rounding of nvcc's code.
FLAGS += ("-march=native", "-ffp-contract=fast")


def load(folder: Path) -> ModuleType:
    """Load the module from `folder`; build it there first if it is missing."""
    path = folder / "emulated.so"
    if not path.exists():
        _build(path)
    spec = importlib.util.spec_from_file_location("emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build(path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    # torch brings the headers of pybind11.
    folders = (
        ROOT / "csrc",
        ROOT / "tests/kernels/cuda",
        Path(torch.__file__).parent / "include",
        sysconfig.get_path("include"),
    )
    half = path.with_suffix(".half")  # an interrupted build must not leave a file with the final name
    command = [compiler, *FLAGS, *(f"-I{folder}" for folder in folders), *(str(ROOT / source) for source in SOURCES)]
    subprocess.run([*command, "-o", str(half)], check=True)
    half.rename(path)
