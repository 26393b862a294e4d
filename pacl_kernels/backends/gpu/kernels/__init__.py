"""The Triton kernels. `../triton.py` launches them in the order of `../order.py`; docs/triton.md draws the tiles.

Texts are the rows of a tile and patches its columns, so that sums over patches stay in the registers of a thread. The
operands are raw; the two inverse norms are applied after the product. The patches of all images lie one after another:
a tile may end within an image, and only the last tile of a run of images is padded. Images of at most 64 patches are
instead padded to a power of two (`PAD`), several to a tile.

    P [B, N, D]  T [K, D]  MASK [B, N]  PHI, STATE, G [B, K]  INV_P [B N]  INV_T [K]      sizes and strides in elements

`do_not_specialize` names the numbers and slice addresses that depend on B, N or K. Otherwise Triton compiles again when
one of them becomes a multiple of 16, and the last batch of an epoch would wait for that.

STATE is what the backward needs besides φ. For `dot` it is the entropy of the attention in bits, (lse(s / τ) - φ / τ)
/ ln 2. The entropy is small where τ is small, unlike the log-sum-exp, so `a = exp2((s - φ) log2(e) / τ - STATE)` loses
no precision. For `cosine` STATE is the log-sum-exp in bits, for `max` the index of the winning patch.
"""

from .attention import attention_kernel
from .cosine import cosine_forward_from_attention_kernel, cosine_weights_from_attention_kernel, gram_kernel
from .forward import compatibility_forward_kernel
from .largest import max_patches_kernel, max_texts_kernel
from .listed import listed_forward_kernel, listed_weights_kernel, sum_rows_kernel
from .loss import loss_backward_kernel, shifted_logsumexp_kernel, sigmoid_loss_kernel
from .norm_term import DTYPES, norm_term_kernel, norm_term_product_kernel
from .packed import packed_forward_kernel
from .rows import inverse_norms_kernel, project_out_kernel
from .sigmoid import sigmoid_weights_kernel
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
    "listed_forward_kernel",
    "listed_weights_kernel",
    "loss_backward_kernel",
    "max_patches_kernel",
    "max_texts_kernel",
    "norm_term_kernel",
    "norm_term_product_kernel",
    "packed_forward_kernel",
    "project_out_kernel",
    "shifted_logsumexp_kernel",
    "sigmoid_loss_kernel",
    "sigmoid_weights_kernel",
    "sum_rows_kernel",
    "upsample_argmax_kernel",
]
