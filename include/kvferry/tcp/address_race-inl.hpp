// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/tcp/address_race.hpp>

#include <asio/post.hpp>

#include <utility>

#include <kvferry/tcp/open_socket.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

KVFERRY_INLINE AddressRace::AddressRace(const asio::any_io_executor& executor, std::vector<Endpoint> candidates,
                                        Handler on_end)
    : executor_(executor), candidates_(std::move(candidates)), on_end_(std::move(on_end)), timer_(executor) {}

KVFERRY_INLINE void AddressRace::start() {
  const std::lock_guard lock(mutex_);
  try_next();
}

KVFERRY_INLINE void AddressRace::try_next() {
  const Endpoint& candidate = candidates_[tried_++];
  const auto attempt = std::make_shared<asio::ip::tcp::socket>(executor_);
  attempts_.push_back(attempt);
  const auto ended = [self = shared_from_this(), attempt](std::error_code ec) {
    if (ec) {
      self->failed(attempt, ec);
    } else {
      self->connected(attempt);
    }
  };
  std::error_code ec;
  open_socket(*attempt, candidate.protocol(), ec);
  if (ec) {
    asio::post(executor_, [ended, ec] { ended(ec); });  // not in this call, whose caller holds the mutex
  } else {
    attempt->async_connect(candidate, ended);
  }
  if (tried_ < candidates_.size()) {
    wait();
  }
}

KVFERRY_INLINE void AddressRace::wait() {
  timer_.expires_after(attempt_delay);
  timer_.async_wait([weak = weak_from_this()](std::error_code ec) {
    const auto self = weak.lock();
    if (!self || ec) {
      return;
    }
    const std::lock_guard lock(self->mutex_);
    if (self->on_end_ && self->tried_ < self->candidates_.size()) {
      self->try_next();
    }
  });
}

KVFERRY_INLINE void AddressRace::connected(const Attempt& attempt) {
  Handler on_end;
  {
    const std::lock_guard lock(mutex_);
    if (!on_end_) {
      return;
    }
    on_end = std::exchange(on_end_, {});
    timer_.cancel();
    attempts_.remove(attempt);
    for (const auto& other : attempts_) {
      std::error_code ignored;
      other->close(ignored);
    }
    attempts_.clear();
  }
  on_end({}, std::move(*attempt));
}

KVFERRY_INLINE void AddressRace::failed(const Attempt& attempt, std::error_code cause) {
  Handler on_end;
  {
    const std::lock_guard lock(mutex_);
    if (!on_end_) {
      return;
    }
    const bool latest = attempts_.back() == attempt;
    attempts_.remove(attempt);
    if (tried_ < candidates_.size()) {
      if (latest) {
        timer_.cancel();
        try_next();
      }
      return;
    }
    if (!attempts_.empty()) {
      return;
    }
    on_end = std::exchange(on_end_, {});
  }
  on_end(cause, asio::ip::tcp::socket(executor_));
}

KVFERRY_INLINE void AddressRace::stop() {
  const std::lock_guard lock(mutex_);
  on_end_ = {};
  timer_.cancel();
  for (const auto& attempt : attempts_) {
    std::error_code ignored;
    attempt->close(ignored);
  }
  attempts_.clear();
}

}  // namespace kvferry::tcp
