// The order of the work: which rows and texts are in memory together, which thread does what, and where it all lies.
// Everything that decides a result's bits depends on shapes alone, so any number of threads gives the same bits.

#include "score.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "team.h"
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace pacl {
namespace {

constexpr int64_t kMiB = 1 << 20;
constexpr int64_t kBudget = 60 * kMiB;       // workspace of a call, whatever its shape and threads; [N, N] comes on top
constexpr int64_t kTextsBudget = 10 * kMiB;  // packed texts
constexpr int64_t kRowsBudget = 26 * kMiB;   // a block of rows of the backward: patches, their gradient, weights

constexpr int64_t kMaxRowsBudget = 8 * kMiB;  // a block of patches of the max form's backward
constexpr int64_t kTextRange = 256;           // texts of a task

// From this τ on the attention is nearly uniform, and weights in bfloat16 are stored less their mean (see Weights).
// At small τ the mean is far from most weights, and would give patches that no text looks at its own rounding.
constexpr float kMeanTemperature = 0.5f;

// Where what W's rounding adds to a gradient is a larger part of it, the backward runs again in float32. That happens
// where the terms cancel: images or texts that are (nearly) the same, as in a batch of duplicates or a collapsed model.
// Terms of independent signs leave 0.002, and CLIP's texts, which share a direction, 0.003.
constexpr double kRoundingShown = 6e-3;

struct Plan {
  const Kernels& kernels;
  const ScoreParams& p;
  bool backward, cosine, means;
  bool local_sums;               // the patches' sums of a chunk at a time, see Scratch
  int64_t row_align;             // rows of an image are padded to this
  int64_t units, dims;           // padded units of D, padded D
  int64_t image_rows;            // most rows of an image
  int64_t chunk;                 // rows of a task
  int64_t rows_block, capacity;  // backward: rows in memory together
  int64_t texts_block;           // texts in memory together
  int64_t group, text_panels;    // forward: images and panels of texts of a task
  int64_t gram_capacity;
  int threads;
  int64_t shared_bytes, scratch_bytes;

  Plan(const ScoreParams& params, bool is_backward, const Kernels& used)
      : kernels(used),
        p(params),
        backward(is_backward),
        cosine(params.form == Form::cosine),
        means(is_backward && kernels.pair == 2 && params.temperature >= kMeanTemperature) {
    const int64_t tile = kernels.tile_rows, panel = kernels.panel, pair = kernels.pair;
    units = round_up(ceil_div(p.dim, pair), panel);
    dims = round_up(p.dim, panel);
    row_align = cosine ? 2 * kernels.inner : 1;  // products over the rows of one image take `inner` units at a time
    image_rows = round_up(p.patches_per_image, row_align);
    gram_capacity = round_up(image_rows, tile);
    // Stays in the second-level cache, which is larger (Intel's, 2 MiB) where there is a matrix unit.
    const int64_t cache = kernels.matrix ? 2 : 1, most_rows = kernels.matrix ? (backward ? 128 : 256) : 112;
    chunk = most(1, least(most_rows, cache * 512 * 1024 / (4 * units)) / tile) * tile;

    const int64_t text_bytes = 4 * units + (backward && p.grad_patches ? 4 * dims / pair : 0);
    texts_block = most(1, least(backward ? 1024 : 4096, kTextsBudget / text_bytes) / panel) * panel;
    texts_block = least(texts_block, round_up(p.texts_count, panel));
    local_sums = backward && !cosine && texts_block >= p.texts_count;

    group = cosine ? 1 : ceil_div(4 * chunk, p.patches_per_image);
    text_panels = (ceil_div(p.images, group) >= 32 ? 1024 : kTextRange) / panel;
    text_panels = least(text_panels, texts_block / panel);
    group = most(1, least(group, 512 * 1024 / (12 * text_panels * panel)));

    const int64_t row_bytes =
        4 * (2 * units + texts_block + (p.grad_patches ? dims : 0)) + (pair == 2 ? 2 * 2 * dims : 0);
    rows_block = most(1, least(1792, kRowsBudget / row_bytes) / chunk) * chunk;
    rows_block = least(rows_block, round_up(p.images * image_rows, chunk));
    if (cosine) rows_block = most(rows_block, image_rows);
    capacity = round_up(rows_block, 2 * tile) + 2 * tile + (means ? 2 * kMeans : 0);  // tiles read past the last row

    Arena counter{nullptr};
    Texts texts;
    take_texts(counter, texts);
    Rows rows[2];
    Weights weights;
    Sums sums;
    if (backward) take_block(counter, rows, weights, sums);
    shared_bytes = counter.used;
    counter.used = 0;
    Scratch scratch{};
    take_scratch(counter, scratch);
    scratch_bytes = counter.used;
    const int64_t beyond = scratch_bytes - (cosine ? 4 * gram_capacity * round_up(image_rows, panel) : 0);
    threads = (int)most(1, least(p.threads, (kBudget - shared_bytes) / most(1, beyond)));
  }

  int64_t workspace_bytes() const { return shared_bytes + threads * scratch_bytes + 64; }

  // Of a row's panels no two are a multiple of 4 KiB apart, or they would meet in one set of the first-level cache.
  int64_t local_capacity() const { return round_up(chunk, 32) + 2; }

  void take_texts(Arena& arena, Texts& texts) const {
    texts.transposed = arena.take(units * texts_block);
    texts.row_units = backward && p.grad_patches ? arena.take(dims * texts_block / kernels.pair) : nullptr;
    texts.inv_norm = arena.take(texts_block);
  }

  void take_rows(Arena& arena, Rows& rows, int64_t size, bool as_right_operand) const {
    rows.capacity = size;
    rows.units = arena.take(units * size);
    rows.row_units = kernels.pair == 1 ? rows.units : as_right_operand ? arena.take(dims * size / 2) : nullptr;
    rows.inv_norm = arena.take(size);
    rows.scale = arena.take(size);
    rows.image = arena.take<int32_t>(size);
    rows.index = arena.take<int32_t>(size);
  }

  void take_block(Arena& arena, Rows (&rows)[2], Weights& weights, Sums& sums) const {
    for (Rows& half : rows) take_rows(arena, half, capacity, p.grad_texts || (cosine && p.grad_patches));
    weights.units = arena.take(capacity * round_up(texts_block, 2 * kernels.panel) / kernels.pair);
    weights.row_units = kernels.pair == 1 ? weights.units : arena.take(round_up(capacity / 2, kernels.panel) * texts_block);
    sums = {nullptr, capacity, 0, nullptr};
    if (!p.grad_patches) return;
    if (!local_sums) sums.panels = arena.take(capacity * dims);
    if (means) sums.means = arena.take(kMeansCapacity * dims);
  }

  void take_scratch(Arena& arena, Scratch& s) const {
    const int64_t panel = kernels.panel, rows = cosine ? gram_capacity : chunk, columns = round_up(image_rows, panel);
    s.row = arena.take(most(panel * units, 2 * dims));
    s.scores = arena.take((rows + panel) * panel);
    s.rows.capacity = rows;
    s.sums = local_sums && p.grad_patches ? arena.take(local_capacity() * dims) : nullptr;
    if (!backward) {
      take_rows(arena, s.rows, rows, false);
      s.largest = arena.take(group * text_panels * panel);
      s.sum = arena.take(group * text_panels * panel);
      s.weighted = arena.take(group * text_panels * panel);
    }
    if (!cosine) return;
    const int64_t matrix = rows * columns, square = panel * panel;
    const bool pairs = kernels.pair == 2;
    s.attention = arena.take((rows + panel) * panel);
    s.pooled = arena.take((rows + panel) * panel);
    s.transposed = arena.take(units * panel);
    s.gram = arena.take(matrix);
    const int64_t half = rows * round_up(columns, 2 * panel) / 2;
    if (kernels.matrix) {
      s.gram_high = arena.take(half);
      s.gram_low = arena.take(half);
      s.attention_high = arena.take((rows + panel) * panel / 2);
      s.attention_low = arena.take((rows + panel) * panel / 2);
    }
    s.pool = arena.take(dims * panel);
    s.direction = arena.take(dims * panel);
    s.scaled = arena.take((rows + panel) * panel);
    if (!backward) return;
    s.scaled_units = pairs ? arena.take((rows + panel) * panel) : nullptr;
    if (!p.grad_patches) return;
    s.attention_t = arena.take(square);
    s.attention_t_units = pairs ? arena.take(square / 2) : nullptr;
    // In the matrix unit's form G itself is not needed any more when C begins, nor that form when C is whole.
    s.outer = kernels.matrix ? s.gram : arena.take(matrix);
    s.outer_units = kernels.matrix ? s.gram_high : pairs ? arena.take(half) : nullptr;
  }
};

// Rows of the valid patches of each image, one after the other: image b has [row_start[b], row_start[b + 1]).
std::vector<int64_t> count_rows(const ScoreParams& p, int64_t align) {
  std::vector<int64_t> row_start(p.images + 1, 0);
  for (int64_t b = 0; b < p.images; ++b) {
    int64_t count = p.patches_per_image;
    if (p.mask) {
      count = 0;
      for (int64_t n = 0; n < p.patches_per_image; ++n)
        count += p.mask[b * p.mask_stride_image + n * p.mask_stride_row] != 0;
    }
    row_start[b + 1] = row_start[b] + round_up(count, align);
  }
  return row_start;
}

// Fewer page faults in memory that is written for the first time; a hint that cannot fail.
void advise_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
  const int64_t huge = 2 * kMiB, first = round_up((int64_t)memory, huge),
                last = ((int64_t)memory + bytes) / huge * huge;
  if (last > first) madvise((void*)first, last - first, MADV_HUGEPAGE);
#endif
}

// Whether the system has yet to make the page of `address`; false where it does not say.
bool is_fresh([[maybe_unused]] const char* address) {
#if defined(__linux__)
  static const int64_t page = sysconf(_SC_PAGESIZE);
  unsigned char present = 0;
  return mincore((void*)((int64_t)address / page * page), page, &present) == 0 && !(present & 1);
#else
  return false;
#endif
}

// Takes the page faults of memory that is about to be written for the first time all at once, in half the time of one
// by one. A hint: where it fails (before Linux 5.14), they come as they are.
void populate([[maybe_unused]] char* memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_POPULATE_WRITE)
  static const int64_t page = sysconf(_SC_PAGESIZE);
  const int64_t first = (int64_t)memory / page * page, last = ((int64_t)memory + bytes - 1) / page * page;
  if (is_fresh((char*)last)) madvise((void*)first, last + page - first, MADV_POPULATE_WRITE);
#endif
}

