// The measured rate of independent FMAs, to which benchmarks compare the kernels.

#include <atomic>
#include <chrono>

#include "calls.h"
#include "kernels.h"
#include "team.h"

namespace pacl {

double fma_peak(Dtype dtype, int threads, double seconds) {
  const Kernels& kernels = select_kernels(dtype, 64);
  using Clock = std::chrono::steady_clock;
  std::atomic<double> total{0};
  const auto begin = Clock::now();
  Team(OpenMp{}, threads, [&](Team& team, int) {
    double flop = 0;
    while (std::chrono::duration<double>(Clock::now() - begin).count() < seconds)
      flop += kernels.independent_fmas(100000);
    for (double old = total; !total.compare_exchange_weak(old, old + flop);) {
    }
    team.phase(0, [](int64_t) {});
  });
  return total / std::chrono::duration<double>(Clock::now() - begin).count();
}

}  // namespace pacl
