// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/tcp/tcp_link.hpp>

#include <poll.h>

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include <kvferry/kit/overlap.hpp>

#include <kvferry/detail/recycled.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {
inline namespace internal {

/// Sleeps until the socket can be received from (or sent to), or the wait is over.
KVFERRY_INLINE void sleep_until_ready(const Socket& socket, bool to_send, kit::BlockingWait& wait) {
  const auto events = static_cast<short>(to_send ? POLLIN | POLLOUT : POLLIN);
  std::array<pollfd, 2> waited{{{socket.descriptor(), events, 0}, {wait.descriptor(), POLLIN, 0}}};
  if (!wait.over()) {
    ::poll(waited.data(), waited.size(), -1);
  }
}

/// Within what a caller's thread moves in one go (lane-inl.hpp).
inline constexpr std::size_t copied_at_once = std::size_t{128} << 10;

KVFERRY_INLINE bool closed_by_peer(std::error_code cause) {
  return cause == errc::peer_closed || cause == std::errc::connection_reset || cause == std::errc::broken_pipe;
}

}  // namespace internal

// NOLINTNEXTLINE(performance-unnecessary-value-param): each lane keeps it
KVFERRY_INLINE std::shared_ptr<TcpLink> TcpLink::create(std::shared_ptr<kit::LinkHost> host,
                                                        std::vector<Lane::Connection> connections, Options options) {
  std::shared_ptr<TcpLink> link(new TcpLink(host, options));
  link->lanes_.reserve(connections.size());
  const std::shared_ptr<Lane::Owner> owner(link, link.get());
  for (std::size_t i = 0; i < connections.size(); ++i) {
    options.lane.traffic = {options.traffic, &options.traffic->at(i)};
    link->lanes_.push_back(std::make_shared<Lane>(std::move(connections[i]), host, options.lane, owner));
  }
  return link;
}

KVFERRY_INLINE void TcpLink::run(std::optional<Hello> welcome) {
  for (std::size_t i = 0; i < lanes_.size(); ++i) {
    if (welcome) {
      welcome->lane = static_cast<std::uint32_t>(i);
      welcome->lane_count = static_cast<std::uint32_t>(lanes_.size());
      lanes_[i]->run(std::as_bytes(std::span(&*welcome, 1)));
    } else {
      lanes_[i]->run({});
    }
  }
}

KVFERRY_INLINE void TcpLink::start(std::shared_ptr<kit::Operation> operation) {
  const TransferRequest& request = operation->request();
  const bool serves = place_.is_of_this_thread();
  // Whoever drives a lane has the work of all others, who would wait for it while the system has it wait.
  const bool aside = !serves && io_rank_->was_above_this_thread_lately();
  std::size_t lane = 0;
  if (lanes_.size() > 1) {
    if (!request.one_sided()) {
      lane = static_cast<std::size_t>(request.tag % lanes_.size());
    } else {
      const std::size_t total = kit::LocalBytes(request).total();
      if (total >= stripe_threshold_ && request.objects.size() > 1 && !kit::lands_on_itself(request)) {
        start_striped(operation, total, aside);
        return;
      }
      lane = next_lane_.fetch_add(1, std::memory_order_relaxed) % lanes_.size();
    }
  }
  const std::size_t count = request.objects.size();
  if (aside) {
    lanes_[lane]->start_aside(kvferry::detail::make_recycled<StripedOperation>(std::move(operation), 1), {0, count});
    return;
  }
  // The thread of a blocking call leads its lane from the same moment on, for which it has it anyway.
  lanes_[lane]->start(kvferry::detail::make_recycled<StripedOperation>(std::move(operation), 1), {0, count},
                      serves ? &led_socket_ : nullptr);
}

KVFERRY_INLINE void TcpLink::start_striped(const std::shared_ptr<kit::Operation>& operation, std::size_t total_bytes,
                                           bool aside) {
  const auto ranges = kit::cut_into_stripes(kit::LocalBytes(operation->request()), total_bytes, lanes_.size());
  const auto batch = std::make_shared<StripedOperation>(operation, ranges.size());
  for (std::size_t i = 0; i < ranges.size(); ++i) {
    if (aside) {
      lanes_[i]->start_aside(batch, ranges[i]);
    } else {
      lanes_[i]->start(batch, ranges[i]);
    }
  }
}

KVFERRY_INLINE void TcpLink::stop(std::shared_ptr<kit::Operation> operation) {
  for (const auto& lane : lanes_) {
    lane->stop(operation);
  }
}

KVFERRY_INLINE void TcpLink::probe(std::function<void()> answered) {
  const auto once = [shared = std::make_shared<std::function<void()>>(std::move(answered)),
                     told = std::make_shared<std::atomic<bool>>(false)] {
    if (!told->exchange(true)) {
      (*shared)();
    }
  };
  for (const auto& lane : lanes_) {
    lane->probe(once);
  }
}

KVFERRY_INLINE void TcpLink::lane_breaking(std::error_code cause) {
  *ended_ = true;  // before any lane drops what waits
  if (!failed_.exchange(true)) {
    host_->link_failed(*this, cause);
  }
}

