"""Tests of the Hopper kernels without a GPU: how the plan divides the work, and what the compiler generates."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from pacl_kernels.backends.gpu import hopper
from pacl_kernels.native import fingerprint

ROOT = Path(__file__).parents[2]
native = hopper.native()
pytestmark = pytest.mark.skipif(native is None, reason="the native module is not built")
needs_cuda = pytest.mark.skipif(not hasattr(native, "CudaLaunch"), reason="built without nvcc")


def plan(images=5, patches=196, texts=70, dim=512, epilogue="dot_forward", processors=132, cluster=0):
    sizes = dict(images=images, patches=patches, texts=texts, dim=dim)
    epilogue = getattr(native.CudaEpilogue, epilogue)
    return native.CudaPlan(**sizes, epilogue=epilogue, processors=processors, cluster=cluster)


@pytest.mark.parametrize("epilogue", ["dot_forward", "dot_forward_running_max", "cosine_weights_from_attention"])
def test_every_patch_is_in_one_column(epilogue):
    """The plan, read as by `column_of` in csrc/cuda/score.cuh, gives every patch exactly one column."""
    images = 5
    for n in range(1, 4097):
        p = plan(images=images, patches=n, epilogue=epilogue)
        assert p.width % 8 == 0 and p.pitch % 8 == 0 and p.pitch <= 256 and p.pitch * p.images_of_tile <= p.width
        tile, column = np.divmod(np.arange(p.groups * p.chunks * p.width), p.width)
        group, chunk = np.divmod(tile, p.chunks)
        part, at = np.divmod(column, p.pitch)
        image, patch = group * p.images_of_tile + part, chunk * p.width + at
        live = (part < p.images_of_tile) & (image < images) & (patch < n)
        covered = np.bincount((image * n + patch)[live], minlength=images * n)
        assert (covered == 1).all(), n
        if n > 128 and epilogue == "dot_forward":  # limits the tensor cores' work on padding
            assert p.chunks * p.width <= 1.15 * n, n


def test_everything_fits_into_shared_memory():
    for n in (1, 49, 64, 100, 128, 129, 144, 196, 197, 256, 257, 576, 729, 1369):
        for d in range(8, 2049, 8):
            for cluster, epilogue in ((1, "dot_forward"), (2, "dot_forward"), (2, "dot_weights"), (2, "attention")):
                p = plan(patches=n, dim=d, cluster=cluster, epilogue=epilogue)
                assert p.steps * 64 >= d > (p.steps - 1) * 64
                assert 3 <= p.stages <= 8 and p.shared_bytes <= 227 * 1024
                of_two = 1024 if p.width == 208 else 832
                most = 1024 if epilogue == "dot_forward" else 960 if p.consumers == 3 else of_two
                assert p.resident or d > most, "texts that fit do not travel with each step"


def test_the_products_of_an_attention():
    for n in range(1, 4097):
        p = plan(patches=n, epilogue="cosine_weights_from_attention")
        assert p.steps * 64 >= n > (p.steps - 1) * 64 and not p.resident and not p.packed
        assert p.passes == (2 if p.chunks > 1 else 1)
        assert 3 <= p.stages <= 8 and p.shared_bytes <= 227 * 1024


def test_a_box_ends_with_its_tile_or_past_its_image():
    for n in range(1, 1500):
        for epilogue in ("dot", "cosine") if native.cuda_fits_one_tile(n) else ("dot", "cosine_from_attention"):
            form, _, rest = epilogue.partition("_")
            p = plan(patches=n, epilogue=f"{form}_weights_{rest}{'_' if rest else ''}transposed")
            assert p.box_patches in (8, 32 if p.consumers == 3 else 64)
            assert p.box_patches == 8 or (not p.packed and (p.chunks == 1 or p.width % p.box_patches == 0))
            assert 3 <= p.stages <= 8 and p.shared_bytes <= 227 * 1024


def test_every_pair_is_in_one_item():
    for images in (1, 2, 3, 7, 64, 1000, 4096):
        for texts in (1, 64, 65, 128, 129, 1000, 4096):
            for processors in (1, 2, 7, 132):
                p = plan(images=images, texts=texts, processors=processors)
                assert p.text_groups * 64 * p.cluster >= texts > (p.text_groups - 1) * 64 * p.cluster
                assert p.items == p.text_groups * p.splits
                assert 1 <= p.clusters <= min(p.items, max(1, processors // p.cluster))
                # Split the groups as `Item` does; no split is empty.
                bounds = [p.groups * split // p.splits for split in range(p.splits + 1)]
                assert bounds[0] == 0 and bounds[-1] == p.groups
                assert all(begin < end for begin, end in zip(bounds, bounds[1:], strict=False))


@pytest.mark.parametrize("texts, at_least", [(4096, 0.9), (1024, 0.9), (16384, 0.9), (12288, 0.9), (96, 0.85)])
def test_all_processors_are_busy(texts, at_least):
    p = plan(images=4096, texts=texts)
    rounds = -(-p.items // p.clusters) * -(-p.groups // p.splits)  # groups of images of the busiest cluster
    assert p.text_groups * p.groups / (rounds * (132 // p.cluster)) > at_least


def test_the_fingerprint_covers_every_kind_of_source(tmp_path):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path)
    found = {fingerprint(tmp_path)}
    by_suffix = {path.suffix: path for path in (tmp_path / "csrc").rglob("*") if path.is_file()}
    assert ".def" in by_suffix
    for path in by_suffix.values():
        path.write_text(path.read_text() + "\n")
        found.add(fingerprint(tmp_path))
    assert len(found) == 1 + len(by_suffix), f"a change of one kind of {sorted(by_suffix)} is not seen"


def cuobjdump() -> str | None:
    try:
        import triton
    except ImportError:
        return shutil.which("cuobjdump")
    bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(bundled) if bundled.exists() else shutil.which("cuobjdump")


def dump(*options: str) -> str:
    tool = cuobjdump()
    if tool is None:
        pytest.skip("needs cuobjdump, which Triton's wheel brings")
    return subprocess.run([tool, *options, native.__file__], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def resources() -> dict[str, str]:
    """Map each kernel's name to its line of registers, stack and memory."""
    found = re.findall(r"Function (\S+):\n\s*(REG.*)", dump("-res-usage"))
    return {name: line for name, line in found if "score_kernel" in name}


