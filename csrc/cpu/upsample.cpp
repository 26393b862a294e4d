// The tasks of an upsampling. They depend on shapes alone and share nothing, so any number of threads gives identical
// results.

#include <memory>

#include "calls.h"
#include "dispatch.h"
#include "plan.h"
#include "team.h"

namespace pacl {
namespace {

constexpr int64_t kTileBytes = 448 * 1024;  // two rows of all classes, which stay in the L2 cache

struct UpsamplePlan {
  const Kernels& kernels;
  const UpsampleParams p;
  int64_t lanes, tiles, vectors;  // tiles of columns; vectors of a tile
  int64_t band, bands;            // rows of a task
  int64_t tasks, scratch_bytes;
  int threads;

  explicit UpsamplePlan(const UpsampleParams& params) : kernels(*select_isa().float_kernels), p(params) {
    lanes = kernels.panel / 2;
    const int64_t all = ceil_div(p.out_width, lanes);
    tiles = ceil_div(all, most(1, kTileBytes / (8 * lanes * p.classes)));
    vectors = ceil_div(all, tiles);
    tiles = ceil_div(all, vectors);
    band = most(32, 4 * ceil_div(p.out_height, p.height));  // each band resizes its first source row once more
    bands = ceil_div(p.out_height, band);
    tasks = p.images * tiles * bands;
    threads = (int)most(1, least(p.threads, tasks));
    Arena counter{nullptr};
    UpsampleTile tile;
    take_tile(counter, tile);
    scratch_bytes = counter.used;
  }

  int64_t workspace_bytes() const { return threads * scratch_bytes + 64; }

  void take_tile(Arena& arena, UpsampleTile& tile) const {
    for (float*& row : tile.rows) row = arena.take(vectors * p.classes * lanes);
    tile.source = arena.take(kSources * (p.width + 1) + 2 * lanes);
    tile.column = arena.take<int32_t>(vectors * lanes);
    tile.fraction = arena.take(vectors * lanes);
    tile.all = arena.take<int32_t>(p.classes);
    tile.some = arena.take<int32_t>(p.classes);
  }
};

void upsample(const UpsamplePlan& plan, char* workspace) {
  const UpsampleParams& p = plan.p;
  char* base = (char*)round_up((int64_t)workspace, 64);
  Team(p.openmp, plan.threads, [&](Team& team, int id) {
    Arena own{base, id * plan.scratch_bytes};
    UpsampleTile tile{};
    plan.take_tile(own, tile);
    for (int64_t c = 0; c < p.classes; ++c) tile.all[c] = (int32_t)c;
    team.phase(plan.tasks, [&](int64_t task) {
      const int64_t y = task % plan.bands * plan.band, x = task / plan.bands % plan.tiles * plan.vectors;
      tile.first = x * plan.lanes;
      tile.vectors = least(plan.vectors, ceil_div(p.out_width, plan.lanes) - x);
      plan.kernels.upsample_argmax(p, task / plan.bands / plan.tiles, y, least(y + plan.band, p.out_height), tile);
    });
  });
}

}  // namespace

Planned upsample_argmax(const UpsampleParams& params) {
  const auto plan = std::make_shared<const UpsamplePlan>(params);
  return {.workspace_bytes = plan->workspace_bytes(), .run = [=](char* workspace) { upsample(*plan, workspace); }};
}

}  // namespace pacl