KVFERRY_INLINE void TcpLink::lane_broken(std::error_code cause, const std::string& why) {
  if (!closed_by_peer(cause)) {
    shut(cause, why);
    return;
  }
  // The ends of a peer's connections arrive in any order, and before what another one carries: the answers to what it has
  // taken.
  const std::shared_ptr<Lane::Owner> self(shared_from_this(), this);
  for (const auto& lane : lanes_) {
    lane->outlive(self, cause, why);
  }
}

KVFERRY_INLINE void TcpLink::shut(std::error_code cause, const std::string& why) {
  *ended_ = true;
  failed_ = true;
  for (const auto& lane : lanes_) {
    lane->shut(cause, why);
  }
  for (const auto& lane : lanes_) {
    lane->disconnect();
  }
}

/// @return a function for each lane to call. The last call calls `done`.
KVFERRY_INLINE std::function<void()> TcpLink::when_all_have(std::function<void()> done) const {
  return [unanswered = std::make_shared<std::atomic<std::size_t>>(lanes_.size()), done = std::move(done)] {
    if (--*unanswered == 0) {
      done();
    }
  };
}

KVFERRY_INLINE bool TcpLink::fence(std::function<void()> done) {
  const auto one_has = when_all_have(std::move(done));
  for (const auto& lane : lanes_) {
    lane->fence(one_has);
  }
  return true;
}

KVFERRY_INLINE void TcpLink::region_added() {
  for (const auto& lane : lanes_) {
    lane->region_added();
  }
}

KVFERRY_INLINE bool TcpLink::region_removed(std::uint32_t number, std::function<void()> done) {
  const auto one_has = when_all_have(std::move(done));
  for (const auto& lane : lanes_) {
    lane->region_removed(number, one_has);
  }
  return true;
}

KVFERRY_INLINE std::optional<kit::Link::Pause> TcpLink::take_leave() {
  const auto now = kit::Clock::now();
  leaving_until_ = leaving_until_.value_or(now + drain_timeout_);
  Pause pause{{}, *leaving_until_};
  bool more = false;
  for (const auto& lane : lanes_) {
    if (const auto socket = lane->take_leave(more)) {
      pause.descriptors.push_back(socket->descriptor());
      if (lane->wants_to_send()) {
        pause.writing.push_back(socket->descriptor());
      }
    }
  }
  if (pause.descriptors.empty() || now >= *leaving_until_) {
    return std::nullopt;
  }
  if (more) {
    pause.until = now;  // of what is there already, the socket may not tell
  }
  return pause;
}

KVFERRY_INLINE bool TcpLink::ends_at_once(const TransferRequest& request) const noexcept {
  if (!memory_ || request.kind != TransferKind::read || request.checksums.value_or(false) ||
      !request.notification.empty() || request.objects.size() > max_chunk_objects ||
      (!request.local_strides.empty() && request.local_strides.size() != request.objects.size())) {
    return false;
  }
  const auto reads = [this](std::uint32_t number) { return memory_->reads(number); };
  return (request.remote_ranges.empty() ? reads(request.remote_region)
                                        : std::ranges::all_of(request.remote_ranges, reads, &RemoteRange::region)) &&
         kit::LocalBytes(request).total() <= copied_at_once;
}

KVFERRY_INLINE bool TcpLink::begin_serving() { return lanes_.size() == 1 && place_.take(); }

KVFERRY_INLINE void TcpLink::serve(kit::BlockingWait& wait) {
  Lane& lane = *lanes_.front();
  bool found_nothing = false;  // Since then:
  kit::Clock::time_point since;
  bool may_wait = !lane.hears_bells();
  bool left = false;
  while (led_socket_ && *led_socket_ && !wait.over()) {
    const auto found = lane.lead(may_wait, wait, left);
    if (left) {
      led_socket_.reset();
      break;
    }
    if (found == Lane::Found::released) {
      break;
    }
    if (found != Lane::Found::nothing) {
      found_nothing = false;
      may_wait = !lane.hears_bells();
      continue;
    }
    const auto now = kit::Clock::now();
    if (!std::exchange(found_nothing, true)) {
      since = now;
    }
    if (now - since < patience_) {
      continue;
    }
    if (!may_wait) {
      may_wait = true;  // once more, and it is said
    } else if (!place_.may_sleep()) {
      break;
    } else {
      sleep_until_ready(**led_socket_, lane.wants_to_send(), wait);
      if (lane.hears_bells()) {
        lane.woken();
        may_wait = false;
      }
    }
  }
}

KVFERRY_INLINE void TcpLink::end_serving() {
  if (led_socket_) {
    led_socket_.reset();
    lanes_.front()->end_leading();
  }
  place_.leave();
}

KVFERRY_INLINE bool TcpLink::take_used() noexcept {
  // Of each lane: what is left to the next call would be old news then.
  return std::ranges::count_if(lanes_, [](const auto& lane) { return lane->take_used(); }) != 0;
}

KVFERRY_INLINE std::string TcpLink::path() const {
  if (!path_.empty()) {
    return memory_ ? path_ + memory_->path() : path_;
  }
  const std::string encryption = lanes_.front()->encryption();
  return "tcp " + lanes_.front()->local_address() + " -> " + lanes_.front()->remote_address() + ", " +
         std::to_string(lanes_.size()) + (lanes_.size() == 1 ? " lane, " : " lanes, ") +
         lanes_.front()->congestion_control() + (encryption.empty() ? "" : ", " + encryption);
}

}  // namespace kvferry::tcp
