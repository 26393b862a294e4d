// The order of the work on the threads of a call.
// Everything that determines a result's bits depends on shapes alone, so any number of threads gives identical results.

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "blocks.h"
#include "calls.h"
#include "kept.h"
#include "team.h"

namespace pacl {
namespace {

// The backward runs again in float32 if the rounding of W makes a larger part of a gradient than this. It happens when
// terms cancel: with (nearly) equal images or texts, as in a batch of duplicates or a collapsed model. Terms of
// independent signs give 0.002, and CLIP's texts, which share a direction, 0.003.
constexpr double kRoundingShown = 6e-3;

// Populates the gradients' memory for rows [first, last) of a block.
void populate_gradients(const CompatibilityParams& p, const Rows& rows, int64_t first, int64_t last) {
  while (first < last && rows.image[last - 1] < 0) --last;
  while (first < last && rows.image[first] < 0) ++first;
  if (first == last) return;
  const int64_t begin = first_patch(p, rows.image[first]) + rows.index[first];
  const int64_t end = first_patch(p, rows.image[last - 1]) + rows.index[last - 1] + 1;
  populate((char*)p.grad_patches + begin * gradient_row_bytes(p), (end - begin) * gradient_row_bytes(p));
}

// Zeroes the gradient of an image's masked patches, which no row of a block visits.
void zero_masked_patches(const CompatibilityParams& p, int64_t image) {
  const uint8_t* mask = image_mask(p, image);
  const int64_t bytes = gradient_row_bytes(p);
  char* gradient = (char*)p.grad_patches + first_patch(p, image) * bytes;
  for (int64_t n = 0; n < patches_of(p, image); ++n)
    if (!mask[n * p.mask_strides.row]) std::memset(gradient + n * bytes, 0, bytes);
}

// Populates the memory of the scores that a task of the forward keeps.
void populate_scores(const CompatibilityParams& p, int64_t width, int64_t image, int64_t image_last, int64_t panel,
                     int64_t panel_last) {
  if (!p.score_blocks) return;
  const int64_t row = p.score_blocks->image_row[image], row_last = p.score_blocks->image_row[image_last];
  for (; panel < panel_last; ++panel)
    visit_scores(p, width, panel, row, row_last - row,
                 [&](float* place, int64_t, int64_t some) { populate((char*)place, some * width * 4); });
}

void open_texts(const CompatibilityParams& p, const Plan& plan, int64_t first, Texts& texts) {
  texts.first = first;
  texts.count = least(plan.texts_block, p.text_count - first);
  texts.padded = round_up(texts.count, plan.kernels.panel);
}

void forward(const Plan& plan, const CompatibilityParams& p, Arena arena) {
  const Kernels& kernels = plan.kernels;
  Texts shared_texts;
  plan.take_texts(arena, shared_texts);
  const int64_t scratch_at = arena.used;

  Team(p.openmp, plan.threads, [&, shared_texts](Team& team, int id) {
    Arena own{arena.base, scratch_at + id * plan.scratch_bytes};
    Scratch scratch{};
    plan.take_scratch(own, scratch);
    Texts texts = shared_texts;
    const int64_t groups = (int64_t)plan.groups.size() - 1;
    for (int64_t first = 0; first < p.text_count; first += plan.texts_block) {
      open_texts(p, plan, first, texts);
      const int64_t panels = texts.padded / kernels.panel, ranges = ceil_div(panels, plan.text_panels);
      team.phase(panels, [&](int64_t panel) { kernels.pack_texts(p, texts, panel, scratch.row); });
      team.phase(groups * ranges, [&](int64_t task) {
        const int64_t group = task / ranges, image = plan.groups[group], image_last = plan.groups[group + 1];
        const int64_t panel = task % ranges * plan.text_panels, panel_last = least(panel + plan.text_panels, panels);
        populate_scores(p, kernels.panel, image, image_last, texts.first / kernels.panel + panel,
                        texts.first / kernels.panel + panel_last);
        kernels.forward(p, plan.row_start.data(), image, image_last, texts, panel, panel_last,
                        plan.groups[least(group + plan.threads, groups)], scratch);
      });
    }
  });
}

// Errors that the gradients have from rounding W to 16 bits (see WeightSums), and the gradients: squared norms.
struct Rounding {
  double patches_error = 0, patches_squared = 0, texts_error = 0, texts_squared = 0;

