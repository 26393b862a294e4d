"""The Triton kernels. `../triton.py` launches them, `../order.py` says in which order; docs/triton.md draws the tiles.

A tile has texts as its rows and patches as its columns, so that sums over patches run along a thread's own registers.
Operands are raw; the two inverse norms enter behind the product. The patches of all images lie one after the other: a
tile may end in the middle of an image, and nothing is padded but the last tile of a run of images. Images of at most
64 patches are padded to a power of two instead (`PAD`), several to a tile.

    P [B, N, D]  T [K, D]  MASK [B, N]  PHI, STATE, G [B, K]  INV_P [B N]  INV_T [K]      sizes and strides in elements

`do_not_specialize` names what depends on B, N or K, numbers and the addresses of slices: Triton would compile again
where one is a multiple of 16 and was not before, and the last batch of an epoch would wait for that.

STATE is what the backward needs beside φ: for `dot` the entropy of the attention in bits, lse(s / τ) - φ / τ over ln 2.
Unlike the log-sum-exp it is small where τ is, so `a = exp2((s - φ) log2(e) / τ - STATE)` loses nothing. For `cosine`
the log-sum-exp in bits, for `max` the index of the winning patch.
"""

from .attention import attention_kernel
from .cosine import cosine_forward_from_attention_kernel, cosine_weights_from_attention_kernel, gram_kernel
from .forward import compatibility_forward_kernel
from .largest import max_patches_kernel, max_texts_kernel
from .loss import loss_backward_kernel, shifted_logsumexp_kernel, sigmoid_loss_kernel
from .norm_term import DTYPES, norm_term_kernel, norm_term_product_kernel
from .rows import inverse_norms_kernel, project_out_kernel
from .upsample import upsample_argmax_kernel
from .weights import dot_weights_kernel

__all__ = [
    "DTYPES",
    "attention_kernel",
    "compatibility_forward_kernel",
    "cosine_forward_from_attention_kernel",
    "cosine_weights_from_attention_kernel",
    "dot_weights_kernel",
    "gram_kernel",
    "inverse_norms_kernel",
    "loss_backward_kernel",
    "max_patches_kernel",
    "max_texts_kernel",
    "norm_term_kernel",
    "norm_term_product_kernel",
    "project_out_kernel",
    "shifted_logsumexp_kernel",
    "sigmoid_loss_kernel",
    "upsample_argmax_kernel",
]
