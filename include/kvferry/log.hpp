// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_LOG_HPP
#define KVFERRY_LOG_HPP

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <system_error>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI {

/// How much a record matters. Each level includes those behind it.
enum class LogLevel : std::uint8_t {
  debug,    ///< For those who look for a fault in kvferry: deadlines that passed, messages that were thrown away.
  info,     ///< The life of connections: handshakes, connects, the path chosen, closes.
  warning,  ///< Something was refused, broke or was replaced; kvferry goes on.
  error,    ///< Something no longer works and won't by itself.
  off,      ///< As a least level: nothing is logged.
};

/// The level's name: "debug", "info", "warning", "error", "off".
[[nodiscard]] KVFERRY_EXPORT std::string_view to_string(LogLevel level) noexcept;

/// One line of a log. All views end with the sink's call. No record holds a key, a secret, or content of a page, a
/// notification or a side message.
struct LogRecord {
  LogLevel level = LogLevel::info;
  std::chrono::system_clock::time_point time;
  /// A stable name of the event, to filter by: "peer_connected", "handshake_refused", ... docs/guide.md lists them.
  std::string_view event;
  std::string_view transport;  ///< The channel's: "tcp", "rdma", ...; empty for what belongs to no channel.
  /// The peer's id, or its address where it has no id yet; empty if the record is about no peer. Control characters, bytes
  /// that are no UTF-8, quotes and backslashes are written as `\xNN`, and what is longer than 100 bytes ends with "...".
  std::string_view peer;
  std::error_code cause;  ///< Empty if nothing went wrong.
  std::string_view text;  ///< One sentence, escaped as `peer` is but for quotes and for its length.
  /// Records of the same event and cause that were left out before this one, because they came too often.
  std::uint64_t suppressed = 0;
};

/// Gets each record that is logged.
///
/// Called on the thread on which it happened, several threads at a time, perhaps with locks of the channel held: it
/// must not call a channel, and should be quick. What it throws is dropped.
using LogSink = std::function<void(const LogRecord&)>;

/// Sends the records of all channels of the process that have no sink of their own (`ChannelOptions::log_sink`) to `sink`.
/// An empty one drops them. Until this is called, warnings and errors go to the standard error output, one line each; a
/// line for which that has no room, or no reader, is dropped.
///
/// A channel logs at most 10 records of the same event and cause in 10 seconds; the next one says how many were left out.
/// Where nothing is logged nothing is allocated.
///
/// Thread safety: may be called at any time. A call of the old sink that is under way on another thread may end after this
/// has returned.
/// @param least records below this level are not made.
KVFERRY_EXPORT void set_log_sink(LogSink sink, LogLevel least = LogLevel::info);

/// The record as the default sink writes it, without the end of the line: `kvferry warning handshake_refused tcp peer
/// "decode-3": another page size [kvferry:page_size_mismatch]`.
[[nodiscard]] KVFERRY_EXPORT std::string to_string(const LogRecord& record);

/// Makes a stranger's text fit for a line: control characters, bytes that are no UTF-8, quotes and
/// backslashes are written as `\xNN`, and of more than `longest` bytes only the first ones are there, followed by "...".
[[nodiscard]] KVFERRY_EXPORT std::string printable(std::string_view text, std::size_t longest = 100);

}  // namespace kvferry

#endif  // KVFERRY_LOG_HPP
