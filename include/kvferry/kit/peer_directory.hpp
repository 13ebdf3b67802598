// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_PEER_DIRECTORY_HPP
#define KVFERRY_KIT_PEER_DIRECTORY_HPP

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <kvferry/base_transfer_channel.hpp>
#include <kvferry/channel_options.hpp>
#include <kvferry/kit/handshake_service.hpp>
#include <kvferry/kit/link.hpp>
#include <kvferry/kit/logger.hpp>
#include <kvferry/kit/refusals.hpp>

#include <kvferry/kit/attempt_slots.hpp>
#include <kvferry/kit/failure.hpp>
#include <kvferry/kit/init_messages.hpp>
#include <kvferry/kit/notification_queue.hpp>
#include <kvferry/kit/operation_registry.hpp>
#include <kvferry/kit/peer_counters.hpp>
#include <kvferry/kit/peer_events.hpp>
#include <kvferry/kit/posted_memory.hpp>
#include <kvferry/kit/region_table.hpp>
#include <kvferry/kit/stranger_links.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

class Serving;

/// The transport's functions that the directory calls.
struct TransportHooks {
  std::string name;
  bool region_changes = false;  ///< As `Capabilities::region_changes`.
  std::function<std::unique_ptr<Dial>(const std::string& peer_id)> dial;
  std::function<Bytes(std::shared_ptr<LinkHost>, const Bytes&, Clock::time_point, LinkHandler)> accept;
  std::function<bool(const std::string& source, std::size_t bytes, std::function<void()> answer)> run_accept;
};

/// The peers of a channel: their identities, the link to each, and the handshakes for these links.
///
/// A peer has one attempt: this side's dial, or the acceptance of the peer's where this side doesn't dial. When two peers
/// dial each other at once, the side with the smaller incarnation wins: it answers the other's request with "yield", once an
/// attempt, and the other waits a little for the winner's request before it asks again. Results of an attempt that
/// another one has superseded are dropped, links included.
///
/// If a peer asks while this side dials, its attempt is a candidate beside the dial, because the question may be old.
/// So is the attempt of a channel that claims to be a known peer without proving that it was connected before. A
/// candidate changes nothing of the peer until its link is there, and until the peer's own link, if any, is gone or has
/// left a probe unanswered for a second (peer_takeover-inl.hpp).
class PeerDirectory : public std::enable_shared_from_this<PeerDirectory> {
 public:
  /// A caller that waits for a peer to become usable.
  struct Waiter {
    Clock::time_point deadline;
    /// Called once, when the peer is usable or can't be made usable.
    std::function<void(const Failure&)> tell;
    /// Whether the wait has ended by itself, so that `tell` needn't be called.
    std::function<bool()> over;
  };

  PeerDirectory(const ChannelOptions& options, std::shared_ptr<RegionTable> regions, std::uint64_t incarnation,
                TransportHooks hooks, std::shared_ptr<DeadlineQueue> deadlines,
                std::shared_ptr<NotificationQueue> notifications, std::shared_ptr<PeerEvents> events,
                std::shared_ptr<OperationRegistry> operations, std::shared_ptr<Logger> logger);
  PeerDirectory(const PeerDirectory&) = delete;
  PeerDirectory& operator=(const PeerDirectory&) = delete;
  ~PeerDirectory();

  /// The service that carries questions; its request handler calls `answer`.
  void use(HandshakeService& service, std::string own_init_url);

  /// Connects if necessary and tells the waiter; within the call if the peer is usable already at this url. If the peer
  /// is usable at another url, asks at the new one, and connects there unless the same incarnation answers.
  /// @param incarnation 0: any. Otherwise the directory asks at the url first, unless this incarnation is connected,
  ///   and tells the waiter `errc::peer_restarted` if another one answers.
  void connect(const std::string& local_id, const std::string& peer_id, const std::string& url,
               std::uint64_t incarnation, Waiter waiter);
  /// Accepts that the peer may be a new incarnation: operations from now on are meant for it.
  void acknowledge(const std::string& peer_id);
  /// As above, if it is this incarnation, and connected.
  /// @param info gets the peer as it is then. @return why it isn't.
  [[nodiscard]] Failure acknowledge(const std::string& peer_id, std::uint64_t incarnation, PeerInfo& info);

