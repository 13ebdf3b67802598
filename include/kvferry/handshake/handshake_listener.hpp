// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <memory>
#include <optional>
#include <string>

#include <kvferry/handshake/handshake_gate.hpp>
#include <kvferry/handshake/handshake_mailbox.hpp>
#include <kvferry/handshake/handshake_sockets.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// Serves requests on a ROUTER. Constructed by the service's user, then used by the service's thread alone.
class HandshakeListener {
 public:
  HandshakeListener(const SharedContext& context, const HandshakeService::Options& options,
                    HandshakeService::RequestHandler on_request, std::weak_ptr<HandshakeMailbox> mailbox);
  HandshakeListener(const HandshakeListener&) = delete;
  HandshakeListener& operator=(const HandshakeListener&) = delete;
  /// Others can listen at the port afterwards.
  ~HandshakeListener() = default;

  [[nodiscard]] const std::string& bound_url() const noexcept { return bound_url_; }
  /// To be waited for.
  [[nodiscard]] std::array<zmq_pollitem_t, 2> poll_items() const noexcept {
    return {{{socket_.ref().handle(), 0, ZMQ_POLLIN, 0}, {nullptr, gate_.event_fd(), ZMQ_POLLIN, 0}}};
  }
  [[nodiscard]] std::optional<HandshakeGate::Clock::time_point> next_deadline() const { return gate_.next_deadline(); }

  /// Takes some of the connections and requests that have arrived, not all, so that a flood of them leaves time for the
  /// questions, and none once the service was closed.
  void serve();
  /// Ends what has had its time.
  void expire(HandshakeGate::Clock::time_point now) {
    gate_.expire(now);
    // After `serve`, or where there was nothing to serve: no message is half-read.
    gate_.retire();
  }
  void reply(const ReplyCommand& command);

 private:
  bool serve_one();
  void use_own_key();
  void hand_over(const std::shared_ptr<ServedRequest>& request, SideMessage message);
  void refuse_stranger(const std::shared_ptr<ServedRequest>& request, std::error_code ec, const std::string& text);
  void refuse(const std::shared_ptr<ServedRequest>& request, std::error_code ec, const std::string& text);

  const std::size_t max_message_bytes_;
  const std::shared_ptr<const Keyring> keyring_;
  std::uint64_t key_revision_ = 0;  ///< Of the key that the socket has.
  HandshakeSocket socket_;
  HandshakeGate gate_;
  const std::shared_ptr<Refusals> refusals_;
  std::string bound_url_;
  HandshakeService::RequestHandler on_request_;
  std::weak_ptr<HandshakeMailbox> mailbox_;
};

}  // namespace kvferry::kit
