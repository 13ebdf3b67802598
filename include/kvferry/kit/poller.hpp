// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_POLLER_HPP
#define KVFERRY_KIT_POLLER_HPP

#include <atomic>
#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include <kvferry/channel_options.hpp>
#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// A connection that a thread can poll without waiting.
class KVFERRY_EXPORT Pollable {
 public:
  enum class Found {
    nothing,
    something,
    completed,  ///< Something moved, and handlers may be ready to run.
    released    ///< Don't poll it any longer: it is closed, or another thread polls it.
  };

  virtual ~Pollable() = default;
  /// Moves the available bytes. Must not block.
  virtual Found poll() = 0;
  /// Called when no thread polls it any longer: from now on an event has to wake it.
  virtual void rest() = 0;
};

/// The connections that a channel's own I/O threads poll before they sleep: the ones that were just active. The
/// channel's `PollPolicy` limits the time. Thread-safe.
///
/// An event costs a system call to request it, another to take it, and tens of microseconds to wake a sleeping thread.
/// A connection with work on it avoids all of these.
class KVFERRY_EXPORT Poller {
 public:
  explicit Poller(PollPolicy policy);

  /// Has an I/O thread poll `pollable` until it has had nothing for the policy's time, and for a few checks (moving the
  /// bytes of others takes time, too). Then calls its `rest`.
  /// @return false if no I/O thread is awake, or they poll enough connections already.
  [[nodiscard]] bool watch(std::shared_ptr<Pollable> pollable);

  [[nodiscard]] std::chrono::nanoseconds patience() const noexcept { return patience_; }

  /// @name For the I/O threads
  /// @{

  /// Announces that this thread polls the watched connections before it sleeps.
  void enter() noexcept;
  /// Polls until no connection is left. One thread does; others return at once.
  /// @param run_ready runs the other work that is ready.
  void look(const std::function<void()>& run_ready);
  /// @}

 private:
  struct Watched {
    std::shared_ptr<Pollable> pollable;
    std::chrono::steady_clock::time_point last_found;
    int looks_since;
  };

  /// @param now updated if something was moved, since that takes time.
  /// @return whether handlers may have become ready to run.
  [[nodiscard]] bool look_once(std::chrono::steady_clock::time_point& now);

  const std::chrono::nanoseconds patience_;
  std::mutex mutex_;
  std::vector<std::shared_ptr<Pollable>> added_;
  std::atomic<bool> any_added_{false};
  std::size_t count_ = 0;
  bool looking_ = false;
  std::vector<Watched> watched_;  ///< By the thread that looks, which has it for as long as it does.
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_POLLER_HPP
