// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_LINK_HPP
#define KVFERRY_KIT_LINK_HPP

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
  std::string id;                     ///< How this channel knows the peer.
  std::uint64_t incarnation = 0;      ///< Drawn anew at each start of the peer's channel.
  std::string init_url;               ///< Where the peer answers handshakes; empty if nowhere.
  std::string reached_host;           ///< The address that answered this side's handshake; empty on the accepting side.
  std::vector<RemoteRegion> regions;  ///< What the peer offers, ordered by number.
  std::string source = {};            ///< On the accepting side, where the handshake came from: see `Reply::source`.
  std::uint32_t next_region = 0;      ///< Of smaller numbers that are not there, the regions have been removed.
  std::uint32_t given_regions = 0;    ///< Smaller numbers are of regions that the peer's channel was made with.
};

/// A transport's connection to one peer, whatever it is made of: sockets, queue pairs.
///
/// Thread safety: all functions may be called from any thread. No function may block on the network or call a
/// completion handler's code (`Operation::finish` posts).
class KVFERRY_EXPORT Link {
 public:
  virtual ~Link() = default;

  /// Takes an operation that the kit has checked against the peer's description. From here on the link ends it.
  /// An operation whose `stop_cause` is set already when its turn comes is ended with that cause.
  virtual void start(std::shared_ptr<Operation> operation) = 0;

  /// Ends an operation early, with `operation->stop_cause()`. What has not started is dequeued; what has is drained, or
  /// the link fails; then `finish` is called. An operation that the link doesn't know is ignored.
  virtual void stop(std::shared_ptr<Operation> operation) = 0;

  /// Drops the connection and ends all operations with `cause`. When it returns, nothing of this link touches any
  /// buffer or region. Idempotent.
  virtual void shut(std::error_code cause, const std::string& why) = 0;

  /// The events that `take_leave` waits for: until one of the descriptors can be read, one of the others written to, or
  /// `until`.
  struct Pause {
    std::vector<int> descriptors;
    Clock::time_point until;
    std::vector<int> writing = {};
  };
  /// The channel is being closed, its operations have been asked to stop, and `shut` follows. Without waiting: takes no
  /// new operations of the peer's, sends the answers that the peer is owed and then goodbye, and reads the peer's answers
  /// to operations that were stopped. All links of a channel do this at the same time, so that many take no longer than
  /// one.
  /// @return what to wait for before calling this again. Nothing: all has been said, or the time for it has passed.
  [[nodiscard]] virtual std::optional<Pause> take_leave() { return std::nullopt; }

  /// Asks the peer for a sign of life, and calls `answered` when one comes that was given after the question; never
  /// calls it if none comes. `answered` may take locks, and doesn't call the link. If it is called within a second, a
  /// newcomer that claims to be this peer is refused. Otherwise the newcomer may take the peer's place.
  ///
  /// The default takes a link that has not failed for one whose peer lives: such a peer's place becomes free when the
  /// link has failed.
  virtual void probe(std::function<void()> answered) { answered(); }  // NOLINT(performance-unnecessary-value-param)

  /// Calls `done` when nothing can land here any more of what the peer had started on this link: the peer has said that its
  /// writes have ended, or the link has been shut. Exactly once, from any thread, possibly within the call, perhaps with
  /// locks of the link's held.
  /// @return false if the link can't ask: then nothing is called, and who wants to be sure shuts the link.
  [[nodiscard]] virtual bool fence(std::function<void()> done) {  // NOLINT(performance-unnecessary-value-param)
    (void)done;
    return false;
  }

  /// @name Regions that come and go: for transports with `Capabilities::region_changes`
  /// @{

