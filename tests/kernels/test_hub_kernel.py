"""`.ci/hub-kernel` writes a folder that Hugging Face's `kernels` loads beside the installed package."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pacl_kernels

kernels = pytest.importorskip("kernels")
SCRIPT = Path(__file__).parents[2] / ".ci" / "hub-kernel"


def write(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), str(folder)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "repository"
    done = write(folder)
    assert done.returncode == 0, done.stderr
    return folder


def loss_and_gradients(library, backend: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(4, 5, 16, generator=generator).requires_grad_()
    texts = torch.randn(4, 16, generator=generator).requires_grad_()
    loss = library.fused_pacl_loss(patches, texts, 10.0, attn_temperature=0.1, form="cosine", backend=backend)
    return [loss, *torch.autograd.grad(loss, (patches, texts))]


def operators(namespace: str) -> set[str]:
    names = [name.split("::") for name in torch._C._dispatch_get_all_op_names()]
    return {name for space, name in names if space == namespace}


@pytest.mark.parametrize("variant", ["torch-cpu", "torch-cuda"])
def test_the_loader_loads_it(variant, repository):
    """Both variants have every public name, and give the installed package's bits with `torch` and `triton`."""
    if variant == "torch-cpu":
        kernel = kernels.get_local_kernel(repository, backend="cpu")
    else:  # the variant itself, because this machine may have no GPU
        kernel = kernels.get_local_kernel(repository / "build" / variant)
    metadata = json.loads((repository / "build" / variant / "metadata.json").read_text())
    assert kernel is not pacl_kernels and kernel.__name__ == metadata["id"]
    assert kernel.__all__ == pacl_kernels.__all__ and all(hasattr(kernel, name) for name in kernel.__all__)
    assert kernel.__file__.startswith(str(repository / "build" / variant))

    backends = [name for name in ("torch", "triton") if kernel.available_backends()[name] is None]
    backends = [name for name in backends if name != "triton" or not torch.cuda.is_available()]  # inputs on the CPU
    assert "torch" in backends
    for backend in backends:
        mine = loss_and_gradients(kernel, backend)
        for got, expected in zip(mine, loss_and_gradients(pacl_kernels, backend), strict=True):
            assert torch.equal(got, expected)


def test_it_shares_nothing_with_the_installed_package(repository):
    """The copy has operators of its own, and takes no native module from the installed package."""
    kernel = kernels.get_local_kernel(repository, backend="cpu")
    assert "not built" in kernel.available_backends()["cpu"]
    mine, installed = operators(kernel.__name__), operators("pacl_kernels")
    assert mine == installed and "compatibility_forward" in mine


def test_metadata(repository):
    """The digests are those that the loader computes, and two contents have two names."""
    from kernels._rust import Digest, DigestAlgorithm, Metadata

    names = set()
    for place in sorted((repository / "build").iterdir()):
        metadata = Metadata.read_from_file(place / "metadata.json")
        Digest.hash_variant(DigestAlgorithm.SHA256, place).validate(metadata.digest)
        assert metadata.id.isidentifier() and metadata.license == "MIT"
        names.add(metadata.id)
    assert len(names) == 2


def test_a_folder_with_files_is_refused(repository):
    done = write(repository)
    assert done.returncode == 1
    assert done.stderr == f"hub-kernel: folder: got {repository}, which is not empty; expected a new folder\n"