EPILOGUES = tuple(native.CudaEpilogue.__members__) if native is not None else ()
ONLY_FLOAT16 = "cosine_forward_from_attention"  # reads and writes nothing of the patches' dtype


def are_three(epilogue: str, width: int) -> bool:
    """Return True if three warpgroups take tiles in turn; otherwise two do, with more registers each."""
    narrow = ("dot_forward", "dot_weights", "attention", "dot_sigmoid_weights", "dot_weights_transposed")
    return epilogue in narrow and width <= 200


@needs_cuda
def test_no_kernel_spills(resources):
    assert len(resources) == 2 * (3 * (10 + 3) + (2 + 1) + 2 * 6 + 4) + 4 + 2 * 6 + (10 + 3) + 6 + 4, (
        "plain, weights and attention, fewer widths with a maximum, cosine, weights and φ of an attention in memory, "
        "and in bfloat16 the sigmoid loss and transposed weights"
    )
    for name, line in resources.items():
        # Attention and sums of the widest cosine tile take 192 registers, so that others are spilled once per tile.
        # The cosine tile of 208 columns, and the weights of 200 columns (three warpgroups), spill two numbers.
        width, epilogue = (int(x) for x in re.search(r"ILi(\d+)E.*EpilogueE(\d+)E", name).groups())
        # The sigmoid loss adds a few that are the same for all tiles.
        stack = {(256, 3): 280, (256, 4): 352, (208, 4): 8, (200, 2): 8}
        stack |= {(200, 8): 32, (192, 8): 16, (256, 9): 352, (208, 9): 8, (256, 11): 304}
        stack = stack.get((width, epilogue), 0)
        found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:0 ", line)
        assert found and int(found[2]) <= stack, f"{name}: {line}"
        assert int(found[1]) == (128 if are_three(EPILOGUES[epilogue], width) else 168), f"{name}: {line}"


@needs_cuda
@pytest.mark.parametrize(
    "element, kind, epilogue",
    [
        *(("13__nv_bfloat16", "BF16", epilogue) for epilogue in EPILOGUES if epilogue != ONLY_FLOAT16),
        *(("6__half", "", epilogue) for epilogue in EPILOGUES if not re.search("sigmoid|transposed", epilogue)),
    ],
)
def test_the_machine_code(resources, element, kind, epilogue):
    of_gram = {"64x200x16.F32"} if "cosine" in epilogue else set()
    shapes = {f"64x200x16.F32{'.' + kind if kind else ''}"} if "from_attention" not in epilogue else set()
    kernel, epilogue = epilogue, int(getattr(native.CudaEpilogue, epilogue))
    name = next(n for n in resources if f"ILi200ELb0E{element}" in n and f"EpilogueE{epilogue}E" in n)
    code = dump("-sass", "-fun", name)
    products = re.findall(r"HGMMA\.(\S+)", code)
    assert products and set(products) == shapes | of_gram
    # Few waits mean that the compiler has not serialised the products.
    waits = len(re.findall(r"WARPGROUP\.DEPBAR", code))
    assert waits <= -(-len(products) // 4) + 2
    assert "UTMALDG.3D.MULTICAST" in code
    registers = {int(x, 16) for x in re.findall(r"USETMAXREG\S* (?:UP0, )?(0x\w+)", code)}
    assert registers == ({160, 32} if are_three(kernel, 200) else {232, 40}), "as the block's 65,536 allow"
    assert not shapes or len(re.findall(r"MUFU\.EX2", code)) >= 100, "one exponential for each element"
    spills = len(re.findall(r"\b(LDL|STL)\b", code))
    most = {"dot_weights": 6, "dot_sigmoid_weights": 40}
    assert spills <= most.get(kernel, 0), "none in a loop over columns"
    assert len(re.findall(r"MEMBAR\.ALL\.GPU", code)) <= 2, "fences belong at the ends of the kernel alone"
    if "transposed" in kernel:
        assert len(re.findall(r"UTMASTG\.3D", code)) >= 8, "a store by the copy engine for each box, full and not"
        assert len(re.findall(r"\bSTG\b", code)) <= 6, "no thread stores anything but norm factors and sums"


@needs_cuda
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_says_what_is_wrong():
    with pytest.raises(RuntimeError, match="CUDA: cuda.*: "):
        native.CudaLaunch(
            epilogue=native.CudaEpilogue.dot_forward,
            **dict(images=1, patches=1, texts=1, dim=8),
            **dict(dtype="bfloat16", cluster=0, device=0),
        )
