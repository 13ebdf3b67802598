// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <kvferry/base_transfer_channel.hpp>
#include <kvferry/channel_options.hpp>
#include <kvferry/kit/handshake_service.hpp>
#include <kvferry/kit/link.hpp>

#include "failure.hpp"
#include "init_messages.hpp"
#include "notification_queue.hpp"
#include "operation_registry.hpp"

namespace kvferry::kit {

/// What the directory needs of the channel's transport.
struct TransportHooks {
  std::string name;
  std::function<std::unique_ptr<Dial>(const std::string& peer_id)> dial;
  std::function<Bytes(std::shared_ptr<LinkHost>, const Bytes&, Clock::time_point, LinkHandler)> accept;
};

/// The peers of a channel: who they are, the link to each, and the handshakes that lead there.
///
/// A peer has at most one attempt at a time: its own dial or the acceptance of the peer's. When two peers dial each
/// other at once, the side with the smaller incarnation wins: it answers the other's request with "yield", once an
/// attempt, and the other waits a little for the winner's request before it asks again. Results of an attempt that
/// another one has superseded are dropped, links included.
class PeerDirectory : public std::enable_shared_from_this<PeerDirectory> {
 public:
  /// Somebody who waits for a peer to become usable.
  struct Waiter {
    Clock::time_point deadline;
    /// Told once, when the peer is usable or can't be made so.
    std::function<void(const Failure&)> tell;
    /// Whether it has ended by itself and needn't be told.
    std::function<bool()> over;
  };

  PeerDirectory(const ChannelOptions& options, std::uint64_t incarnation, TransportHooks hooks,
                std::shared_ptr<DeadlineQueue> deadlines, std::shared_ptr<NotificationQueue> notifications);
  PeerDirectory(const PeerDirectory&) = delete;
  PeerDirectory& operator=(const PeerDirectory&) = delete;
  ~PeerDirectory();

  /// The service that carries questions; its request handler calls `answer`.
  void use(HandshakeService& service, std::string own_init_url);

  /// Tells the waiter - within the call if the peer is usable already - and connects if need be.
  void connect(const std::string& local_id, const std::string& peer_id, const std::string& url, Waiter waiter);
  /// Accepts that the peer may be a new incarnation: operations from now on are meant for it.
  void acknowledge(const std::string& peer_id);

  /// Hands an operation to its peer's link, reconnecting if need be, or ends it.
  void route(const std::shared_ptr<Operation>& operation);

  /// Answers a peer's `InitQuestion`. On the service's thread.
  void answer(const SideMessage& request, HandshakeService::Reply reply);

  [[nodiscard]] std::optional<PeerInfo> info(std::string_view peer_id) const;
  /// Null if there is none.
  [[nodiscard]] std::shared_ptr<Link> link(std::string_view peer_id) const;
  /// `url` with the address that answered there when the peer was connected to, instead of a name that may have several.
  [[nodiscard]] std::string reached_url(std::string_view peer_id, const std::string& url) const;
  [[nodiscard]] bool usable(std::string_view peer_id) const;
  [[nodiscard]] std::size_t usable_count() const;

  /// Shuts all links with `errc::closed`, whether or not they are still in the table, and waits for what other threads
  /// are doing here. Afterwards neither the transport's hooks nor the service are used.
  void close();

 private:
  struct Peer;
  struct Expiry;
  class Host;
  class Visit;
  class Stay;

  using Lock = std::unique_lock<std::mutex>;

  // The table (peer_directory.cpp)
  void route(const std::shared_ptr<Operation>& operation, bool has_waited);
  void wait(Peer& peer, Waiter waiter, Lock& lock);
  [[nodiscard]] Peer* find_or_add(const std::string& peer_id);
  void hand_over(const std::string& peer_id, const Link* link);
  void link_failed(const std::string& peer_id, const Link& link, std::error_code cause);

  // Attempts to connect (peer_attempts.cpp)
  void start_dial(Peer& peer, Lock& lock);
  void ask(const std::string& peer_id, std::uint64_t attempt, const std::string& url, const SideMessage& question,
           Clock::time_point deadline);
  void ask_again(const std::string& peer_id, std::uint64_t attempt);
  void dial_answered(const std::string& peer_id, std::uint64_t attempt, Failure failure, const SideMessage& answer,
                     const std::string& reached_address);
  [[nodiscard]] std::uint64_t begin_attempt(Peer& peer, Clock::time_point deadline);
  void end_attempt(Peer& peer);
  void fail_attempt(const std::string& peer_id, std::uint64_t attempt, Failure failure);
  void publish(const std::string& peer_id, std::uint64_t attempt, const std::shared_ptr<Host>& host,
               std::shared_ptr<Link> link);
  [[nodiscard]] LinkHandler link_handler(std::string peer_id, std::uint64_t attempt, std::shared_ptr<Host> host,
                                         std::shared_ptr<Dial> dial);
  [[nodiscard]] Peer* current(const std::string& peer_id, std::uint64_t attempt);
  [[nodiscard]] Failure check(const InitQuestion& question) const;

  const ChannelOptions& options_;
  const std::uint64_t incarnation_;
  const TransportHooks hooks_;
  const std::shared_ptr<DeadlineQueue> deadlines_;
  const std::shared_ptr<NotificationQueue> notifications_;
  HandshakeService* service_ = nullptr;
  std::string own_init_url_;

  mutable std::mutex mutex_;
  std::map<std::string, Peer, std::less<>> peers_;
  std::vector<std::weak_ptr<Link>> links_;  ///< All that were published.
  std::uint64_t last_attempt_ = 0;          ///< Never used twice, so that nothing late is taken for something current.
  std::size_t visits_ = 0;
  std::condition_variable no_visits_;
  bool closed_ = false;
};

}  // namespace kvferry::kit