  /// Hands an operation to its peer's link, reconnecting if need be, or ends it.
  /// @param serving the thread that is going to wait for it, if it may serve the link; else null.
  void route(const std::shared_ptr<Operation>& operation, Serving* serving = nullptr);

  /// Answers a peer's `InitQuestion`. On the service's thread.
  void answer(const SideMessage& message, HandshakeService::Reply reply);

  [[nodiscard]] std::optional<PeerInfo> info(std::string_view peer_id) const;
  /// Of all that are connected.
  [[nodiscard]] std::vector<PeerInfo> infos() const;
  /// Null if there is none.
  [[nodiscard]] std::shared_ptr<Link> link(std::string_view peer_id) const;
  /// `url` with the address that answered there when the peer was connected to, instead of a name that may have several.
  [[nodiscard]] std::string reached_url(std::string_view peer_id, const std::string& url) const;
  /// Describes the event for which the peer's connection still waits, or waited until a moment ago; else empty.
  [[nodiscard]] std::string awaited(std::string_view peer_id);
  /// Somebody doesn't wait any longer for a peer's connection: a dial for which nobody waits ends.
  void stopped_waiting(std::string_view peer_id) noexcept;
  [[nodiscard]] bool usable(std::string_view peer_id) const;
  [[nodiscard]] std::size_t usable_count() const;
  /// How often another channel had, or claimed, the id of one that lives.
  [[nodiscard]] std::uint64_t identity_conflicts() const noexcept { return identity_conflicts_; }
  /// How often another incarnation took a known peer's place: it restarted, or moved.
  [[nodiscard]] std::uint64_t peer_replacements() const noexcept { return peer_replacements_; }

  /// Gets the peer's link, which must be fenced as well; null if there is none. Or an error: the channel is closed.
  using FenceHandler = std::function<void(std::error_code, const std::shared_ptr<Link>&)>;
  /// Calls `then` when nothing lands any more that the peer has started by now and that has not reached its link in
  /// use: within the call, or when the connections that are being made have been made or given up, by `deadline` at the
  /// latest; by the middle of the time until then if there is a link that needs the rest of it for its answer.
  /// @param answered set when the link has answered.
  void fence(const std::string& peer_id, Clock::time_point deadline, FenceHandler then,
             std::shared_ptr<const std::atomic<bool>> answered = nullptr);
  /// Takes leave of a peer: its operations and attempts to connect are cancelled, its links shut.
  /// @param then called once, within the call or on a thread of the channel's, when that is done.
  void disconnect(const std::string& peer_id, std::function<void(std::error_code)> then);
  /// All links that have been handed over and not ended, whether or not they are a peer's link in use, each with its
  /// peer's id; nothing if the directory is closed.
  [[nodiscard]] std::optional<std::vector<std::pair<std::string, std::shared_ptr<Link>>>> all_links() const;
  /// Has all links tell their peers of regions that have been added.
  void tell_of_regions() noexcept;
  /// Shuts a link as if it had failed by itself.
  void break_link(const std::string& peer_id, Link& link, std::error_code cause, std::string_view why);
  [[nodiscard]] HandshakeStats handshakes() const;
  [[nodiscard]] std::vector<PeerStats> peers() const;

  /// Shuts all links with `errc::closed`, whether or not they are still in the table, and waits for what other threads
  /// are doing here. Afterwards neither the transport's hooks nor the service are used.
  void close();

 private:
  struct Peer;
  struct Attempt;
  /// An operation that waits for a word of the peer's regions, and with the answer to which question it has it.
  struct RegionAsker {
    std::shared_ptr<Operation> operation;
    std::uint64_t question = 0;
  };
  struct Instance;
  struct Expiry;
  class Host;
  class Visit;
  class Stay;

  using Lock = std::unique_lock<std::mutex>;

