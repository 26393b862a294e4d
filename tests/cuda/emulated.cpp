// The Hopper kernels on the host, for tests/test_cuda_emulated.py.

#define PACL_EMULATE
#include "cuda/score.cuh"

#include <cstdio>

using namespace pacl;
using namespace pacl::cuda;

namespace {

TensorMap map_of(const Box& box) {
  TensorMap map{};
  map.base = static_cast<const uint8_t*>(box.base);
  for (int i = 0; i < 3; ++i) map.sizes[i] = box.sizes[i], map.strides[i] = box.strides[i], map.box[i] = box.box[i];
  return map;
}

constexpr bool is_of_one_image(Epilogue e) { return has_second_product(e) || reads_attention(e); }

template <int kWidth, bool kPacked, class T>
void run_tile(Epilogue epilogue, const TensorMap& patches, const TensorMap& texts,
              const TensorMap& gram, const Work& work) {
  switch (epilogue) {
#define PACL_EPILOGUE(NAME, DTYPE)                                                                    \
  case Epilogue::NAME:                                                                                \
    if constexpr (!kPacked || !is_of_one_image(Epilogue::NAME))                                       \
      return score_kernel<kWidth, kPacked, T, Epilogue::NAME>(patches, texts, gram, work);            \
    break;
#include "cuda/epilogues.def"
  }
  emulator::fail("a Gram matrix is of one image");
}

template <class T>
void run(const Plan& plan, Epilogue epilogue, const TensorMap& patches, const TensorMap& texts,
              const TensorMap& gram, const Work& work) {
  switch (plan.packed ? -plan.width : plan.width) {
    case -192: return run_tile<192, true, T>(epilogue, patches, texts, gram, work);
    case -224: return run_tile<224, true, T>(epilogue, patches, texts, gram, work);
    case -256: return run_tile<256, true, T>(epilogue, patches, texts, gram, work);
    case 144: return run_tile<144, false, T>(epilogue, patches, texts, gram, work);
    case 200: return run_tile<200, false, T>(epilogue, patches, texts, gram, work);
    case 256: return run_tile<256, false, T>(epilogue, patches, texts, gram, work);
    default: emulator::fail("width " + std::to_string(plan.width) + " is not compiled into the emulator");
  }
}

}  // namespace

extern "C" {

struct EmulatedCall {
  int64_t images, patches_per_image, texts, dim;
  int64_t epilogue, half;  // half: float16, otherwise bfloat16
  const void *patches, *texts_data;
  int64_t patch_stride_image, patch_stride_row, text_stride_row;
  const float *inverse_patches, *inverse_texts;
  const uint8_t* mask;
  int64_t mask_stride_image, mask_stride_row;
  double temperature;
  const float* temperature_at;
  float *phi, *stat;
  int64_t stride_phi;
  const float* grad_phi;
  void* weights;
  int64_t stride_weights;
  const float* weight_scale;
  float* temperature_sums;
  int64_t masked;
  const void* gram;
  int64_t stride_gram;
  void* attention;
  int64_t attention_pitch;
  float* curvature;
  int64_t cluster, processors, seed, stages, resident;  // the last two 0 and -1 for what the plan says
  char* message;
  int64_t message_bytes;
};

int emulated_score(const EmulatedCall* in) {
  try {
    ScoreCall call{};
    call.epilogue = static_cast<Epilogue>(in->epilogue);
    call.images = in->images, call.patches_per_image = in->patches_per_image;
    call.texts = in->texts, call.dim = in->dim;
    call.dtype = in->half ? Dtype::float16 : Dtype::bfloat16;
    call.patches = in->patches, call.texts_data = in->texts_data;
    call.patch_stride_image = in->patch_stride_image, call.patch_stride_row = in->patch_stride_row;
    call.text_stride_row = in->text_stride_row;
    call.inverse_texts = in->inverse_texts;
    call.temperature = in->temperature, call.temperature_at = in->temperature_at;
    call.phi = in->phi, call.stat = in->stat, call.stride_phi = in->stride_phi;
    call.grad_phi = in->grad_phi;
    call.weights = in->weights, call.stride_weights = in->stride_weights;
    call.weight_scale = in->weight_scale, call.temperature_sums = in->temperature_sums;
    call.masked = in->masked;
    call.attention = in->attention, call.attention_pitch = in->attention_pitch, call.curvature = in->curvature;
    call.gram = in->gram, call.stride_gram = in->stride_gram;
    call.cluster = in->cluster;
    Plan plan = plan_of(call, in->processors);
    if (in->resident >= 0 && !reads_attention(call.epilogue)) plan.resident = in->resident;
    if (in->stages) plan.stages = in->stages;
    plan.shared_bytes = shared_bytes(plan, plan.stages);
    std::vector<float> storage(plan.groups * plan.chunks * plan.width + 4);
    float* columns = storage.data() + (16 - reinterpret_cast<uintptr_t>(storage.data()) % 16) / 4 % 4;
    if (in->inverse_patches) {  // where the call has made columns
      Columns made = make_columns(call, plan, in->inverse_patches, in->mask, in->mask_stride_image,
                                  in->mask_stride_row, columns);
      for (int64_t at = 0; at < made.tiles * made.width; ++at) columns[at] = column_of(made, at);
      call.columns = columns;
    }
    Work work = make_work(call, plan);
    TensorMap patches = map_of(patch_box(call, plan)), texts = map_of(text_box(call));
    TensorMap gram = has_second_product(call.epilogue) ? map_of(gram_box(call, plan)) : patches;
    emulator::launch(plan.clusters, plan.cluster, threads_of(plan.consumers), plan.shared_bytes, in->seed, [&] {
      if (in->half)
        run<__half>(plan, call.epilogue, patches, texts, gram, work);
      else
        run<__nv_bfloat16>(plan, call.epilogue, patches, texts, gram, work);
    });
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(in->message, in->message_bytes, "%s", error.what());
    return 1;
  }
}

}
