// The tasks of a loss over logits. They depend on shapes alone and their sums are added in order, so any number of
// threads gives identical results.

#include <memory>

#include "calls.h"
#include "dispatch.h"
#include "plan.h"
#include "team.h"

namespace pacl {
namespace {

constexpr int64_t kPairs = 1 << 15;   // of a task, at least: a thread that waits for less costs more than it saves
constexpr int64_t kMostBlocks = 64;   // each has sums of all columns
constexpr int64_t kColumns = 1 << 9;  // columns of a task that merges these sums

struct LossPlan {
  const Kernels& kernels;
  const LossParams p;
  int64_t rows, blocks, padded;
  int threads;

  explicit LossPlan(const LossParams& params) : kernels(*select_isa().float_kernels), p(params) {
    rows = most(ceil_div(kPairs, p.size), ceil_div(p.size, kMostBlocks));
    blocks = ceil_div(p.size, rows);
    padded = round_up(p.size, kernels.panel);
    threads = (int)most(1, least(p.threads, blocks));
  }

  int64_t row_end(int64_t block) const { return least((block + 1) * rows, p.size); }
};

void forward(const LossPlan& plan, char* workspace) {
  const LossParams& p = plan.p;
  Arena arena{(char*)round_up((int64_t)workspace, 64)};
  double* totals = arena.take<double>(plan.blocks);
  const int64_t of_block = p.sigmoid ? 0 : 2 * plan.padded;
  float* columns = arena.take(plan.blocks * of_block);
  Team(p.openmp, plan.threads, [&](Team& team, int) {
    team.phase(plan.blocks, [&](int64_t block) {
      float* own = columns + block * of_block;
      totals[block] = plan.kernels.loss_rows(p, block * plan.rows, plan.row_end(block), own, plan.padded);
    });
    if (p.sigmoid) return;
    team.phase(ceil_div(p.size, kColumns), [&](int64_t task) {
      const int64_t last = least((task + 1) * kColumns, p.size);
      plan.kernels.loss_columns(p, task * kColumns, last, columns, plan.padded, plan.blocks);
    });
  });
  if (!p.sigmoid) return plan.kernels.loss_value(p);
  double total = 0;
  for (int64_t block = 0; block < plan.blocks; ++block) total += totals[block];
  *p.value = (float)(total / (double)p.size);
}

void backward(const LossPlan& plan, char* workspace) {
  const LossParams& p = plan.p;
  LossSums* sums = Arena{(char*)round_up((int64_t)workspace, 64)}.take<LossSums>(plan.blocks);
  Team(p.openmp, plan.threads, [&](Team& team, int) {
    team.phase(plan.blocks, [&](int64_t block) {
      sums[block] = plan.kernels.loss_gradient(p, block * plan.rows, plan.row_end(block));
    });
  });
  LossSums total;
  for (int64_t block = 0; block < plan.blocks; ++block) {
    total.scale += sums[block].scale;
    total.bias += sums[block].bias;
  }
  if (p.grad_scale) *p.grad_scale = (float)total.scale;
  if (p.grad_bias) *p.grad_bias = (float)total.bias;
}

}  // namespace

Planned loss_forward(const LossParams& params) {
  const auto plan = std::make_shared<const LossPlan>(params);
  const int64_t columns = params.sigmoid ? 0 : 4 * plan->blocks * 2 * plan->padded;
  return {.workspace_bytes = columns + round_up(8 * plan->blocks, 64) + 128,
          .run = [=](char* workspace) { forward(*plan, workspace); }};
}

Planned loss_backward(const LossParams& params) {
  const auto plan = std::make_shared<const LossPlan>(params);
  return {.workspace_bytes = (int64_t)sizeof(LossSums) * plan->blocks + 128,
          .run = [=](char* workspace) { backward(*plan, workspace); }};
}

}  // namespace pacl
