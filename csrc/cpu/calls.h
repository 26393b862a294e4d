// The functions that the binding calls. Include only in files compiled once, not per instruction set.
#pragma once

#include <functional>

#include "params.h"

namespace pacl {

// A planned call: the size of the workspace it needs, and the function that runs in it.
struct Planned {
  int64_t workspace_bytes;
  std::function<void(char* workspace)> run;
};

// Rounding of the weights of a backward to 16 bits. A backward runs again in float32 if the rounding makes a larger
// part of a gradient than kRoundingShown. It happens when terms cancel: with (nearly) equal images or texts, as in a
// batch of duplicates or a collapsed model. Terms of independent signs give 0.002, and CLIP's texts, which share a
// direction, 0.003.
constexpr double kRoundingShown = 6e-3;
struct Rounding {
  bool exact;          // read: compute in float32 at once
  double texts_error;  // written: the squared error of the texts' gradient, 0 in float32
};

Planned compatibility_forward(const CompatibilityParams&);
Planned compatibility_backward(const CompatibilityParams&, Rounding* = nullptr);
Planned sigmoid_step(const CompatibilityParams&);        // loss and all gradients, for the dot and cosine forms
Planned max_backward(const CompatibilityParams&);        // compatibility_backward for the max form
int64_t accumulator_floats(const CompatibilityParams&);  // size of texts_sum
Planned upsample_argmax(const UpsampleParams&);

// Lists of texts: int64 [B, length], -1 for none. phi, state and grad_phi of a call are then [B, length], and texts_sum
// [K, D] becomes the gradient of the texts; grad_texts is not used.
struct Lists {
  const int64_t* index;
  int64_t length;
};
Planned listed_forward(const CompatibilityParams&, const Lists&);
Planned listed_backward(const CompatibilityParams&, const Lists&);

double fma_peak(Dtype dtype, int threads, double seconds);  // measured flop/s of independent FMAs

}  // namespace pacl
