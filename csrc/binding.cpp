// The native module `pacl_kernels._native`: raw addresses, sizes and strides; Python allocates every buffer.

#include "cpu/calls.h"
#include "cpu/constants.h"
#include "cpu/dispatch.h"
#include "cuda/plan.h"
#include "cuda/score.h"
#include "fields.h"

using namespace pacl;

namespace {

// A field of the struct `Params` at hand, by its own name.
#define FIELD(NAME, IS_NEEDED) {#NAME, IS_NEEDED, [](Params& params, py::handle value) { assign(params.NAME, value); }}
#define NEEDED(NAME) FIELD(NAME, true)
#define OPTIONAL(NAME) FIELD(NAME, false)

const Fields<CompatibilityParams>& compatibility_fields() {
  typedef CompatibilityParams Params;
  static const Fields<Params> fields("CompatibilityParams", {NEEDED(images),
                                                             NEEDED(patches_per_image),
                                                             NEEDED(text_count),
                                                             NEEDED(dim),
                                                             NEEDED(dtype),
                                                             NEEDED(form),
                                                             NEEDED(temperature),
                                                             NEEDED(threads),
                                                             NEEDED(openmp),
                                                             NEEDED(patches),
                                                             NEEDED(patch_strides),
                                                             NEEDED(texts),
                                                             NEEDED(text_strides),
                                                             OPTIONAL(mask),
                                                             OPTIONAL(mask_strides),
                                                             NEEDED(phi),
                                                             NEEDED(state),
                                                             OPTIONAL(grad_phi),
                                                             OPTIONAL(grad_patches),
                                                             OPTIONAL(grad_texts),
                                                             OPTIONAL(grad_texts_dtype),
                                                             OPTIONAL(texts_sum),
                                                             OPTIONAL(grad_temperature)});
  return fields;
}

const Fields<UpsampleParams>& upsample_fields() {
  typedef UpsampleParams Params;
  static const Fields<Params> fields(
      "UpsampleParams", {NEEDED(images), NEEDED(classes), NEEDED(height), NEEDED(width), NEEDED(out_height),
                         NEEDED(out_width), NEEDED(dtype), NEEDED(threads), NEEDED(openmp), NEEDED(scores),
                         NEEDED(strides), NEEDED(row), NEEDED(row_fraction), NEEDED(column), NEEDED(column_fraction),
                         NEEDED(scale), NEEDED(labels), OPTIONAL(best), OPTIONAL(entropy)});
  return fields;
}
#undef FIELD
#undef NEEDED
#undef OPTIONAL

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels of pacl_kernels; see csrc/cpu/calls.h and csrc/cuda/score.h.";

  py::class_<CompatibilityParams>(m, "CompatibilityParams", "A call of the compatibility; see csrc/cpu/params.h.")
      .def(py::init([](const py::kwargs& values) { return compatibility_fields().fill(values); }))
      .def("set", [](CompatibilityParams& p, const py::kwargs& values) { compatibility_fields().set(p, values); })
      .def("accumulator_floats", &accumulator_floats);

  py::class_<UpsampleParams>(m, "UpsampleParams", "A call of the upsampling; see csrc/cpu/params.h.")
      .def(py::init([](const py::kwargs& values) { return upsample_fields().fill(values); }));

  py::class_<Planned>(m, "Planned", "A call whose plan has been made; see csrc/cpu/calls.h.")
      .def_readonly("workspace_bytes", &Planned::workspace_bytes)
      .def(
          "run",
          [](const Planned& call, uintptr_t workspace, int64_t bytes) {
            if (bytes < call.workspace_bytes)
              throw std::invalid_argument("workspace has " + std::to_string(bytes) + " bytes, expected " +
                                          std::to_string(call.workspace_bytes));
            call.run(address<char>(workspace));
          },
          py::arg("workspace"), py::arg("bytes"), py::call_guard<py::gil_scoped_release>());

  m.def("compatibility_forward", &compatibility_forward);
  m.def("compatibility_backward", &compatibility_backward);
  m.def("upsample_argmax", &upsample_argmax);

  py::enum_<cuda::Epilogue>(m, "CudaEpilogue", "What a launch makes of the scores; see csrc/cuda/plan.h.")
#define PACL_EPILOGUE(NAME) .value(#NAME, cuda::Epilogue::NAME)
      PACL_EPILOGUE(forward) PACL_EPILOGUE(forward_safe) PACL_EPILOGUE(weights) PACL_EPILOGUE(cosine)
      PACL_EPILOGUE(cosine_weights) PACL_EPILOGUE(attention) PACL_EPILOGUE(pool) PACL_EPILOGUE(pool_weights);
#undef PACL_EPILOGUE

