// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include <zmq.hpp>

#include <kvferry/handshake/handshake_sockets.hpp>
#include <kvferry/keyring.hpp>
#include <kvferry/kit/refusals.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// Has a socket show its peers the keyring's own key, and take none but those who have one that `KeyCheck` takes. For
/// connections that are made afterwards. @throws zmq::error_t
void secure_server(zmq::socket_ref socket, const Keyring& keyring);
/// Has a socket connect as the keyring's owner, and to nobody but who has `server_key`. @throws zmq::error_t
void secure_client(zmq::socket_ref socket, const Keyring& keyring, const std::string& server_key);

/// Decides whose connections ZeroMQ takes, for all sockets of a context (ZAP, https://rfc.zeromq.org/spec/27): those of peers
/// with a key of the keyring. The property `key_property` of a message tells the sender's key. A context has one check at most.
/// Not thread-safe.
class KeyCheck {
 public:
  static constexpr const char* key_property = "User-Id";

  /// @param refusals may be null. @throws zmq::error_t
  KeyCheck(const SharedContext& context, std::shared_ptr<const Keyring> keyring, std::shared_ptr<Refusals> refusals);

  [[nodiscard]] zmq::socket_ref ref() const noexcept { return socket_.ref(); }
  /// Answers the questions that have come. Throws nothing: who isn't answered isn't let in.
  void serve();
  /// The key that a message came with; empty if with none.
  [[nodiscard]] static std::string key_of(const zmq::message_t& frame);

 private:
  [[nodiscard]] bool serve_one();

  HandshakeSocket socket_;
  const std::shared_ptr<const Keyring> keyring_;
  const std::shared_ptr<Refusals> refusals_;
};

}  // namespace kvferry::kit
