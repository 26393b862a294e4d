// The order of the work in the max form's backward; see max.h.

#include <memory>
#include <vector>

#include "calls.h"
#include "plan.h"
#include "team.h"

namespace pacl {
namespace {

constexpr int64_t kMaxRowsBudget = 8 * kMiB;  // a block of patches of the max form's backward

// Divides the images into blocks of at most `rows` patches and 256 images.
std::vector<MaxImages> make_blocks(const CompatibilityParams& p, int64_t rows) {
  std::vector<MaxImages> blocks;
  for (int64_t b = 0; b < p.images; ++b) {
    const int64_t patches = patches_of(p, b);
    const bool joins = !blocks.empty() && b - blocks.back().first < 256 &&
                       first_patch(p, b) - first_patch(p, blocks.back().first) + patches <= rows;
    if (joins) {
      MaxImages& block = blocks.back();
      block.last = b + 1;
      block.patches = most(block.patches, patches);
      block.all_patches += patches;
    }
    for (int64_t first = 0; !joins && first < most(1, patches); first += rows) {
      const int64_t part = least(rows, patches - first);
      blocks.push_back({.first = b, .last = b + 1, .patch_first = first, .patches = part, .all_patches = part});
    }
  }
  return blocks;
}

// The plan of the max form's backward: blocks of patches (whole images if they fit) against blocks of texts.
struct MaxPlan {
  const Kernels& kernels;
  const CompatibilityParams p;
  int64_t dims, texts_block;  // padded D; texts of a block
  std::vector<MaxImages> blocks;
  int64_t images = 0, patches = 0;  // most of a block
  int64_t shared_bytes, scratch_bytes;
  int threads;

  explicit MaxPlan(const CompatibilityParams& params) : kernels(select_kernels(params.dtype, params.dim)), p(params) {
    dims = round_up(p.dim, kernels.panel);
    texts_block = least(p.text_count, most(1, least(4096, kTextsBudget / (4 * dims))));
    blocks = make_blocks(p, most(1, kMaxRowsBudget / (4 * dims)));
    for (const MaxImages& block : blocks) {
      images = most(images, block.last - block.first);
      patches = most(patches, block.all_patches);
    }
    Arena counter{nullptr};
    MaxBlock block;
    MaxScratch scratch;
    take_block(counter, block);
    shared_bytes = counter.used;
    counter.used = 0;
    take_scratch(counter, scratch);
    scratch_bytes = counter.used;
    threads = (int)most(1, least(p.threads, (kBudget - shared_bytes) / scratch_bytes));
  }

  int64_t workspace_bytes() const { return shared_bytes + threads * scratch_bytes + 64; }

  void take_block(Arena& arena, MaxBlock& block) const {
    block.patch = arena.take<const float*>(patches);
    block.patch_norm = arena.take(patches);
    block.patch_range_scale = arena.take(patches);
    block.patch_rows = arena.take(patches * dims);
    block.patch_sums = p.grad_patches && texts_block < p.text_count ? arena.take(patches * dims) : nullptr;
    block.text = arena.take<const float*>(texts_block);
    block.text_norm = arena.take(texts_block);
    block.text_rows = arena.take(texts_block * dims);
    block.order = arena.take<int32_t>(images * texts_block);
    block.start = arena.take<int32_t>(patches + images);
  }

  void take_scratch(Arena& arena, MaxScratch& scratch) const {
    scratch.rows = arena.take<const float*>(most(texts_block, images));
    scratch.weights = arena.take(most(texts_block, images));
    scratch.sum = arena.take(dims);
    scratch.buffer = arena.take(dims);
  }
};

void backward(const MaxPlan& plan, const CompatibilityParams& p, Arena arena) {
  const Kernels& kernels = plan.kernels;
  MaxBlock shared_block;
  plan.take_block(arena, shared_block);
  const int64_t scratch_at = arena.used, text_blocks = ceil_div(p.text_count, plan.texts_block);

  Team(p.openmp, plan.threads, [&, shared_block](Team& team, int id) {
    Arena own{arena.base, scratch_at + id * plan.scratch_bytes};
    MaxScratch scratch;
    plan.take_scratch(own, scratch);
    MaxBlock block = shared_block;
    bool packed = false;
    for (const MaxImages& images : plan.blocks) {
      block.images = images;
      for (int64_t text_block = 0; text_block < text_blocks; ++text_block) {
        block.text_first = text_block * plan.texts_block;
        block.text_count = least(plan.texts_block, p.text_count - block.text_first);
        if (!packed || text_blocks > 1)
          team.phase(ceil_div(block.text_count, 16), [&](int64_t i) {
            kernels.max_pack_texts(p, block, i * 16, least(i * 16 + 16, block.text_count));
          });
        packed = true;
        team.phase(images.last - images.first, [&](int64_t i) { kernels.max_sort(p, block, images.first + i); });
        const int64_t ranges = ceil_div(images.patches, 64);
        team.phase((images.last - images.first) * ranges, [&](int64_t task) {
          const int64_t image = images.first + task / ranges, first = task % ranges * 64;
          const int64_t last = least(first + 64, block_patches(p, images, image));
          if (first >= last) return;  // a shorter image than the largest
          if (p.grad_patches && text_block == text_blocks - 1)
            populate(
                (char*)p.grad_patches + (first_patch(p, image) + images.patch_first + first) * gradient_row_bytes(p),
                (last - first) * gradient_row_bytes(p));
          kernels.max_patches(p, block, image, first, last, scratch);
        });
        if (p.grad_texts)
          team.phase(ceil_div(block.text_count, 16), [&](int64_t i) {
            kernels.max_texts(p, block, i * 16, least(i * 16 + 16, block.text_count), scratch);
          });
      }
    }
    if (p.grad_texts && !p.leaves_texts_sum)
      team.phase(ceil_div(p.text_count, 16),
                 [&](int64_t i) { kernels.max_finish_texts(p, i * 16, least(i * 16 + 16, p.text_count), scratch); });
  });
}

}  // namespace

Planned max_backward(const CompatibilityParams& params) {
  const auto plan = std::make_shared<const MaxPlan>(params);
  const int64_t bytes = plan->workspace_bytes();
  return {.workspace_bytes = bytes, .run = [=](char* workspace) {
            const CompatibilityParams p = with_fresh_gradient(plan->p);
            if (p.grad_temperature) *p.grad_temperature = 0.0f;
            if (p.grad_patches || p.grad_texts) backward(*plan, p, open_workspace(workspace, bytes));
          }};
}

}  // namespace pacl