int64_t gradient_row_bytes(const ScoreParams& p) { return p.dim * (p.dtype == Dtype::float32 ? 4 : 2); }

// The gradients of rows [first, last) of a block.
void populate_gradients(const ScoreParams& p, const Rows& rows, int64_t first, int64_t last) {
  while (first < last && rows.image[last - 1] < 0) --last;
  while (first < last && rows.image[first] < 0) ++first;
  if (first == last) return;
  const int64_t begin = rows.image[first] * p.patches_per_image + rows.index[first];
  const int64_t end = rows.image[last - 1] * p.patches_per_image + rows.index[last - 1] + 1;
  populate((char*)p.grad_patches + begin * gradient_row_bytes(p), (end - begin) * gradient_row_bytes(p));
}

template <class AnyPlan>
Arena open_workspace(const ScoreParams& p, const AnyPlan& plan) {
  if (p.workspace_bytes < plan.workspace_bytes())
    throw std::invalid_argument("workspace has " + std::to_string(p.workspace_bytes) + " bytes, expected " +
                                std::to_string(plan.workspace_bytes()));
  char* base = (char*)round_up((int64_t)p.workspace, 64);
  advise_huge_pages(p.workspace, p.workspace_bytes);
  return {base};
}

void open_texts(const ScoreParams& p, const Plan& plan, int64_t first, Texts& texts) {
  texts.first = first;
  texts.count = least(plan.texts_block, p.texts_count - first);
  texts.padded = round_up(texts.count, plan.kernels.panel);
}

