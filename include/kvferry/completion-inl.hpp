// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/completion.hpp>

#include <cstddef>
#include <exception>
#include <new>
#include <string>
#include <system_error>

#include <kvferry/kit/logger.hpp>

namespace kvferry::inline KVFERRY_ABI::detail {

KVFERRY_INLINE void log_exception(std::string_view where) noexcept {
  // One for all, so that much of the same is logged once; never destroyed, as threads may outlive main's statics.
  alignas(kit::Logger) static std::byte place[sizeof(kit::Logger)];
  static auto* const logger = new (place) kit::Logger();
  const auto log = [&](std::error_code cause, std::string_view what) {
    logger->log(LogLevel::error, "exception_dropped", {}, cause,
                [&] { return "thrown " + std::string(where) + ": " + std::string(what); });
  };
  try {
    throw;
  } catch (const std::system_error& error) {
    log(error.code(), error.what());
  } catch (const std::exception& error) {
    log({}, error.what());
  } catch (...) {
    log({}, "not a std::exception");
  }
}

}  // namespace kvferry::detail
