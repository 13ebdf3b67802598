// SPDX-License-Identifier: Apache-2.0
#pragma once

// A lane and the threads that look at its socket themselves: the leader, which waits for bytes in a blocking call, and a
// polling I/O thread. And a lane that nobody looks at for a moment, between blocking calls.
#include <asio/error.hpp>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <optional>
#include <system_error>
#include <thread>
#include <utility>

#include <kvferry/tcp/lane-inl.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {
inline namespace internal {

/// A leader that finds nothing asks the socket so often before it looks after everything else, which takes some microseconds at
/// most: others may wait to get the lane.
inline constexpr int receives_at_a_check = 8;
/// Calls follow each other at once whose last bytes came within this time.
inline constexpr std::chrono::microseconds close_together{100};
/// So long nobody may wait for a lane's bytes between two such calls: what the peer begins then is late by that. A timer that
/// ends so often takes a hundredth of a CPU.
inline constexpr std::chrono::microseconds longest_unattended{500};
/// Rows of calls aren't asked to be longer than this.
inline constexpr std::uint64_t longest_row = std::uint64_t{1} << 20;

}  // namespace internal

KVFERRY_INLINE std::shared_ptr<Socket> Lane::begin_leading() {
  std::shared_ptr<Socket> socket;
  driver_.change([&] {
    become_leader();
    socket = socket_;
  });
  return socket;
}

/// An event that has been asked for is taken back when the thread waits: first it may have something to send.
KVFERRY_INLINE void Lane::become_leader() {
  leader_ = std::this_thread::get_id();
  watched_ = false;
  may_leave_ = false;
  unattended_ = false;
}

KVFERRY_INLINE void Lane::leave_lead() {
  leader_ = {};
  may_leave_ = true;
}

KVFERRY_INLINE void Lane::end_leading() {
  change([&] { leave_lead(); }, caller_bytes);
}

template <class Released, class Over>
kit::Pollable::Found Lane::look(Role role, Released released, Over over, bool& left) {
  auto found = Found::something;  // unless this thread finds out otherwise: another may be at it
  bool moved = false;
  bool completed = false;
  driver_.drive(
      [&](std::optional<Inbox> taken) {
        take(std::move(taken));
        if (left || released()) {
          found = left ? found : Found::released;
          // Others have left their work to this thread, which held the engine for a moment: in the inbox, or in what they
          // changed (`change`).
          std::size_t budget = turn_bytes;
          return work(budget);
        }
        const std::uint64_t moved_before = moved_;
        const std::uint64_t completed_before = protocol_.completed();
        readable_ = true;
        writable_ = true;
        std::size_t budget = turn_bytes;
        try {
          // Where the turn ends before all is moved, nobody has said that he waits.
          moved = move_bytes(budget, role) || moved;
          if (moved_ == moved_before && role != Role::visitor && !hears_bells_ && receives_again(budget)) {
            moved = move_bytes(budget, role) || moved;
          }
        } catch (const std::exception& error) {
          fail_for(error);
        }
        moved = moved || moved_ != moved_before;
        if (moved && role == Role::visitor) {
          calls_in_a_row_ = 0;
        }
        completed = completed || protocol_.completed() != completed_before;
        found = failed_ ? Found::released : completed ? Found::completed : moved ? Found::something : Found::nothing;
        if (over()) {
          // As another thread that comes by: somebody has to wait for what comes next.
          left = true;
          leave_lead();
          budget = std::min(budget, caller_bytes);
          return work(budget);
        }
        return done(false);
      },
      [&](const Driven& driven) { return let_go(driven); });
  return found;
}

/// A check that finds nothing is mostly followed by another one. Asking the socket alone takes a third of the instructions.
KVFERRY_INLINE bool Lane::receives_again(std::size_t& budget) {
  for (int receives = 0; receives < receives_at_a_check && driver_.empty() && !failed_ && running_; ++receives) {
    readable_ = true;
    if (receive_step(budget) == Step::progress) {
      return true;
    }
  }
  return false;
}

KVFERRY_INLINE kit::Pollable::Found Lane::lead(bool may_wait) {
  bool left = false;
  return look(
      may_wait ? Role::waiting_leader : Role::leader, [this] { return failed_; }, [] { return false; }, left);
}

KVFERRY_INLINE kit::Pollable::Found Lane::lead(bool may_wait, const kit::BlockingWait& wait, bool& left) {
  return look(
      may_wait ? Role::waiting_leader : Role::leader, [this] { return failed_; }, [&wait] { return wait.over(); },
      left);
}

KVFERRY_INLINE void Lane::woken() {
  driver_.put([](Inbox& inbox) { inbox.readable = true; });
}

KVFERRY_INLINE kit::Pollable::Found Lane::poll() {
  bool left = false;
  return look(
      Role::visitor, [this] { return failed_ || !watched_; }, [] { return false; }, left);
}

// No event is lost in between. `unattended_` is guarded by the engine, and it is true only while the timer that ends it is
// armed: `attend` looks at the socket, and this thread then has it watched or armed as at any other end of work. Arming
// reports what is there already. A timer that has ended before the lane is left, but has not been dealt with, does so early.
KVFERRY_INLINE bool Lane::leave_unattended() {
  const auto since = std::exchange(last_led_, protocol_.last_received());
  const bool at_once = since != last_led_ && last_led_ - since < close_together;
  calls_in_a_row_ = at_once ? calls_in_a_row_ + 1 : 0;
  if (calls_in_a_row_ < row_ || hears_bells_ || !writable_ || outlived_ || watched_ || armed_ != 0 ||
      !protocol_.quiet()) {
    return false;
  }
  if (!attend_timer_armed_) {
    attend_timer_.expires_after(longest_unattended);
    attend_timer_.async_wait([self = shared_from_this()](std::error_code ec) {
      if (ec != asio::error::operation_aborted) {
        self->driver_.put([](Inbox& inbox) { inbox.attend = true; });
        self->drive_on_io_thread();
      }
    });
    attend_timer_armed_ = true;
  }
  unattended_ = true;
  return true;
}

KVFERRY_INLINE void Lane::attend() {
  attend_timer_armed_ = false;
  if (!unattended_ || failed_) {
    return;
  }
  unattended_ = false;
  const std::uint64_t moved_before = moved_;
  std::size_t unlimited = receive_step_bytes;
  readable_ = true;
  (void)receive_step(unlimited);
  if (moved_ != moved_before) {
    row_ = std::min(2 * row_, longest_row);  // the peer has waited
    calls_in_a_row_ = 0;
  } else {
    tired_ = true;  // no I/O thread is to poll beside callers because the timer has woken it
  }
}

}  // namespace kvferry::tcp