// The backward of the max form: blocks of patches, whole images where they fit, against blocks of texts.
struct MaxPlan {
  const Kernels& kernels;
  const ScoreParams& p;
  int64_t dims, texts_block, patches, images;  // padded D; texts, patches of an image and images of a block
  int64_t shared_bytes, scratch_bytes;
  int threads;

  explicit MaxPlan(const ScoreParams& params) : kernels(select_kernels(params.dtype, params.dim)), p(params) {
    dims = round_up(p.dim, kernels.panel);
    texts_block = least(p.texts_count, most(1, least(4096, kTextsBudget / (4 * dims))));
    const int64_t rows = most(1, kMaxRowsBudget / (4 * dims));
    patches = least(p.patches_per_image, rows);
    images = least(p.images, least(256, rows / patches));
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
    block.patch = arena.take<const float*>(images * patches);
    block.patch_norm = arena.take(images * patches);
    block.patch_scale = arena.take(images * patches);
    block.patch_rows = arena.take(images * patches * dims);
    block.patch_sums = p.grad_patches && texts_block < p.texts_count ? arena.take(images * patches * dims) : nullptr;
    block.text = arena.take<const float*>(texts_block);
    block.text_norm = arena.take(texts_block);
    block.text_rows = arena.take(texts_block * dims);
    block.order = arena.take<int32_t>(images * texts_block);
    block.start = arena.take<int32_t>(images * (patches + 1));
  }