  // The table (peer_directory-inl.hpp)
  void wait(Peer& peer, Waiter waiter, Lock& lock);
  /// @param named by this channel's user: such peers and strangers are counted apart, and neither displace the others.
  [[nodiscard]] Peer* find_or_add(const std::string& peer_id, bool named);
  /// With the lock held, which it releases before it tells anybody.
  void connect(const std::string& local_id, const std::string& peer_id, const std::string& url,
               std::uint64_t incarnation, Waiter waiter, Lock& lock);
  /// @return who is told `waiter`'s success only when the peer is at this url.
  [[nodiscard]] Waiter arriving_at(const std::string& local_id, const std::string& peer_id, const std::string& url,
                                   Waiter waiter);
  void arrive(const std::string& local_id, const std::string& peer_id, const std::string& url, Waiter waiter);
  /// @return none if the peer isn't connected, has connected by itself, or knows this channel by this id.
  [[nodiscard]] static Failure why_known_otherwise(const Peer& peer, const std::string& local_id);
  [[nodiscard]] std::vector<std::shared_ptr<Link>> links_but(const std::shared_ptr<Link>& kept,
                                                             const std::string& peer_id) const;

  // The way of operations to a link (peer_routes-inl.hpp)
  /// How an operation comes to be routed.
  enum class Routed {
    anew,
    has_waited,  ///< For a connection.
    has_asked,   ///< The peer, for its regions.
  };
  void route(const std::shared_ptr<Operation>& operation, Routed how, Serving* serving = nullptr);
  void hand_over(const std::string& peer_id, const Link* link);
  void link_failed(const std::string& peer_id, const Link& link, std::error_code cause) noexcept;

  // Facts (peer_facts-inl.hpp)
  /// With the lock held: of one that has a link. All but the path, which only the link knows.
  [[nodiscard]] static PeerInfo describe(const Peer& peer);
  /// @param number of the attempt; nothing: the one for which calls wait.
  [[nodiscard]] std::string awaited(std::string_view peer_id, std::optional<std::uint64_t> number);

  // Peers' regions (peer_regions-inl.hpp)
  [[nodiscard]] bool region_added(const std::string& peer_id, const Host& host, const RemoteRegion& region);
  void region_removed(const std::string& peer_id, const Host& host, std::uint32_t number);
  enum class News { old, heard_of, too_many };
  /// @param change makes a copy of the peer's description what it is to be; may be called several times.
  /// @return false if there are too many.
  template <class Change>
  [[nodiscard]] bool change_regions(const std::string& peer_id, const Host& host, Change change);
  void ask_for_regions(const std::shared_ptr<Operation>& operation, const std::shared_ptr<Link>& link);
  void ask_for_regions(const std::string& peer_id, const std::shared_ptr<Link>& link, std::uint64_t question);
  /// With the lock held. @return its number.
  [[nodiscard]] static std::uint64_t begin_region_question(Peer& peer);
  void regions_known(const std::string& peer_id, const std::weak_ptr<Link>& asked, std::uint64_t question);
  /// With the lock held. @return operations that waited to hear of the peer's regions; to be routed again.
  [[nodiscard]] static std::vector<RegionAsker> take_askers(Peer& peer) noexcept;
  /// On a thread of the channel's, without locks.
  void route_later(std::vector<RegionAsker> askers, Routed how);

  // Attempts to connect (peer_attempts-inl.hpp)
  void start_dial(Peer& peer, Lock& lock);
  void start_dial(Peer& peer, const std::string& local_id, const std::string& url, Lock& lock);
  /// Of the attempt that a new one takes the place of.
  struct Continued;
  void start_dial(Peer& peer, const std::string& local_id, const std::string& url, Lock& lock,
                  const Continued& continued);
  void ask(const std::string& peer_id, std::uint64_t attempt, const std::string& url, const SideMessage& question,
           Clock::time_point deadline);
  void ask_again(const std::string& peer_id, std::uint64_t attempt);

  // Asking at a url (peer_greeting-inl.hpp)
  /// @param wanted whether anybody still wants to know, when the greeting has been answered; called without the lock. If not,
  ///   nothing is asked, and the answer is `errc::cancelled`.
  void ask_there(const std::string& peer_id, const std::string& url, const SideMessage& question,
                 Clock::time_point deadline, std::function<bool()> wanted, HandshakeService::AnswerHandler on_answer);
  void remember_kvferry(const std::string& url);
  void greeted(const std::string& peer_id, const std::string& url, const SideMessage& question,
               Clock::time_point deadline, HandshakeService::AnswerHandler on_answer, Failure failure,
               const SideMessage& answer, const std::string& reached_address);

