// The way of results from registers to memory: through a warp's staging buffer, with stores of its own, or through the
// boxes of a warpgroup, with bulk tensor stores of the copy engine.

#pragma once

#include "pipeline.cuh"

namespace pacl::cuda {

// The patch of a column of a tile that begins with `image`; `there` is false for a column without a patch.
struct Patch {
  int image, n;
  bool there;

  template <int kWidth, bool kPacked>
  static __device__ __forceinline__ Patch of(const Work& work, int image, int chunk, int column) {
    Patch patch{image, chunk * kWidth + column, column < kWidth};
    if constexpr (kPacked) {
      int which = column / work.pitch;
      patch.image += which;
      patch.n = column - which * work.pitch;
      patch.there &= which < work.images_of_tile;
    }
    patch.there &= patch.n < work.patches && patch.image < work.images;
    return patch;
  }
};

// Copies results of a warp from registers to memory, 64 columns of its 16 rows at a time, through shared memory, so
// that neighbouring lanes store neighbours.
struct Outlet {
  static constexpr int kBlocks = kStagedColumns / 8;  // of eight columns, written at once

  uint8_t* staged;
  int text, texts;  // the text of the first row, and the number of texts
  int lane;

  // Stages column blocks `j` and `j + 1`, of eight columns each. Call it between `begin` and `end`. Entry 2 b + r of
  // `two_blocks` holds two packed neighbours of block j + b, in the row 8 r below the thread's first.
  __device__ __forceinline__ void put(int j, const uint32_t (&two_blocks)[4]) const {
    store_matrices(staged + lane % 16 * kStagedPitch + lane / 16 * 16 + 16 * j, two_blocks);
  }
  __device__ __forceinline__ void begin() const { __syncwarp(); }  // the previous contents have been read
  __device__ __forceinline__ void end() const { __syncwarp(); }

  // Stages 64 columns of a tile from block `j0` on, or fewer at the tile's end. `pair(j, column, r)` returns two packed
  // neighbours of row r in block j; `column` has their entries of `columns`. `behind()` is called after each block.
  template <int kWidth, class Pair, class Behind>
  __device__ __forceinline__ void stage(int j0, const float* columns, const Pair& pair, const Behind& behind) const {
    uint32_t out[4] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      int j = j0 + i;
      if (j >= kWidth / 8) continue;
      float2 column = *reinterpret_cast<const float2*>(columns + 8 * j + 2 * (lane % 4));
#pragma unroll
      for (int r = 0; r < 2; ++r) out[i % 2 * 2 + r] = pair(j, column, r);
      bool last = j + 1 == kWidth / 8;
      if (i == 1 || (i == 0 && last)) begin();
      if (i % 2 == 1 || last) put(i / 2 * 2, out);  // past an odd last block, the contents do not matter
      behind();
    }
    end();
  }

  // Copies the staged columns to `matrix`, kElements neighbours at a time; texts are `stride` apart. `place` returns
  // the offset of a column in its row, or a negative number for a column that is not stored.
  template <int kElements, class Place>
  __device__ __forceinline__ void copy(uint16_t* matrix, int64_t stride, const Place& place) const {
    constexpr int kLanes = kStagedColumns / kElements < 32 ? kStagedColumns / kElements : 32, kRows = 32 / kLanes;
    int first = lane / kLanes, left = texts - text - first;
    using Bits = std::conditional_t<kElements == 8, uint4, std::conditional_t<kElements == 4, uint2, uint16_t>>;
#pragma unroll
    for (int begin = 0; begin < kStagedColumns; begin += kLanes * kElements) {
      int column = begin + lane % kLanes * kElements;
      int64_t offset = place(column);
      if (offset < 0) continue;
      const uint8_t* from = staged + first * kStagedPitch + 2 * column;
      uint16_t* to = matrix + (text + first) * stride + offset;
#pragma unroll kElements == 1 ? 4 : 16  // fully unrolled, the narrowest stores would be most of the code
      for (int row = 0; row < 16; row += kRows, to += kRows * stride) {
        Bits bits = *reinterpret_cast<const Bits*>(from + row * kStagedPitch);
        if (row < left) *reinterpret_cast<Bits*>(to) = bits;
      }
    }
  }

  // Writes 64 columns of the weights `[texts, images patches]`, from block `j0` on of a tile that begins with `image`.
  template <int kWidth, bool kPacked, class Pair, class Behind>
  __device__ __forceinline__ void write_weights(const Work& work, int image, int chunk, int j0, const float* columns,
                                                const Pair& pair, const Behind& behind) const {
    stage<kWidth>(j0, columns, pair, behind);
    auto place = [&](int column) {
      Patch patch = Patch::of<kWidth, kPacked>(work, image, chunk, 8 * j0 + column);
      return patch.there ? int64_t(patch.image) * work.patches + patch.n : int64_t(-1);
    };
    switch (work.store_elements) {
      case 8:
        return copy<8>(work.weights, work.weights_stride, place);
      case 4:
        return copy<4>(work.weights, work.weights_stride, place);
      default:
        return copy<1>(work.weights, work.weights_stride, place);
    }
  }