  void take_scratch(Arena& arena, MaxScratch& scratch) const {
    scratch.rows = arena.take<const float*>(most(texts_block, images));
    scratch.weights = arena.take(most(texts_block, images));
    scratch.sum = arena.take(dims);
    scratch.buffer = arena.take(dims);
  }
};

void backward_max(const ScoreParams& p) {
  const MaxPlan plan(p);
  const Kernels& kernels = plan.kernels;
  Arena arena = open_workspace(p, plan);
  MaxBlock shared_block;
  plan.take_block(arena, shared_block);
  const int64_t scratch_at = arena.used, text_blocks = ceil_div(p.texts_count, plan.texts_block);

  Team(p.openmp, plan.threads, [&, shared_block](Team& team, int id) {
    Arena own{arena.base, scratch_at + id * plan.scratch_bytes};
    MaxScratch scratch;
    plan.take_scratch(own, scratch);
    MaxBlock block = shared_block;
    bool packed = false;
    for (int64_t image = 0; image < p.images; image += plan.images)
      for (int64_t patch = 0; patch < p.patches_per_image; patch += plan.patches) {
        block.image_first = image;
        block.image_last = least(image + plan.images, p.images);
        block.patch_first = patch;
        block.patches = least(plan.patches, p.patches_per_image - patch);
        for (int64_t text_block = 0; text_block < text_blocks; ++text_block) {
          block.text_first = text_block * plan.texts_block;
          block.text_count = least(plan.texts_block, p.texts_count - block.text_first);
          if (!packed || text_blocks > 1)
            team.phase(ceil_div(block.text_count, 16), [&](int64_t i) {
              kernels.max_pack_texts(p, block, i * 16, least(i * 16 + 16, block.text_count));
            });
          packed = true;
          team.phase(block.image_last - image, [&](int64_t i) { kernels.max_sort(p, block, image + i); });
          const int64_t ranges = ceil_div(block.patches, 64);
          team.phase((block.image_last - image) * ranges, [&](int64_t task) {
            const int64_t first = task % ranges * 64, last = least(first + 64, block.patches);
            if (p.grad_patches && text_block == text_blocks - 1)
              populate((char*)p.grad_patches + ((image + task / ranges) * p.patches_per_image + patch + first) *
                                                   gradient_row_bytes(p),
                       (last - first) * gradient_row_bytes(p));
            kernels.max_patches(p, block, image + task / ranges, first, last, scratch);
          });
          if (p.grad_texts)
            team.phase(ceil_div(block.text_count, 16), [&](int64_t i) {
              kernels.max_texts(p, block, i * 16, least(i * 16 + 16, block.text_count), scratch);
            });
        }
      }
    if (p.grad_texts)
      team.phase(ceil_div(p.texts_count, 16),
                 [&](int64_t i) { kernels.max_finish_texts(p, i * 16, least(i * 16 + 16, p.texts_count), scratch); });
  });
}

}  // namespace

