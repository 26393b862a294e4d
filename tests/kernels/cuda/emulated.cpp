// The Hopper kernels on the host, for tests/kernels/test_cuda_emulated.py. The module has the CUDA side of
// `pacl_kernels._native`.

#define PACL_EMULATE
#include "cuda/binding.h"
#include "cuda/score.cuh"

namespace py = pybind11;
using namespace pacl;
using namespace pacl::cuda;

namespace {

TensorMap map_of(const Box& box, int, bool) {
  TensorMap map{};
  map.base = static_cast<const uint8_t*>(box.base);
  for (int i = 0; i < 3; ++i) map.sizes[i] = box.sizes[i], map.strides[i] = box.strides[i], map.box[i] = box.box[i];
  return map;
}

constexpr bool is_of_one_image(Epilogue e) { return takes_whole_images(e) || reads_attention(e); }

// As csrc/cuda/kernels.cu does.
template <bool kPacked, class T>
constexpr bool is_compiled(Epilogue e) {
  return !(kPacked && is_of_one_image(e)) && !(is_only_bfloat16(e) && std::is_same_v<T, __half>);
}

template <int kWidth, bool kPacked, class T>
void run_tile(Epilogue epilogue, const Maps& maps, const Work& work) {
  switch (epilogue) {
#define PACL_EPILOGUE(NAME, DTYPE)                                         \
  case Epilogue::NAME:                                                     \
    if constexpr (is_compiled<kPacked, T>(Epilogue::NAME))                 \
      return score_kernel<kWidth, kPacked, T, Epilogue::NAME>(maps, work); \
    break;
#include "cuda/epilogues.def"
  }
  emulator::fail("this kernel is not compiled");
}

template <class T>
void run_widths(const Launch& launch, const Maps& maps, const Work& work) {
  const Plan& plan = launch.plan;
  switch (plan.packed ? -plan.width : plan.width) {
    case -192:
      return run_tile<192, true, T>(launch.epilogue, maps, work);
    case -224:
      return run_tile<224, true, T>(launch.epilogue, maps, work);
    case -256:
      return run_tile<256, true, T>(launch.epilogue, maps, work);
    case 144:
      return run_tile<144, false, T>(launch.epilogue, maps, work);
    case 200:
      return run_tile<200, false, T>(launch.epilogue, maps, work);
    case 256:
      return run_tile<256, false, T>(launch.epilogue, maps, work);
    default:
      emulator::fail("width " + std::to_string(plan.width) + " is not compiled into the emulator");
  }
}

// Settings of a test. `stages` 0 and `resident` -1 keep the plan's values.
struct Settings {
  int processors;  // multiprocessors of the device: even, and few, so that each cluster gets several items
  uint64_t seed;   // seeds the order of threads
  int stages, resident;
} settings;

}  // namespace

namespace pacl::cuda {

int processors_of(int) { return settings.processors; }

void make_columns(const Launch& launch, const float* inverse_norms, const uint8_t* mask, int64_t mask_stride_image,
                  int64_t mask_stride_row, float* columns) {
  Columns made = columns_of(launch, inverse_norms, mask, mask_stride_image, mask_stride_row, columns);
  for (int64_t at = 0; at < made.tiles * made.width; ++at) columns[at] = column_of(made, at);
}

void run(const Launch& given) {
  Launch launch = given;
  Plan& plan = launch.plan;
  if (settings.resident >= 0 && !reads_attention(launch.epilogue)) plan.resident = settings.resident;
  if (settings.stages) plan.stages = settings.stages;
  plan.shared_bytes = shared_bytes(plan, plan.stages);
  Work work = make_work(launch);
  auto maps = maps_of<Maps>(launch, map_of);
  emulator::launch(plan.clusters, plan.cluster, threads_of(plan.consumers), plan.shared_bytes, settings.seed, [&] {
    if (launch.half)
      run_widths<__half>(launch, maps, work);
    else
      run_widths<__nv_bfloat16>(launch, maps, work);
  });
}

}  // namespace pacl::cuda

PYBIND11_MODULE(emulated, m) {
  cuda::bind(m);
  m.def(
      "configure",
      [](int processors, uint64_t seed, int stages, int resident) {
        settings = {.processors = processors, .seed = seed, .stages = stages, .resident = resident};
      },
      py::kw_only(), py::arg("processors") = 4, py::arg("seed") = 0, py::arg("stages") = 0, py::arg("resident") = -1,
      "Settings of the launches made from now on.");
}
