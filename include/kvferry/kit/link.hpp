// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_LINK_HPP
#define KVFERRY_KIT_LINK_HPP

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/config.hpp>
#include <kvferry/kit/blocking_wait.hpp>
#include <kvferry/kit/operation.hpp>
#include <kvferry/kit/region_list.hpp>
#include <kvferry/memory_region.hpp>
#include <kvferry/side_message.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// A peer's handshake, checked.
struct PeerDescription {
  std::string id;                     ///< The id by which this channel knows the peer.
  std::uint64_t incarnation = 0;      ///< Drawn anew at each start of the peer's channel.
  std::string init_url;               ///< The url at which the peer answers handshakes; empty if it answers none.
  std::string reached_host;           ///< The address that answered this side's handshake; empty on the accepting side.
  std::vector<RemoteRegion> regions;  ///< The peer's regions, ordered by number.
  std::string source = {};            ///< On the accepting side, where the handshake came from: see `Reply::source`.
  std::uint32_t next_region = 0;      ///< A smaller number without a region is a removed region's.
  std::uint32_t given_regions = 0;    ///< The peer's channel was made with the regions of smaller numbers.
};

/// A transport's connection to one peer. It may consist of sockets, queue pairs, or anything else.
///
/// Thread safety: all functions may be called from any thread. No function may block on the network or call a
/// completion handler's code (`Operation::finish` posts).
class KVFERRY_EXPORT Link {
 public:
  virtual ~Link() = default;

  /// Takes an operation that the kit has checked against the peer's description. From now on it is the link's duty to
  /// end it. If its `stop_cause` is set when its turn comes, the link ends it with that cause.
  virtual void start(std::shared_ptr<Operation> operation) = 0;

  /// Ends an operation early, with `operation->stop_cause()`. Parts that have not started are dequeued; the others are
  /// drained, or the link fails; then the link calls `finish`. An operation that the link doesn't know is ignored.
  virtual void stop(std::shared_ptr<Operation> operation) = 0;

  /// Drops the connection and ends all operations with `cause`. When it returns, this link touches no buffer and no
  /// region. It may be called again.
  virtual void shut(std::error_code cause, const std::string& why) = 0;

  /// The events for which `take_leave` waits: one of `descriptors` is readable, one of `writing` is writable, or
  /// `until` has come.
  struct Pause {
    std::vector<int> descriptors;
    Clock::time_point until;
    std::vector<int> writing = {};
  };
  /// Called when the channel is being closed and its operations have been asked to stop; `shut` follows. Without
  /// waiting, it refuses the peer's new operations, sends the answers for which the peer waits and then goodbye, and
  /// reads the peer's answers to stopped operations. All links of a channel do this at the same time, so many links
  /// take no longer than one.
  /// @return the events to wait for before the next call. Nothing: everything has been sent, or the time for it has
  ///   passed.
  [[nodiscard]] virtual std::optional<Pause> take_leave() { return std::nullopt; }

  /// Asks the peer whether it lives, and calls `answered` when an answer to this question comes; never calls it if none
  /// comes. `answered` may take locks, and doesn't call the link. If it is called within a second, a newcomer that
  /// claims to be this peer is refused. Otherwise the newcomer may take the peer's place.
  ///
  /// The default assumes that the peer of a link that has not failed lives: the peer's place becomes free when the link
  /// has failed.
  // NOLINTNEXTLINE(performance-unnecessary-value-param): links keep it
  virtual void probe(std::function<void()> answered) { answered(); }

  /// Calls `done` when no write that the peer had started on this link can land here any more: the peer has confirmed
  /// that its writes have ended, or the link has been shut. Calls it exactly once, from any thread, possibly within the
  /// call, perhaps with locks of the link held. If the link throws, or destroys `done` without a call (because memory is
  /// used up), the caller shuts it, unless nobody waits for the answer any more.
  /// @return false if the link can't ask: then it calls nothing, and the caller shuts the link to be sure.
  // NOLINTNEXTLINE(performance-unnecessary-value-param): links keep it
  [[nodiscard]] virtual bool fence(std::function<void()> done) {
    (void)done;
    return false;
  }
  /// Set when the connection has ended; if that is why `fence` calls `done`, then before. Null: the link can't tell, and
  /// when the peer connects again, more of its writes are refused with `errc::fenced` than need be.
  [[nodiscard]] virtual std::shared_ptr<const std::atomic<bool>> ended() const noexcept { return nullptr; }

  /// @name Regions that come and go: for transports with `Capabilities::region_changes`
  /// @{

