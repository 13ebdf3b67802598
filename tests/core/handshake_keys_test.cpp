// SPDX-License-Identifier: Apache-2.0
// Whose requests a listener with keys answers.
#include <gtest/gtest.h>
#include <zmq.hpp>

#include <memory>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/keyring.hpp>

#include "core/handshake_fixture.hpp"
#include "core/handshake_test_support.hpp"

namespace kvferry::inline KVFERRY_ABI::test {
namespace {

class HandshakeKeys : public HandshakeFixture {};

TEST_F(HandshakeKeys, AKeyThatIsTakenAwayIsNoGoodForAnOpenConnectionEither) {
  const KeyPair server_key = make_key_pair();
  const KeyPair client_key = make_key_pair();
  const auto keyring = std::make_shared<Keyring>(server_key, std::vector<PeerKey>{{"client", client_key.public_key}});
  auto options = listening();
  options.keyring = keyring;
  HandshakeService service(options, handler());
  PeerSocket client(context_, zmq::socket_type::req);
  client.set(zmq::sockopt::curve_publickey, client_key.public_key);
  client.set(zmq::sockopt::curve_secretkey, client_key.secret_key.text());
  client.set(zmq::sockopt::curve_serverkey, server_key.public_key);
  client.connect(service.bound_url());
  EXPECT_EQ(client.exchange(echo(1).encoded()), echo(1));

  keyring->replace_peers({});
  const SideMessage refusal = client.exchange(echo(2).encoded());
  ASSERT_TRUE(refusal.is<SideMessageError>()) << refusal.type();

  keyring->replace_peers({{"client", client_key.public_key}});
  EXPECT_EQ(client.exchange(echo(3).encoded()), echo(3));
}

}  // namespace
}  // namespace kvferry::test