  py::class_<cuda::Plan>(m, "CudaPlan", "Tiles and work of a launch on Hopper; see csrc/cuda/plan.h.")
      .def(py::init(&cuda::make_plan), py::kw_only(), py::arg("images"), py::arg("patches"), py::arg("texts"),
           py::arg("dim"), py::arg("epilogue"), py::arg("processors"), py::arg("cluster"))
#define PACL_FIELD(NAME) .def_readonly(#NAME, &cuda::Plan::NAME)
      PACL_FIELD(width) PACL_FIELD(packed) PACL_FIELD(pitch) PACL_FIELD(images) PACL_FIELD(chunks) PACL_FIELD(passes) PACL_FIELD(groups)
      PACL_FIELD(steps) PACL_FIELD(gram_steps) PACL_FIELD(resident) PACL_FIELD(stages) PACL_FIELD(consumers) PACL_FIELD(cluster) PACL_FIELD(text_groups)
      PACL_FIELD(splits) PACL_FIELD(items) PACL_FIELD(clusters) PACL_FIELD(shared_bytes);
#undef PACL_FIELD

  m.def("cuda_can_pool", &cuda::can_pool, py::arg("patches"));

#ifdef PACL_CUDA
  py::class_<cuda::ScoreCall>(m, "CudaScoreCall")
      .def(py::init([](cuda::Epilogue epilogue, std::array<int64_t, 4> sizes, const std::string& dtype,
                       uintptr_t patches, std::array<int64_t, 2> patch_strides, uintptr_t texts, int64_t text_stride,
                       uintptr_t inverse_texts, float temperature, uintptr_t temperature_at, uintptr_t phi,
                       uintptr_t stat, int64_t stride_phi, int cluster, int device, uintptr_t stream) {
             cuda::ScoreCall c{};
             c.epilogue = epilogue;
             c.images = sizes[0], c.patches_per_image = sizes[1], c.texts = sizes[2], c.dim = sizes[3];
             c.dtype = parse_dtype(dtype);
             c.patches = address<const void>(patches);
             c.patch_stride_image = patch_strides[0], c.patch_stride_row = patch_strides[1];
             c.texts_data = address<const void>(texts);
             c.text_stride_row = text_stride;
             c.inverse_texts = address<const float>(inverse_texts);
             c.temperature = temperature;
             c.temperature_at = address<const float>(temperature_at);
             c.phi = address<float>(phi), c.stat = address<float>(stat);
             c.stride_phi = stride_phi;
             c.cluster = cluster, c.device = device;
             c.stream = address<void>(stream);
             return c;
           }),
           py::kw_only(), py::arg("epilogue"), py::arg("sizes"), py::arg("dtype"), py::arg("patches"),
           py::arg("patch_strides"), py::arg("texts"), py::arg("text_stride"), py::arg("inverse_texts"),
           py::arg("temperature"), py::arg("temperature_at"), py::arg("phi"), py::arg("stat"), py::arg("stride_phi"),
           py::arg("cluster"), py::arg("device"), py::arg("stream"))
      .def(
          "set_weights",
          [](cuda::ScoreCall& c, uintptr_t weights, int64_t stride, uintptr_t grad_phi,
             uintptr_t scale, uintptr_t temperature_sums, bool masked) {
            c.weights = address<void>(weights);
            c.masked = masked;
            c.stride_weights = stride;
            c.grad_phi = address<const float>(grad_phi);
            c.weight_scale = address<const float>(scale);
            c.temperature_sums = address<float>(temperature_sums);
          },
          py::kw_only(), py::arg("weights"), py::arg("stride"), py::arg("grad_phi"),
          py::arg("scale"), py::arg("temperature_sums"), py::arg("masked"))
      .def("set_gram",
           [](cuda::ScoreCall& c, uintptr_t gram, int64_t stride) {
             c.gram = address<const void>(gram);
             c.stride_gram = stride;
           })
      .def("set_attention",
           [](cuda::ScoreCall& c, uintptr_t attention, int64_t pitch) {
             c.attention = address<void>(attention);
             c.attention_pitch = pitch;
           })
      .def("set_curvature",
           [](cuda::ScoreCall& c, uintptr_t curvature) { c.curvature = address<float>(curvature); })
      .def("plan", &cuda::device_plan)
      .def(
          "make_columns",
          [](cuda::ScoreCall& c, uintptr_t inverse_norms, uintptr_t mask, std::array<int64_t, 2> mask_strides,
             uintptr_t columns) {
            cuda::make_columns(c, address<const float>(inverse_norms), address<const uint8_t>(mask), mask_strides[0],
                               mask_strides[1], address<float>(columns));
            c.columns = address<const float>(columns);
          },
          py::kw_only(), py::arg("inverse_norms"), py::arg("mask"), py::arg("mask_strides"), py::arg("columns"))
      .def("launch", &cuda::score, py::call_guard<py::gil_scoped_release>());
#endif

  m.def("constants", [] {
    py::dict constants;
    constants["running_max_below"] = kRunningMaxBelow;
    constants["min_norm_squared"] = kMinNormSquared;
    constants["min_pooled_norm"] = kMinPooledNorm;
    constants["largest_score"] = kLargestScore;
    return constants;
  });
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const Isa& isa : isas()) names.push_back(isa.name);
    return names;
  });
  m.def("cpu_isa", [] { return std::string(select_isa().name); });
  m.def(
      "fma_peak",
      [](const std::string& dtype, int threads, double seconds) {
        return fma_peak(parse_dtype(dtype), threads, seconds);
      },
      py::arg("dtype"), py::arg("threads"), py::arg("seconds"), py::call_guard<py::gil_scoped_release>(),
      "Flop per second of independent FMAs on `threads` threads.");
}
