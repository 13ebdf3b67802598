// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_LOGGER_HPP
#define KVFERRY_KIT_LOGGER_HPP

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include <kvferry/config.hpp>
#include <kvferry/log.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// The log of a channel and its transport: it has the sink, the level, and the rates of repeated records.
///
/// Thread-safe. A record below the level costs a comparison; its text is made only if it is logged.
class KVFERRY_EXPORT Logger {
 public:
  /// @param sink empty: the process's sink at the time of the record; `least` is then ignored.
  /// @param interval the time in which at most 10 records of the same event and cause are logged.
  explicit Logger(LogSink sink = {}, LogLevel least = LogLevel::info,
                  std::chrono::milliseconds interval = std::chrono::seconds(10))
      : sink_(std::move(sink)), least_(least), interval_(interval) {}
  Logger(const Logger&) = delete;
  Logger& operator=(const Logger&) = delete;

  /// The name of the transport in records from now on.
  void set_transport(std::string_view transport);

  /// Whether records of this level are wanted.
  [[nodiscard]] bool enabled(LogLevel level) const noexcept;

  /// @param event a string that lives as long as the process.
  /// @param peer the id or address as it is; empty if there is none.
  /// @param text called once, or not at all if the record isn't logged; returns a sentence.
  template <class Text>
  void log(LogLevel level, std::string_view event, std::string_view peer, std::error_code cause, Text text) noexcept {
    if (enabled(level)) {
      try {
        std::uint64_t suppressed = 0;
        if (admit(event, cause, suppressed)) {
          write(level, event, peer, cause, std::string(text()), suppressed);
        }
      } catch (...) {
        // Neither a lack of memory nor the sink's own trouble is the caller's.
      }
    }
  }

 private:
  /// How often one event has ended with one cause.
  struct Rate {
    std::string_view event;
    std::error_code cause;
    std::chrono::steady_clock::time_point since;
    std::uint64_t logged = 0;
    std::uint64_t suppressed = 0;
  };

  [[nodiscard]] bool admit(std::string_view event, std::error_code cause, std::uint64_t& suppressed);
  void write(LogLevel level, std::string_view event, std::string_view peer, std::error_code cause,
             const std::string& text, std::uint64_t suppressed);

  const LogSink sink_;
  const LogLevel least_;
  const std::chrono::milliseconds interval_;
  std::mutex mutex_;  ///< Guards what follows; not held while a sink runs.
  std::string transport_;
  std::array<Rate, 64> rates_;  ///< The longest unused gives its place to a new one.
};

/// Whether this thread is within a call of a log sink: it may hold locks of any channel.
[[nodiscard]] KVFERRY_EXPORT bool in_log_sink() noexcept;

/// Writes to standard error that a sink made a call that it must not make. What the call throws may be dropped with the
/// sink's other exceptions.
KVFERRY_EXPORT void tell_of_call_in_log_sink(std::string_view call) noexcept;

/// For calls that may wait for the thread of a log sink.
/// @throws TransferError `errc::would_deadlock` in a log sink, after `tell_of_call_in_log_sink`.
KVFERRY_EXPORT void refuse_in_log_sink(std::string_view call);

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_LOGGER_HPP