  /// The channel has regions that the peer hasn't been told of (`LinkHost::local_regions`, and `told_regions` before the
  /// first call): tells it, on each connection of the link, ahead of what is started here later. May be called when
  /// there are none.
  virtual void region_added() {}
  /// The channel has taken a region back; `LinkHost::local_regions` doesn't have it any more. Tells the peer, and calls
  /// `done` when nothing of the peer's can touch the region over this link: new accesses are answered with
  /// `errc::region_gone`, those that had begun are over, and the peer has confirmed it; or the link has been shut. Exactly
  /// once, from any thread, possibly within the call, perhaps with locks of the link's held. A link that throws, or lets
  /// `done` go without having called it - memory is used up -, is shut.
  /// @return false if the link can't ask: then nothing is called, and who wants to be sure shuts the link.
  // NOLINTNEXTLINE(performance-unnecessary-value-param)
  [[nodiscard]] virtual bool region_removed(std::uint32_t number, std::function<void()> done) {
    (void)number;
    (void)done;
    return false;
  }
  /// Calls `done` when all has come that the peer had said of its regions before it was asked: `LinkHost` has been told
  /// then. Never calls it when the link fails. What it calls may take locks, and doesn't call the link. The default
  /// suits links whose peer answers a probe itself, behind the news of regions.
  virtual void ask_regions(std::function<void()> done) { probe(std::move(done)); }
  /// @}

  /// @name For a thread that would rather move the link's bytes than sleep while it waits
  /// @{

  /// Whether such an operation is over when `start` returns, as long as nobody else has the link do something: then the thread
  /// that waits for it is of no use to the link, and `begin_serving` isn't called. A wrong answer costs time alone.
  /// @param request as the caller gave it: nothing of it has been checked yet.
  [[nodiscard]] virtual bool ends_at_once(const TransferRequest& request) const noexcept {
    (void)request;
    return false;
  }
  /// The calling thread is about to start an operation here and to wait for it. From here until `end_serving` the link may
  /// leave to it what it would otherwise have another thread do.
  /// @return false if the link has no use for it; then the thread just sleeps until the operation ends.
  [[nodiscard]] virtual bool begin_serving() { return false; }
  /// Moves the link's bytes until `wait.over()`, or less; must return soon after that. May throw `std::system_error`, which
  /// counts as returning early.
  virtual void serve(BlockingWait& wait) { (void)wait; }
  /// Somebody else has to see to the link now. To be called once for each `begin_serving` that returned true, by the same
  /// thread.
  virtual void end_serving() {}
  /// @}

  /// `host:port` of the peer's end, as this side sees it: with the zone of an IPv6 address that needs one. Empty if the
  /// transport knows no such thing.
  [[nodiscard]] virtual std::string remote_address() const { return {}; }
  /// File descriptors that the link holds, as long as it has not been shut: links of peers that came by themselves are
  /// bounded by them as well (docs/security.md). Constant.
  [[nodiscard]] virtual std::size_t descriptors() const noexcept { return 0; }
  /// Whether one of this side's operations is under way on it, or either side has started one since the last call. Asked
  /// when there are too many links of peers that came by themselves: one that was never used, or not for long, gives way to
  /// a newer one. With the default none does, and newer ones are refused.
  [[nodiscard]] virtual bool take_used() noexcept { return true; }
  /// How the bytes travel, for people.
  [[nodiscard]] virtual std::string path() const = 0;

  /// What people should know besides of this path: why no other was taken. To be set, if at all, before the link is handed
  /// over.
  void set_remark(std::string remark) { remark_ = std::move(remark); }
  /// The path and the remark.
  [[nodiscard]] std::string path_with_remark() const { return remark_.empty() ? path() : path() + "; " + remark_; }

 private:
  std::string remark_;
};

/// The channel, as its links see it. Stays valid after the channel is closed; calls then do nothing.
class KVFERRY_EXPORT LinkHost {
 public:
  virtual ~LinkHost() = default;

