// SPDX-License-Identifier: Apache-2.0
#pragma once

// A lane's end: leave taken, shut by this side, or failed.
#include <memory>
#include <string>
#include <utility>

#include <kvferry/error.hpp>

#include <kvferry/kit/failure.hpp>
#include <kvferry/tcp/lane-inl.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

KVFERRY_INLINE void Lane::announce_failure(std::error_code cause) {
  if (auto owner = std::exchange(owner_, {}).lock()) {
    owner->lane_breaking(cause);
    told_owner_ = std::move(owner);
  }
}

KVFERRY_INLINE void Lane::fail(std::error_code cause, std::string why) {
  if (failed_) {
    return;
  }
  announce_failure(cause);
  close_socket();
  end_all(cause, std::move(why));
}

KVFERRY_INLINE void Lane::fail_for(const std::exception& error) {
  std::string why;
  kit::if_memory_lasts([&] { why = remote_ + ": " + error.what(); });
  fail(errc::connection_lost, std::move(why));
}

KVFERRY_INLINE void Lane::end_all(std::error_code cause, std::string why) {
  if (failed_) {
    return;
  }
  failed_ = true;
  failure_ = cause;
  failure_why_ = kit::copied_if_memory_lasts(why);
  attend_timer_.cancel();
  drain_timer_.cancel();
  frame_timer_.cancel();
  if (socket_) {
    socket_->operations_end();
  }
  protocol_.fail(cause, std::move(why));
}

KVFERRY_INLINE std::shared_ptr<Socket> Lane::take_leave(bool& more) {
  std::shared_ptr<Socket> socket;
  change(
      [&] {
        if (failed_ || !running_) {
          return;
        }
        protocol_.leave();
        readable_ = true;
        writable_ = true;
        if (hears_bells_) {
          // No bell rings for what a polling thread takes, and this one may sleep.
          leaving_ = true;
          watched_ = false;
          socket_->woken();
        }
        std::size_t budget = turn_bytes;
        more |= move_bytes(budget, Role::leaving);
        if (!failed_ && (!protocol_.settled() || socket_->holds_back())) {
          socket = socket_;
        }
      },
      caller_bytes);
  return socket;
}

KVFERRY_INLINE void Lane::shut(std::error_code cause, const std::string& why) {
  change(
      [&] {
        owner_.reset();  // it knows
        end_all(cause, kit::copied_if_memory_lasts(why));
      },
      caller_bytes);
}

KVFERRY_INLINE void Lane::disconnect() {
  change([&] { close_socket(); }, caller_bytes);
}

KVFERRY_INLINE void Lane::outlive(std::shared_ptr<Owner> owner, std::error_code cause, const std::string& why) {
  change(
      [&] {
        owner_.reset();  // it knows
        if (running_ && !failed_) {
          outlived_ = Outlived{kit::Clock::now(), cause, kit::copied_if_memory_lasts(why), std::move(owner)};
        } else {
          end_all(cause, kit::copied_if_memory_lasts(why));
        }
      },
      caller_bytes);
}

KVFERRY_INLINE void Lane::close_socket() {
  if (socket_) {
    options_.events->remove(socket_->descriptor());
    socket_->operations_end();
    if (protocol_.in_flight()) {
      socket_->drop_unsent();
    } else {
      socket_->say_end();
    }
    socket_->shut();
    socket_.reset();
  }
}

}  // namespace kvferry::tcp
