// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_PEER_HPP
#define KVFERRY_KIT_PEER_HPP

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/url.hpp>

#include <kvferry/detail/secret.hpp>

#include <kvferry/kit/abandonment.hpp>
#include <kvferry/kit/init_messages.hpp>
#include <kvferry/kit/peer_directory.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// The secret by which one peer knows this channel again.
[[nodiscard]] inline Bytes new_secret() {
  Bytes secret(secret_bytes);
  make_secret(std::span<std::byte, secret_bytes>(secret.data(), secret_bytes));
  return secret;
}

/// Why a peer that came by itself is refused.
inline constexpr const char* too_many_links =
    "there are as many connections of peers that came by themselves, and use them, as there may be, in all or of this address";

/// The channel at a peer's end, and the secrets that the two sides show each other to be known again. An incarnation
/// alone proves nothing: anybody who asks is told it.
struct PeerDirectory::Instance {
  std::uint64_t incarnation = 0;
  Bytes its_secret;
  Bytes own_secret;
  std::uint64_t its_attempt = 0;  ///< As it counts its own; 0: it doesn't, or this side dialed.

  [[nodiscard]] bool shown_by(std::uint64_t claimed, const std::optional<Bytes>& secret) const noexcept {
    return claimed == incarnation && secret && !its_secret.empty() && equal_secrets(*secret, its_secret);
  }
};

/// One attempt to make a connection. Its results become the peer's only when its link is published.
struct PeerDirectory::Attempt {
  std::uint64_t number = 0;  ///< 0: there is none.
  std::shared_ptr<Expirable> expiry;
  Clock::time_point deadline;
  bool accepting = false;  ///< The peer's dial, not this side's.
  std::string local_id;
  std::string url;  ///< Where it leads to, or where the peer says that it answers.
  Instance instance;
  bool known = false;  ///< The peer is the one that was connected before.
  std::shared_ptr<Host> host;  ///< For whom the transport awaits the peer's connections, or makes its own.
  Clock::time_point fenced_until =
      Clock::time_point::min();               ///< By the peer: writes that were started here until then.
  std::vector<std::shared_ptr<void>> fences;  ///< Held for as long as fences of this side wait for its end.
  bool given_up = false;                      ///< By a fence that waited for too long.
  bool awaited = false;              ///< This side dials as well, if it takes long.
  std::uint64_t silent_probe = 0;    ///< Unanswered by the peer, for which reason it was let in beside the peer's link.

  // Of a dial
  std::shared_ptr<const RegionList> told_regions;  ///< With the question.
  std::shared_ptr<Dial> dial;
  SideMessage question;
  bool yielded = false;     ///< Told by the peer that its own dial counts.
  bool gave_yield = false;  ///< Told the peer that this side's dial counts.
  Clock::time_point told_at;  ///< When the peer was told what fences there have been.
  bool told_again = false;
  bool crossed = false;     ///< The two have accepted each other's dials, and this one has waited for the other.
  bool as_known = false;    ///< Asked with the secret of a peer that answers at the same place.
  bool moves = false;       ///< To a peer that is connected, because the user says that it is at another url now.
  std::optional<std::chrono::milliseconds> peers_patience;  ///< If that is what it lasts.
  bool crowded = false;        ///< The peer may have to let go of it, to make room for others.
  bool let_go = false;         ///< That has happened, it seems: it is over, and made anew after a pause.
  unsigned times_let_go = 0;   ///< With those that it continues.
  std::string let_go_because;  ///< How it, or the one before it, ended.

  /// A peer's own attempt may take the place of this dial.
  [[nodiscard]] bool gives_way() const noexcept { return yielded || let_go; }
};

struct PeerDirectory::Continued {
  bool moves = false;
  /// The peer has been asked already, and is to be told of a fence that there has been since.
  bool told_again = false;
  unsigned times_let_go = 0;
  std::string let_go_because;
};

struct PeerDirectory::Peer {
  /// handing_over: there is a link, and operations that waited for it are going there; later ones queue up behind them,
  /// so that sends and recvs of a tag stay in order.
  enum class State { unconnected, handing_over, ready };

  /// A channel that claims to be the peer while the peer is connected, and waits for the outcome of a probe.
  struct Newcomer {
    InitQuestion question;
    HandshakeService::Reply reply;
  };

  std::string id;
  std::string local_id;  ///< How the peer knows this channel.
  std::string url;       ///< Where it answers handshakes, if known.
  Bytes secret = new_secret();  ///< That is shown to whom this side connects to, whichever attempt gets through.
  State state = State::unconnected;
  bool named = false;  ///< By this channel's user, rather than by itself.
  std::vector<Waiter> waiting;
  std::vector<Waiter> movers;  ///< Who waits for the connection to a new url.
  std::map<std::uint64_t, Waiter> asking;  ///< Who waits to hear who answers at a url.