  [[nodiscard]] virtual const PeerDescription& peer() const noexcept = 0;
  /// The channel's regions at this moment; never null. Two things allow a link to touch their memory: the link has not
  /// been shut, and the access began before `Link::region_removed`, with a list that wasn't outdated.
  [[nodiscard]] virtual std::shared_ptr<const RegionList> local_regions() const = 0;
  /// The regions that the peer knows from the handshake.
  [[nodiscard]] virtual std::shared_ptr<const RegionList> told_regions() const { return local_regions(); }
  /// The peer offers one more region. What has been heard before, on another connection of the link, changes nothing.
  /// @return false if the peer has more than it may: it breaks the protocol.
  [[nodiscard]] virtual bool peer_region_added(const RemoteRegion& region) {
    (void)region;
    return true;
  }
  /// The peer has taken a region back. Likewise.
  virtual void peer_region_removed(std::uint32_t number) { (void)number; }
  /// Hands a notification to the channel's user. @param key as in `TransferRequest::notification_key`. @return false if the
  /// queue is full.
  [[nodiscard]] virtual bool deliver_notification(std::vector<std::byte> payload, std::uint64_t key) = 0;
  /// The peer is about to take up `bytes` more of this process's memory, with what it posts and nothing here has met yet.
  /// Whoever takes any gives it back. Thread-safe.
  /// @return false if that is more than the peer, or all peers of the channel together, may take up; then nothing is taken.
  [[nodiscard]] virtual bool take_memory(std::size_t bytes) {
    (void)bytes;
    return true;
  }
  virtual void give_back_memory(std::size_t bytes) noexcept { (void)bytes; }
  /// So many objects have landed here with other bytes than their checksums say. Thread-safe.
  virtual void checksums_differed(std::size_t objects) noexcept { (void)objects; }
  /// Has `drop` called once if what is being dialed or accepted for this host is no longer wanted, because a newer attempt
  /// has taken its place, say, or nobody wants the peer any more; at once if that has happened already. `drop` frees what
  /// waits for the peer; it may be called with locks of the channel held and must not call into it. Afterwards the
  /// `LinkHandler` needn't be called any more.
  // NOLINTNEXTLINE(performance-unnecessary-value-param)
  virtual void when_abandoned(std::function<void()> drop) { (void)drop; }
  /// Makes `close()` wait as long as the result is held. Hold it while you call a transport to go on with an attempt,
  /// and not while the attempt waits for the network. @return null if the channel is closed: don't call a transport
  /// then.
  [[nodiscard]] virtual std::shared_ptr<void> stay() { return {std::shared_ptr<void>(), this}; }
  /// Calls `done` when the writes to this peer that this channel had started by now have ended, wherever they are: on
  /// this link, on their way to it, or waiting for one. What a peer's fence waits for. `done` may be called within the
  /// call, from any thread, with locks of the channel's held.
  virtual void when_writes_ended(std::function<void()> done) { done(); }  // NOLINT(performance-unnecessary-value-param)
  /// The connection broke by itself: the peer counts as failed, and the next call reconnects.
  virtual void link_failed(const Link& link, std::error_code cause) = 0;
};

/// Gets a link once it is usable in both directions, or an error and a sentence that names the peer. Called exactly
/// once, from any thread, possibly inside the call that it was given to.
using LinkHandler = std::function<void(std::error_code, std::shared_ptr<Link>, std::string diagnostic)>;

/// One attempt of this side to connect, from before the handshake until the `LinkHandler` that `connect` got is gone.
/// Its destructor must not call into the channel.
class KVFERRY_EXPORT Dial {
 public:
  virtual ~Dial() = default;
  /// This side's endpoint, for the handshake's request; may be empty. May throw `TransferError`: then there is no
  /// handshake.
  [[nodiscard]] virtual Bytes local_endpoint() = 0;
  /// Connects to the endpoint in the handshake's answer. Must not block.
  virtual void connect(std::shared_ptr<LinkHost> host, const Bytes& remote_endpoint, Clock::time_point deadline,
                       LinkHandler on_link) = 0;
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_LINK_HPP
