// Constants that the Triton kernels and Python have as well; tests/test_cuda_build.py compares them.

#pragma once

namespace pacl::cuda {

constexpr float kRunningMaxBelow = 0.05f;  // from this temperature on exp(s / τ) <= e^20 needs no running maximum
constexpr float kMinPooledNorm = 1e-6f;    // floor of the pooled patch's norm in the cosine form
constexpr float kLog2e = 1.4426950408889634f;

}  // namespace pacl::cuda
