// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/completion.hpp>

#include <asio/any_io_executor.hpp>

#include <cstddef>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <system_error>

#include <kvferry/detail/known_executor.hpp>
#include <kvferry/detail/posted_handler.hpp>
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

KVFERRY_INLINE void post_handler(const asio::any_io_executor& executor, const std::shared_ptr<PostedHandler>& handler) {
  if (!with_context_executor(executor, [&](const auto& known) { post_handler(known, handler); })) {
    post_handler<asio::any_io_executor>(executor, handler);
  }
}

}  // namespace kvferry::detail
