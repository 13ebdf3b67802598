// SPDX-License-Identifier: Apache-2.0
#include "errors.hpp"

#include <nanobind/stl/string.h>

#include <array>
#include <exception>
#include <utility>

#include <kvferry/error.hpp>

#include "released.hpp"

namespace kvferry::python {
namespace {

constexpr std::array<std::pair<condition, const char*>, 6> conditions{{
    {condition::invalid_argument, "invalid_argument"},
    {condition::peer_failed, "peer_failed"},
    {condition::retryable, "retryable"},
    {condition::cancelled, "cancelled"},
    {condition::timed_out, "timed_out"},
    {condition::may_still_land, "may_still_land"},
}};

}  // namespace

nb::tuple names_of(std::span<const std::error_code> statuses) {
  nb::list names;
  for (const std::error_code& status : statuses) {
    names.append(status ? nb::cast(error_name(status)) : nb::none());
  }
  return nb::tuple(names);
}

nb::object make_error(const std::error_code& code, const std::string& text, std::size_t transferred,
                      std::span<const std::error_code> statuses) {
  const IntoPython calling;
  nb::list met;
  for (const auto& [value, name] : conditions) {
    if (code == value) {
      met.append(name);
    }
  }
  return nb::module_::import_("kvferry._errors")
      .attr("from_native")(text.empty() ? code.message() : text, code.category().name(), code.value(), error_name(code),
                           nb::tuple(met), transferred, names_of(statuses));
}

void raise(const nb::object& error) {
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
  throw nb::python_error();
}

void bind_errors(nb::module_&) {
  nb::register_exception_translator([](const std::exception_ptr& thrown, void*) {
    try {
      std::rethrow_exception(thrown);
    } catch (const TransferError& error) {
      try {
        raise(make_error(error.code(), error.what(), error.transferred()));
      } catch (nb::python_error& raised) {
        raised.restore();
      }
    }
  });
}

}  // namespace kvferry::python
