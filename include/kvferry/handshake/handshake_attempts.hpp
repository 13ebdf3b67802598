// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstddef>
#include <list>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include <kvferry/url.hpp>

#include <kvferry/handshake/handshake_sockets.hpp>
#include <kvferry/keyring.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

class HandshakeAttempts;

/// How many connections a service tries to make at a time: each takes three descriptors. Not thread-safe.
class ConnectSlots {
 public:
  using TimePoint = std::chrono::steady_clock::time_point;

  explicit ConnectSlots(std::size_t most) : most_(most) {}
  /// One 24th of RLIMIT_NOFILE, 8 to 1,024: what is tried has an eighth of the process's descriptors at most.
  ConnectSlots();
  ConnectSlots(const ConnectSlots&) = delete;
  ConnectSlots& operator=(const ConnectSlots&) = delete;

  /// Where there is none left, the attempt that has had one for longest has to try again later, if it has had some time.
  /// @param again for an address that was tried before: those displace nobody, and a quarter is left to the others.
  class Slot;
  [[nodiscard]] std::optional<Slot> take(HandshakeAttempts& owner, bool again, TimePoint now);

 private:
  struct Holder {
    HandshakeAttempts* owner;
    TimePoint since;
  };

  const std::size_t most_;
  std::list<Holder> holders_;  ///< The oldest first.
};

/// One is taken for as long as this lives.
class ConnectSlots::Slot {
 public:
  Slot(ConnectSlots& slots, std::list<Holder>::iterator place) : slots_(&slots), place_(place) {}
  Slot(Slot&& other) noexcept : slots_(std::exchange(other.slots_, nullptr)), place_(other.place_) {}
  Slot& operator=(Slot&&) = delete;
  ~Slot() { give_back(); }
  void give_back() noexcept {
    if (slots_ != nullptr) {
      std::exchange(slots_, nullptr)->holders_.erase(place_);
    }
  }

 private:
  ConnectSlots* slots_;
  std::list<Holder>::iterator place_;
};

/// The connections by one of which a question may get to its peer: to each of the host's addresses in turn, beside
/// those that have not answered (RFC 8305, section 5), and again later where nobody listens. Between two tries an
/// address costs no descriptor. Not thread-safe.
class HandshakeAttempts {
 public:
  using TimePoint = std::chrono::steady_clock::time_point;

  /// The outcome of the latest try: nothing was said, or the listener hung up within the greeting, or said no.
  enum class Verdict { none, hung_up, refused };

  /// A connection, or what may become one, and what tells whether it has.
  struct Candidate {
    HandshakeSocket socket;
    HandshakeMonitor monitor;
    ConnectSlots::Slot slot;
    HostPort address;
    std::size_t failures = 0;
    std::string server_key = {};
    Verdict verdict = Verdict::none;  ///< Of an earlier try, until this one has its own.
    bool judged = false;              ///< This one has.
  };
  /// Not movable: ZeroMQ's monitor must go before the socket that it watches.
  using Candidates = std::list<Candidate>;

  HandshakeAttempts() = default;
  HandshakeAttempts(const HandshakeAttempts&) = delete;
  HandshakeAttempts& operator=(const HandshakeAttempts&) = delete;

  /// The addresses to try, at most 8.
  /// @param server_keys who may answer there, each of whom is tried; none if that isn't known by a key.
  void add(std::span<const HostPort> addresses, TimePoint now, std::span<const std::string> server_keys = {});
  /// Whether all that there is to try has been answered like that, or worse.
  [[nodiscard]] bool all(Verdict verdict) const noexcept;
  /// Whether there was ever anything to try.
  [[nodiscard]] bool begun() const noexcept { return !candidates_.empty() || !waiting_.empty(); }

  /// When `advance` has something to do; `TimePoint::max()` if never.
  [[nodiscard]] TimePoint due() const noexcept;
  /// Tries what is due.
  /// @throws zmq::error_t if that can't be tried and there is nothing else.
  /// @param keyring of who connects; null without keys.
  void advance(const SharedContext& context, ConnectSlots& slots, std::size_t max_message_bytes, TimePoint now,
               const Keyring* keyring = nullptr);

  [[nodiscard]] Candidates& candidates() noexcept { return candidates_; }
  /// @return the end if there is none (any more).
  [[nodiscard]] Candidates::iterator find(const void* monitor) noexcept;
  /// Nobody listens there, or who does has hung up.
  void failed(Candidates::iterator candidate, TimePoint now);
  /// The oldest makes room for another question's.
  void yield(TimePoint now) { failed(candidates_.begin(), now); }
  /// This one it is: the others are given up.
  void settle_on(Candidates::iterator candidate);
  void clear();

 private:
  struct Waiting {
    HostPort address;
    TimePoint at;
    std::size_t failures = 0;
    std::string server_key = {};
    Verdict verdict = Verdict::none;
  };

  void try_again(Waiting tried, TimePoint now);

  Candidates candidates_;  ///< In the order in which they were begun.
  std::vector<Waiting> waiting_;
};

}  // namespace kvferry::kit
