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

/// How much a record matters. Each level includes the levels after it.
enum class LogLevel : std::uint8_t {
  debug,    ///< To look for a fault in kvferry: deadlines that passed, messages that were dropped.
  info,     ///< The life of connections: handshakes, connects, the path chosen, closes.
  warning,  ///< Something was refused, broke or was replaced; kvferry goes on.
  error,    ///< Something doesn't work any more and won't recover by itself.
  off,      ///< As the least level: nothing is logged.
};

/// The level's name: "debug", "info", "warning", "error", "off".
[[nodiscard]] KVFERRY_EXPORT std::string_view to_string(LogLevel level) noexcept;

/// One line of a log. All views are valid during the sink's call only. No record holds a key, a secret, or content of a
/// page, a notification or a side message.
struct LogRecord {
  LogLevel level = LogLevel::info;
  std::chrono::system_clock::time_point time;
  /// A stable name of the event, to filter by: "peer_connected", "handshake_refused", ... docs/guide.md lists them.
  std::string_view event;
  std::string_view transport;  ///< The channel's: "tcp", "rdma", ...; empty if the record belongs to no channel.
  /// The peer's id, or its address where it has no id yet; empty if the record is about no peer. Control characters,
  /// bytes that are no UTF-8, quotes and backslashes are written as `\xNN`. A longer text is cut after 100 bytes and
  /// ends with "...".
  std::string_view peer;
  std::error_code cause;  ///< Empty if nothing went wrong.
  std::string_view text;  ///< One sentence, escaped as `peer`, but with quotes and of any length.
  /// How many records of the same event and cause were left out before this one, because they came too often.
  std::uint64_t suppressed = 0;
};

/// Gets each record that is logged.
///
/// Called on the thread of the event, from several threads at a time, perhaps with locks of the channel held. It should
/// be quick. Its exceptions are dropped.
///
/// It must not call a channel, nor destroy one. What can be noticed is refused, for any channel: blocking forms end with
/// `errc::would_deadlock`, `close` and `add_region` throw it, and a destructor ends the process (`std::terminate`). The
/// last three say so on standard error, too. Other calls may wait for ever. To close a channel because of a record, have
/// another thread do it.
using LogSink = std::function<void(const LogRecord&)>;

/// Sends the records of all channels of the process that have no sink of their own (`ChannelOptions::log_sink`) to `sink`.
/// An empty sink drops them. Until this is called, warnings and errors go to the standard error output, one line each.
/// A line is dropped if the output would block or has no reader.
///
/// A channel logs at most 10 records of the same event and cause in 10 seconds. The next one tells how many were left
/// out. Records that are not logged allocate nothing.
///
/// Thread safety: may be called at any time. A call of the old sink on another thread may end after this function has
/// returned.
/// @param least the lowest level that is logged.
KVFERRY_EXPORT void set_log_sink(LogSink sink, LogLevel least = LogLevel::info);

/// Formats the record as the default sink writes it, without the end of the line: `kvferry warning handshake_refused
/// tcp peer "decode-3": another page size [kvferry:page_size_mismatch]`.
[[nodiscard]] KVFERRY_EXPORT std::string to_string(const LogRecord& record);

/// Makes a stranger's text safe to print on one line. Control characters, bytes that are no UTF-8, quotes and
/// backslashes are written as `\xNN`. A text of more than `longest` bytes is cut there and ends with "...".
[[nodiscard]] KVFERRY_EXPORT std::string printable(std::string_view text, std::size_t longest = 100);

}  // namespace kvferry

#endif  // KVFERRY_LOG_HPP
