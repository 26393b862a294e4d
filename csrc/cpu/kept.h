// Scores that the forward keeps for the backward, in memory of scores_row_bytes for each patch of the call.
//
// Each block of the backward has the piece of the memory that begins at its first patch. In it are as many panels of
// texts as fit there, panels [rows, panel] of raw products. The backward reads all scores of a block before it writes
// any gradient of that block, and a masked patch's gradient at the very end. The memory may therefore be that of the
// patches' gradient.
#pragma once

#include "patches.h"

namespace {

using namespace pacl;

// Returns the place of the score of row `row` with panel `panel`, of `width` texts, of the call. Reduces `count` to the
// number of rows from there on in the same block. Returns null if the panel is not kept, or the row is padding at the
// end.
inline float* kept_scores(const CompatibilityParams& p, int64_t width, int64_t panel, int64_t row, int64_t& count) {
  const ScoreBlocks* blocks = p.score_blocks;
  panel += p.scores_first_text / width;  // of the backward's call
  if (!blocks || row >= blocks->first_row[blocks->count] || (panel + 1) * width * 4 > p.scores_row_bytes)
    return nullptr;
  const int64_t block = last_at_most(blocks->first_row, blocks->count, row);
  const int64_t first = blocks->first_row[block], end = blocks->first_row[block + 1];
  count = least(count, end - row);
  return (float*)(p.scores + blocks->first_patch[block] * p.scores_row_bytes) +
         (panel * (end - first) + row - first) * width;
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
