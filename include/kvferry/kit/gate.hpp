// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_GATE_HPP
#define KVFERRY_KIT_GATE_HPP

#include <condition_variable>
#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>

#include <asio/cancellation_type.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// Lets other threads use the channel's timers, sockets and their context until the channel is closed. A thread that
/// emits on a cancellation slot holds an operation and its link for a moment. It must not be the last one to hold them
/// when the channel is gone.
class Gate {
 public:
  /// A thread's stay inside, if it got in.
  class Visit {
   public:
    explicit Visit(Gate& gate) : gate_(gate.enter() ? &gate : nullptr) {}
    Visit(const Visit&) = delete;
    Visit& operator=(const Visit&) = delete;
    ~Visit() {
      if (gate_ != nullptr) {
        gate_->leave();
      }
    }
    [[nodiscard]] explicit operator bool() const noexcept { return gate_ != nullptr; }

   private:
    Gate* const gate_;
  };

  /// Lets no thread in any more, and waits for the ones inside.
  void close() {
    std::unique_lock lock(mutex_);
    closed_ = true;
    empty_.wait(lock, [this] { return inside_ == 0; });
  }

 private:
  [[nodiscard]] bool enter() {
    const std::lock_guard lock(mutex_);
    inside_ += closed_ ? 0 : 1;
    return !closed_;
  }
  void leave() {
    const std::lock_guard lock(mutex_);
    if (--inside_ == 0) {
      empty_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable empty_;
  std::size_t inside_ = 0;
  bool closed_ = false;
};

/// The function in a cancellation slot: calls `cancel` on `object`, if it is still there and its channel is not closed.
template <class Object, class Cancel>
[[nodiscard]] std::function<void(asio::cancellation_type)> cancellation(std::shared_ptr<Gate> gate,
                                                                        std::weak_ptr<Object> object, Cancel cancel) {
  return [gate = std::move(gate), object = std::move(object), cancel](asio::cancellation_type) {
    const Gate::Visit visit(*gate);
    if (const auto held = visit ? object.lock() : nullptr) {
      cancel(*held);
    }
  };
}

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_GATE_HPP
