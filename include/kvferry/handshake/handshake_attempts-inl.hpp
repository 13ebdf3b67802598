// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/handshake/handshake_attempts.hpp>

#include <algorithm>
#include <iterator>

#include <kvferry/detail/descriptor_limit.hpp>
#include <kvferry/detail/standard_descriptors.hpp>
#include <kvferry/handshake/curve.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
inline namespace internal {

/// A name may have many addresses; the first to accept a connection gets the question.
inline constexpr std::size_t max_addresses = 8;
inline constexpr std::chrono::milliseconds attempt_delay{250};
/// Before an address is tried again: doubled each time.
inline constexpr std::chrono::milliseconds first_pause{20};
inline constexpr std::size_t longest_pause_doublings = 5;
/// Until those that have the slots are looked at again.
inline constexpr std::chrono::milliseconds slot_pause{20};
/// The kernel waits for minutes, with growing pauses, for a host that does not respond. The first pause alone is a second:
/// too long where the other side's listen queue was full for a moment. Doubled each time, for hosts that are far away.
inline constexpr int first_connect_timeout_ms = 300;
inline constexpr int longest_connect_timeout_ms = 2000;

KVFERRY_INLINE HandshakeSocket connected_socket(const SharedContext& context, std::size_t max_message_bytes,
                                                std::size_t failures) {
  occupy_standard_descriptors();
  // A REQ, unlike a DEALER, takes none but servers for its peer: no other client, and not itself, to which TCP may
  // connect it while nobody listens at a port of the ephemeral range.
  HandshakeSocket socket(context, zmq::socket_type::req, max_message_bytes);
  socket.ref().set(
      zmq::sockopt::connect_timeout,
      std::min(first_connect_timeout_ms << std::min(failures, longest_pause_doublings), longest_connect_timeout_ms));
  return socket;
}

}  // namespace internal

KVFERRY_INLINE ConnectSlots::ConnectSlots() : ConnectSlots(share_of_descriptors(24, 8, 1024)) {}

KVFERRY_INLINE std::optional<ConnectSlots::Slot> ConnectSlots::take(HandshakeAttempts& owner, bool again,
                                                                    TimePoint now) {
  if (holders_.size() >= (again ? most_ - most_ / 4 : most_)) {
    if (again || holders_.front().since + attempt_delay > now) {
      return std::nullopt;
    }
    holders_.front().owner->yield(now);
  }
  return std::optional<Slot>(std::in_place, *this, holders_.insert(holders_.end(), {&owner, now}));
}

KVFERRY_INLINE void HandshakeAttempts::add(std::span<const HostPort> addresses, TimePoint now,
                                           std::span<const std::string> server_keys) {
  const auto add_one = [&](const HostPort& address, std::string key) {
    waiting_.push_back({address, now, 0, std::move(key)});
    now += attempt_delay;
  };
  for (const auto& address : addresses.first(std::min(addresses.size(), max_addresses))) {
    if (server_keys.empty()) {
      add_one(address, {});
    }
    for (const std::string& key : server_keys) {
      add_one(address, key);
    }
  }
}

KVFERRY_INLINE HandshakeAttempts::TimePoint HandshakeAttempts::due() const noexcept {
  const auto next = std::ranges::min_element(waiting_, {}, &Waiting::at);
  return next == waiting_.end() ? TimePoint::max() : next->at;
}

KVFERRY_INLINE void HandshakeAttempts::advance(const SharedContext& context, ConnectSlots& slots,
                                               std::size_t max_message_bytes, TimePoint now, const Keyring* keyring) {
  while (due() <= now) {
    const auto next = std::ranges::min_element(waiting_, {}, &Waiting::at);
    const Waiting trying = std::move(*next);
    waiting_.erase(next);
    auto slot = slots.take(*this, trying.failures != 0, now);
    if (!slot) {
      waiting_.push_back({trying.address, now + slot_pause, trying.failures, trying.server_key, trying.verdict});
      continue;
    }
    try {
      auto socket = connected_socket(context, max_message_bytes, trying.failures);
      // ZMQ_IMMEDIATE would tell of a connection with less effort, but loses the answer of a server that hangs up after it.
      HandshakeMonitor monitor(context, socket,
                               ZMQ_EVENT_HANDSHAKE_SUCCEEDED | ZMQ_EVENT_DISCONNECTED | ZMQ_EVENT_CLOSED |
                                   ZMQ_EVENT_HANDSHAKE_FAILED_NO_DETAIL | ZMQ_EVENT_HANDSHAKE_FAILED_PROTOCOL |
                                   ZMQ_EVENT_HANDSHAKE_FAILED_AUTH);
      if (keyring != nullptr) {
        secure_client(socket.ref(), *keyring, trying.server_key);
      }
      socket.connect(trying.address);
      candidates_.push_back({std::move(socket), std::move(monitor), std::move(*slot), trying.address, trying.failures,
                             trying.server_key, trying.verdict});
    } catch (const zmq::error_t&) {
      if (trying.failures == 0 && !begun()) {
        throw;
      }
      try_again(trying, now);
    }
  }
}

KVFERRY_INLINE HandshakeAttempts::Candidates::iterator HandshakeAttempts::find(const void* monitor) noexcept {
  return std::ranges::find_if(candidates_, [&](const Candidate& one) { return one.monitor.ref().handle() == monitor; });
}

KVFERRY_INLINE void HandshakeAttempts::failed(Candidates::iterator candidate, TimePoint now) {
  const bool latest = std::next(candidate) == candidates_.end();
  Waiting tried{std::move(candidate->address), now, candidate->failures, std::move(candidate->server_key),
                candidate->judged ? candidate->verdict : Verdict::none};
  candidates_.erase(candidate);
  // The latest failed: no reason to wait for it.
  const auto untried = [](const Waiting& one) { return one.failures == 0; };
  const auto next = std::ranges::find_if(waiting_, untried);
  if (latest && next != waiting_.end() && next->at > now) {
    const auto early = next->at - now;
    for (Waiting& one : waiting_) {
      one.at -= untried(one) ? early : early.zero();
    }
  }
  try_again(std::move(tried), now);
}

KVFERRY_INLINE void HandshakeAttempts::try_again(Waiting tried, TimePoint now) {
  tried.at = now + first_pause * (1 << std::min(tried.failures, longest_pause_doublings));
  ++tried.failures;
  waiting_.push_back(std::move(tried));
}

KVFERRY_INLINE bool HandshakeAttempts::all(Verdict verdict) const noexcept {
  const auto has_it = [&](const auto& one) { return one.verdict >= verdict; };
  return begun() && std::ranges::all_of(candidates_, has_it) && std::ranges::all_of(waiting_, has_it);
}

KVFERRY_INLINE void HandshakeAttempts::settle_on(Candidates::iterator candidate) {
  Candidates chosen;
  chosen.splice(chosen.end(), candidates_, candidate);
  chosen.front().slot.give_back();
  clear();
  candidates_.swap(chosen);
}

KVFERRY_INLINE void HandshakeAttempts::clear() {
  candidates_.clear();
  waiting_.clear();
}

}  // namespace kvferry::kit
