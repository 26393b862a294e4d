// The CUDA side of the native module. The tests' emulator is a separate module with the same names.

#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "launch.h"
#include "plan.h"

namespace pacl::cuda {

namespace py = pybind11;

inline bool is_half(const std::string& dtype) {
  if (dtype != "bfloat16" && dtype != "float16")
    throw std::invalid_argument("dtype is '" + dtype + "', expected bfloat16 or float16");
  return dtype == "float16";
}

inline void bind_plan(py::module_& m) {
  py::enum_<Epilogue>(m, "CudaEpilogue", "The epilogue of a launch; see epilogues.def.", py::module_local())
#define PACL_EPILOGUE(NAME, DTYPE) .value(#NAME, Epilogue::NAME)
#include "epilogues.def"
      ;

  py::class_<Plan>(m, "CudaPlan", "The tiles and the distribution of work of a launch; see plan.h.", py::module_local())
      .def(py::init(&make_plan), py::kw_only(), py::arg("images"), py::arg("patches"), py::arg("texts"), py::arg("dim"),
           py::arg("epilogue"), py::arg("processors"), py::arg("cluster"))
#define PACL_FIELD(NAME) .def_readonly(#NAME, &Plan::NAME)
      // clang-format off: one field a line
      PACL_FIELD(groups)
      PACL_FIELD(splits)
      PACL_FIELD(text_groups)
      PACL_FIELD(items)
      PACL_FIELD(clusters)
      PACL_FIELD(pitch)
      PACL_FIELD(images_of_tile)
      PACL_FIELD(chunks)
      PACL_FIELD(passes)
      PACL_FIELD(steps)
      PACL_FIELD(gram_steps)
      PACL_FIELD(stages)
      PACL_FIELD(cluster)
      PACL_FIELD(resident)
      PACL_FIELD(width)
      PACL_FIELD(packed)
      PACL_FIELD(box_patches)
      PACL_FIELD(consumers)
      PACL_FIELD(shared_bytes);
  // clang-format on
#undef PACL_FIELD

  m.def("cuda_fits_one_tile", &fits_one_tile, py::arg("patches"));
  m.attr("cuda_transposed_weights") = kTransposedWeights;
}

#ifdef PACL_CUDA
// Assigns a Python value; an address is an int.
template <class T>
void assign(T& field, const py::handle& value) {
  if constexpr (std::is_pointer_v<T>)
    field = reinterpret_cast<T>(value.cast<uintptr_t>());
  else
    field = value.cast<T>();
}

inline void set_field(Launch& launch, const std::string& name, const py::handle& value) {
#define PACL_FIELD(NAME) \
  if (name == #NAME) return assign(launch.NAME, value);
  PACL_FIELD(stream)
  PACL_FIELD(patch_rows)
  PACL_FIELD(patch_stride_image)
  PACL_FIELD(patch_stride_row)
  PACL_FIELD(text_rows)
  PACL_FIELD(text_stride)
  PACL_FIELD(gram)
  PACL_FIELD(gram_stride)
#undef PACL_FIELD
#define PACL_ARGUMENT(NAME) \
  if (name == #NAME) return assign(launch.arguments.NAME, value);
  PACL_ARGUMENT(inverse_texts)
  PACL_ARGUMENT(temperature)
  PACL_ARGUMENT(temperature_at)
  PACL_ARGUMENT(phi)
  PACL_ARGUMENT(state)
  PACL_ARGUMENT(phi_stride)
  PACL_ARGUMENT(grad_phi)
  PACL_ARGUMENT(weights)
  PACL_ARGUMENT(full)
  PACL_ARGUMENT(weights_stride)
  PACL_ARGUMENT(range_scale)
  PACL_ARGUMENT(temperature_sums)
  PACL_ARGUMENT(attention)
  PACL_ARGUMENT(attention_stride)
  PACL_ARGUMENT(norm_factor)
  PACL_ARGUMENT(logit_scale)
  PACL_ARGUMENT(logit_bias)
  PACL_ARGUMENT(logit_scale_at)
  PACL_ARGUMENT(logit_bias_at)
  PACL_ARGUMENT(share)
  PACL_ARGUMENT(own_text)
  PACL_ARGUMENT(image_ids)
  PACL_ARGUMENT(text_ids)
  PACL_ARGUMENT(targets)
  PACL_ARGUMENT(pair_bias)
  PACL_ARGUMENT(grad_pair_bias)
  PACL_ARGUMENT(loss_sums)
#undef PACL_ARGUMENT
  throw py::attribute_error("CudaLaunch has no field '" + name + "'");
}

inline Launch make_launch(Epilogue epilogue, int64_t images, int64_t patches, int64_t texts, int64_t dim,
                          const std::string& dtype, int cluster, int device, const py::kwargs& fields) {
  Launch launch{
      .epilogue = epilogue,
      .half = is_half(dtype),
      .device = device,
      .plan = make_plan(images, patches, texts, dim, epilogue, processors_of(device), cluster),
  };
  for (auto [name, value] : fields) set_field(launch, name.cast<std::string>(), value);
  return launch;
}

inline void bind_launch(py::module_& m) {
  py::class_<Launch>(m, "CudaLaunch", "A launch; its fields are those of launch.h, as keywords or attributes.",
                     py::module_local())
      .def(py::init(&make_launch), py::kw_only(), py::arg("epilogue"), py::arg("images"), py::arg("patches"),
           py::arg("texts"), py::arg("dim"), py::arg("dtype"), py::arg("cluster"), py::arg("device"))
      .def("__setattr__", &set_field)
      .def_readonly("plan", &Launch::plan)
      .def(
          "make_columns",
          [](Launch& launch, uintptr_t inverse_norms, uintptr_t mask, std::array<int64_t, 2> mask_strides,
             uintptr_t columns) {
            auto* made = reinterpret_cast<float*>(columns);
            make_columns(launch, reinterpret_cast<const float*>(inverse_norms), reinterpret_cast<const uint8_t*>(mask),
                         mask_strides[0], mask_strides[1], made);
            launch.arguments.columns = made;
          },
          py::kw_only(), py::arg("inverse_norms"), py::arg("mask"), py::arg("mask_strides"), py::arg("columns"),
          "Fill `columns`, [groups chunks width] of float32, which must live until `run` is done.")
      .def("run", &run, py::call_guard<py::gil_scoped_release>());
}
#endif

inline void bind(py::module_& m) {
  bind_plan(m);
#ifdef PACL_CUDA
  bind_launch(m);
#endif
}

}  // namespace pacl::cuda