  /// Tells the peer about regions of the channel that it hasn't been told of (`LinkHost::local_regions`, and
  /// `told_regions` before the first call), on each connection of the link, before operations that are started here
  /// later. May be called when there are none.
  virtual void region_added() {}
  /// Called when the channel has taken a region back; `LinkHost::local_regions` doesn't have it any more. Tells the
  /// peer, and calls `done` when the peer can't touch the region over this link any more: new accesses are answered
  /// with `errc::region_gone`, earlier ones have ended, and the peer has confirmed it; or the link has been shut. Calls
  /// it exactly once, from any thread, possibly within the call, perhaps with locks of the link held. If the link
  /// throws, or destroys `done` without a call (because memory is used up), it is shut.
  /// @return false if the link can't ask: then it calls nothing, and the caller shuts the link to be sure.
  // NOLINTNEXTLINE(performance-unnecessary-value-param): links keep it
  [[nodiscard]] virtual bool region_removed(std::uint32_t number, std::function<void()> done) {
    (void)number;
    (void)done;
    return false;
  }
  /// Calls `done` when all announcements of regions that the peer had sent before the question have come, and
  /// `LinkHost` has been told. Never calls it if the link fails. `done` may take locks, and doesn't call the link. The
  /// default suits links whose peer answers a probe itself, behind its announcements of regions.
  virtual void ask_regions(std::function<void()> done) { probe(std::move(done)); }
  /// @}

  /// @name For a waiting thread that moves the link's bytes instead of sleeping
  /// @{

  /// Whether such an operation has ended when `start` returns, if the link has no other work. The link then has no use
  /// for the waiting thread, and `begin_serving` isn't called. A wrong answer costs only time.
  /// @param request has been checked against what the peer told.
  [[nodiscard]] virtual bool ends_at_once(const TransferRequest& request) const noexcept {
    (void)request;
    return false;
  }
  /// Called by a thread that is about to start an operation here and to wait for it. Until `end_serving`, the link may
  /// leave work to it that another thread would do otherwise.
  /// @return false if the link has no use for the thread; the thread then sleeps until the operation ends.
  [[nodiscard]] virtual bool begin_serving() { return false; }
  /// Moves the link's bytes, at most until `wait.over()`; must return soon after that. May throw `std::system_error`,
  /// which counts as returning early.
  virtual void serve(BlockingWait& wait) { (void)wait; }
  /// Hands the link's work back to other threads. Called once for each `begin_serving` that returned true, by the same
  /// thread.
  virtual void end_serving() {}
  /// @}

  /// `host:port` of the peer's end, as this side sees it, with the zone of an IPv6 address that needs one. Empty if the
  /// transport has no such address.
  [[nodiscard]] virtual std::string remote_address() const { return {}; }
  /// The number of file descriptors that the link holds until it is shut. It counts for the limit on links of peers
  /// that connected by themselves (docs/security.md). Constant.
  [[nodiscard]] virtual std::size_t descriptors() const noexcept { return 0; }
  /// Whether one of this side's operations is under way on it, or either side has started one since the last call. The
  /// kit asks when there are too many links of peers that connected by themselves: a link that was never used, or not
  /// for long, gives way to a newer one. With the default no link gives way, and newer ones are refused.
  [[nodiscard]] virtual bool take_used() noexcept { return true; }
  /// A description of the path of the bytes, for people.
  [[nodiscard]] virtual std::string path() const = 0;

  /// Adds a remark to the path for people: the reason why no other path was taken. Set it, if at all, before the link
  /// is handed over.
  void set_remark(std::string remark) { remark_ = std::move(remark); }
  /// The path and the remark.
  [[nodiscard]] std::string path_with_remark() const { return remark_.empty() ? path() : path() + "; " + remark_; }

  /// Has `call` called once if the link becomes its peer's: it may be refused when it is handed over. Without locks, on the
  /// thread that hands it over. Set it, if at all, before that; of several, all are called. Must not throw.
  void when_taken(std::function<void()> call) { when_taken_.push_back(std::move(call)); }
  /// For the channel, which takes it.
  void be_taken() noexcept {
    for (const auto& call : std::exchange(when_taken_, {})) {
      call();
    }
  }

 private:
  std::string remark_;
  std::vector<std::function<void()>> when_taken_;
};

/// The channel, as its links see it. Stays valid after the channel is closed; calls then do nothing.
class KVFERRY_EXPORT LinkHost {
 public:
  virtual ~LinkHost() = default;

