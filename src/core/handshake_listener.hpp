// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <string>

#include "handshake_mailbox.hpp"
#include "handshake_sockets.hpp"

namespace kvferry::kit {

/// Serves requests on a ROUTER. Constructed by the service's user, then used by the service's thread alone.
class HandshakeListener {
 public:
  HandshakeListener(const SharedContext& context, const HandshakeService::Options& options,
                    HandshakeService::RequestHandler on_request, std::weak_ptr<HandshakeMailbox> mailbox);
  HandshakeListener(const HandshakeListener&) = delete;
  HandshakeListener& operator=(const HandshakeListener&) = delete;
  /// Returns once others can listen at the port.
  ~HandshakeListener();

  [[nodiscard]] const std::string& bound_url() const noexcept { return bound_url_; }
  [[nodiscard]] zmq_pollitem_t poll_item() const noexcept { return {socket_.ref().handle(), 0, ZMQ_POLLIN, 0}; }

  /// Takes some of the requests that have arrived, not all, so that a flood of them leaves time for the questions.
  void serve();
  void reply(const ReplyCommand& command) const;

 private:
  bool serve_one();
  void hand_over(const std::shared_ptr<ServedRequest>& request, SideMessage message);
  void refuse(const std::shared_ptr<ServedRequest>& request, std::error_code ec, const std::string& text) const;

  const std::size_t max_message_bytes_;
  HandshakeSocket socket_;
  HandshakeMonitor monitor_;
  std::string bound_url_;
  HandshakeService::RequestHandler on_request_;
  std::weak_ptr<HandshakeMailbox> mailbox_;
};

}  // namespace kvferry::kit
