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

/// A connection that can be looked at without waiting for it.
class KVFERRY_EXPORT Pollable {
 public:
  enum class Found {
    nothing,
    something,
    completed,  ///< Something, of which handlers may have become ready to run.
    released    ///< Not to be looked at any longer: it is closed, or another thread looks at it.
  };

  virtual ~Pollable() = default;
  /// Moves what there is to move. Must not block.
  virtual Found poll() = 0;
  /// Nobody looks at it any longer: from now on it has to be woken by an event.
  virtual void rest() = 0;
};

/// The connections that a channel's own I/O threads poll before they sleep: those on which something happened a moment ago.
/// Bounded by the channel's `PollPolicy`. Thread-safe.
///
/// Events cost a system call to be asked for, another to be taken, and a sleeping thread tens of microseconds to wake. A
/// connection with work on it is spared all of these.
class KVFERRY_EXPORT Poller {
 public:
  explicit Poller(PollPolicy policy);

  /// Has an I/O thread look at `pollable` until nothing has come of it for as long as the policy says, and for some looks
  /// (moving what others have takes time, too), and then calls its `rest`.
  /// @return false if it won't: no I/O thread is awake, or they look at enough already.
  [[nodiscard]] bool watch(std::shared_ptr<Pollable> pollable);

  [[nodiscard]] std::chrono::nanoseconds patience() const noexcept { return patience_; }

  /// @name For the I/O threads
  /// @{

  /// Says that this thread looks at what is watched before it sleeps.
  void enter() noexcept;
  /// Looks until there is nothing left to look at. One thread does; others return at once.
  /// @param run_ready runs what else there is to run.
  void look(const std::function<void()>& run_ready);
  /// @}

 private:
  struct Watched {
    std::shared_ptr<Pollable> pollable;
    std::chrono::steady_clock::time_point last_found;
    int looks_since;
  };

  /// @param now is set anew where something was moved, which takes time.
  /// @return whether handlers may have become ready to run.
  [[nodiscard]] bool look_once(std::vector<Watched>& watched, std::chrono::steady_clock::time_point& now);

  const std::chrono::nanoseconds patience_;
  std::mutex mutex_;
  std::vector<std::shared_ptr<Pollable>> added_;
  std::atomic<bool> any_added_{false};
  std::size_t count_ = 0;
  bool looking_ = false;
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_POLLER_HPP
