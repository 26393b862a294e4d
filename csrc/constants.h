// Numbers that Python and Triton have as well: `_native.constants()` gives them to tests/test_constants.py.
#pragma once

namespace pacl {

// From this τ on |s / τ| <= 20: e^(s / τ) and its sums need no offset, and no bound on the exponent. Smaller τ subtract
// the running maximum.
constexpr float kRunningMaxBelow = 0.05f;

constexpr float kMinNormSquared = 1e-24f;  // a shorter patch or text has no direction: similarity 0, gradient 0
constexpr float kMinPooledNorm = 1e-6f;    // floor of the pooled patch's norm in the cosine form

// Upsampling: what is beyond counts as this. An infinite score times a fraction of 0 would be NaN.
constexpr float kLargestScore = 0x1p120f;

constexpr float kLog2e = 1.4426950408889634f;

}  // namespace pacl
