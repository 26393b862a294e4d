"""Constants, scalar arguments, FMA, rounding, and several sums in one pass."""

import triton
import triton.language as tl

from ..tiles import interpreted

LOG2E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def scalar(X, IS_TENSOR: tl.constexpr):
    """Return a number unchanged, the value at an address, or 0 for None."""
    if X is None:
        return 0.0
    elif IS_TENSOR:
        return tl.load(X).to(tl.float32)
    else:
        return X


@triton.jit
def fma(x, y, z):
    """Return x y + z, rounded once, in kernels that are compiled without FMA contraction."""
    if INTERPRETED:  # the interpreter's tl.fma does not accept plain numbers
        return x * y + z
    else:
        return tl.fma(x, y, z)


@triton.jit
def log_one_plus(x):
    """Return log(1 + x) for x in [0, 1], with all digits of a small x, which 1 + x rounds away."""
    above = 1.0 + x
    return tl.where(above == 1.0, x, tl.log(above) * x / tl.where(above == 1.0, 1.0, above - 1.0))


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def sum_pair(a, b, AXIS: tl.constexpr):
    """Return both sums in one pass, so that neither operand is ever whole in registers."""
    if INTERPRETED:  # the interpreter runs tl.reduce as a loop over elements
        return tl.sum(a, AXIS), tl.sum(b, AXIS)
    else:
        return tl.reduce((a, b), AXIS, _add_pairs)


@triton.jit
def _add_threes(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def sum_three(a, b, c, AXIS: tl.constexpr):
    if INTERPRETED:
        return tl.sum(a, AXIS), tl.sum(b, AXIS), tl.sum(c, AXIS)
    else:
        return tl.reduce((a, b, c), AXIS, _add_threes)


@triton.jit
def round_to(x, TYPE: tl.constexpr):
    """Round float32 to the nearest of that type; in the interpreter, the plain cast to bfloat16 would truncate."""
    if INTERPRETED and TYPE == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, nearest, x)
    return x.to(TYPE)
