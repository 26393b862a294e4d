// Launches: tensor maps, the choice of the kernel, and CUDA errors as exceptions.

#include <cuda.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "kernels.h"
#include "score.cuh"

namespace pacl::cuda {
namespace {

__global__ void columns_kernel(Columns c) {
  int64_t at = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (at < c.tiles * c.width) c.columns[at] = column_of(c, at);
}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error, which the next call would report again
  throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(error));
}

// Makes a device current during the lifetime of the object.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// Returns the driver's function. If it were linked, the module could not be imported without a driver.
EncodeTiled encode_tiled() {
  static void* const entry = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result),
          "cudaGetDriverEntryPointByVersion");
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result),
          "cudaGetDriverEntryPoint");
#endif
    if (result != cudaDriverEntryPointSuccess || !found)
      throw std::runtime_error("CUDA: the driver has no cuTensorMapEncodeTiled, expected one of CUDA 12 or newer");
    return found;
  }();
  return reinterpret_cast<EncodeTiled>(entry);
}

CUtensorMap tensor_map(const Box& box, int dimensions, bool half) {
  cuuint64_t sizes[3], strides[2];
  cuuint32_t extents[3], steps[3] = {1, 1, 1};
  for (int i = 0; i < dimensions; ++i) {
    sizes[i] = box.sizes[i];
    extents[i] = box.box[i];
    if (i > 0) strides[i - 1] = box.strides[i];
  }
  auto type = half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  CUtensorMap map;
  CUresult result = encode_tiled()(&map, type, dimensions, const_cast<void*>(box.base), sizes, strides, extents, steps,
                                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("CUDA: cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(result)) +
                             " for a tensor of " + std::to_string(sizes[0]) + " dimensions");
  return map;
}

// Returns the kernel, or null where none is compiled for the dtype or the width.
const void* kernel_of(const Launch& launch) {
  switch (launch.epilogue) {
#define PACL_EPILOGUE(NAME, DTYPE) \
  case Epilogue::NAME:             \
    return NAME##_kernel(launch.half, launch.plan.width, launch.plan.packed);
#include "epilogues.def"
  }
  return nullptr;
}

}  // namespace

int processors_of(int device) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}

void make_columns(const Launch& launch, const float* inverse_norms, const uint8_t* mask, int64_t mask_stride_image,
                  int64_t mask_stride_row, float* columns) {
  OnDevice on(launch.device);
  Columns made = columns_of(launch, inverse_norms, mask, mask_stride_image, mask_stride_row, columns);
  int64_t blocks = ceil_div(made.tiles * made.width, 256);
  columns_kernel<<<static_cast<unsigned>(blocks), 256, 0, static_cast<cudaStream_t>(launch.stream)>>>(made);
  check(cudaGetLastError(), "columns_kernel");
}

void run(const Launch& launch) {
  OnDevice on(launch.device);
  const Plan& plan = launch.plan;
  Work work = make_work(launch);
  auto maps = maps_of<Maps>(launch, tensor_map);
  const void* kernel = kernel_of(launch);
  if (!kernel) throw std::runtime_error("CUDA: this kernel is not compiled for this dtype and number of patches");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes),
        "cudaFuncSetAttribute");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.clusters * plan.cluster));
  config.blockDim = dim3(threads_of(plan.consumers));
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = static_cast<cudaStream_t>(launch.stream);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = plan.cluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = 1;
  void* arguments[] = {&maps, &work};
  check(cudaLaunchKernelExC(&config, kernel, arguments), "score_kernel");
}

}  // namespace pacl::cuda
