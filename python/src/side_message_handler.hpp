// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nanobind/nanobind.h>

#include <utility>

#include <kvferry/side_message.hpp>

namespace kvferry::python {

namespace nb = nanobind;

/// Answers side messages by a Python function, on the channel's thread.
/// `function(type, encoded)` returns the answer's bytes, or (code, sentence) for an error.
class SideMessageHandler {
 public:
  explicit SideMessageHandler(nb::object function) : function_(std::move(function)) {}
  SideMessageHandler(const SideMessageHandler&) = delete;
  SideMessageHandler& operator=(const SideMessageHandler&) = delete;
  /// With the GIL.
  ~SideMessageHandler() = default;

  /// Without the GIL, which it takes.
  [[nodiscard]] SideMessage answer(const SideMessage& message) const;

 private:
  nb::object function_;
};

}  // namespace kvferry::python