  // Writes the same columns of the attention `[images, texts, attention_stride]`.
  template <int kWidth, bool kPacked, class Pair, class Behind>
  __device__ __forceinline__ void write_attention(const Work& work, int image, int chunk, int j0, const float* columns,
                                                  const Pair& pair, const Behind& behind) const {
    stage<kWidth>(j0, columns, pair, behind);
    copy<8>(work.attention, work.attention_stride, [&](int column) {
      Patch patch = Patch::of<kWidth, kPacked>(work, image, chunk, 8 * j0 + column);
      return patch.there ? patch.image * work.texts * work.attention_stride + patch.n : int64_t(-1);
    });
  }
};

// Sends the results of a warpgroup to memory by bulk tensor stores, kPatches columns at a time. The weights leave
// transposed, `[images, patches, weights_stride]`: a row of a box is a patch with 64 texts, 128 bytes that are aligned
// for any number of patches. Columns without a patch lie outside of the tensor, and the copy engine leaves them out.
//
// All boxes must be free at the beginning of a tile. The first thread of the warpgroup issues the stores.
template <int kPatches>
struct Boxes {
  static constexpr int kBlocks = kPatches / 8;
  static constexpr int kBytes = kPatches * kTileTexts * 2;

  const TensorMap &weights, &attention;
  uint8_t* boxes;  // [kBoxes][kBytes]
  int text;        // the first of the tile
  int warp, lane;  // of the warpgroup, and of the warp
  int barrier;     // named barrier of the warpgroup
  int next = 0;    // the box to fill

  __device__ __forceinline__ bool is_first() const { return warp == 0 && lane == 0; }

  // Returns the offset in a box of the row of 16 bytes that this lane passes to store_matrices, for row `row` of the
  // box and its chunk `chunk` of 16 bytes. The swizzle of 128 bytes keeps eight rows off each other's banks.
  static __device__ __forceinline__ int offset_of(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

  // Fills the next box from block `j0` on, as Outlet::stage does: `put(box, i, two_blocks)` stores blocks j0 + i and
  // j0 + i + 1. On return the box is complete. Returns it to the first thread, and null to the others.
  template <int kWidth, class Put, class Pair, class Behind>
  __device__ __forceinline__ uint8_t* fill(int j0, const float* columns, const Put& put, const Pair& pair,
                                           const Behind& behind) {
    uint8_t* box = boxes + next * kBytes;
    next = (next + 1) % kBoxes;
    uint32_t out[4] = {};
    __syncwarp();  // the first thread comes from a store
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      int j = j0 + i;
      if (j >= kWidth / 8) continue;
      float2 column = *reinterpret_cast<const float2*>(columns + 8 * j + 2 * (lane % 4));
#pragma unroll
      for (int r = 0; r < 2; ++r) out[i % 2 * 2 + r] = pair(j, column, r);
      if (i % 2 == 1 || j + 1 == kWidth / 8) put(box, i / 2 * 2, out);  // past an odd last block: not stored
      behind();
    }
    engine_fence();
    // The other box's store began a box ago. Behind the barrier that box may be filled.
    if (is_first()) store_wait_read();
    named_sync(barrier, kWarpgroup);
    return is_first() ? box : nullptr;
  }

  template <int kWidth, bool kPacked, class Pair, class Behind>
  __device__ __forceinline__ void write_weights(const Work& work, int image, int chunk, int j0, const float* columns,
                                                const Pair& pair, const Behind& behind) {
    auto put = [&](uint8_t* box, int i, const uint32_t(&two_blocks)[4]) {
      // Matrix 2 b + r has eight texts of block i + b, which transposed are a row of 16 bytes for each patch.
      store_matrices_transposed(box + 1024 * i + lane / 16 * 1024 + offset_of(lane % 8, 2 * warp + lane / 8 % 2),
                                two_blocks);
    };
    uint8_t* box = fill<kWidth>(j0, columns, put, pair, behind);
    if (!box) return;
#pragma unroll 1
    for (int column = 0; column < kPatches; column += work.box_patches) {
      Patch patch = Patch::of<kWidth, kPacked>(work, image, chunk, 8 * j0 + column);
      if (patch.there) store_box(weights, box + 128 * column, text, patch.n, patch.image);
    }
    store_commit();
  }

  // Writes the attention `[images, texts, attention_stride]`, whose rows are aligned. A tile holds one image.
  template <int kWidth, bool kPacked, class Pair, class Behind>
  __device__ __forceinline__ void write_attention(const Work&, int image, int, int j0, const float* columns,
                                                  const Pair& pair, const Behind& behind) {
    static_assert(kPatches == kTileTexts && !kPacked);  // otherwise the box would have other sizes
    auto put = [&](uint8_t* box, int i, const uint32_t(&two_blocks)[4]) {
      store_matrices(box + offset_of(16 * warp + lane % 16, i + lane / 16), two_blocks);
    };
    uint8_t* box = fill<kWidth>(j0, columns, put, pair, behind);
    if (!box) return;
    store_box(attention, box, 8 * j0, text, image);
    store_commit();
  }
};

}  // namespace pacl::cuda
