// SPDX-License-Identifier: Apache-2.0
// A rail's work when nothing comes: deadlines, and whether the peer is there.
#include <algorithm>
#include <chrono>
#include <optional>
#include <utility>

#include <kvferry/error.hpp>

#include "rail.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma {

void Rail::check_timer() {
  if (failed_ || held_ || phase_ != Phase::running) {
    return;
  }
  const auto now = kit::Clock::now();
  if (const auto since = protocol_->draining_since(); since && now - *since >= options_.drain_timeout) {
    if (protocol_->cut_off(now - options_.drain_timeout)) {
      fail(errc::connection_lost, path() + ": a stopped operation's requests didn't complete");
      return;
    }
  }
  check_parts();
  if (failed_) {
    return;
  }
  const bool silent = options_.keepalive_interval.count() > 0 && now - last_activity_ >= options_.keepalive_interval;
  if (silent && protocol_->posted() == 0 && protocol_->fill_probe(list_)) {
    post("probe");
  }
}

void Rail::check_parts() {
  const auto late = [this] {
    const auto since = protocol_->unfinished_since();
    return since && kit::Clock::now() - *since >= options_.parts_timeout;
  };
  if (late()) {
    catch_up();  // it may be this side that hasn't looked
  }
  if (!failed_ && late()) {
    fail(errc::connection_lost, path() + ": the peer stopped within a recv's list of buffers, or a notification, for " +
                                    std::to_string(options_.parts_timeout.count()) + " ms");
  }
}

void Rail::arm_timer() {
  std::optional<kit::Clock::time_point> by;
  const auto look_by = [&by](std::optional<kit::Clock::time_point> since, std::chrono::milliseconds timeout) {
    if (since) {
      by = by ? std::min(*by, *since + timeout) : *since + timeout;
    }
  };
  look_by(protocol_->draining_since(), options_.drain_timeout);
  look_by(protocol_->unfinished_since(), options_.parts_timeout);
  // One that was armed before comes early enough for the keepalive, and no clock need be read to know that.
  if (timer_at_ && (!by || *timer_at_ <= *by)) {
    return;
  }
  std::optional<kit::Clock::time_point> next;
  if (options_.keepalive_interval.count() > 0 && phase_ == Phase::running) {
    // A request that is with the adapter is a probe in itself.
    next = (protocol_->posted() == 0 ? last_activity_ : kit::Clock::now()) + options_.keepalive_interval;
  }
  if (by) {
    next = next ? std::min(*next, *by) : *by;
  }
  if (!next) {
    return;
  }
  timer_at_ = next;
  timer_.expires_at(*next);
  timer_.async_wait([weak = weak_from_this()](std::error_code ec) {
    const auto self = weak.lock();
    if (self && ec != asio::error::operation_aborted) {
      self->driver_.put([](Inbox& inbox) { inbox.timer = true; });
      self->drive_on_io_thread();
    }
  });
}

}  // namespace kvferry::rdma