  void dial_beside_later(Peer& peer);
  void dial_beside(const std::string& peer_id, std::uint64_t attempt);
  /// When the other side has had a while.
  void call_later(Clock::duration pause, void (PeerDirectory::*what)(const std::string& peer_id, std::uint64_t attempt),
                  const std::string& peer_id, std::uint64_t attempt);
  /// Ends the attempt, or has it made anew.
  void dial_failed(const std::string& peer_id, std::uint64_t attempt, const Failure& failure, bool was_cut_off);
  void dial_anew(const std::string& peer_id, std::uint64_t attempt);
  [[nodiscard]] static std::string awaited_of_one_let_go(const Attempt& attempt);
  void dial_answered(const std::string& peer_id, std::uint64_t attempt, Failure failure, const SideMessage& message,
                     const std::string& reached_address);
  void begin_attempt(const Peer& peer, Attempt& attempt, Clock::time_point deadline);
  void set_deadline(Attempt& attempt, Clock::time_point deadline);
  void end_attempt(Attempt& attempt);
  void end_attempts(Peer& peer);
  void fail_attempt(const std::string& peer_id, std::uint64_t number, const Failure& failure);
  static void tell(const std::vector<Waiter>& told, const Failure& failure) noexcept;
  std::optional<bool> drop_attempt(const std::string& peer_id, std::uint64_t number, const Failure& failure,
                                   std::string awaited, std::vector<Waiter>& told);
  void publish(const std::string& peer_id, std::uint64_t number, const std::shared_ptr<Host>& host,
               std::shared_ptr<Link> link);
  [[nodiscard]] LinkHandler link_handler(std::string peer_id, std::uint64_t attempt, std::shared_ptr<Host> host,
                                         std::shared_ptr<Dial> dial);
  [[nodiscard]] Peer* current(const std::string& peer_id, std::uint64_t attempt);
  [[nodiscard]] bool is_current(const std::string& peer_id, std::uint64_t attempt);
  [[nodiscard]] InitQuestion question_to(const Peer& peer, const std::string& local_id, const std::string& url,
                                         const RegionList& regions) const;
  [[nodiscard]] InitAnswer read_answer(const std::string& peer_id, const SideMessage& message, Failure& failure) const;
  [[nodiscard]] InitAnswer describe_self(const RegionList& regions) const;
  [[nodiscard]] Bytes own_secret(const Peer& peer, const std::string& url) const;
  /// @param key of who asks; empty without keys.
  [[nodiscard]] Failure check(const InitQuestion& question, const std::string& key) const;
  void accept(Peer& peer, const InitQuestion& question, HandshakeService::Reply reply, Lock& lock);
  void make_room_for_candidate(Peer& peer);
  [[nodiscard]] Attempt& place_for(Peer& peer, const InitQuestion& question, bool known);
  [[nodiscard]] static bool is_outdated(const Peer& peer, const InitQuestion& question);
  void refuse(HandshakeService::Reply& reply, const std::string& peer_id, const Failure& cause);

  // Room for the links of strangers (stranger_links-inl.hpp)
  using Displaced = std::vector<std::pair<std::string, std::shared_ptr<Link>>>;
  [[nodiscard]] const std::string* idle_link(const StrangerLinks::Ids& ids);
  [[nodiscard]] bool may_link(const std::string& source);
  [[nodiscard]] bool enter_stranger(const Peer& peer, const std::string& source, const Link& link, Displaced& displaced);
  void break_links(const Displaced& displaced);

  // Fences (peer_fences-inl.hpp)
  /// Microseconds, as peers are told; nothing if there was none.
  [[nodiscard]] static std::optional<std::uint64_t> time_since_fence(const Peer& peer);
  /// The same for the peer that asks. One that has answered the fence has nothing left from before it.
  [[nodiscard]] static std::optional<std::uint64_t> time_since_fence(const Peer& peer, const InitQuestion& question,
                                                                     bool known);
  /// An operation started here until then counts as started before the peer's fence.
  [[nodiscard]] static Clock::time_point fenced_until(std::optional<std::uint64_t> time_since);
  [[nodiscard]] bool wait_for_attempts(Peer& peer, Clock::time_point deadline, FenceHandler& then);
  void go_on_fencing(const std::string& peer_id, std::uint64_t number);
  [[nodiscard]] std::shared_ptr<Expirable> give_up_later(const std::string& peer_id, std::uint64_t number,
                                                         Clock::time_point deadline);
  void give_up_attempts(const std::string& peer_id, std::uint64_t number, Clock::time_point deadline);
  /// @param spared besides the one in use, which is returned.
  [[nodiscard]] std::shared_ptr<Link> shut_old_links(const std::string& peer_id,
                                                     const std::vector<std::shared_ptr<Link>>& spared = {});

