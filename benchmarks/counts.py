"""Count the work of a step of the loss, and look up or measure the machine's peak, for `throughput.py`.

One unit is the product of all patches with all texts, 2·B·N·K·D floating-point operations. A training step needs 4
units (forward, recomputed scores, gradient of the patches, gradient of the texts), or 3 with frozen texts. The max form
needs one: its backward adds one row of D for each pair and gradient, 1/N of a unit each.
"""

from __future__ import annotations

import torch

from pacl_kernels.native import native

# NVIDIA's data sheets (A100 SXM, H100 SXM, H200 SXM): FP32, and half of the tensor figures printed "with sparsity".
CUDA_PEAKS = {
    "NVIDIA A100-SXM4": {"float32": 19.5e12, "bfloat16": 312e12, "float16": 312e12},
    "NVIDIA H100 80GB HBM3": {"float32": 67e12, "bfloat16": 989e12, "float16": 989e12},
    "NVIDIA H200": {"float32": 67e12, "bfloat16": 989e12, "float16": 989e12},
}


def unit(args) -> int:
    return 2 * args.batch**2 * args.patches * args.dim


def units(args) -> dict[str, float]:
    """Return the units that grow with B K N; for the cosine the pooled patch's norm adds N/D, and 2N/D in backward.

    The max form: one product, and one row of D per pair for each of its gradients.
    """
    if args.form == "max":
        return {"forward": 1, "step": 1 + (1 if args.frozen_texts else 2) / args.patches}
    norm = min(args.patches / args.dim, 1.0) if args.form == "cosine" else 0.0
    return {"forward": 1 + norm, "step": (3 if args.frozen_texts else 4) + 3 * norm}


def operations(args) -> dict[str, float]:
    """Return the work of the fused loss in units, the basis of the shares of the peak.

    For the cosine that is the cheaper of two ways to the pooled patch's norm. The first uses the Gram matrix G = P̂ P̂ᵀ
    of each image and computes half of every symmetric matrix: G takes N/2K, in forward and again in backward, aᵀ G a
    N/2D, and in backward G a N/D, C = Σ w a aᵀ N/2D, C P̂ N/K. The second uses the pooled patches v = Σ a p̂: v takes 1
    in forward and again in backward, p̂ · (t̂ - (φ / r) v) takes 1, and so does v's part of the patches' gradient.
    """
    if args.form != "cosine":
        return units(args)
    n, d, k, products = args.patches, args.dim, args.batch, 3 if args.frozen_texts else 4
    gram = {"forward": 1 + n / 2 / d + n / 2 / k, "step": products + 2 * n / d + 2 * n / k}
    pooled = {"forward": 2, "step": products + 4}
    return min(gram, pooled, key=lambda way: way["step"])


def machine_peak(args) -> float | None:
    """Return the machine's floating-point operations per second: measured on a CPU, from the data sheet on a GPU."""
    if args.torch_device.type == "cuda":
        name = torch.cuda.get_device_name()
        return next((peaks[args.dtype] for prefix, peaks in CUDA_PEAKS.items() if name.startswith(prefix)), None)
    if native() is None:
        return None
    try:
        return native().fma_peak(args.dtype, args.threads, 0.1)
    except ValueError:  # no instruction for this dtype
        return None
