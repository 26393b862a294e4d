// The native module `pacl_kernels._native`: raw addresses, sizes and strides; Python allocates every buffer.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/dispatch.h"
#include "cpu/score.h"
#include "cpu/upsample.h"
#include "cuda/binding.h"

namespace py = pybind11;
using namespace pacl;

namespace {

Dtype parse_dtype(const std::string& name) {
  if (name == "float32") return Dtype::float32;
  if (name == "bfloat16") return Dtype::bfloat16;
  if (name == "float16") return Dtype::float16;
  throw std::invalid_argument("dtype is '" + name + "', expected float32, bfloat16 or float16");
}

Form parse_form(const std::string& name) {
  if (name == "dot") return Form::dot;
  if (name == "cosine") return Form::cosine;
  if (name == "max") return Form::max;
  throw std::invalid_argument("form is '" + name + "', expected dot, cosine or max");
}

template <class T>
T* address(uintptr_t value) {
  return reinterpret_cast<T*>(value);
}

OpenMp parse_openmp(std::array<uintptr_t, 3> addresses) {
  OpenMp openmp;
  openmp.parallel = reinterpret_cast<decltype(openmp.parallel)>(addresses[0]);
  openmp.thread_num = reinterpret_cast<decltype(openmp.thread_num)>(addresses[1]);
  openmp.num_threads = reinterpret_cast<decltype(openmp.num_threads)>(addresses[2]);
  return openmp;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels of pacl_kernels; see csrc/cpu/score.h, csrc/cpu/upsample.h and csrc/cuda/launch.h.";

  py::class_<ScoreParams>(m, "ScoreParams")
      .def(py::init([](std::array<int64_t, 4> sizes, const std::string& dtype, const std::string& form,
                       float temperature, int threads, std::array<uintptr_t, 3> openmp, uintptr_t patches,
                       std::array<int64_t, 3> patch_strides, uintptr_t texts, std::array<int64_t, 2> text_strides,
                       uintptr_t mask, std::array<int64_t, 2> mask_strides, uintptr_t phi, uintptr_t lse) {
             ScoreParams p{};
             p.images = sizes[0], p.patches_per_image = sizes[1], p.texts_count = sizes[2], p.dim = sizes[3];
             p.dtype = parse_dtype(dtype);
             p.form = parse_form(form);
             p.temperature = temperature;
             p.threads = threads;
             p.openmp = parse_openmp(openmp);
             p.patches = address<const void>(patches);
             p.patch_stride_image = patch_strides[0], p.patch_stride_row = patch_strides[1];
             p.patch_stride_dim = patch_strides[2];
             p.texts = address<const void>(texts);
             p.text_stride_row = text_strides[0], p.text_stride_dim = text_strides[1];
             p.mask = address<const uint8_t>(mask);
             p.mask_stride_image = mask_strides[0], p.mask_stride_row = mask_strides[1];
             p.phi = address<float>(phi);
             p.lse = address<float>(lse);
             return p;
           }),
           py::kw_only(), py::arg("sizes"), py::arg("dtype"), py::arg("form"), py::arg("temperature"),
           py::arg("threads"), py::arg("openmp"), py::arg("patches"), py::arg("patch_strides"), py::arg("texts"),
           py::arg("text_strides"), py::arg("mask"), py::arg("mask_strides"), py::arg("phi"), py::arg("lse"))
      .def(
          "set_gradients",
          [](ScoreParams& p, uintptr_t grad_phi, uintptr_t grad_patches, uintptr_t grad_texts,
             const std::string& grad_texts_dtype, uintptr_t texts_sum, uintptr_t grad_temperature) {
            p.grad_phi = address<const float>(grad_phi);
            p.grad_patches = address<void>(grad_patches);
            p.grad_texts = address<void>(grad_texts);
            p.grad_texts_dtype = parse_dtype(grad_texts_dtype);
            p.texts_sum = address<float>(texts_sum);
            p.grad_temperature = address<float>(grad_temperature);
          },
          py::kw_only(), py::arg("grad_phi"), py::arg("grad_patches"), py::arg("grad_texts"),
          py::arg("grad_texts_dtype"), py::arg("texts_sum"), py::arg("grad_temperature"))
      .def("set_workspace",
           [](ScoreParams& p, uintptr_t at, int64_t bytes) {
             p.workspace = address<char>(at);
             p.workspace_bytes = bytes;
           })
      .def("workspace_bytes", py::overload_cast<const ScoreParams&, bool>(&workspace_bytes), py::arg("backward"))
      .def("accumulator_floats", &accumulator_floats);

  py::class_<UpsampleParams>(m, "UpsampleParams")
      .def(py::init([](std::array<int64_t, 6> sizes, const std::string& dtype, int threads,
                       std::array<uintptr_t, 3> openmp, uintptr_t scores, std::array<int64_t, 4> strides, uintptr_t row,
                       uintptr_t row_weight, uintptr_t column, uintptr_t column_weight, float scale, uintptr_t labels,
                       uintptr_t best, uintptr_t entropy) {
             UpsampleParams p{};
             p.images = sizes[0], p.classes = sizes[1], p.height = sizes[2], p.width = sizes[3];
             p.out_height = sizes[4], p.out_width = sizes[5];
             p.dtype = parse_dtype(dtype);
             p.threads = threads;
             p.openmp = parse_openmp(openmp);
             p.scores = address<const void>(scores);
             p.stride_image = strides[0], p.stride_class = strides[1];
             p.stride_row = strides[2], p.stride_column = strides[3];
             p.row = address<const int32_t>(row), p.row_weight = address<const float>(row_weight);
             p.column = address<const int32_t>(column), p.column_weight = address<const float>(column_weight);
             p.scale = scale;
             p.labels = address<int16_t>(labels);
             p.best = address<float>(best), p.entropy = address<float>(entropy);
             return p;
           }),
           py::kw_only(), py::arg("sizes"), py::arg("dtype"), py::arg("threads"), py::arg("openmp"), py::arg("scores"),
           py::arg("strides"), py::arg("row"), py::arg("row_weight"), py::arg("column"), py::arg("column_weight"),
           py::arg("scale"), py::arg("labels"), py::arg("best"), py::arg("entropy"))
      .def("set_workspace",
           [](UpsampleParams& p, uintptr_t at, int64_t bytes) {
             p.workspace = address<char>(at);
             p.workspace_bytes = bytes;
           })
      .def("workspace_bytes", py::overload_cast<const UpsampleParams&>(&workspace_bytes));

  cuda::bind(m);

  m.def("upsample_argmax", &upsample_argmax, py::call_guard<py::gil_scoped_release>());
  m.def("score_forward", &score_forward, py::call_guard<py::gil_scoped_release>());
  m.def("score_backward", &score_backward, py::call_guard<py::gil_scoped_release>());
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const Isa& isa : isas()) names.push_back(isa.name);
    return names;
  });
  m.def("cpu_isa", [] { return std::string(select_isa().name); });
  m.def(
      "fma_peak",
      [](const std::string& dtype, int threads, double seconds) {
        return multiply_add_rate(parse_dtype(dtype), threads, seconds);
      },
      py::arg("dtype"), py::arg("threads"), py::arg("seconds"), py::call_guard<py::gil_scoped_release>(),
      "Flop per second of independent multiply-adds on `threads` threads.");
}
