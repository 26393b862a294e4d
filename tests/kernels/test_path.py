"""A call reaches its kernel by a short path: it enters no file twice and has no more levels than the design."""

import pytest
import torch
from paths import path_to_kernel

from pacl_kernels import available_backends, fused_pacl_loss

FLOORS = ["loss.py", "autograd.py", "ops.py", "scoring.py"]
BACKENDS = {
    "cpu": ["backends/cpu.py"],
    "torch": ["backends/blockwise.py"],
    "triton": ["backends/gpu/lists.py", "backends/gpu/order.py", "backends/gpu/triton.py"],
}


@pytest.mark.parametrize("form", ["dot", "cosine", "max"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_path_of_the_patches(backend, form):
    if (reason := available_backends()[backend]) is not None:
        pytest.skip(reason)
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    patches, texts = torch.randn(3, 5, 16, device=device), torch.randn(3, 16, device=device)
    assert path_to_kernel(lambda: fused_pacl_loss(patches, texts, 10.0, form=form, backend=backend)) == [
        *FLOORS,
        *BACKENDS[backend],
    ]
