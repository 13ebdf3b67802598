// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/any_io_executor.hpp>

#include <atomic>
#include <memory>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI {

/// How many forks lie between this process and the one that loaded the library.
[[nodiscard]] KVFERRY_EXPORT unsigned process_generation() noexcept;

/// The process in which an object was made. A forked child gets a copy of the object and none of the threads that
/// worked for it; the locks that they held are never released. So whoever has locks or threads asks before anything
/// else.
class ProcessOfOrigin {
 public:
  /// Whether this process is a forked child of the object's.
  [[nodiscard]] bool was_forked() const noexcept { return generation_ != process_generation(); }

 private:
  unsigned generation_ = process_generation();
};

/// One object in each process: a forked child makes its own, and leaves its parent's alone. Never destroyed. To be made at
/// compile time.
template <class T>
class PerProcess {
 public:
  [[nodiscard]] T& here() {
    Entry* found = current_.load();
    while (found == nullptr || found->origin.was_forked()) {
      auto made = std::make_unique<Entry>(found);
      if (current_.compare_exchange_strong(found, made.get())) {
        return made.release()->value;
      }
    }
    return found->value;
  }
  /// Null if this process hasn't made it yet.
  [[nodiscard]] T* if_here() noexcept {
    Entry* const found = current_.load();
    return found == nullptr || found->origin.was_forked() ? nullptr : &found->value;
  }

 private:
  struct Entry {
    explicit Entry(Entry* of_parent) : parents(of_parent) {}

    ProcessOfOrigin origin;
    Entry* const parents;  ///< To keep it reachable.
    T value;
  };

  std::atomic<Entry*> current_{nullptr};
};

/// Keeps what a forked child inherited: to destroy it would take the parent's threads and locks, and disturb its sockets.
KVFERRY_EXPORT void keep_inherited(std::shared_ptr<void> object);

/// Where handlers run that are given to an inherited channel: a thread of this process, made at the first call.
/// @throws std::system_error EAGAIN if there can't be one.
[[nodiscard]] asio::any_io_executor executor_of_forked_child();

}  // namespace kvferry
