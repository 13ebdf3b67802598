// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/log.hpp>

#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <exception>
#include <memory>
#include <mutex>
#include <utility>

#include <kvferry/error.hpp>
#include <kvferry/kit/logger.hpp>

#include <kvferry/detail/text.hpp>

namespace kvferry::inline KVFERRY_ABI {
inline namespace internal {

inline constexpr std::size_t most_in_interval = 10;

/// Sinks that this thread is within: they may log, too.
KVFERRY_INLINE constinit thread_local std::size_t sinks_here = 0;

inline constexpr const char* refused_in_sinks =
    " in a log sink may wait for the thread that the sink was called on: call it elsewhere";

class SinkCall {
 public:
  SinkCall() noexcept { ++sinks_here; }
  SinkCall(const SinkCall&) = delete;
  SinkCall& operator=(const SinkCall&) = delete;
  ~SinkCall() { --sinks_here; }
};

/// While it lasts a write to a pipe that nobody reads is an error, and no signal for the calling thread.
class NoBrokenPipes {
 public:
  NoBrokenPipes() noexcept {
    sigemptyset(&signal_);
    sigaddset(&signal_, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &signal_, &before_);
    pending_before_ = pending();
  }
  NoBrokenPipes(const NoBrokenPipes&) = delete;
  NoBrokenPipes& operator=(const NoBrokenPipes&) = delete;
  ~NoBrokenPipes() {
    if (!pending_before_ && pending()) {
      const timespec at_once{};
      ::sigtimedwait(&signal_, nullptr, &at_once);
    }
    pthread_sigmask(SIG_SETMASK, &before_, nullptr);
  }

 private:
  static bool pending() noexcept {
    sigset_t signals;
    sigpending(&signals);
    return sigismember(&signals, SIGPIPE) == 1;
  }

  sigset_t signal_{};
  sigset_t before_{};
  bool pending_before_ = false;
};

/// A line that finds no room is dropped: this is somebody else's thread, perhaps with a lock of the channel's held.
KVFERRY_INLINE void write_to_standard_error(const LogRecord& record) {
  const std::string line = to_string(record) + '\n';
  const NoBrokenPipes no_signal;
  pollfd room{STDERR_FILENO, POLLOUT, 0};
  if (::poll(&room, 1, 0) == 1 && room.revents == POLLOUT) {
    // In one call, so that lines of several threads don't mix. There is nobody to tell of a failure.
    [[maybe_unused]] const ssize_t written = ::write(STDERR_FILENO, line.data(), line.size());
  }
}

/// The process's sink. Never destroyed: a channel of static storage duration may log after everything else is gone.
class ProcessSink {
 public:
  void set(LogSink sink, LogLevel least) {
    auto next = sink ? std::make_shared<const LogSink>(std::move(sink)) : nullptr;
    {
      const std::lock_guard lock(mutex_);
      sink_.swap(next);
      least_ = sink_ ? least : LogLevel::off;
    }
    // The old sink, which is the user's code, is destroyed without the lock.
  }

  [[nodiscard]] LogLevel least() const noexcept { return least_; }

  void call(const LogRecord& record) {
    std::shared_ptr<const LogSink> sink;
    {
      const std::lock_guard lock(mutex_);
      sink = sink_;
    }
    if (sink) {
      (*sink)(record);
    }
  }

  [[nodiscard]] static ProcessSink& instance() {
    union Storage {
      Storage() : sink() {}
      ~Storage() {}
      ProcessSink sink;
    };
    static Storage storage;
    return storage.sink;
  }

  /// A forked child finds it unlocked. To be called once: a second handler would wait for the lock that the first one holds.
  [[nodiscard]] static bool take_along_to_children() {
    return pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                          [] { instance().mutex_.unlock(); }) == 0;
  }

 private:
  std::mutex mutex_;
  std::shared_ptr<const LogSink> sink_ = std::make_shared<const LogSink>(write_to_standard_error);
  std::atomic<LogLevel> least_{LogLevel::warning};
};

// NOLINTNEXTLINE(cert-err58-cpp): throws nothing
KVFERRY_INLINE const bool sink_is_taken_along = ProcessSink::take_along_to_children();

}  // namespace internal

