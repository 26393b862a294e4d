"""The machine code of the Triton kernels has no spills, uses the tensor cores, and its shared memory fits."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from gpu import on_gpu, random_inputs, step
from problems import FORMS

from pacl_kernels.backends.gpu import launch
from pacl_kernels.backends.gpu import triton as backend

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
SOURCES = ROOT / "pacl_kernels" / "backends" / "gpu" / "kernels"
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
TENSOR_CORE = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}
SCORES = ("compatibility_forward", "dot_weights", "attention", "sigmoid_weights")  # kernels with a tile of scores


def _run(*arguments) -> str:
    """Return the output of Python without Triton's interpreter, which the other tests use."""
    if backend._triton_version() is None or backend._triton_version() < (3, 6):
        pytest.skip("ahead-of-time compilation is checked with Triton 3.6 and later")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=BENCHMARKS, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module", params=["90", pytest.param("80,90,100", marks=pytest.mark.long)])
def rows(request, tmp_path_factory) -> list[dict]:
    path = tmp_path_factory.mktemp("report") / "report.json"
    _run("kernel_report.py", "--json", path, "--targets", request.param)
    return json.loads(path.read_text())


# This program prints the kernels that other batch sizes than 128 would compile, by Triton's own rules.
UNSEEN = """
from kernel_report import Variant, launches
for form in ("dot", "cosine", "max"):
    masked = dict(mask=True, patches=49, tensor_tau=True)
    for options in (dict(), masked, dict(dtype="fp16", patches=144), dict(lists=64)):
        variant = Variant(form, **options)
        known = set(map(str, launches(variant, 90, 128)))
        for batch in (129, 257, 1000, 4096):
            print(*set(map(str, launches(variant, 90, batch))) - known, sep="\\n", end="")
"""


def test_a_batch_of_unseen_size_compiles_nothing():
    assert _run("-c", UNSEEN) == ""


@on_gpu
@pytest.mark.parametrize("form", FORMS)
def test_a_batch_of_unseen_size_compiles_nothing_on_a_gpu(form):
    """A new batch size compiles nothing once there are enough texts for whole tiles."""
    step(random_inputs(128, 196, 128), form)
    names = [name for name in vars(launch.kernels()) if name.endswith("_kernel")]

    def compiled():
        caches = [getattr(launch.kernels(), name).device_caches for name in names]
        return sum(len(cache[0]) for devices in caches for cache in devices.values())

    before = compiled()
    for b in (129, 130, 144, 200, 257, 1000):
        step(random_inputs(b, 196, 128), form)
    assert compiled() == before


def test_every_kernel_and_target_is_there(rows):
    targets = {row["target"] for row in rows}
    assert targets in ({"sm_90"}, set(SHARED)) and 30 <= len(rows) <= 120
    tiled = {"compatibility_forward", "dot_weights", "attention", "norm_term", "sigmoid_weights"}
    tiled |= {"cosine_forward_from_attention", "cosine_weights_from_attention"}
    tiled |= {"max_patches", "max_texts", "upsample_argmax"}
    for target in targets:
        assert tiled <= {row["kernel"] for row in rows if row["target"] == target}
        assert {"bf16", "fp32"} <= {row["dtype"] for row in rows if row["target"] == target}
    source = "\n".join(path.read_text() for path in SOURCES.glob("*.py"))
    shipped = set(re.findall(r"^def (\w+)_kernel\(", source, re.MULTILINE))
    assert {row["kernel"] for row in rows} == shipped


def test_nothing_spills(rows):
    assert [row for row in rows if row["spills"]] == []


def test_products_run_on_the_tensor_cores(rows):
    for row in rows:
        products = row["kernel"].startswith((*SCORES, "packed_forward", "cosine_", "gram", "norm_term", "max_patches"))
        assert row["tensor_core"] == (TENSOR_CORE[row["target"]] if products else "none"), row


def test_the_programs_that_share_a_multiprocessor_fit(rows):
    for row in rows:
        assert 0 < row["registers"] <= 255 and row["shared_bytes"] <= SHARED[row["target"]], row
        if row["kernel"] in SCORES:
            expected = 2 if "warps 4" in row["config"] else 1
            assert row["programs_per_sm"] >= expected, row


# This program prints the PTX of the kernels that subtract scores before an exponential, at a small temperature.
DIFFERENCES = """
import json
from kernel_report import Variant, compiled, launches
kinds = "compatibility_forward_kernel", "dot_weights_kernel", "attention_kernel"
variants = (Variant(tau=0.01), Variant(form="cosine", tau=0.01, dtype="fp32", patches=48))
found = {str(x): x for variant in variants for x in launches(variant, 90) if x.kernel in kinds}
print(json.dumps([(x.kernel, compiled(x).asm["ptx"]) for x in found.values()]))
"""


def _differences(ptx: str) -> list[tuple[str, str]]:
    """Return, for each exponential in PTX, the subtraction before it and the instruction that made the minuend."""
    made = {to: (name, rest.split(", ")) for name, to, rest in re.findall(r"^\t([\w.]+) \t(%\w+), (.*);", ptx, re.M)}

    def origins(x: str, through: tuple[str, ...]) -> list[str]:
        """Return the nearest registers behind x that are made by other instructions than `through`."""
        found, left, seen = [], [x], set()
        while left:
            x = left.pop()
            if x in made and x not in seen and made[x][0].startswith(through):
                left += [y for y in made[x][1] if not y.startswith("%p")]
            elif x in made and x not in seen:
                found.append(x)
            seen.add(x)
        return found

    found = []
    for name, operands in list(made.values()):
        for x in origins(operands[0], ("mul.", "fma.", "mov.")) if name.startswith("ex2.") else ():
            if made[x][0].startswith("sub."):
                found.append((made[x][0], *(made[y][0] for y in origins(made[x][1][0], ("mov.", "selp."))[:1])))
    return found


def test_differences_of_scores_are_taken_of_rounded_products():
    """The kernels subtract φ from a rounded score, so that s - φ is exactly 0 where the two are equal.

    An FMA of product and subtraction would leave a rounding error there, which the temperature magnifies. Both
    instructions need an explicit `.rn`: ptxas fuses a product and a sum without it.
    """
    kernels = json.loads(_run("-c", DIFFERENCES))
    assert len(kernels) == 5, "forward, weights, and both kinds of attention"
    for name, ptx in kernels:
        found = _differences(ptx)
        assert found.count(("sub.rn.f32", "mul.rn.f32")) >= 16, (name, set(found))
        assert all(difference == "sub.rn.f32" for difference, *_ in found), (name, set(found))