  // Disconnecting (peer_disconnect-inl.hpp)
  struct Leave {
    std::string peer_id;
    std::shared_ptr<Link> link;  ///< Null: it had none.
    std::function<void(std::error_code)> then;
  };
  void go_on_leaving(std::uint64_t number);
  /// @param least_rest a dial that has no more time than this ends by itself.
  void end_dial_for_nobody(std::string_view peer_id, Clock::duration least_rest);

  // Identities (peer_takeover-inl.hpp)
  void take(InitQuestion question, HandshakeService::Reply reply);
  void refuse_conflict(std::uint64_t taken_by, const InitQuestion& question, HandshakeService::Reply& reply);
  void start_probe(Peer& peer, Lock& lock);
  void probe_answered(const std::string& peer_id, std::uint64_t probe);
  void probe_unanswered(const std::string& peer_id, std::uint64_t probe);
  void end_probe(Peer& peer);
  void let_newcomers_in(Peer& peer);
  void take_newcomers(const std::string& peer_id);
  [[nodiscard]] bool ask_as_known(const std::string& peer_id, std::uint64_t attempt, const std::string& reached_address);
  void ask_who(Peer& peer, const std::string& local_id, const std::string& url, std::uint64_t incarnation,
               Waiter waiter, Lock& lock);
  void moved_peer_judged(const std::string& local_id, const std::string& peer_id, const std::string& url,
                         std::uint64_t number, const std::shared_ptr<Link>& asked_on, bool lives);
  void move_to(Peer& peer, const std::string& local_id, const std::string& url, const Waiter& waiter, Lock& lock);
  void who_answered(const std::string& local_id, const std::string& peer_id, const std::string& url,
                    std::uint64_t incarnation, std::uint64_t number, Failure failure, const SideMessage& message);

  const ChannelOptions& options_;
  const std::shared_ptr<RegionTable> regions_;
  const std::uint64_t incarnation_;
  const TransportHooks hooks_;
  const std::shared_ptr<DeadlineQueue> deadlines_;
  const std::shared_ptr<NotificationQueue> notifications_;
  const std::shared_ptr<PeerEvents> events_;
  const std::shared_ptr<OperationRegistry> operations_;
  const std::shared_ptr<PostedMemory> posted_;
  const std::shared_ptr<Logger> logger_;
  AttemptSlots slots_;
  StrangerLinks stranger_links_;
  std::atomic<std::uint64_t> identity_conflicts_{0};
  std::atomic<std::uint64_t> peer_replacements_{0};
  std::atomic<std::uint64_t> dialed_{0};
  std::atomic<std::uint64_t> accepted_{0};
  std::atomic<std::uint64_t> reconnected_{0};
  CauseCounter failed_dials_;
  CauseCounter refused_;
  HandshakeService* service_ = nullptr;
  std::string own_init_url_;

  mutable std::mutex mutex_;
  std::map<std::string, Peer, std::less<>> peers_;
  /// Of attempts and probes. No number is used twice, so late answers aren't taken for current ones.
  std::uint64_t last_number_ = 0;
  struct Published {
    std::string peer_id;
    std::weak_ptr<Link> link;
  };
  std::vector<Published> links_;            ///< All links that there ever were, as far as something is left of them.
  std::map<std::uint64_t, FenceHandler> fences_;  ///< Those that wait for connections that are being made.
  std::map<std::uint64_t, Leave> leaves_;         ///< Disconnects under way.
  std::set<std::string> kvferry_urls_;            ///< Where a kvferry channel has answered.
  Clock::time_point fenced_forgotten_at_ =
      Clock::time_point::min();  ///< The last fence of a peer that is not known any more.
  std::size_t visits_ = 0;
  std::condition_variable no_visits_;
  bool closed_ = false;
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_PEER_DIRECTORY_HPP