  // Returns true if a gradient must not be used.
  bool shows() const {
    constexpr double kSquared = kRoundingShown * kRoundingShown;
    return patches_error > kSquared * patches_squared || texts_error > kSquared * texts_squared;
  }
};

// Runs the backward of the dot or cosine form.
Rounding backward(const Plan& plan, const CompatibilityParams& p, Arena arena) {
  const Kernels& kernels = plan.kernels;
  const std::vector<int64_t>& row_start = plan.row_start;

  Texts shared_texts;
  Rows shared_rows[2];  // of a block and of the next one
  Weights weights;
  Sums shared_sums;
  plan.take_texts(arena, shared_texts);
  plan.take_block(arena, shared_rows, weights, shared_sums);
  const int64_t scratch_at = arena.used;

  const std::vector<Block> blocks = make_blocks(plan);
  const int64_t text_blocks = ceil_div(p.text_count, plan.texts_block);
  size_t most_tasks = 0;
  for (const Block& block : blocks) most_tasks = most(most_tasks, block.starts.size());
  std::vector<WeightSums> weight_sums(most_tasks * ceil_div(plan.texts_block, kTextRange));  // by task
  // Squared norms of the gradients: of the patches by chunk of a block, of the texts by task.
  std::vector<double> patches_squared(ceil_div(plan.capacity, plan.chunk)), texts_squared(ceil_div(p.text_count, 16));

  Team(p.openmp, plan.threads, [&](Team& team, int id) {
    Arena own{arena.base, scratch_at + id * plan.scratch_bytes};
    Scratch scratch{};
    plan.take_scratch(own, scratch);
    Texts texts = shared_texts;
    const auto chunks = [&](const Block& block) { return ceil_div(block.starts.back(), plan.chunk); };
    const auto pack = [&](const Block& block, Rows rows, int64_t i) {
      const int64_t first = i * plan.chunk, last = least(first + plan.chunk, block.starts.back());
      // Rows past the last one of the call are padding.
      kernels.pack_rows(p, row_start.data(), block.first_row + first, block.first_row + last, rows, first, scratch.row);
    };
    if (!blocks.empty()) team.phase(chunks(blocks[0]), [&](int64_t i) { pack(blocks[0], shared_rows[0], i); });
    for (size_t number = 0; number < blocks.size(); ++number) {
      const Block& block = blocks[number];
      const Block* next = number + 1 < blocks.size() ? &blocks[number + 1] : nullptr;
      Rows rows = shared_rows[number % 2];
      rows.count = block.starts.back();
      rows.first_row = block.first_row;
      rows.means = block.share.size();
      rows.image_begin = block.image_begin.data();
      rows.share = block.share.data();
      for (int64_t text_block = 0; text_block < text_blocks; ++text_block) {
        const bool add = text_block > 0, finish = text_block == text_blocks - 1;
        open_texts(p, plan, text_block * plan.texts_block, texts);
        const int64_t panels = texts.padded / kernels.panel;
        if (text_blocks > 1 || number == 0)
          team.phase(panels, [&](int64_t panel) { kernels.pack_texts(p, texts, panel, scratch.row); });

        const int64_t range = plan.cosine ? panels : kTextRange / kernels.panel, ranges = ceil_div(panels, range);
        const int64_t tasks = ((int64_t)block.starts.size() - 1) * ranges;
        team.phase(tasks + (text_block == 0 && p.grad_texts ? rows.means : 0), [&](int64_t task) {
          if (task >= tasks) return kernels.sum_rows(p, rows, task - tasks);
          const int64_t panel = task % ranges * range, i = plan.by_image ? block.order[task / ranges] : task / ranges;
          weight_sums[task].add(kernels.weights(p, rows, block.starts[i], block.starts[i + 1], texts, panel,
                                                least(panel + range, panels), weights, shared_sums, add, scratch));
        });
        if (rows.means && p.grad_patches)
          team.phase(plan.dims / kernels.panel,
                     [&](int64_t panel) { kernels.means_product(rows, texts, weights, shared_sums, panel, add); });
        // The two products are independent, so they share one phase, the larger tasks first. The next block is packed
        // in the same phase, once the patches' product has prefetched its rows.
        const int64_t columns = texts.padded / kernels.tile_columns, dim_panels = plan.dims / kernels.panel;
        const int64_t column_step = 128 / kernels.tile_columns, panel_step = most(1, 256 / kernels.panel);
        const int64_t across = ceil_div(dim_panels, panel_step);
        const int64_t text_tasks = p.grad_texts ? ceil_div(columns, column_step) * across : 0;
        const int64_t next_chunks = finish && next ? chunks(*next) : 0;
        team.phase(text_tasks + most(chunks(block), next_chunks), [&](int64_t task) {
          if (task < text_tasks) {
            const int64_t column = task / across * column_step, panel = task % across * panel_step;
            kernels.texts_product(p, rows, texts, weights, column, least(column + column_step, columns), panel,
                                  least(panel + panel_step, dim_panels));
            return;
          }
          const int64_t i = task - text_tasks, first = i * plan.chunk, last = least(first + plan.chunk, rows.count);
          if (p.grad_patches && first < last) {
            Sums sums = shared_sums;
            if (plan.local_sums) sums.panels = scratch.sums, sums.capacity = plan.local_capacity(), sums.first = first;
            kernels.patches_product(p, row_start.data(), i < next_chunks ? next->first_row + first : -1, rows, first,
                                    last, texts, weights, sums, add || plan.cosine);
            if (finish) populate_gradients(p, rows, first, last);
            if (finish) patches_squared[i] += kernels.finish_patches(p, rows, first, last, sums, scratch.row);
          }
          if (i < next_chunks) pack(*next, shared_rows[(number + 1) % 2], i);
        });
      }
    }
    const int64_t text_tasks = p.grad_texts && !p.leaves_texts_sum ? ceil_div(p.text_count, 16) : 0;
    const int64_t masked_images = p.grad_patches && p.mask ? p.images : 0;
    if (text_tasks + masked_images == 0) return;
    team.phase(text_tasks + masked_images, [&](int64_t i) {
      if (i >= text_tasks) return zero_masked_patches(p, i - text_tasks);
      texts_squared[i] = kernels.finish_texts(p, i * 16, least(i * 16 + 16, p.text_count), scratch.row);
    });
  });

  WeightSums total;
  for (const WeightSums& sums : weight_sums) total.add(sums);
  if (p.loss_sums) {
    for (int64_t b = 0; b < p.images; ++b)
      if (row_start[b] == row_start[b + 1]) kernels.add_empty_image(p, b, total);
    p.loss_sums[0] = total.loss;
    p.loss_sums[1] = total.scale;
    p.loss_sums[2] = total.bias;
  }
  if (p.grad_temperature) *p.grad_temperature = (float)(-total.temperature / p.temperature / p.temperature);
  const auto add_up = [](const std::vector<double>& squares) {
    return std::accumulate(squares.begin(), squares.end(), 0.0);
  };
  Rounding rounding;
  if (p.grad_patches) rounding.patches_error = total.patches_error, rounding.patches_squared = add_up(patches_squared);
  if (p.grad_texts) rounding.texts_error = total.texts_error, rounding.texts_squared = add_up(texts_squared);
  return rounding;
}

void require_texts_sum(const CompatibilityParams& p) {
  if (p.grad_texts && !p.texts_sum) throw std::invalid_argument("texts_sum is missing, which grad_texts needs");
}

// Plans a backward, and where it is in 16 bits also the one in float32 that runs if rounding showed.
Planned plan_backward(const CompatibilityParams& params) {
  require_texts_sum(params);
  const Kernels &kernels = kernels_of(params), &exact = select_kernels(Dtype::float32, params.dim);
  const auto plan = std::make_shared<const Plan>(params, true, kernels);
  if (kernels.pair == 1) {
    const int64_t bytes = plan->workspace_bytes();
    return {.workspace_bytes = bytes, .run = [=](char* workspace) {
              backward(*plan, with_fresh_gradient(plan->p), open_workspace(workspace, bytes));
            }};
  }
  const auto exact_forward = std::make_shared<const Plan>(params, false, exact);
  const auto exact_backward = std::make_shared<const Plan>(params, true, exact);
  int64_t bytes = plan->workspace_bytes();
  for (const auto& again : {exact_forward, exact_backward}) bytes = most(bytes, again->workspace_bytes());
  return {.workspace_bytes = bytes, .run = [=](char* workspace) {
            CompatibilityParams p = with_fresh_gradient(plan->p);
            const Arena arena = open_workspace(workspace, bytes);
            if (!backward(*plan, p, arena).shows()) return;
            if (p.texts_sum) std::memset(p.texts_sum, 0, sizeof(float) * accumulator_floats(p));
            p.fresh_gradient = false;
            p.score_blocks = nullptr;  // they are products of other kernels
            std::vector<float> again;
            if (p.form == Form::dot && !p.loss_sums) {
              // s - φ is divided by τ, so both must come from the same kernels.
              const int64_t pairs = p.images * p.text_count;
              again.resize(2 * pairs);
              p.phi = again.data();
              p.state = again.data() + pairs;
              forward(*exact_forward, p, arena);
            }
            backward(*exact_backward, p, arena);
          }};
}

}  // namespace
}  // namespace pacl

