// The blocks of rows of a backward, and where the forward keeps their scores. Include only in files compiled once.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "plan.h"

namespace pacl {
namespace {

// Rows of the backward that are in memory together: [first_row, last_row) of the call.
struct Block {
  int64_t first_row, last_row;
  std::vector<int64_t> starts;       // first rows of the weights' tasks (chunks or whole images), then the end
  std::vector<int64_t> order;        // of the weights' tasks if they are whole images: the largest first
  std::vector<int64_t> image_begin;  // see Rows
  std::vector<float> share;
};

// Finds the images of a block with means. Shortens the block if it has more than kMeans of them.
void count_images(const Plan& plan, Block& block) {
  if (!plan.means) return;
  const std::vector<int64_t>& row_start = plan.row_start;
  const int64_t padding = 2 * plan.kernels.inner;
  int64_t b = std::upper_bound(row_start.begin(), row_start.end(), block.first_row) - row_start.begin() - 1;
  for (; row_start[b] < block.last_row; ++b) {
    if (row_start[b] == row_start[b + 1]) continue;
    block.image_begin.push_back(most(0, row_start[b] - block.first_row));
    block.share.push_back(1.0f / (float)(row_start[b + 1] - row_start[b]));
    if ((int64_t)block.share.size() == kMeans)  // end here or a few rows before: only the last block may be padded
      block.last_row =
          least(block.last_row, block.first_row + (row_start[b + 1] - block.first_row) / padding * padding);
  }
  while (block.image_begin.back() >= block.last_row - block.first_row) {
    block.image_begin.pop_back();
    block.share.pop_back();
  }
}

std::vector<Block> make_blocks(const Plan& plan) {
  const std::vector<int64_t>& row_start = plan.row_start;
  std::vector<Block> blocks;
  if (plan.by_image) {
    for (int64_t b = 0; b < plan.p.images; ++b) {
      if (row_start[b] == row_start[b + 1]) continue;
      if (blocks.empty() || row_start[b + 1] - blocks.back().first_row > plan.rows_block ||
          (plan.means && (int64_t)blocks.back().starts.size() > kMeans))
        blocks.push_back(
            {.first_row = row_start[b], .last_row = 0, .starts = {0}, .order = {}, .image_begin = {}, .share = {}});
      Block& block = blocks.back();
      block.last_row = row_start[b + 1];
      block.starts.push_back(block.last_row - block.first_row);
    }
    for (Block& block : blocks) {
      count_images(plan, block);
      block.order.resize(block.starts.size() - 1);
      std::iota(block.order.begin(), block.order.end(), 0);
      const auto rows = [&](int64_t i) { return block.starts[i + 1] - block.starts[i]; };
      std::stable_sort(block.order.begin(), block.order.end(), [&](int64_t a, int64_t b) { return rows(a) > rows(b); });
    }
  } else {
    const int64_t rows_total = row_start[plan.p.images];
    for (int64_t row = 0; row < rows_total; row = blocks.back().last_row) {
      Block block{.first_row = row,
                  .last_row = least(row + plan.rows_block, rows_total),
                  .starts = {},
                  .order = {},
                  .image_begin = {},
                  .share = {}};
      count_images(plan, block);
      const int64_t count = round_up(block.last_row - row, 2 * plan.kernels.inner);
      for (int64_t at = 0; at < count; at += plan.chunk) block.starts.push_back(at);
      block.starts.push_back(count);
      blocks.push_back(block);
    }
  }
  for (Block& block : blocks) block.image_begin.push_back(block.starts.back());
  return blocks;
}

// Returns the number, among the patches of all images, of valid patch `rank` of an image.
int64_t valid_patch(const CompatibilityParams& p, int64_t image, int64_t rank) {
  int64_t n = rank;
  if (const uint8_t* mask = image_mask(p, image))
    for (n = 0; !mask[n * p.mask_strides.row] || rank-- > 0;) ++n;
  return first_patch(p, image) + n;
}

// A call, and the blocks in which its scores are kept, on which forward and backward must agree. With a matrix unit
// none are kept: computing a score again takes less time than storing and loading it.
struct KeptScores {
  std::vector<int64_t> first_row, first_patch, image_row;
  ScoreBlocks blocks{};

  // Returns p with score_blocks set, to these blocks.
  CompatibilityParams in(CompatibilityParams p) {
    p.score_blocks = nullptr;
    if (!p.scores || p.form == Form::max) return p;
    CompatibilityParams forward = p, backward = p;
    forward.grad_phi = nullptr;
    backward.grad_phi = p.phi;  // only its presence counts, and that of the gradient
    backward.grad_patches = p.scores;
    if (p.scores_texts) backward.text_count = p.scores_texts;
    const Kernels& kernels = kernels_of(backward);
    if (kernels.matrix || &kernels != &kernels_of(forward)) return p;
    const Plan plan(backward, true, kernels);
    image_row = count_rows(p, 1);
    for (const Block& block : make_blocks(plan)) {
      const int64_t image = last_at_most(plan.row_start.data(), p.images, block.first_row);
      const int64_t rank = block.first_row - plan.row_start[image];
      first_row.push_back(image_row[image] + rank);
      first_patch.push_back(valid_patch(p, image, rank));
    }
    blocks = {(int64_t)first_patch.size(), nullptr, first_patch.data(), image_row.data()};
    if (first_patch.empty()) return p;
    first_row.push_back(image_row.back());
    blocks.first_row = first_row.data();
    p.score_blocks = &blocks;
    return p;
  }
};

}  // namespace
}  // namespace pacl
