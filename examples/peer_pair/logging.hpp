// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/log.hpp>

namespace example {

/// A sink that hands kvferry's records to spdlog, which writes them to stderr: the time, the level, the event and what is
/// known of it.
[[nodiscard]] kvferry::LogSink log_to_spdlog();

}  // namespace example
