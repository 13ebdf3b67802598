// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <typeinfo>

namespace kvferry::python {

namespace nb = nanobind;

inline nb::builtin_exception wrong_type(const std::string& text) { return nb::type_error(text.c_str()); }
inline nb::builtin_exception wrong_value(const std::string& text) { return nb::value_error(text.c_str()); }

/// None if there is none. @throws nb::python_error what else its code raises, as a signal's handler does: nb::hasattr takes
/// that for none.
inline nb::object attribute(nb::handle object, const char* name) {
  nb::object found = nb::steal(PyObject_GetAttrString(object.ptr(), name));
  if (!found.is_valid()) {
    if (PyErr_ExceptionMatches(PyExc_AttributeError) == 0) {
      throw nb::python_error();
    }
    PyErr_Clear();
    return nb::none();
  }
  return found;
}

/// Seconds, as Python has them. A part of a unit counts as a whole one, so that what is short isn't none.
template <class Duration>
Duration duration_of(double seconds) {
  const double count = std::ceil(seconds * static_cast<double>(Duration::period::den) / Duration::period::num);
  if (std::isnan(count)) {
    throw nb::value_error("a number of seconds is expected, not nan");
  }
  constexpr double most = 9e15;  // still whole as a double; of milliseconds, many thousand years
  return Duration(static_cast<typename Duration::rep>(std::clamp(count, -most, most)));
}

/// None stands for "unset".
inline std::optional<std::chrono::milliseconds> timeout_of(std::optional<double> seconds) {
  if (!seconds) {
    return std::nullopt;
  }
  return duration_of<std::chrono::milliseconds>(*seconds);
}

inline std::span<const std::byte> bytes_of(const nb::bytes& bytes) {
  return {reinterpret_cast<const std::byte*>(bytes.c_str()), bytes.size()};
}

inline nb::bytes to_bytes(std::span<const std::byte> bytes) { return nb::bytes(bytes.data(), bytes.size()); }

/// @throws nb::python_error UnicodeEncodeError if it has halves of surrogate pairs.
inline std::string text_of(const nb::str& given) {
  Py_ssize_t size = 0;
  const char* const text = PyUnicode_AsUTF8AndSize(given.ptr(), &size);
  if (text == nullptr) {
    throw nb::python_error();
  }
  return {text, static_cast<std::size_t>(size)};
}

/// @throws nb::type_error "`what` can't be ..." if it is nothing of that type.
template <class T>
T converted(nb::handle given, const std::string& what) {
  try {
    return nb::cast<T>(given);
  } catch (const std::bad_cast&) {
    throw wrong_type(what + " can't be " + nb::cast<std::string>(nb::repr(given)));
  }
}

/// Takes keyword arguments out of a dict, one by one. None counts as left out.
class Arguments {
 public:
  explicit Arguments(const nb::dict& given) : rest_(nb::steal<nb::dict>(PyDict_Copy(given.ptr()))) {}

  /// The argument, which is nobody else's afterwards; null if it isn't there.
  [[nodiscard]] nb::object take(const char* name) {
    nb::object found;
    if (rest_.contains(name)) {
      found = rest_[name];
      nb::del(rest_[name]);
    }
    return found.is_none() ? nb::object() : found;
  }

  /// Overwrites `value` if there is such an argument. @return whether there is.
  template <class T>
  bool read(const char* name, T& value) {
    const nb::object found = take(name);
    if (!found.is_valid()) {
      return false;
    }
    if constexpr (requires { typename T::period; }) {
      value = duration_of<T>(converted<double>(found, name));
    } else {
      value = converted<T>(found, name);
    }
    return true;
  }

  /// @throws nb::type_error if there is an argument that nobody took.
  void finish(const char* function) const {
    for (const auto& [name, value] : rest_) {
      throw wrong_type(std::string(function) + " takes no argument '" + nb::cast<std::string>(nb::str(name)) + "'");
    }
  }

 private:
  nb::dict rest_;
};

}  // namespace kvferry::python
