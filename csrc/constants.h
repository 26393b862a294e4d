// Constants that Python and Triton define as well: tests/kernels/test_constants.py compares `_native.constants()`.
#pragma once

namespace pacl {

// At this τ and above, |s / τ| <= 20, so e^(s / τ) and its sums need neither an offset nor a bound on the exponent.
// Below it the running maximum is subtracted.
constexpr float kRunningMaxBelow = 0.05f;

constexpr float kMinNormSquared = 1e-24f;  // a shorter patch or text has no direction: its scores and gradient are 0
constexpr float kMinPooledNorm = 1e-6f;    // floor of the pooled patch's norm in the cosine form

// Upsampling clamps scores to this magnitude: an infinite score times a fraction of 0 would be NaN.
constexpr float kLargestScore = 0x1p120f;

constexpr float kLog2e = 1.4426950408889634f;

}  // namespace pacl
