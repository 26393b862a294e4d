// The plan of a Hopper launch: its tiles and the distribution of work. Plain arithmetic, tested on the host.
//
// A tile is 64 texts by `width` columns. The columns are the patches of one image, a chunk of them, or several small
// images. A cluster of one or two blocks works on an item: 64 texts per block against a run of groups of images.

#pragma once

#include <algorithm>
#include <cstdint>

namespace pacl::cuda {

enum class Epilogue {
#define PACL_EPILOGUE(NAME, DTYPE) NAME,
#include "epilogues.def"
};

// The default of `Settings.transposed_weights` in pacl_kernels/backends/gpu/hopper.py: W leaves by bulk tensor stores,
// transposed, where there is such a kernel. False until that has been timed on a GPU.
inline constexpr bool kTransposedWeights = false;

// Returns true if results leave through boxes in shared memory, by bulk tensor stores, and W transposed.
constexpr bool is_transposed(Epilogue e) {
  return e == Epilogue::dot_weights_transposed || e == Epilogue::cosine_weights_transposed ||
         e == Epilogue::cosine_weights_from_attention_transposed;
}
// Returns the epilogue with the same arithmetic whose threads store their results.
constexpr Epilogue arithmetic_of(Epilogue e) {
  switch (e) {
    case Epilogue::dot_weights_transposed:
      return Epilogue::dot_weights;
    case Epilogue::cosine_weights_transposed:
      return Epilogue::cosine_weights;
    case Epilogue::cosine_weights_from_attention_transposed:
      return Epilogue::cosine_weights_from_attention;
    default:
      return e;
  }
}
// Returns true if a tile has a second product: its attention, in registers, with the Gram matrix, which follows the
// patches in the ring.
constexpr bool has_second_product(Epilogue e) {
  e = arithmetic_of(e);
  return e == Epilogue::cosine_forward || e == Epilogue::cosine_weights || e == Epilogue::cosine_sigmoid_weights;
}
// Returns true if the epilogue computes the sigmoid loss of its pairs besides W.
constexpr bool has_sigmoid_loss(Epilogue e) {
  return e == Epilogue::dot_sigmoid_weights || e == Epilogue::cosine_sigmoid_weights;
}
constexpr bool is_only_bfloat16(Epilogue e) { return has_sigmoid_loss(e) || is_transposed(e); }
// Returns true if a tile must hold all patches of an image, and no others.
constexpr bool takes_whole_images(Epilogue e) { return has_second_product(e) || has_sigmoid_loss(e); }
// Returns true if the operands are the attention in memory and the Gram matrix, in place of texts and patches.
constexpr bool reads_attention(Epilogue e) {
  e = arithmetic_of(e);
  return e == Epilogue::cosine_forward_from_attention || e == Epilogue::cosine_weights_from_attention;
}
constexpr bool writes_weights(Epilogue e) {
  e = arithmetic_of(e);
  return e == Epilogue::dot_weights || e == Epilogue::cosine_weights || e == Epilogue::cosine_weights_from_attention ||
         has_sigmoid_loss(e);
}
// Returns true if a warp's results go through its staging buffer.
constexpr bool is_staged(Epilogue e) { return !is_transposed(e) && (writes_weights(e) || e == Epilogue::attention); }

inline constexpr int kTileTexts = 64;
inline constexpr int kStep = 64;  // elements along D: the 128 bytes that the swizzle of shared memory spans
inline constexpr int kMaxWidth = 256;
inline constexpr int kMaxStages = 8;
inline constexpr int kSharedBytes = 227 * 1024;  // the limit of a block on Hopper
inline constexpr int kBarrierBytes = 256;        // room for Barriers in pipeline.cuh
inline constexpr int kTextStepBytes = kTileTexts * kStep * 2;
// Staging buffer of a warp between registers and memory: 16 rows by 64 columns of 16 bits. Each row is padded by 16
// bytes, so that eight rows do not share banks.
inline constexpr int kStagedColumns = 64;
inline constexpr int kStagedPitch = kStagedColumns * 2 + 16;
inline constexpr int kStagedBytes = 16 * kStagedPitch;
// Boxes of a warpgroup between registers and bulk tensor stores: one is filled while the other is read.
inline constexpr int kBoxes = 2;
// Columns of a box. With three warpgroups wider boxes would take a step from the ring.
constexpr int box_columns(int consumers) { return consumers == 3 ? 32 : 64; }
// The sums of a sigmoid loss: of the loss and of the gradients of scale, bias and temperature, in this order.
inline constexpr int kLossSums = 4;
inline constexpr int kLossSumsBytes = kLossSums * 32 * 8;  // of a warpgroup; one of double for each four threads
// Compiled tile widths, for one image (or a chunk of it) and for several small images side by side. There are fewer for
// the running maximum.
inline constexpr int kWidths[] = {144, 160, 176, 192, 200, 208, 224, 232, 248, 256};
inline constexpr int kPackedWidths[] = {192, 224, 256};
inline constexpr int kRunningMaxWidths[] = {200, 256};
inline constexpr int kRunningMaxPackedWidths[] = {256};
// Compiled tile widths of whole images, and with the attention in memory.
inline constexpr int kWholeImageWidths[] = {144, 176, 192, 200, 208, 256};
inline constexpr int kFromAttentionWidths[] = {144, 176, 192, 200};
inline constexpr int kMostPacked = 128;  // images of at most this many patches share a tile

// Widest tile with three consumers. Consumers are warpgroups that take tiles in turn: two with 232 registers a thread,
// or three with 160 if that suffices. While one of three has the tensor cores, the epilogues of two hide each other's
// waits.
inline constexpr int kMostOfThree = 200;  // columns

constexpr int consumers_of(Epilogue e, int width) {
  e = arithmetic_of(e);
  bool narrow = e == Epilogue::dot_forward || e == Epilogue::dot_weights || e == Epilogue::attention ||
                e == Epilogue::dot_sigmoid_weights;
  return narrow && width <= kMostOfThree ? 3 : 2;
}

// The part of a plan that the kernel reads.
struct Schedule {
  int64_t images, texts;
  int64_t groups;       // groups of images; a group shares a tile
  int64_t splits;       // runs of groups of images
  int64_t text_groups;  // groups of 64 texts per block of the cluster
  int64_t items;        // text groups times splits
  int64_t clusters;     // clusters launched
  int patches;          // patches of an image
  int pitch;            // columns from one image of a tile to the next; a multiple of 8
  int images_of_tile;
  int chunks;       // tiles of an image
  int passes;       // passes over the chunks: 2 if a tile needs sums over all of them
  int steps;        // steps along D, or along the image's patches for the attention's products
  int gram_steps;   // steps along the image's patches if the Gram matrix is a second operand, otherwise 0
  int stages;       // steps that the ring in shared memory holds
  int cluster;      // blocks that share each step of patches
  int box_patches;  // rows of a bulk tensor store of W, all of them patches of one image
  bool resident;    // the texts stay in shared memory; otherwise each step loads its part of them
};

struct Plan : Schedule {
  int64_t dim;
  int width;      // columns of a tile
  bool packed;    // several images to a tile
  bool staged;    // shared memory has staging buffers for results
  bool summed;    // shared memory has the sums of a sigmoid loss
  bool boxed;     // shared memory has boxes for bulk tensor stores
  int consumers;  // warpgroups that take tiles in turn
  int shared_bytes;
};

constexpr int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// Returns the bytes of one step in the ring. The parts of a step begin at multiples of 1,024.
inline int stage_bytes(const Plan& plan) { return plan.width * kStep * 2 + (plan.resident ? 0 : kTextStepBytes); }

// Returns the bytes before texts and ring in shared memory. The offsets in this part are compile-time constants.
constexpr int fixed_bytes(int consumers, bool staged, bool summed, bool boxed) {
  int of_consumer = kMaxWidth * 4 + (staged ? 4 * kStagedBytes : 0);  // its columns, and a staging buffer per warp
  of_consumer += summed ? kLossSumsBytes : 0;
  int bytes = static_cast<int>(ceil_div(kBarrierBytes + consumers * of_consumer, 1024) * 1024);
  // Boxes begin at multiples of 1,024, as the swizzle demands.
  return bytes + (boxed ? consumers * kBoxes * box_columns(consumers) * kTileTexts * 2 : 0);
}

inline int shared_bytes(const Plan& plan, int stages) {
  int texts = plan.resident ? plan.steps * kTextStepBytes : 0;
  return fixed_bytes(plan.consumers, plan.staged, plan.summed, plan.boxed) + texts + stages * stage_bytes(plan);
}

// Returns the narrowest compiled width of at least `columns`, or 0 if there is none.
template <int kCount>
int width_for(const int (&widths)[kCount], int64_t columns) {
  for (int width : widths)
    if (width >= columns) return width;
  return 0;
}

// Plans one image or a chunk of it per tile.
template <int kCount>
void choose_chunks(Plan& plan, int64_t patches, const int (&widths)[kCount]) {
  int64_t fewest = INT64_MAX;
  int64_t least = ceil_div(patches, widths[kCount - 1]);
  for (int64_t chunks = least; chunks <= least + 1; ++chunks) {
    int width = width_for(widths, ceil_div(patches, chunks));
    // Each tile has a fixed cost of about 8 columns.
    int64_t cost = chunks * (width + 8);
    if (cost < fewest) fewest = cost, plan.width = width, plan.chunks = static_cast<int>(chunks);
  }
  plan.pitch = plan.width;
  plan.images_of_tile = 1;
}

template <int kCount, int kPackedCount>
void choose_tile(Plan& plan, int64_t patches, const int (&widths)[kCount], const int (&packed_widths)[kPackedCount]) {
  plan.packed = patches <= kMostPacked;
  if (!plan.packed) return choose_chunks(plan, patches, widths);
  plan.chunks = 1;
  plan.pitch = static_cast<int>(ceil_div(patches, 8) * 8);
  double best = 0;
  for (int width : packed_widths) {
    int images = width / plan.pitch;
    double used = double(images * patches) / width;
    if (images > 0 && used > best) best = used, plan.width = width, plan.images_of_tile = images;
  }
}

// Splits the work into items so that the busiest cluster has the fewest rounds of tiles.
inline void choose_items(Plan& plan, int processors) {
  int64_t most = std::max<int64_t>(processors / plan.cluster, 1);
  int64_t fewest = INT64_MAX;
  for (int64_t splits = 1; splits <= std::min<int64_t>(plan.groups, 64); ++splits) {
    int64_t items = plan.text_groups * splits;
    int64_t turns = ceil_div(ceil_div(plan.groups, splits), plan.consumers);  // each consumer takes a group
    int64_t tiles = plan.consumers * turns * plan.chunks * plan.passes;
    int64_t rounds = ceil_div(items, most) * (tiles + 1);  // + 1 for loading the texts
    if (rounds < fewest) fewest = rounds, plan.splits = splits, plan.items = items;
  }
  plan.clusters = std::min(most, plan.items);
}

// With fewer patches several images would share a tile, and the product with their Gram matrices would be mostly zeros.
inline constexpr int kLeastOfOneTile = 97;

// Returns true if all patches of one image, and no others, go into a tile. The cosine form then runs in one launch, and
// so does the sigmoid loss with W.
inline bool fits_one_tile(int64_t patches) { return patches >= kLeastOfOneTile && patches <= kMaxWidth; }

// Makes a plan for a device of `processors` multiprocessors. `cluster`: 1 or 2 blocks, or 0 for the best.
inline Plan make_plan(int64_t images, int64_t patches, int64_t texts, int64_t dim, Epilogue epilogue, int processors,
                      int cluster) {
  Plan plan{};
  plan.images = images, plan.patches = static_cast<int>(patches), plan.texts = texts, plan.dim = dim;
  plan.staged = is_staged(epilogue);
  plan.summed = has_sigmoid_loss(epilogue);
  plan.boxed = is_transposed(epilogue);
  if (takes_whole_images(epilogue)) {
    plan.width = plan.pitch = width_for(kWholeImageWidths, patches);
    plan.images_of_tile = plan.chunks = 1;
    plan.gram_steps = has_second_product(epilogue) ? static_cast<int>(ceil_div(plan.width, kStep)) : 0;
  } else if (reads_attention(epilogue)) {
    choose_chunks(plan, patches, kFromAttentionWidths);
  } else if (epilogue == Epilogue::dot_forward_running_max) {
    choose_tile(plan, patches, kRunningMaxWidths, kRunningMaxPackedWidths);
  } else {
    choose_tile(plan, patches, kWidths, kPackedWidths);
  }
  plan.consumers = consumers_of(epilogue, plan.width);
  plan.passes = reads_attention(epilogue) && writes_weights(epilogue) && plan.chunks > 1 ? 2 : 1;
  // A store must not reach into the next image or chunk; what lies past an image's last patch is left out anyway.
  int box = box_columns(plan.consumers);
  plan.box_patches = plan.packed || (plan.chunks > 1 && plan.width % box != 0) ? 8 : box;
  plan.groups = ceil_div(images, plan.images_of_tile);
  plan.steps = static_cast<int>(ceil_div(reads_attention(epilogue) ? patches : dim, kStep));
  plan.cluster = cluster ? cluster : (texts > kTileTexts && processors > 1 ? 2 : 1);
  plan.text_groups = ceil_div(texts, kTileTexts * plan.cluster);
  for (bool resident : {true, false}) {
    if (resident && reads_attention(epilogue)) continue;  // each image has its own attention
    plan.resident = resident;
    plan.stages = kMaxStages;
    while (plan.stages > 1 && shared_bytes(plan, plan.stages) > kSharedBytes) --plan.stages;
    // Fewer than three stages do not hide the memory latency.
    if (plan.stages >= 3) break;
  }
  plan.shared_bytes = shared_bytes(plan, plan.stages);
  choose_items(plan, processors);
  return plan;
}

}  // namespace pacl::cuda
