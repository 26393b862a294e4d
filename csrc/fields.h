// Structs that Python fills by name, as in `Params(images=3, ...)`. A table lists each field once.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/params.h"

namespace pacl {

namespace py = pybind11;

template <class T>
T cast(py::handle value, const char* expected) {
  try {
    return value.cast<T>();
  } catch (const py::cast_error&) {
    throw py::type_error(py::str("is {!r}, expected {}").format(value, expected));
  }
}

template <class T>
T* address(uintptr_t value) {
  return reinterpret_cast<T*>(value);
}

inline Dtype parse_dtype(const std::string& name) {
  if (name == "float32") return Dtype::float32;
  if (name == "bfloat16") return Dtype::bfloat16;
  if (name == "float16") return Dtype::float16;
  throw std::invalid_argument("dtype is '" + name + "', expected float32, bfloat16 or float16");
}

inline void assign(Dtype& to, py::handle value) { to = parse_dtype(cast<std::string>(value, "the name of a dtype")); }
inline void assign(Form& to, py::handle value) {
  const auto name = cast<std::string>(value, "the name of a form");
  if (name == "dot")
    to = Form::dot;
  else if (name == "cosine")
    to = Form::cosine;
  else if (name == "max")
    to = Form::max;
  else
    throw std::invalid_argument("form is '" + name + "', expected dot, cosine or max");
}
inline void assign(int64_t& to, py::handle value) { to = cast<int64_t>(value, "an integer"); }
inline void assign(int& to, py::handle value) { to = cast<int>(value, "an integer"); }
inline void assign(bool& to, py::handle value) { to = cast<bool>(value, "True or False"); }
inline void assign(float& to, py::handle value) { to = cast<float>(value, "a number"); }
template <class T>
void assign(T*& to, py::handle value) {
  to = address<T>(cast<uintptr_t>(value, "an address"));
}
// Fills a struct of 8-byte members (strides or addresses) from a tuple of as many integers.
template <class T>
  requires std::is_class_v<T>
void assign(T& to, py::handle value) {
  constexpr size_t kMembers = sizeof(T) / sizeof(int64_t);
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) == kMembers * sizeof(int64_t));
  const std::string expected = std::to_string(kMembers) + " integers";
  const auto members = cast<std::array<int64_t, kMembers>>(value, expected.c_str());
  std::memcpy(static_cast<void*>(&to), members.data(), sizeof to);
}

// The fields of one struct. fill() requires the needed fields; the others keep their default.
template <class Params>
class Fields {
 public:
  typedef void (*Set)(Params&, py::handle);
  struct Field {
    const char* name;
    bool needed;
    Set set;
    PyObject* key = PyUnicode_InternFromString(name);  // never freed, like the module; saves a new string per lookup
  };

  Fields(const char* name, std::vector<Field> fields) : name_(name), fields_(std::move(fields)) {}

  Params fill(const py::kwargs& values) const {
    Params params{};
    set(params, values);
    for (const Field& field : fields_)
      if (field.needed && !PyDict_GetItem(values.ptr(), field.key))
        throw py::type_error(py::str("{} needs '{}', which is missing").format(name_, field.name));
    return params;
  }

  void set(Params& params, const py::kwargs& values) const {
    size_t found = 0;
    for (const Field& field : fields_)
      if (PyObject* value = PyDict_GetItem(values.ptr(), field.key)) {
        assign_field(params, field, value);
        ++found;
      }
    if (found < values.size()) refuse(values);
  }

 private:
  void assign_field(Params& params, const Field& field, py::handle value) const {
    try {
      field.set(params, value);
    } catch (const py::type_error& error) {
      throw py::type_error(py::str("{}.{} {}").format(name_, field.name, error.what()));
    }
  }

  [[noreturn]] void refuse(const py::kwargs& values) const {
    py::list names;
    for (const Field& field : fields_) names.append(field.name);
    for (const auto& [key, value] : values)
      if (!names.contains(key))
        throw py::type_error(
            py::str("{} has no field '{}', expected some of {}").format(name_, key, py::str(", ").attr("join")(names)));
    throw std::logic_error("every field is known");
  }

  const char* name_;
  std::vector<Field> fields_;
};

}  // namespace pacl