KVFERRY_INLINE std::string_view to_string(LogLevel level) noexcept {
  constexpr std::array<std::string_view, 5> names{"debug", "info", "warning", "error", "off"};
  return names[std::min<std::size_t>(static_cast<std::size_t>(level), names.size() - 1)];
}

KVFERRY_INLINE std::string to_string(const LogRecord& record) {
  std::string line = "kvferry ";
  line += to_string(record.level);
  line += ' ';
  line += record.event;
  if (!record.transport.empty()) {
    line += ' ';
    line += record.transport;
  }
  if (!record.peer.empty()) {
    line += " peer \"";
    line += record.peer;
    line += '"';
  }
  line += ": ";
  line += record.text;
  if (record.cause) {
    line += " [";
    line += record.cause.category().name();
    line += ':' + error_name(record.cause) + ']';
  }
  if (record.suppressed != 0) {
    line += " (" + std::to_string(record.suppressed) + " more like this were left out)";
  }
  return line;
}

KVFERRY_INLINE std::string printable(std::string_view text, std::size_t longest) {
  return escaped(text, longest, "\"'\\");
}

KVFERRY_INLINE void set_log_sink(LogSink sink, LogLevel least) { ProcessSink::instance().set(std::move(sink), least); }

namespace kit {

KVFERRY_INLINE bool in_log_sink() noexcept { return sinks_here != 0; }

KVFERRY_INLINE void tell_of_call_in_log_sink(std::string_view call) noexcept {
  try {
    const std::string text = std::string(call) + refused_in_sinks;
    write_to_standard_error({LogLevel::error,
                             std::chrono::system_clock::now(),
                             "call_in_log_sink",
                             {},
                             {},
                             make_error_code(errc::would_deadlock),
                             text,
                             0});
  } catch (const std::exception&) {
    // there is no memory for the sentence
  }
}

KVFERRY_INLINE void refuse_in_log_sink(std::string_view call) {
  if (in_log_sink()) {
    tell_of_call_in_log_sink(call);
    throw TransferError(errc::would_deadlock, std::string(call) + refused_in_sinks);
  }
}

KVFERRY_INLINE bool Logger::enabled(LogLevel level) const noexcept {
  try {
    return level < LogLevel::off && level >= (sink_ ? least_ : ProcessSink::instance().least());
  } catch (const std::exception&) {
    return false;  // there is no memory for the process's sink, which nothing has been logged to yet
  }
}

KVFERRY_INLINE void Logger::set_transport(std::string_view transport) {
  const std::lock_guard lock(mutex_);
  transport_ = transport;
}

KVFERRY_INLINE bool Logger::admit(std::string_view event, std::error_code cause, std::uint64_t& suppressed) {
  const auto now = std::chrono::steady_clock::now();
  const std::lock_guard lock(mutex_);
  auto rate =
      std::ranges::find_if(rates_, [&](const Rate& known) { return known.event == event && known.cause == cause; });
  if (rate == rates_.end()) {
    rate = std::ranges::min_element(rates_, {}, &Rate::since);
    *rate = {event, cause, now};
  } else if (now - rate->since >= interval_) {
    rate->since = now;
    rate->logged = 0;
  }
  if (rate->logged == most_in_interval) {
    ++rate->suppressed;
    return false;
  }
  ++rate->logged;
  suppressed = std::exchange(rate->suppressed, 0);
  return true;
}

KVFERRY_INLINE void Logger::write(LogLevel level, std::string_view event, std::string_view peer, std::error_code cause,
                                  const std::string& text, std::uint64_t suppressed) {
  const std::string shown_peer = printable(peer);
  const std::string shown_text = escaped(text, std::string::npos);
  std::string transport;
  {
    const std::lock_guard lock(mutex_);
    transport = transport_;
  }
  const LogRecord record{level,     std::chrono::system_clock::now(), event, transport, shown_peer, cause, shown_text,
                         suppressed};
  const SinkCall within;
  if (sink_) {
    sink_(record);
  } else {
    ProcessSink::instance().call(record);
  }
}

}  // namespace kit
}  // namespace kvferry
