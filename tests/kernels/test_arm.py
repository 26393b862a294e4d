"""Tests of the CPU kernels compiled for Arm and run in QEMU, where a cross compiler and qemu-user are installed.

On Debian: apt-get install g++-aarch64-linux-gnu qemu-user. They take 15 seconds, most of it to compile.
"""

import shutil
import subprocess
from pathlib import Path

import accuracy
import numpy as np
import pytest
import torch
from problems import FORMS, Case, make

ROOT = Path(__file__).parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
ISAS = {"baseline": (), "neonbf16": ("-march=armv8.2-a+bf16",)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of csrc/dtype.h
CASES = [
    Case(3, 50, 64, K=33),
    Case(2, 197, 130, K=49),
    Case(49, 15, 64, K=49, tau=0.01),
    Case(9, 50, 65, K=9, tau=10.0),
    Case(6, 30, 70, K=6, data="norms"),
    Case(4, 24, 65, K=51, tau=0.01, data="duplicated"),
    Case(4, 9, 70, K=6, tau=1e-12),
]
pytestmark = pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"needs {COMPILER} and {EMULATOR}"
)


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """Compile csrc/cpu for Arm, both instruction sets, with the flags of CMakeLists.txt."""
    folder = tmp_path_factory.mktemp("arm")
    command = [COMPILER, "-std=c++20", "-O2", "-ffp-contract=off", "-fvisibility=hidden", f"-I{ROOT / 'csrc'}"]
    for isa, flags in ISAS.items():
        kernels = [*flags, f"-DPACL_ISA={isa}", "-O3", "-c", ROOT / "csrc/cpu/kernels.cpp", "-o", folder / f"{isa}.o"]
        subprocess.run([*command, *kernels], check=True)
    sources = [ROOT / f"csrc/cpu/{name}.cpp" for name in ("compatibility", "max", "dispatch")]
    sources = [*sources, ROOT / "tests/kernels/emulated_arm.cpp", *(folder / f"{isa}.o" for isa in ISAS)]
    subprocess.run([*command, "-static", "-DPACL_ARM_BF16", *sources, "-o", folder / "program"], check=True)
    return folder / "program"


def run(program: Path, isa: str, problem) -> dict[str, torch.Tensor]:
    patches, texts, temperature = problem.patches, problem.texts, float(problem.attn_temperature)
    (b, n, d), k = patches.shape, len(texts)
    head = np.array([FORMS.index(problem.form), DTYPES.index(patches.dtype), b, n, k, d]).tobytes()
    arrays = [x.detach().contiguous().view(torch.uint8).numpy().tobytes() for x in (patches, texts, problem.upstream)]
    given = head + np.float32(temperature).tobytes() + b"".join(arrays)
    command = [EMULATOR, "-cpu", "max", "-E", f"PACL_CPU_ISA={isa}", program]
    out = bytearray(subprocess.run(command, input=given, stdout=subprocess.PIPE, check=True).stdout)
    phi, rest = torch.frombuffer(out[: 4 * b * k], dtype=torch.float32).view(b, k), out[4 * b * k : -4]
    halves = torch.frombuffer(rest, dtype=patches.dtype).split([patches.numel(), texts.numel()])
    gradients = {"patches": halves[0].view_as(patches), "texts": halves[1].view_as(texts)}
    return {"value": phi, **gradients, "attn_temperature": torch.frombuffer(out[-4:], dtype=torch.float32)[0]}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("form", FORMS[:2])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_accuracy(isa, case, dtype, form, program, monkeypatch):
    expected = accuracy.Expected(make(case, form, "compatibility", dtype))
    monkeypatch.setattr(accuracy, "evaluate", lambda problem, *_: run(program, isa, problem))
    expected.check(isa)


def test_bfloat16_dot_products_are_used(program):
    """The kernels of neonbf16 multiply with bfdot, those of the baseline do not."""
    for isa in ISAS:
        code = subprocess.run(["aarch64-linux-gnu-objdump", "-d", program.with_name(f"{isa}.o")], capture_output=True)
        assert (b"bfdot" in code.stdout) == (isa == "neonbf16")