int64_t workspace_bytes(const ScoreParams& p, bool backward) {
  if (backward && p.form == Form::max) return MaxPlan(p).workspace_bytes();
  const Kernels &kernels = select_kernels(p.dtype, p.dim), &exact = select_kernels(Dtype::float32, p.dim);
  int64_t bytes = Plan(p, backward, kernels).workspace_bytes();
  if (backward && kernels.pair == 2)  // see score_backward
    for (const bool again : {false, true}) bytes = most(bytes, Plan(p, again, exact).workspace_bytes());
  return bytes;
}

int64_t accumulator_floats(const ScoreParams& p) {
  const int64_t panel = select_kernels(p.dtype, p.dim).panel;
  return round_up(p.texts_count, panel) * round_up(p.dim, panel);
}

namespace {

void forward(const ScoreParams& p, const Kernels& kernels) {
  const Plan plan(p, false, kernels);
  Arena arena = open_workspace(p, plan);
  const std::vector<int64_t> row_start = count_rows(p, plan.row_align);
  Texts shared_texts;
  plan.take_texts(arena, shared_texts);
  const int64_t scratch_at = arena.used;

  Team(p.openmp, plan.threads, [&, shared_texts](Team& team, int id) {
    Arena own{arena.base, scratch_at + id * plan.scratch_bytes};
    Scratch scratch{};
    plan.take_scratch(own, scratch);
    Texts texts = shared_texts;
    const int64_t groups = ceil_div(p.images, plan.group);
    for (int64_t first = 0; first < p.texts_count; first += plan.texts_block) {
      open_texts(p, plan, first, texts);
      const int64_t panels = texts.padded / kernels.panel, ranges = ceil_div(panels, plan.text_panels);
      team.phase(panels, [&](int64_t panel) { kernels.pack_texts(p, texts, panel, scratch.row); });
      team.phase(groups * ranges, [&](int64_t task) {
        const int64_t image = task / ranges * plan.group, panel = task % ranges * plan.text_panels;
        kernels.forward(p, row_start.data(), image, least(image + plan.group, p.images), texts, panel,
                        least(panel + plan.text_panels, panels), image + plan.group * plan.threads, scratch);
      });
    }
  });
}

int64_t gradient_bytes(const ScoreParams& p) { return p.images * p.patches_per_image * gradient_row_bytes(p); }

// The backward of the dot and the cosine form. Returns false where W, rounded to 16 bits, has left too much error in a
// gradient, which is then not to be used.
bool backward_weighted(ScoreParams p, const Kernels& kernels) {
  const Plan plan(p, true, kernels);
  Arena arena = open_workspace(p, plan);
  const std::vector<int64_t> row_start = count_rows(p, plan.row_align);
  const int64_t rows_total = row_start[p.images];
  if (p.grad_patches && p.mask) {  // masked patches are never visited
    std::memset(p.grad_patches, 0, gradient_bytes(p));
    p.fresh_gradient = false;
  }

  Texts shared_texts;
  Rows shared_rows[2];  // a block's and the next one's
  Weights weights;
  Sums shared_sums;
  plan.take_texts(arena, shared_texts);
  plan.take_block(arena, shared_rows, weights, shared_sums);
  const int64_t scratch_at = arena.used;

  struct Block {
    int64_t first_row, last_row;
    std::vector<int64_t> starts;  // of the tasks that make weights: chunks of rows, or (cosine) images; then the end
    std::vector<int64_t> image_begin;  // see Rows
    std::vector<float> share;
  };
  std::vector<Block> blocks;
  const int64_t padding = 2 * kernels.inner;
  const auto count_images = [&](Block& block) {
    if (!plan.means) return;
    int64_t b = std::upper_bound(row_start.begin(), row_start.end(), block.first_row) - row_start.begin() - 1;
    for (; row_start[b] < block.last_row; ++b) {
      if (row_start[b] == row_start[b + 1]) continue;
      block.image_begin.push_back(most(0, row_start[b] - block.first_row));
      block.share.push_back(1.0f / (float)(row_start[b + 1] - row_start[b]));
      if ((int64_t)block.share.size() == kMeans)  // the block ends here, or a few rows before: only the last is padded
        block.last_row = least(block.last_row, block.first_row + (row_start[b + 1] - block.first_row) / padding * padding);
    }
    while (block.image_begin.back() >= block.last_row - block.first_row) {
      block.image_begin.pop_back();
      block.share.pop_back();
    }
  };
  if (plan.cosine) {
    for (int64_t b = 0; b < p.images; ++b) {
      if (row_start[b] == row_start[b + 1]) continue;
      if (blocks.empty() || row_start[b + 1] - blocks.back().first_row > plan.rows_block ||
          (plan.means && (int64_t)blocks.back().starts.size() > kMeans))
        blocks.push_back({row_start[b], 0, {0}, {}, {}});
      Block& block = blocks.back();
      block.last_row = row_start[b + 1];
      block.starts.push_back(block.last_row - block.first_row);
    }
  } else {
    for (int64_t row = 0; row < rows_total; row = blocks.back().last_row) {
      Block block{row, least(row + plan.rows_block, rows_total), {}, {}, {}};
      count_images(block);
      const int64_t count = round_up(block.last_row - row, padding);
      for (int64_t at = 0; at < count; at += plan.chunk) block.starts.push_back(at);
      block.starts.push_back(count);
      blocks.push_back(block);
    }
  }
  for (Block& block : blocks) {
    if (plan.cosine) count_images(block);
    block.image_begin.push_back(block.starts.back());
  }
  const int64_t text_blocks = ceil_div(p.texts_count, plan.texts_block);
  size_t most_tasks = 0;
  for (const Block& block : blocks) most_tasks = most(most_tasks, block.starts.size());
  std::vector<WeightSums> weight_sums(most_tasks * ceil_div(plan.texts_block, kTextRange));  // by task
  // Squared norms of the gradients, by chunk of a block and by task.
  std::vector<double> patches_squared(ceil_div(plan.capacity, plan.chunk)), texts_squared(ceil_div(p.texts_count, 16));

  Team(p.openmp, plan.threads, [&](Team& team, int id) {
    Arena own{arena.base, scratch_at + id * plan.scratch_bytes};
    Scratch scratch{};
    plan.take_scratch(own, scratch);
    Texts texts = shared_texts;
    const auto chunks = [&](const Block& block) { return ceil_div(block.starts.back(), plan.chunk); };
    const auto pack = [&](const Block& block, Rows rows, int64_t i) {
      const int64_t first = i * plan.chunk, last = least(first + plan.chunk, block.starts.back());
      // Past the last row of all, rows are padding.
      kernels.pack_rows(p, row_start.data(), block.first_row + first, block.first_row + last, rows, first, scratch.row);
    };
    if (!blocks.empty()) team.phase(chunks(blocks[0]), [&](int64_t i) { pack(blocks[0], shared_rows[0], i); });
    for (size_t number = 0; number < blocks.size(); ++number) {
      const Block& block = blocks[number];
      const Block* next = number + 1 < blocks.size() ? &blocks[number + 1] : nullptr;
      Rows rows = shared_rows[number % 2];
      rows.count = block.starts.back();
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
          const int64_t panel = task % ranges * range;
          weight_sums[task].add(kernels.weights(p, rows, block.starts[task / ranges], block.starts[task / ranges + 1],
                                                texts, panel, least(panel + range, panels), weights, shared_sums, add,
                                                scratch));
        });
        if (rows.means && p.grad_patches)
          team.phase(plan.dims / kernels.panel,
                     [&](int64_t panel) { kernels.means_product(rows, texts, weights, shared_sums, panel, add); });
        // Neither product needs the other, so both are one phase, the larger tasks first. The next block is packed in
        // between, when its rows have been fetched behind the patches' product.
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
    if (p.grad_texts)
      team.phase(ceil_div(p.texts_count, 16), [&](int64_t i) {
        texts_squared[i] = kernels.finish_texts(p, i * 16, least(i * 16 + 16, p.texts_count), scratch.row);
      });
  });

