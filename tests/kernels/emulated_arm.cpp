// Calls the CPU kernels on one problem, for test_arm.py, which compiles this for Arm and runs it in QEMU.
// It reads Form, Dtype, B, N, K and D (int64), τ (float32), patches, texts and ∂L/∂φ from stdin, and writes φ and the
// gradients of patches, texts and τ to stdout.

#include <cstdio>
#include <cstring>
#include <vector>

#include "cpu/calls.h"

using namespace pacl;

namespace {

std::vector<char> read(int64_t bytes) {
  std::vector<char> data(bytes);
  if (std::fread(data.data(), 1, bytes, stdin) != (size_t)bytes) throw "the input is too short";
  return data;
}

}  // namespace

int main() {
  int64_t size[6];
  std::vector<char> head = read(sizeof size + sizeof(float));
  std::memcpy(size, head.data(), sizeof size);
  const auto [form, dtype, images, patches, texts, dim] = size;
  const int64_t element = (Dtype)dtype == Dtype::float32 ? 4 : 2;
  const std::vector<char> patch_data = read(images * patches * dim * element), text_data = read(texts * dim * element),
                          grad_phi = read(4 * images * texts);
  std::vector<char> grad_patches(patch_data.size()), grad_texts(text_data.size());
  std::vector<float> phi(images * texts), state(images * texts);
  float grad_temperature = 0;

  CompatibilityParams p{};
  p.form = (Form)form, p.dtype = p.grad_texts_dtype = (Dtype)dtype, p.threads = 2;
  p.images = images, p.patches_per_image = patches, p.text_count = texts, p.dim = dim;
  std::memcpy(&p.temperature, head.data() + sizeof size, sizeof p.temperature);
  p.patches = patch_data.data(), p.patch_strides = {.image = patches * dim, .row = dim, .dim = 1};
  p.texts = text_data.data(), p.text_strides = {.row = dim, .dim = 1};
  p.phi = phi.data(), p.state = state.data();
  const auto run = [](const Planned& call) {
    std::vector<char> workspace(call.workspace_bytes);
    call.run(workspace.data());
  };
  run(compatibility_forward(p));
  p.grad_phi = (const float*)grad_phi.data();
  p.grad_patches = grad_patches.data(), p.grad_texts = grad_texts.data(), p.grad_temperature = &grad_temperature;
  std::vector<float> texts_sum(accumulator_floats(p));
  p.texts_sum = texts_sum.data();
  run(compatibility_backward(p));

  std::fwrite(phi.data(), sizeof(float), phi.size(), stdout);
  std::fwrite(grad_patches.data(), 1, grad_patches.size(), stdout);
  std::fwrite(grad_texts.data(), 1, grad_texts.size(), stdout);
  std::fwrite(&grad_temperature, sizeof grad_temperature, 1, stdout);
}