  std::shared_ptr<PeerCounters> counters = std::make_shared<PeerCounters>();

  Attempt attempt;                  ///< This side's dial, or that of the peer itself.
  std::vector<Attempt> candidates;  ///< Dials of the peer, or of those who may be it anew, beside; the oldest first.

  std::shared_ptr<Link> link;
  bool dialed = false;         ///< By this side, the latest link: the peer was told `local_id`.
  const Host* host = nullptr;  ///< Of the latest link. To be compared only: it may be gone.
  std::shared_ptr<const PeerDescription>
      description;            ///< Of the latest link, with the news of regions since; null if there never was one.
  bool asks_regions = false;  ///< On the link.
  Clock::time_point asked_regions_at;  ///< The last time.
  std::uint64_t region_question = 0;   ///< The last one.
  std::vector<RegionAsker> region_askers;
  Instance instance;                                   ///< Of the latest link.
  std::uint64_t instances = 0;                         ///< How many different ones there were.
  std::uint64_t acknowledged_instance = 0;
  Clock::time_point out_of_use_since;  ///< Of an unconnected one.
  Failure last_failure;
  std::string last_awaited;              ///< What the last attempt that ran out of time had waited for.
  Clock::time_point last_awaited_until;  ///< Calls whose time ends at about the same moment tell that.

  Clock::time_point fenced_at = Clock::time_point::min();  ///< By this side's user, the last time.
  /// Whether `instance`, under `local_id`, has answered that fence. Null: nobody else's answer counts.
  std::shared_ptr<const std::atomic<bool>> fence_answered;
  Clock::time_point fenced_until =
      Clock::time_point::min();  ///< By the peer: writes that were started here until then.

  // Whether the peer at the link lives, when somebody says that he is the peer.
  std::uint64_t probe = 0;  ///< The one that is awaited; 0: none.
  std::uint64_t last_probe = 0;
  std::shared_ptr<Expirable> probe_expiry;
  Clock::time_point probe_deadline;
  std::vector<Newcomer> newcomers;
  Clock::time_point silent_until;  ///< Until then the link counts as dead; a late answer revokes that.

  [[nodiscard]] bool dialing() const noexcept { return attempt.number != 0 && !attempt.accepting; }
  [[nodiscard]] bool lives() const noexcept { return link != nullptr && Clock::now() >= silent_until; }
  /// However long its connection takes: the peer that was silent when it came has not answered since.
  [[nodiscard]] bool gives_way_to(const Attempt& newcomer) const noexcept {
    return !lives() ||
           (newcomer.silent_probe != 0 && newcomer.silent_probe == last_probe && silent_until != Clock::time_point());
  }
  [[nodiscard]] bool in_use() const noexcept {
    return link || attempt.number != 0 || !candidates.empty() || !waiting.empty() || !movers.empty() ||
           !asking.empty() || !newcomers.empty();
  }
  /// `at` with the address that answered there.
  [[nodiscard]] std::string reached(const std::string& at) const {
    if (!description || description->init_url != at || description->reached_host.empty()) {
      return at;
    }
    std::error_code ignored;
    return HostPort{description->reached_host, parse_url(at, ignored).port}.to_url();
  }
  [[nodiscard]] Attempt* find(std::uint64_t number) noexcept {
    if (attempt.number == number) {
      return &attempt;
    }
    const auto it = std::ranges::find(candidates, number, &Attempt::number);
    return it == candidates.end() ? nullptr : &*it;
  }
};

/// Something to be done at a time unless the attempt is over by then.
struct PeerDirectory::Expiry final : Expirable {
  explicit Expiry(std::function<void()> what) : run(std::move(what)) {}
  /// Not a template: all callers share the code of one `std::make_shared`.
  [[nodiscard]] static std::shared_ptr<Expiry> make(std::function<void()> what) {
    return std::make_shared<Expiry>(std::move(what));
  }
  void expire() override { run(); }

  std::function<void()> run;
};

class PeerDirectory::Host final : public LinkHost {
 public:
  /// @param told the regions that the peer is told of by the handshake.
  Host(PeerDirectory& directory, PeerDescription peer, std::shared_ptr<const RegionList> told)
      : directory_(directory.weak_from_this()),
        notifications_(directory.notifications_),
        operations_(directory.operations_),
        posted_(directory.posted_),
        regions_(directory.regions_),
        told_regions_(std::move(told)),
        peer_(std::make_shared<const PeerDescription>(std::move(peer))) {}

