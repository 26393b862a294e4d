// The native module `pacl_kernels._native`: raw addresses, sizes and strides; Python allocates every buffer.

#include "cuda/binding.h"

#include "constants.h"
#include "cpu/calls.h"
#include "cpu/dispatch.h"
#include "fields.h"

using namespace pacl;

namespace {

// An entry for the field NAME of the struct that `Params` stands for.
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
                                                             OPTIONAL(patch_starts),
                                                             OPTIONAL(raw),
                                                             OPTIONAL(mask),
                                                             OPTIONAL(mask_strides),
                                                             OPTIONAL(list_starts),
                                                             OPTIONAL(list_texts),
                                                             NEEDED(phi),
                                                             NEEDED(state),
                                                             OPTIONAL(scores),
                                                             OPTIONAL(scores_row_bytes),
                                                             OPTIONAL(scores_texts),
                                                             OPTIONAL(scores_first_text),
                                                             OPTIONAL(grad_phi),
                                                             OPTIONAL(grad_patches),
                                                             OPTIONAL(grad_texts),
                                                             OPTIONAL(grad_texts_dtype),
                                                             OPTIONAL(texts_sum),
                                                             OPTIONAL(grad_temperature),
                                                             OPTIONAL(loss_sums),
                                                             OPTIONAL(logit_scale),
                                                             OPTIONAL(logit_bias),
                                                             OPTIONAL(image_ids),
                                                             OPTIONAL(text_ids),
                                                             OPTIONAL(targets),
                                                             OPTIONAL(pair_bias),
                                                             OPTIONAL(grad_pair_bias)});
  return fields;
}

const Fields<LossParams>& loss_fields() {
  typedef LossParams Params;
  static const Fields<Params> fields(
      "LossParams", {NEEDED(size), NEEDED(sigmoid), NEEDED(scale), NEEDED(bias), NEEDED(threads), NEEDED(openmp),
                     NEEDED(phi), NEEDED(statistics), OPTIONAL(value), OPTIONAL(grad_loss), OPTIONAL(grad_phi),
                     OPTIONAL(grad_scale), OPTIONAL(grad_bias)});
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
  m.doc() = "The native kernels of pacl_kernels; see csrc/cpu/calls.h and csrc/cuda/launch.h.";

  py::class_<CompatibilityParams>(m, "CompatibilityParams",
                                  "Parameters of a call of the compatibility; see csrc/cpu/params.h.")
      .def(py::init([](const py::kwargs& values) { return compatibility_fields().fill(values); }))
      .def("set", [](CompatibilityParams& p, const py::kwargs& values) { compatibility_fields().set(p, values); })
      .def("accumulator_floats", &accumulator_floats);

  py::class_<LossParams>(m, "LossParams", "Parameters of a call of a loss over logits; see csrc/cpu/params.h.")
      .def(py::init([](const py::kwargs& values) { return loss_fields().fill(values); }));

  py::class_<UpsampleParams>(m, "UpsampleParams", "Parameters of a call of the upsampling; see csrc/cpu/params.h.")
      .def(py::init([](const py::kwargs& values) { return upsample_fields().fill(values); }));

  py::class_<Planned>(m, "Planned", "A planned call and its workspace; see csrc/cpu/calls.h.")
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
  m.def("sigmoid_step", &sigmoid_step);
  m.def("loss_forward", &loss_forward);
  m.def("loss_backward", &loss_backward);
  m.def("upsample_argmax", &upsample_argmax);

  cuda::bind(m);

  m.def("constants", [] {
    py::dict constants;
    constants["running_max_below"] = kRunningMaxBelow;
    constants["min_norm_squared"] = kMinNormSquared;
    constants["min_pooled_norm"] = kMinPooledNorm;
    constants["largest_score"] = kLargestScore;
    constants["log2e"] = kLog2e;
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
      "Return the flop per second of independent FMAs on `threads` threads.");
}
