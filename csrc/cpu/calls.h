// The functions that the binding calls. Only for files that are compiled once, not for those of an instruction set.
#pragma once

#include <functional>

#include "params.h"

namespace pacl {

// A call whose plan has been made: the workspace that it needs, and what runs in one of that size.
struct Planned {
  int64_t workspace_bytes;
  std::function<void(char* workspace)> run;
};

Planned compatibility_forward(const CompatibilityParams&);
Planned compatibility_backward(const CompatibilityParams&);
Planned max_backward(const CompatibilityParams&);        // what compatibility_backward is for that form
int64_t accumulator_floats(const CompatibilityParams&);  // of texts_sum
Planned upsample_argmax(const UpsampleParams&);
double fma_peak(Dtype dtype, int threads, double seconds);  // flop per second of independent FMAs

}  // namespace pacl
