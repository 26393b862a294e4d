// Scores that the forward keeps for the backward, in memory of scores_row_bytes for each row of the call.
//
// The rows are in groups, and each group has a piece of the memory for as many panels of texts as fit there, panels
// [rows, panel] of raw products. The backward takes exactly one group in a block and reads all of its scores before it
// writes any gradient of that block. The memory may therefore be that of the patches' gradient.
#pragma once

#include "patches.h"

namespace {

using namespace pacl;

// Returns the place of the score of row `row` with panel `panel`, of `width` texts, of the call. Reduces `count` to the
// number of rows from there on in the same group. Returns null if the panel is not kept, or the row is padding (-1).
inline float* kept_scores(const CompatibilityParams& p, int64_t width, int64_t panel, int64_t row, int64_t& count) {
  if (!p.scores_group || row < 0 || (panel + 1) * width * 4 > p.scores_row_bytes) return nullptr;
  const int64_t first = row / p.scores_group * p.scores_group, size = least(p.scores_group, all_patches(p) - first);
  count = most(0, least(count, first + size - row));  // 0 for padding after the last row
  return (float*)(p.scores + first * p.scores_row_bytes) + (panel * size + row - first) * width;
}

// Calls act(place, rows before it, rows) for each part of the scores of rows [row, row + count) that are kept.
template <class Act>
inline void visit_scores(const CompatibilityParams& p, int64_t width, int64_t panel, int64_t row, int64_t count,
                         Act act) {
  for (int64_t done = 0, some; done < count; done += some) {
    some = count - done;
    float* place = kept_scores(p, width, panel, row + done, some);
    if (!place) return;
    act(place, done, some);
  }
}

}  // namespace
