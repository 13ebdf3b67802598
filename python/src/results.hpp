// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nanobind/nanobind.h>

#include <kvferry/channel_stats.hpp>

#include "operation.hpp"

namespace kvferry::python {

/// What the library hands out, as objects of kvferry._types, or None.
[[nodiscard]] nb::object to_python(const PeerInfo& peer);
[[nodiscard]] nb::object to_python(const SideMessage& message);
[[nodiscard]] nb::object to_python(const Operation::Result& result);
/// As a dict of dicts, lists, strings and numbers; durations in seconds.
[[nodiscard]] nb::dict to_python(const ChannelStats& stats);

}  // namespace kvferry::python
