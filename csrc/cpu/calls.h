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

Planned compatibility_forward(const CompatibilityParams&);
Planned compatibility_backward(const CompatibilityParams&);
Planned sigmoid_step(const CompatibilityParams&);        // loss and all gradients, for the dot and cosine forms
Planned max_backward(const CompatibilityParams&);        // compatibility_backward for the max form
int64_t accumulator_floats(const CompatibilityParams&);  // size of texts_sum
Planned loss_forward(const LossParams&);
Planned loss_backward(const LossParams&);
Planned upsample_argmax(const UpsampleParams&);
double fma_peak(Dtype dtype, int threads, double seconds);  // measured flop/s of independent FMAs

}  // namespace pacl