  WeightSums total;
  for (const WeightSums& sums : weight_sums) total.add(sums);
  if (p.grad_temperature) *p.grad_temperature = (float)(-total.temperature / p.temperature / p.temperature);
  const auto shows = [](double error, const std::vector<double>& squares) {
    return error > kRoundingShown * kRoundingShown * std::accumulate(squares.begin(), squares.end(), 0.0);
  };
  return !(p.grad_patches && shows(total.patches_error, patches_squared)) &&
         !(p.grad_texts && shows(total.texts_error, texts_squared));
}

}  // namespace

void score_forward(const ScoreParams& p) { forward(p, select_kernels(p.dtype, p.dim)); }

void score_backward(const ScoreParams& asked) {
  ScoreParams p = asked;
  p.fresh_gradient = p.grad_patches && is_fresh((const char*)p.grad_patches + gradient_bytes(p) - 1);
  if (p.form == Form::max) {
    if (p.grad_temperature) *p.grad_temperature = 0.0f;
    if (p.grad_patches || p.grad_texts) backward_max(p);
    return;
  }
  const Kernels& kernels = select_kernels(p.dtype, p.dim);
  if (backward_weighted(p, kernels) || kernels.pair == 1) return;
  const Kernels& exact = select_kernels(Dtype::float32, p.dim);
  if (p.texts_sum) std::memset(p.texts_sum, 0, sizeof(float) * accumulator_floats(p));
  p.fresh_gradient = false;
  std::vector<float> again;
  if (p.form == Form::dot) {  // τ may divide the difference of s and φ: both from the same kernels
    const int64_t pairs = p.images * p.texts_count;
    again.resize(2 * pairs);
    p.phi = again.data();
    p.lse = again.data() + pairs;
    forward(p, exact);
  }
  backward_weighted(p, exact);
}

double multiply_add_rate(Dtype dtype, int threads, double seconds) {
  const Kernels& kernels = select_kernels(dtype, 64);
  using Clock = std::chrono::steady_clock;
  std::atomic<double> total{0};
  const auto begin = Clock::now();
  Team(OpenMp{}, threads, [&](Team& team, int) {
    double flop = 0;
    while (std::chrono::duration<double>(Clock::now() - begin).count() < seconds) flop += kernels.multiply_adds(100000);
    for (double old = total; !total.compare_exchange_weak(old, old + flop);) {
    }
    team.phase(0, [](int64_t) {});
  });
  return total / std::chrono::duration<double>(Clock::now() - begin).count();
}

}  // namespace pacl