  [[nodiscard]] virtual const PeerDescription& peer() const noexcept = 0;
  /// The channel's regions now; never null. A link may touch their memory under two conditions: the link has not been
  /// shut, and the access began before `Link::region_removed`, with a list that wasn't outdated.
  [[nodiscard]] virtual std::shared_ptr<const RegionList> local_regions() const = 0;
  /// The regions that the peer knows from the handshake.
  [[nodiscard]] virtual std::shared_ptr<const RegionList> told_regions() const { return local_regions(); }
  /// Reports that the peer offers one more region. A repeated report, from another connection of the link, changes
  /// nothing.
  /// @return false if the peer has too many regions, and so breaks the protocol.
  [[nodiscard]] virtual bool peer_region_added(const RemoteRegion& region) {
    (void)region;
    return true;
  }
  /// Reports that the peer has taken a region back. Likewise.
  virtual void peer_region_removed(std::uint32_t number) { (void)number; }
  /// Hands a notification to the channel's user. @param key as in `TransferRequest::notification_key`. @return false if the
  /// queue is full.
  [[nodiscard]] virtual bool deliver_notification(std::vector<std::byte> payload, std::uint64_t key) = 0;
  /// Reserves `bytes` of this process's memory for recvs that the peer posts and no send has met yet. Give them back
  /// with `give_back_memory`. Thread-safe.
  /// @return false if that exceeds the limit of the peer, or of all peers of the channel; then nothing is reserved.
  [[nodiscard]] virtual bool take_memory(std::size_t bytes) {
    (void)bytes;
    return true;
  }
  virtual void give_back_memory(std::size_t bytes) noexcept { (void)bytes; }
  /// Counts objects that have landed here with bytes that don't match their checksums. Thread-safe.
  virtual void checksums_differed(std::size_t objects) noexcept { (void)objects; }
  /// Has `drop` called once if the attempt to dial or accept for this host is abandoned, for example because a newer
  /// attempt has taken its place, or nobody wants the peer any more; at once if it is abandoned already. `drop` frees
  /// the attempt's resources. It may be called with locks of the channel held and must not call into it. Afterwards the
  /// `LinkHandler` needn't be called any more.
  // NOLINTNEXTLINE(performance-unnecessary-value-param): channels keep it
  virtual void when_abandoned(std::function<void()> drop) { (void)drop; }
  /// Tells until when the attempt may be at ways that don't answer, with others behind them, though nothing is wrong. A
  /// fence gives an attempt up a second after that at the earliest, or at the fence's deadline. The latest time counts.
  virtual void may_take_until(Clock::time_point until) noexcept { (void)until; }
  /// Makes `close()` wait as long as the result is held. Hold it while you call a transport to go on with an attempt,
  /// but not while the attempt waits for the network.
  /// @return null if the channel is closed: don't call a transport then.
  [[nodiscard]] virtual std::shared_ptr<void> stay() { return {std::shared_ptr<void>(), this}; }
  /// Calls `done` when the writes to this peer that this channel has started by now have ended, wherever they are: on
  /// this link, on their way to it, or waiting for one. A peer's fence waits for this. `done` may be called within the
  /// call, from any thread, with locks of the channel held.
  // NOLINTNEXTLINE(performance-unnecessary-value-param): channels keep it
  virtual void when_writes_ended(std::function<void()> done) { done(); }
  /// Reports that the connection broke by itself: the peer counts as failed, and the next call reconnects.
  virtual void link_failed(const Link& link, std::error_code cause) = 0;
};

/// Gets a link once it is usable in both directions, or an error and a sentence that names the peer. Called exactly
/// once, from any thread, possibly inside the call that it was given to.
using LinkHandler = std::function<void(std::error_code, std::shared_ptr<Link>, std::string diagnostic)>;

/// One attempt of this side to connect, from before the handshake until the `LinkHandler` of `connect` is destroyed.
/// Its destructor must not call into the channel.
class KVFERRY_EXPORT Dial {
 public:
  virtual ~Dial() = default;
  /// This side's endpoint, for the handshake's request; may be empty. May throw `TransferError`: then there is no
  /// handshake.
  [[nodiscard]] virtual Bytes local_endpoint() = 0;
  /// Connects to the endpoint in the handshake's answer. Must not block.
  /// @param deadline when `on_link` is called at the latest. A channel alone ends the attempt by itself a little later. As a
  ///   road of an `AutoTransferChannel` the transport has to keep it: no other road is tried before.
  virtual void connect(std::shared_ptr<LinkHost> host, const Bytes& remote_endpoint, Clock::time_point deadline,
                       LinkHandler on_link) = 0;
  /// Describes the present step of `connect`, for the sentence of a call whose time is over; empty if the transport has only one way.
  /// Thread-safe.
  [[nodiscard]] virtual std::string awaited() const { return {}; }
  /// Whether the peer closed a connection of a `connect` that has failed since with a code that doesn't say so. Called within the
  /// `LinkHandler`, or after it.
  [[nodiscard]] virtual bool was_cut_off() const noexcept { return false; }
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_LINK_HPP