#include "lists.h"

namespace pacl {

Planned compatibility_forward(const CompatibilityParams& params) {
  if (params.list_starts) return listed_forward(params);
  const auto kept = std::make_shared<KeptScores>();
  const auto plan = std::make_shared<const Plan>(kept->in(params), false, kernels_of(params));
  const int64_t bytes = plan->workspace_bytes();
  return {.workspace_bytes = bytes,
          .run = [kept, plan, bytes](char* workspace) { forward(*plan, plan->p, open_workspace(workspace, bytes)); }};
}

Planned compatibility_backward(const CompatibilityParams& params) {
  const bool empty = params.list_starts && params.list_starts[params.images] == 0;
  if (!params.grad_phi && !empty) throw std::invalid_argument("grad_phi is missing, which the backward needs");
  if (params.list_starts) {
    require_texts_sum(params);
    return listed_backward(params);
  }
  if (params.form == Form::max) {
    require_texts_sum(params);
    return max_backward(params);
  }
  const auto kept = std::make_shared<KeptScores>();
  const Planned planned = plan_backward(kept->in(params));
  return {.workspace_bytes = planned.workspace_bytes,
          .run = [kept, planned](char* workspace) { planned.run(workspace); }};
}

Planned sigmoid_step(const CompatibilityParams& params) {
  if (!params.loss_sums) throw std::invalid_argument("loss_sums is missing, which sigmoid_step needs");
  if (params.form == Form::max) throw std::invalid_argument("form is 'max', expected dot or cosine");
  if (!params.image_ids != !params.text_ids) throw std::invalid_argument("image_ids and text_ids must come together");
  return plan_backward(params);
}

int64_t accumulator_floats(const CompatibilityParams& p) {
  const int64_t panel = select_kernels(p.dtype, p.dim).panel;
  return round_up(p.text_count, panel) * round_up(p.dim, panel);
}

}  // namespace pacl