  [[nodiscard]] const PeerDescription& peer() const noexcept override { return *peer_; }
  [[nodiscard]] std::shared_ptr<const RegionList> local_regions() const override { return regions_->now(); }
  [[nodiscard]] std::shared_ptr<const RegionList> told_regions() const override { return told_regions_; }

  [[nodiscard]] bool peer_region_added(const RemoteRegion& region) override {
    const auto directory = directory_.lock();
    return !directory || directory->region_added(peer_->id, *this, region);
  }
  void peer_region_removed(std::uint32_t number) override {
    if (const auto directory = directory_.lock()) {
      directory->region_removed(peer_->id, *this, number);
    }
  }

  [[nodiscard]] bool deliver_notification(std::vector<std::byte> payload, std::uint64_t key) override {
    return notifications_->push({peer_->id, std::move(payload), peer_->incarnation, key});
  }

  [[nodiscard]] bool take_memory(std::size_t bytes) override { return posted_.take(bytes); }
  void give_back_memory(std::size_t bytes) noexcept override { posted_.give_back(bytes); }
  void checksums_differed(std::size_t objects) noexcept override {
    operations_->counters().count_checksum_mismatches(objects);
  }
  void when_writes_ended(std::function<void()> done) override {
    operations_->when_writes_ended(peer_->id, std::move(done));
  }

  void link_failed(const Link& link, std::error_code cause) override {
    failed_ = true;
    if (const auto directory = directory_.lock()) {
      directory->link_failed(peer_->id, link, cause);
    }
  }

  [[nodiscard]] std::shared_ptr<void> stay() override;
  void when_abandoned(std::function<void()> drop) override { abandonment_.when_abandoned(std::move(drop)); }
  void abandon() { abandonment_.abandon(); }
  /// The connection is used, and can't be abandoned any more.
  void keep() { abandonment_.keep(); }
  void may_take_until(Clock::time_point until) noexcept override {
    const auto given = until.time_since_epoch().count();
    auto latest = may_take_until_.load();
    while (latest < given && !may_take_until_.compare_exchange_weak(latest, given)) {
    }
  }
  [[nodiscard]] Clock::time_point may_take_until() const noexcept {
    return Clock::time_point(Clock::duration(may_take_until_));
  }

  [[nodiscard]] std::shared_ptr<const PeerDescription> description() const { return peer_; }
  [[nodiscard]] bool failed() const noexcept { return failed_; }

 private:
  const std::weak_ptr<PeerDirectory> directory_;
  const std::shared_ptr<NotificationQueue> notifications_;
  const std::shared_ptr<OperationRegistry> operations_;
  PostedMemory::Share posted_;
  const std::shared_ptr<const RegionTable> regions_;
  const std::shared_ptr<const RegionList> told_regions_;
  const std::shared_ptr<const PeerDescription> peer_;
  std::atomic<bool> failed_{false};
  std::atomic<Clock::rep> may_take_until_{0};
  Abandonment abandonment_;
};

/// Makes `close` wait as long as it exists. To be made with the directory's mutex held, before the directory is closed,
/// and to be destroyed without the mutex.
class PeerDirectory::Stay {
 public:
  explicit Stay(PeerDirectory& directory) : directory_(directory) { ++directory_.visits_; }
  Stay(const Stay&) = delete;
  Stay& operator=(const Stay&) = delete;
  ~Stay() {
    const Lock lock(directory_.mutex_);
    if (--directory_.visits_ == 0) {
      directory_.no_visits_.notify_all();
    }
  }

 private:
  PeerDirectory& directory_;
};

/// A callback's stay in the directory: `close` waits for those that have begun and lets no more in.
class PeerDirectory::Visit {
 public:
  explicit Visit(const std::weak_ptr<PeerDirectory>& weak) : directory_(weak.lock()) {
    if (directory_) {
      const Lock lock(directory_->mutex_);
      if (directory_->closed_) {
        left_ = std::move(directory_);
      } else {
        stay_.emplace(*directory_);
      }
    }
  }

  explicit operator bool() const noexcept { return directory_ != nullptr; }
  PeerDirectory* operator->() const noexcept { return directory_.get(); }

 private:
  std::shared_ptr<PeerDirectory> directory_;
  std::shared_ptr<PeerDirectory> left_;  ///< Not to be let go while its mutex is held.
  std::optional<Stay> stay_;
};

inline std::shared_ptr<void> PeerDirectory::Host::stay() {
  auto visit = std::make_shared<Visit>(directory_);
  return *visit ? visit : nullptr;
}

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_PEER_HPP
