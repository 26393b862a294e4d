// φ and gradients of lists of texts: each image is a call of its own, with the texts of its list, in one thread.
// A text's gradient is summed in the order of the images, so any number of threads gives identical results.

#include <cstring>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "calls.h"
#include "plan.h"
#include "team.h"

namespace pacl {
namespace {

constexpr int64_t kSlotsBudget = 8 * kMiB;  // gradients of listed texts that wait to be added
constexpr int64_t kMostSlots = 64;
constexpr int64_t kSlice = 64;  // columns of D that a task adds

// Memory of a thread for one image.
struct Own {
  std::vector<int64_t> place;  // of the listed texts in the list
  std::vector<char> texts;
  std::vector<float> phi, state, grad_phi, texts_sum;
  std::unique_ptr<char[]> workspace;
  int64_t workspace_bytes = 0;

  void run(const Planned& call) {
    if (call.workspace_bytes > workspace_bytes) {
      workspace.reset(new char[call.workspace_bytes]);
      workspace_bytes = call.workspace_bytes;
    }
    call.run(workspace.get());
  }
};

bool is_listed(const CompatibilityParams& p, int64_t text) { return text >= 0 && text < p.text_count; }

// Copies values of the image's list to those of its listed texts.
void gather(const float* list, const Own& own, std::vector<float>& to) {
  to.resize(own.place.size());
  for (size_t i = 0; i < to.size(); ++i) to[i] = list[own.place[i]];
}

// Returns the call for one image, with copies of the texts in its list.
CompatibilityParams call_of_image(const CompatibilityParams& p, const Lists& lists, int64_t image, Own& own) {
  const int64_t width = p.dtype == Dtype::float32 ? 4 : 2, row_bytes = p.dim * width;
  const int64_t* list = lists.index + image * lists.length;
  own.place.clear();
  for (int64_t m = 0; m < lists.length; ++m)
    if (is_listed(p, list[m])) own.place.push_back(m);
  own.texts.resize(own.place.size() * row_bytes);
  for (size_t i = 0; i < own.place.size(); ++i) {
    char* to = own.texts.data() + i * row_bytes;
    const char* from = (const char*)p.texts + list[own.place[i]] * p.text_strides.row * width;
    if (p.text_strides.dim == 1)
      std::memcpy(to, from, row_bytes);
    else
      for (int64_t d = 0; d < p.dim; ++d) std::memcpy(to + d * width, from + d * p.text_strides.dim * width, width);
  }
  CompatibilityParams call = p;
  call.images = 1;
  call.patches_per_image = patches_of(p, image);
  call.patch_starts = nullptr;
  call.text_count = (int64_t)own.place.size();
  call.threads = 1;
  call.openmp = {};
  call.patches = (const char*)p.patches + image_offset(p, image) * width;
  call.patch_strides.image = call.patches_per_image * p.patch_strides.row;
  call.texts = own.texts.data();
  call.text_strides = {p.dim, 1};
  call.mask = image_mask(p, image);
  if (p.grad_patches) call.grad_patches = (char*)p.grad_patches + first_patch(p, image) * gradient_row_bytes(p);
  return call;
}

void forward(const CompatibilityParams& p, const Lists& lists, int64_t image, Own& own) {
  CompatibilityParams call = call_of_image(p, lists, image, own);
  float *phi = p.phi + image * lists.length, *state = p.state + image * lists.length;
  const bool has_patches = call.patches_per_image > 0;
  std::memset(phi, 0, sizeof(float) * lists.length);
  for (int64_t m = 0; m < lists.length; ++m) state[m] = p.form == Form::max ? -1.0f : 0.0f;
  if (!has_patches || !call.text_count) return;
  own.phi.resize(call.text_count);
  own.state.resize(call.text_count);
  call.phi = own.phi.data();
  call.state = own.state.data();
  own.run(compatibility_forward(call));
  for (int64_t i = 0; i < call.text_count; ++i) {
    phi[own.place[i]] = own.phi[i];
    state[own.place[i]] = own.state[i];
  }
}

// Computes the gradients of one image: of its patches, of its listed texts [texts, D] in `slot` if that is not null,
// and of the temperature. Returns false if nothing is written to `slot`.
bool backward(const CompatibilityParams& p, const Lists& lists, int64_t image, Own& own, float* slot,
              float* grad_temperature, Rounding& rounding) {
  CompatibilityParams call = call_of_image(p, lists, image, own);
  if (!call.patches_per_image) return false;
  if (!call.text_count) {
    if (p.grad_patches) std::memset(call.grad_patches, 0, call.patches_per_image * gradient_row_bytes(p));
    return false;
  }
  const int64_t at = image * lists.length;
  gather(p.phi + at, own, own.phi);
  gather(p.state + at, own, own.state);
  gather(p.grad_phi + at, own, own.grad_phi);
  call.phi = own.phi.data();
  call.state = own.state.data();
  call.grad_phi = own.grad_phi.data();
  call.grad_temperature = p.grad_temperature ? grad_temperature : nullptr;
  call.grad_texts = slot;
  call.grad_texts_dtype = Dtype::float32;
  call.texts_sum = nullptr;
  if (slot) {
    own.texts_sum.assign(accumulator_floats(call), 0.0f);
    call.texts_sum = own.texts_sum.data();
  }
  own.run(compatibility_backward(call, &rounding));
  return slot != nullptr;
}

// Runs the backward. Returns false if rounding to 16 bits left too large an error in the sum over the images of the
// texts' gradient. That in the gradients of one image is its call's own matter.
bool backward(const CompatibilityParams& p, const Lists& lists, bool exact) {
  const int64_t slot_floats = lists.length * p.dim;
  int64_t slots = least(kMostSlots, kSlotsBudget / (int64_t)sizeof(float) / most(1, slot_floats));
  slots = least(p.images, most(p.threads, slots));
  std::unique_ptr<float[]> memory(p.texts_sum ? new float[slots * slot_floats] : nullptr);
  std::vector<char> written(slots);
  std::vector<float> temperature(p.images, 0.0f);
  std::vector<Rounding> rounding(p.images, Rounding{.exact = exact, .texts_error = 0});
  if (p.texts_sum) std::memset(p.texts_sum, 0, sizeof(float) * p.text_count * p.dim);

  Team(p.openmp, p.threads, [&](Team& team, int) {
    Own own;
    for (int64_t first = 0; first < p.images; first += slots) {
      const int64_t count = least(slots, p.images - first);
      team.phase(count, [&](int64_t i) {
        float* slot = memory ? memory.get() + i * slot_floats : nullptr;
        written[i] = backward(p, lists, first + i, own, slot, &temperature[first + i], rounding[first + i]);
      });
      if (!memory) continue;
      team.phase(ceil_div(p.dim, kSlice), [&](int64_t slice) {
        const int64_t begin = slice * kSlice, end = least(begin + kSlice, p.dim);
        for (int64_t i = 0; i < count; ++i) {
          if (!written[i]) continue;
          const int64_t* list = lists.index + (first + i) * lists.length;
          const float* row = memory.get() + i * slot_floats;
          for (int64_t m = 0; m < lists.length; ++m) {
            if (!is_listed(p, list[m])) continue;
            float* sum = p.texts_sum + list[m] * p.dim;
            for (int64_t d = begin; d < end; ++d) sum[d] += row[d];
            row += p.dim;
          }
        }
      });
    }
  });

  if (p.grad_temperature) *p.grad_temperature = (float)std::accumulate(temperature.begin(), temperature.end(), 0.0);
  double error = 0;
  for (const Rounding& of_image : rounding) error += of_image.texts_error;
  if (!p.texts_sum || error == 0) return true;
  double squares = 0;
  for (int64_t i = 0; i < p.text_count * p.dim; ++i) squares += (double)p.texts_sum[i] * p.texts_sum[i];
  return !(error > kRoundingShown * kRoundingShown * squares);
}

}  // namespace

Planned listed_forward(const CompatibilityParams& p, const Lists& lists) {
  return {.workspace_bytes = 0, .run = [=](char*) {
            Team(p.openmp, p.threads, [&](Team& team, int) {
              Own own;
              team.phase(p.images, [&](int64_t image) { forward(p, lists, image, own); });
            });
          }};
}

Planned listed_backward(const CompatibilityParams& p, const Lists& lists) {
  if (!p.grad_phi) throw std::invalid_argument("grad_phi is missing, which the backward needs");
  return {.workspace_bytes = 0, .run = [=](char*) {
            if (!backward(p, lists, false)) backward(p, lists, true);
          }};
}

}  // namespace pacl
