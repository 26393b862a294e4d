// Calls with lists: every image is a call of its own, on one thread, whose texts are those of the image's list.
// Included by compatibility.cpp alone, which has the calls.
#pragma once

namespace pacl {
namespace {

constexpr int64_t kListedBudget = 24 * kMiB;  // gradients of listed texts that wait to be added

inline int64_t list_size(const CompatibilityParams& p, int64_t image) {
  return p.list_starts[image + 1] - p.list_starts[image];
}

inline int64_t element_bytes(const CompatibilityParams& p) { return p.dtype == Dtype::float32 ? 4 : 2; }

// Returns the call of one image. Its texts and texts_sum are still those of the whole call.
CompatibilityParams call_of_image(const CompatibilityParams& p, int64_t image) {
  CompatibilityParams own = p;
  const int64_t begin = p.list_starts[image];
  own.images = 1;
  own.patches_per_image = patches_of(p, image);
  own.text_count = list_size(p, image);
  own.patch_starts = nullptr;
  own.list_starts = nullptr;
  own.list_texts = nullptr;
  own.scores = nullptr;
  own.threads = 1;
  own.openmp = {};
  own.patches = (const char*)p.patches + image_offset(p, image) * element_bytes(p);
  own.mask = image_mask(p, image);
  own.text_strides = {p.dim, 1};
  own.phi = p.phi + begin;
  own.state = p.state + begin;
  own.leaves_texts_sum = true;
  if (p.grad_phi) own.grad_phi = p.grad_phi + begin;
  if (p.grad_patches) own.grad_patches = (char*)p.grad_patches + first_patch(p, image) * gradient_row_bytes(p);
  return own;
}

void gather_rows(const CompatibilityParams& p, int64_t image, char* to) {
  const int64_t bytes = element_bytes(p);
  const int32_t* list = p.list_texts + p.list_starts[image];
  for (int64_t i = 0; i < list_size(p, image); ++i, to += p.dim * bytes) {
    const char* from = (const char*)p.texts + list[i] * p.text_strides.row * bytes;
    if (p.text_strides.dim == 1) {
      std::memcpy(to, from, p.dim * bytes);
      continue;
    }
    for (int64_t d = 0; d < p.dim; ++d) std::memcpy(to + d * bytes, from + d * p.text_strides.dim * bytes, bytes);
  }
}

// Adds panel `panel` of D of an image's texts_sum to that of the whole call.
void add_listed(const CompatibilityParams& p, int64_t image, int64_t width, int64_t panel, const float* from) {
  // The sums of the max form are rows of padded D, the others panels of D.
  const int64_t dims = round_up(p.dim, width), size = list_size(p, image);
  const bool rows = p.form == Form::max;
  const int64_t step = rows ? dims : width;
  const int32_t* list = p.list_texts + p.list_starts[image];
  from += rows ? panel * width : panel * round_up(size, width) * width;
  float* to = p.texts_sum + (rows ? panel * width : panel * round_up(p.text_count, width) * width);
  for (int64_t i = 0; i < size; ++i)
    for (int64_t d = 0; d < width; ++d) to[list[i] * step + d] += from[i * step + d];
}

// The plan of a call with lists: the memory of a thread, and the images whose texts' gradients wait together.
struct ListsPlan {
  const CompatibilityParams p;
  const Kernels &kernels, &exact;
  bool backward;
  std::vector<int64_t> batches{0};  // the first image of each, then the end
  std::vector<int64_t> place;       // of each image's texts_sum among those of its batch
  int64_t call_bytes = 0, rows_bytes = 0, waiting = 0;
  int threads;
  int64_t thread_bytes;

  ListsPlan(const CompatibilityParams& params, bool is_backward)
      : p(params),
        kernels(kernels_of(params)),
        exact(select_kernels(Dtype::float32, params.dim)),
        backward(is_backward),
        place(params.images) {
    int64_t floats = 0;
    for (int64_t b = 0; b < p.images; ++b) {
      if (is_empty(b)) continue;
      const CompatibilityParams own = call_of_image(p, b);
      rows_bytes = most(rows_bytes, own.text_count * p.dim * element_bytes(p));
      call_bytes = most(call_bytes, bytes_of(own));
      if (!p.grad_texts) continue;
      const int64_t sum = accumulator_floats(own);
      if (floats > 0 && 4 * (floats + sum) > kListedBudget) {
        batches.push_back(b);
        floats = 0;
      }
      place[b] = floats;
      floats += sum;
      waiting = most(waiting, floats);
    }
    batches.push_back(p.images);
    Arena counter{nullptr};
    take(counter);
    thread_bytes = counter.used;
    threads = (int)most(1, least(p.threads, (kBudget - 4 * waiting) / most(1, thread_bytes)));
  }

  bool is_empty(int64_t image) const { return !list_size(p, image) || !patches_of(p, image); }
  bool rounds() const { return backward && p.form != Form::max && kernels.pair == 2; }

  int64_t bytes_of(const CompatibilityParams& own) const {
    if (!backward) return Plan(own, false, kernels).workspace_bytes();
    if (own.form == Form::max) return max_backward(own).workspace_bytes;
    int64_t bytes = Plan(own, true, kernels).workspace_bytes();
    if (rounds()) {
      bytes = most(bytes, Plan(own, true, exact).workspace_bytes());
      bytes = most(bytes, Plan(own, false, exact).workspace_bytes()) + 8 * own.text_count;
    }
    return bytes;
  }

