// SPDX-License-Identifier: Apache-2.0
#pragma once

// A lane and the thread of a blocking call that leads it.
#include <atomic>
#include <memory>
#include <thread>
#include <utility>

#include <kvferry/tcp/lane-inl.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

KVFERRY_INLINE void Lane::begin_leading() {
  if (holds_engine_) {
    return;
  }
  driver_.hold();
  holds_engine_ = true;
  if (std::exchange(leads_, true)) {
    return;
  }
  leader_ = std::this_thread::get_id();
  times_led_.fetch_add(1, std::memory_order_relaxed);
  watched_ = false;
  kept_ = false;
  if (armed_ != 0 && socket_) {
    armed_ = 0;
    arm(0);
  }
}

KVFERRY_INLINE void Lane::start_leading(std::shared_ptr<StripedOperation> batch, ObjectRange range) {
  begin_leading();
  if (driver_.has_some()) {
    take(driver_.take());
  }
  std::size_t budget = turn_bytes;
  try {
    protocol_.start(std::move(batch), range);
    (void)move_bytes(budget, Role::leader);
  } catch (const std::exception& error) {
    fail(errc::connection_lost, remote_ + ": " + error.what());  // memory is used up
  }
  drop_lead();
}

KVFERRY_INLINE kit::Pollable::Found Lane::lead() {
  begin_leading();
  if (driver_.has_some()) {
    take(driver_.take());
  }
  const Looked looked = failed_ ? Looked() : look(Role::leader);
  if (failed_) {
    drop_lead();
    return Found::released;
  }
  if (driver_.is_wanted()) {
    drop_lead();
    driver_.let_others_hold();
  }
  return looked.completed ? Found::completed : looked.moved ? Found::something : Found::nothing;
}

KVFERRY_INLINE std::shared_ptr<Socket> Lane::pause_leading() {
  begin_leading();
  auto socket = socket_;
  drop_lead();
  return socket;
}

KVFERRY_INLINE void Lane::drop_lead() {
  const Driven driven = done(false);
  holds_engine_ = false;
  const bool more = driver_.let_go();
  (void)let_go(driven);
  if (more) {
    drive(turn_bytes);
  }
}

KVFERRY_INLINE void Lane::end_leading(bool keep) {
  if (!leads_) {
    return;
  }
  begin_leading();
  leads_ = false;
  leader_ = {};
  take(driver_.take());
  const bool asked = std::exchange(asked_when_led_, protocol_.asked()) != protocol_.asked();
  kept_ = keep && !asked && running_ && !failed_ && writable_ && !readable_ && !by_cpu_ && protocol_.settled() &&
          !protocol_.reader().within_frame() && await_next_lead();
  std::size_t budget = caller_bytes;
  const Driven driven = work(budget);
  holds_engine_ = false;
  const bool more = driver_.let_go();
  if (let_go(driven) && more) {
    drive(caller_bytes);
  }
}

/// Sees to it that a lane is not kept for longer than it is led. The timer is its handler's while it is armed, so that calls which follow
/// each other don't touch it.
/// @return whether it is armed.
KVFERRY_INLINE bool Lane::await_next_lead() noexcept {
  if (keep_timer_armed_.exchange(true)) {
    return true;
  }
  try {
    times_led_then_ = times_led_.load(std::memory_order_relaxed);
    keep_timer_.expires_after(keep_time);
    keep_timer_.async_wait([weak = weak_from_this()](std::error_code ec) {
      if (const auto self = weak.lock(); self && !ec) {
        self->keep_expired();
      }
    });
    return true;
  } catch (const std::exception&) {
    keep_timer_armed_ = false;
    return false;
  }
}

KVFERRY_INLINE void Lane::keep_expired() {
  const bool led = times_led_.load(std::memory_order_relaxed) != times_led_then_;
  keep_timer_armed_ = false;
  if (!led || !await_next_lead()) {
    driver_.put([](Inbox& inbox) { inbox.kept_in_vain = true; });
    drive(turn_bytes);
  }
}

}  // namespace kvferry::tcp
