// Calls the AVX2 kernels once for each form, dtype and direction, for instruction_counts.py to count their
// instructions. It prints the name of each call, in order; its argument limits the calls to one form. Update it with
// csrc/cpu/calls.h and csrc/cpu/params.h, which it fills.

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cpu/calls.h"
#include "cpu/kernels.h"

namespace pacl {
namespace avx2 {
extern const Kernels kernels;
}
// Replaces csrc/cpu/dispatch.cpp, which would need every instruction set.
const Kernels& select_kernels(Dtype, int64_t) { return avx2::kernels; }
}  // namespace pacl

using namespace pacl;

namespace {

constexpr int64_t kImages = 32, kPatches = 49, kTexts = 32, kDim = 128;

// Memory that is aligned, filled with zeros, and never freed: counts do not depend on where it is or who wrote it.
template <class T>
T* zeros(int64_t count) {
  const size_t bytes = (count * sizeof(T) + 4095) / 4096 * 4096;
  void* memory = std::aligned_alloc(4096, bytes);
  std::memset(memory, 0, bytes);
  return (T*)memory;
}

// Returns numbers between -1 and 1, the same on every machine, in float32 or as the upper half of it: bfloat16.
void* random(int64_t count, Dtype dtype, uint32_t seed) {
  uint32_t* numbers = zeros<uint32_t>(count);
  for (int64_t i = 0; i < count; ++i) {
    seed = 1664525 * seed + 1013904223;
    const float number = (float)(int32_t)seed * 0x1p-31f;
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    if (dtype == Dtype::float32)
      numbers[i] = bits;
    else
      ((uint16_t*)numbers)[i] = bits >> 16;
  }
  return numbers;
}

}  // namespace

// Plans and runs a call: callgrind counts in this function alone, which instruction_counts.py names.
extern "C" void counted_call(Planned (*plan)(const CompatibilityParams&), const CompatibilityParams& p,
                             char* workspace) {
  plan(p).run(workspace);
}

int main(int count, char** arguments) {
  const auto volatile call = counted_call;  // volatile: the compiler can neither inline nor clone the function
  const struct {
    const char* name;
    Form form;
  } forms[] = {{"dot", Form::dot}, {"cosine", Form::cosine}, {"max", Form::max}};
  const struct {
    const char* name;
    Dtype dtype;
  } dtypes[] = {{"float32", Dtype::float32}, {"bfloat16", Dtype::bfloat16}};
  const struct {
    const char* name;
    Planned (*plan)(const CompatibilityParams&);
  } directions[] = {{"forward", compatibility_forward}, {"backward", compatibility_backward}};

  for (const auto& form : forms) {
    if (count > 1 && std::strcmp(arguments[1], form.name)) continue;
    for (const auto& dtype : dtypes) {
      CompatibilityParams p{};
      p.images = kImages, p.patches_per_image = kPatches, p.text_count = kTexts, p.dim = kDim;
      p.dtype = p.grad_texts_dtype = dtype.dtype;
      p.form = form.form;
      p.temperature = 0.1f;
      p.threads = 1;
      p.patches = random(kImages * kPatches * kDim, dtype.dtype, 1);
      p.patch_strides = {.image = kPatches * kDim, .row = kDim, .dim = 1};
      p.texts = random(kTexts * kDim, dtype.dtype, 2);
      p.text_strides = {.row = kDim, .dim = 1};
      p.phi = zeros<float>(kImages * kTexts);
      p.state = zeros<float>(kImages * kTexts);
      p.grad_phi = (const float*)random(kImages * kTexts, Dtype::float32, 3);
      p.grad_patches = zeros<float>(kImages * kPatches * kDim);
      p.grad_texts = zeros<float>(kTexts * kDim);
      p.texts_sum = zeros<float>(accumulator_floats(p));
      p.grad_temperature = zeros<float>(1);
      for (const auto& direction : directions) {
        char* workspace = zeros<char>(direction.plan(p).workspace_bytes);
        std::printf("%s %s %s\n", form.name, dtype.name, direction.name);
        call(direction.plan, p, workspace);
      }
    }
  }
}
