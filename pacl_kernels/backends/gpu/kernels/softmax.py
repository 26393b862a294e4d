"""Sums of the softmax over the patches of an image, and φ and entropy of the `dot` form."""

import triton
import triton.language as tl

from ....constants import RUNNING_MAX_BELOW as BELOW
from .shared import sum_pair

RUNNING_MAX_BELOW = tl.constexpr(BELOW)


@triton.jit
def add_softmax(
    s, inside, scale, total, weighted, largest,
    SELECT: tl.constexpr, RUNNING_MAX: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """Add the columns `inside` of a tile of cosines to Σ e, Σ e s and, if RUNNING_MAX, the running maximum of s."""
    if RUNNING_MAX:
        known = tl.where(inside, s, float("-inf")) if SELECT else s
        raised = tl.maximum(largest, tl.max(known, AXIS))
        anchor = tl.where(raised == float("-inf"), 0.0, raised)  # no patch so far: every e is 0
        shrink = tl.exp2((largest - anchor) * scale)
        e = tl.exp2((known - tl.expand_dims(anchor, AXIS)) * scale)
        total *= shrink
        weighted *= shrink
        largest = raised
    else:
        e = tl.exp2(s * scale)
    es = e * s
    if SELECT:  # select, do not multiply: other columns may be NaN
        e = tl.where(inside, e, 0.0)
        es = tl.where(inside, es, 0.0)
    e_sum, es_sum = sum_pair(e, es, AXIS)
    return total + e_sum, weighted + es_sum, largest


@triton.jit
def softmax_result(total, weighted, largest, scale, RUNNING_MAX: tl.constexpr):
    """Return φ and the entropy in bits; both are 0 for an image without a patch."""
    empty = total == 0.0
    phi = tl.where(empty, 0.0, weighted / tl.where(empty, 1.0, total))
    offset = (tl.where(empty, 0.0, largest) - phi) * scale if RUNNING_MAX else -phi * scale
    return phi, tl.where(empty, 0.0, tl.log2(tl.where(empty, 1.0, total)) + offset)