  struct Memory {  // of a thread
    char* rows;    // listed texts
    char* call;    // the workspace of an image's call
    float* row;    // two rows of padded D
  };
  Memory take(Arena& arena) const {
    Memory memory;
    memory.rows = arena.take<char>(rows_bytes);
    memory.call = arena.take<char>(call_bytes);
    memory.row = arena.take(2 * round_up(p.dim, kernels.panel));
    return memory;
  }
  int64_t workspace_bytes() const { return threads * thread_bytes + 4 * waiting + 128; }
};

// Computes the gradients of one image in the kernels of `plan`, or in float32.
Rounding gradients_of_image(const ListsPlan& plan, CompatibilityParams own, char* workspace, bool in_float32) {
  if (own.form == Form::max) {
    max_backward(own).run(workspace);
    return {};
  }
  std::vector<float> again;
  if (in_float32 && own.form == Form::dot) {
    // s - φ is divided by τ, so both must come from the same kernels.
    again.resize(2 * own.text_count);
    own.phi = again.data();
    own.state = again.data() + own.text_count;
    const Plan forward_plan(own, false, plan.exact);
    forward(forward_plan, own, open_workspace(workspace, forward_plan.workspace_bytes()));
  }
  const Plan backward_plan(own, true, in_float32 ? plan.exact : plan.kernels);
  return backward(backward_plan, own, open_workspace(workspace, backward_plan.workspace_bytes()));
}

Rounding listed_gradients(const ListsPlan& plan, char* workspace, bool in_float32) {
  const CompatibilityParams p = with_fresh_gradient(plan.p);
  const int64_t width = plan.kernels.panel;
  std::vector<Rounding> rounding(p.images);
  std::vector<float> temperature(p.images);
  std::vector<double> squares(p.grad_texts ? ceil_div(p.text_count, 16) : 0);
  workspace = (char*)round_up((int64_t)workspace, 64);
  float* waiting = (float*)(workspace + plan.threads * plan.thread_bytes);

  Team(p.openmp, plan.threads, [&](Team& team, int id) {
    Arena arena{workspace, id * plan.thread_bytes};
    const ListsPlan::Memory memory = plan.take(arena);
    for (size_t batch = 0; batch + 1 < plan.batches.size(); ++batch) {
      const int64_t first = plan.batches[batch], last = plan.batches[batch + 1];
      team.phase(last - first, [&](int64_t i) {
        const int64_t image = first + i;
        CompatibilityParams own = call_of_image(p, image);
        if (plan.is_empty(image)) {
          if (p.grad_patches) std::memset(own.grad_patches, 0, gradient_bytes(own));
          return;
        }
        gather_rows(p, image, memory.rows);
        own.texts = memory.rows;
        if (p.grad_texts) {
          own.texts_sum = waiting + plan.place[image];
          std::memset(own.texts_sum, 0, sizeof(float) * accumulator_floats(own));
        }
        if (p.grad_temperature) own.grad_temperature = &temperature[image];
        rounding[image] = gradients_of_image(plan, own, memory.call, in_float32);
      });
      if (p.grad_texts)  // in the order of the images, so that the result does not depend on the threads
        team.phase(ceil_div(p.dim, width), [&](int64_t panel) {
          for (int64_t image = first; image < last; ++image)
            if (!plan.is_empty(image)) add_listed(p, image, width, panel, waiting + plan.place[image]);
        });
    }
    team.phase(squares.size(), [&](int64_t i) {
      const int64_t first = i * 16, last = least(first + 16, p.text_count);
      if (p.form != Form::max) {
        squares[i] = plan.kernels.finish_texts(p, first, last, memory.row);
        return;
      }
      MaxScratch scratch{nullptr, nullptr, memory.row, memory.row + round_up(p.dim, width)};
      plan.kernels.max_finish_texts(p, first, last, scratch);
    });
  });

  Rounding total;
  for (const Rounding& own : rounding) {
    total.patches_error += own.patches_error;
    total.patches_squared += own.patches_squared;
    total.texts_error += own.texts_error;
  }
  total.texts_squared = std::accumulate(squares.begin(), squares.end(), 0.0);
  if (p.grad_temperature) *p.grad_temperature = (float)std::accumulate(temperature.begin(), temperature.end(), 0.0);
  return total;
}

Planned listed_forward(const CompatibilityParams& params) {
  const auto plan = std::make_shared<const ListsPlan>(params, false);
  return {.workspace_bytes = plan->workspace_bytes(), .run = [=](char* workspace) {
            const CompatibilityParams& p = plan->p;
            Team(p.openmp, plan->threads, [&](Team& team, int id) {
              Arena arena{(char*)round_up((int64_t)workspace, 64), id * plan->thread_bytes};
              const ListsPlan::Memory memory = plan->take(arena);
              team.phase(p.images, [&](int64_t image) {
                CompatibilityParams own = call_of_image(p, image);
                if (plan->is_empty(image)) {
                  for (int64_t i = 0; i < own.text_count; ++i) own.phi[i] = 0, own.state[i] = -1;
                  return;
                }
                gather_rows(p, image, memory.rows);
                own.texts = memory.rows;
                const Plan call(own, false, plan->kernels);
                forward(call, own, open_workspace(memory.call, call.workspace_bytes()));
              });
            });
          }};
}

Planned listed_backward(const CompatibilityParams& params) {
  const auto plan = std::make_shared<const ListsPlan>(params, true);
  return {.workspace_bytes = plan->workspace_bytes(), .run = [=](char* workspace) {
            if (listed_gradients(*plan, workspace, false).shows() && plan->rounds()) {
              const CompatibilityParams& p = plan->p;
              if (p.texts_sum) std::memset(p.texts_sum, 0, sizeof(float) * accumulator_floats(p));
              listed_gradients(*plan, workspace, true);
            }
          }};
}

}  // namespace
}  // namespace pacl
