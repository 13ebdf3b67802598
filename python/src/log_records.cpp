// SPDX-License-Identifier: Apache-2.0
#include "log_records.hpp"

#include <kvferry/log.hpp>

#include <nanobind/stl/string.h>

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include <kvferry/detail/process.hpp>
#include <kvferry/error.hpp>

#include "released.hpp"

namespace kvferry::python {
namespace {

struct Kept {
  LogLevel level;
  std::chrono::system_clock::time_point time;
  std::string event;
  std::string transport;
  std::string peer;
  std::string cause;
  std::string text;
  std::uint64_t suppressed;
};

/// Records in order. Those who wait do so without the GIL.
class Records {
 public:
  void put(const LogRecord& record) {
    Kept kept{record.level,
              record.time,
              std::string(record.event),
              std::string(record.transport),
              std::string(record.peer),
              record.cause ? error_name(record.cause) : "",
              std::string(record.text),
              record.suppressed};
    const std::lock_guard lock(mutex_);
    if (records_.size() == most) {
      ++dropped_;
      return;
    }
    kept.suppressed += std::exchange(dropped_, 0);
    records_.push_back(std::move(kept));
    changed_.notify_all();
  }

  /// Sleeps until there are records; those that were taken before count as written. None: stopped.
  [[nodiscard]] std::deque<Kept> take() {
    std::unique_lock lock(mutex_);
    written_ = true;
    changed_.notify_all();
    changed_.wait(lock, [this] { return stopped_ || !records_.empty(); });
    written_ = records_.empty();
    return std::exchange(records_, {});
  }

  /// Sleeps until all records that are there have been written, or the time is over. To be called while a thread takes them.
  /// @return whether they have been.
  [[nodiscard]] bool flush(std::chrono::milliseconds longest) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, longest, [this] { return written_ && records_.empty(); });
  }

  void stop() {
    const std::lock_guard lock(mutex_);
    stopped_ = true;
    changed_.notify_all();
  }

 private:
  static constexpr std::size_t most = 4096;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Kept> records_;
  std::uint64_t dropped_ = 0;  ///< Since the last one that was kept.
  bool written_ = true;
  bool stopped_ = false;
};

/// A forked child has its own: the lock may have been held when it was made.
constinit PerProcess<Records> records;

int level_of(LogLevel level) {
  switch (level) {
    case LogLevel::debug: return 10;
    case LogLevel::info: return 20;
    case LogLevel::warning: return 30;
    case LogLevel::error: return 40;
    case LogLevel::off: break;
  }
  return 50;
}

nb::list take() {
  InterpreterExit::is_waited_for = true;
  std::deque<Kept> taken;
  {
    const nb::gil_scoped_release released;
    taken = records.here().take();
  }
  nb::list result;
  for (const Kept& record : taken) {
    const double time = std::chrono::duration<double>(record.time.time_since_epoch()).count();
    result.append(nb::make_tuple(level_of(record.level), time, record.event, record.transport, record.peer,
                                 record.cause, record.text, record.suppressed));
  }
  return result;
}

void set_level(int least) {
  LogLevel level = LogLevel::off;
  for (const auto one : {LogLevel::error, LogLevel::warning, LogLevel::info, LogLevel::debug}) {
    if (least <= level_of(one)) {
      level = one;
    }
  }
  set_log_sink([](const LogRecord& record) { records.here().put(record); }, level);
}

}  // namespace

void bind_log_records(nb::module_& module) {
  module.def("log_level", &set_level, nb::arg("least"));
  module.def("log_take", &take);
  module.def("log_flush", [] {
    InterpreterExit::stop_here_if_begun();
    if (InterpreterExit::has_begun()) {
      return true;
    }
    const Released released;
    return records.here().flush(std::chrono::milliseconds(100));
  });
  module.def("log_stop", [] { records.here().stop(); });
}

}  // namespace kvferry::python
