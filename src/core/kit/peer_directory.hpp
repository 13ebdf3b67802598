// SPDX-License-Identifier: Apache-2.0
#pragma once

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
/// A peer has at most one attempt at a time: its own dial or the acceptance of the peer's. When two peers dial each other at
/// once, the side with the smaller incarnation wins: it answers the other's request with "yield", and the other waits for the
/// winner's request. Results of an attempt that another one has superseded are dropped, links included.
class PeerDirectory : public std::enable_shared_from_this<PeerDirectory> {
 public:
  /// Told once, when the peer is usable or can't be made so.
  using Waiter = std::function<void(const Failure&)>;

  PeerDirectory(const ChannelOptions& options, std::uint64_t incarnation, TransportHooks hooks,
                std::shared_ptr<DeadlineQueue> deadlines, std::shared_ptr<NotificationQueue> notifications);
  PeerDirectory(const PeerDirectory&) = delete;
  PeerDirectory& operator=(const PeerDirectory&) = delete;
  ~PeerDirectory();

  /// The service that carries questions; its request handler calls `answer`.
  void use(HandshakeService& service, std::string own_init_url);

  /// Calls `waiter` - within the call if the peer is usable already - and connects if need be.
  void connect(const std::string& local_id, const std::string& peer_id, const std::string& url,
               Clock::time_point deadline, Waiter waiter);
  /// Accepts that the peer may be a new incarnation.
  void acknowledge(const std::string& peer_id);

  /// Hands an operation to its peer's link, reconnecting if need be, or ends it.
  void route(const std::shared_ptr<Operation>& operation);

  /// Answers a peer's `InitQuestion`. On the service's thread.
  void answer(const SideMessage& request, HandshakeService::Reply reply);

  [[nodiscard]] std::optional<PeerInfo> info(std::string_view peer_id) const;

  /// Shuts all links with `errc::closed`; later links are shut at once.
  void close();

 private:
  struct Peer;
  struct Attempt;
  class Host;

  using Lock = std::unique_lock<std::mutex>;

  struct WaitingFor {
    Clock::time_point deadline;
    Waiter tell;
  };

  void start_dial(Peer& peer, Lock& lock);
  void dial_answered(const std::string& peer_id, std::uint64_t attempt, Failure failure, const SideMessage& answer);
  [[nodiscard]] std::uint64_t begin_attempt(Peer& peer, Clock::time_point deadline);
  void fail_attempt(const std::string& peer_id, std::uint64_t attempt, Failure failure);
  void publish(const std::string& peer_id, std::uint64_t attempt, const std::shared_ptr<Host>& host,
               std::shared_ptr<Link> link);
  void link_failed(const std::string& peer_id, const Link& link, std::error_code cause);
  [[nodiscard]] LinkHandler link_handler(std::string peer_id, std::uint64_t attempt, std::shared_ptr<Host> host);
  [[nodiscard]] Peer* current(const std::string& peer_id, std::uint64_t attempt);

  const ChannelOptions& options_;
  const std::uint64_t incarnation_;
  const TransportHooks hooks_;
  const std::shared_ptr<DeadlineQueue> deadlines_;
  const std::shared_ptr<NotificationQueue> notifications_;
  HandshakeService* service_ = nullptr;
  std::string own_init_url_;

  mutable std::mutex mutex_;
  std::map<std::string, Peer, std::less<>> peers_;
  bool closed_ = false;
};

}  // namespace kvferry::kit
