// SPDX-License-Identifier: Apache-2.0
// Channels whose data connections are encrypted by certificates: who meets whom, and who is refused.
#include <gtest/gtest.h>

#include <cstddef>
#include <mutex>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/kit/handshake_service.hpp>
#include <kvferry/side_message_codec.hpp>

#include "certified.hpp"
#include "common/certificates.hpp"
#include "init_question.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

TEST_F(Certified, PagesMoveOverSeveralLanesAndTheirPathSaysSo) {
  for (const auto& key : kvferry::testing::keys_of_all_kinds()) {
    const Identity between = issue({.name = "between", .by = &ca_, .key = key, .ca = true});
    const Identity own = issue({.name = "a", .by = &between, .key = key});
    CertificateDirectory::put(a_files_.files().key, own.key_pem());
    CertificateDirectory::put(a_files_.files().chain, own.pem() + between.pem());
    for (const bool with_chain_dials : {true, false}) {
      TcpOptions a_options = with(with_chain_dials ? a_files_ : b_files_);
      TcpOptions b_options = with(with_chain_dials ? b_files_ : a_files_);
      a_options.lanes_per_peer = b_options.lanes_per_peer = 3;
      Node a(certified_pages, std::move(a_options), false);
      Node b(certified_pages, std::move(b_options));
      std::string diagnostic;
      ASSERT_FALSE(connect(a, b, &diagnostic)) << diagnostic;
      const std::string path = a.channel->peer_info("b")->path;
      EXPECT_TRUE(has(path, "3 lanes") && has(path, "TLS 1.3 ") && has(path, " with certificates")) << path;
      expect_pages_move(a, b);
      EXPECT_EQ(b.channel->batched_read(b.pages(certified_pages),
                                        {.peer_id = "a", .remote_indexes = indexes(certified_pages)}),
                certified_pages);
    }
  }
}

TEST_F(Certified, AChainThatDoesNotFitTheSocketsBuffersGoesPartByPart) {
  const Identity between = issue({.name = "between", .by = &ca_, .ca = true, .padding = 25'000});
  for (const CertificateDirectory* files : {&a_files_, &b_files_}) {
    const Identity own = issue({.name = "own", .by = &between, .padding = 25'000});
    CertificateDirectory::put(files->files().key, own.key_pem());
    CertificateDirectory::put(files->files().chain, own.pem() + between.pem());
  }
  TcpOptions a_options = with(a_files_);
  TcpOptions b_options = with(b_files_);
  for (TcpOptions* options : {&a_options, &b_options}) {
    options->send_buffer = options->receive_buffer = 1;  // as small as the kernel makes it
  }
  Node a(certified_pages, std::move(a_options), false);
  Node b(certified_pages, std::move(b_options));
  std::string diagnostic;
  ASSERT_FALSE(connect(a, b, &diagnostic)) << diagnostic;
  expect_pages_move(a, b);
}

TEST_F(Certified, AChannelIsNotMadeWithOptionsThatDoNotFitEachOther) {
  const auto invalid = std::make_error_code(std::errc::invalid_argument);
  for (std::string CertificateFiles::*const field :
       {&CertificateFiles::chain, &CertificateFiles::key, &CertificateFiles::trusted}) {
    TcpOptions options = with(a_files_);
    (options.certificates.*field).clear();
    EXPECT_TRUE(has(refused(std::move(options), invalid), " is empty, and others aren't"));
  }
  TcpOptions options = with(a_files_);
  options.keyring = nullptr;
  EXPECT_TRUE(has(refused(std::move(options), invalid), "there is no ChannelOptions::keyring"));
  options = with(a_files_);
  options.encryption = Encryption::off;
  EXPECT_TRUE(has(refused(std::move(options), invalid), "TcpOptions::encryption is off"));
  CertificateDirectory::put(a_files_.files().key, a_own_.key_pem(), 0644);
  EXPECT_TRUE(has(refused(with(a_files_), std::make_error_code(std::errc::permission_denied)), "has mode 0644"));
  options = with(b_files_);
  options.require_encryption = true;
  options.encryption = Encryption::required;
  EXPECT_EQ(refused(std::move(options), {}), "it is taken");
}

TEST_F(Certified, OneSideWithCertificatesAndOneWithoutDoNotMeet) {
  TcpOptions off = plain();
  off.encryption = Encryption::off;
  struct Other {
    TcpOptions options;
    std::string name;
  };
  for (const Other& other :
       {Other{plain(), "none (encrypted by the handshake's key)"}, Other{off, "none (not encrypted)"}}) {
    for (const bool certified_dials : {true, false}) {
      Node a(certified_pages, certified_dials ? with(a_files_) : other.options, false);
      Node b(certified_pages, certified_dials ? other.options : with(b_files_));
      std::string diagnostic;
      EXPECT_EQ(connect(a, b, &diagnostic), errc::encryption_mismatch) << diagnostic;
      // As b says, who answers.
      EXPECT_TRUE(has(diagnostic, "TcpOptions::certificates: " +
                                      (certified_dials ? other.name + " here, given" : "given here, " + other.name) +
                                      " at peer 'a'"))
          << diagnostic;
      EXPECT_EQ(b.channel->stats().handshakes.accepted, 0U);
    }
  }
}

TEST_F(Certified, ACertificateOfAnotherCaIsRefusedOnWhicheverSideAndBothSay) {
  const Identity other_ca = authority("another ca");
  const Identity foreign = issue({.name = "foreign", .by = &other_ca});
  const CertificateDirectory foreign_files(foreign, ca_);  // it takes the others, who don't take it
  for (const std::size_t lanes : {1U, 3U}) {
    for (const bool foreign_dials : {true, false}) {
      CertificateLog dialing;
      CertificateLog accepting;
      TcpOptions a_options = with(foreign_dials ? foreign_files : a_files_, &dialing);
      TcpOptions b_options = with(foreign_dials ? b_files_ : foreign_files, &accepting);
      a_options.lanes_per_peer = b_options.lanes_per_peer = lanes;
      Node a(certified_pages, std::move(a_options), false);
      Node b(certified_pages, std::move(b_options));
      std::string diagnostic;
      EXPECT_EQ(connect(a, b, &diagnostic), errc::authentication_failed) << diagnostic;
      EXPECT_TRUE(has(diagnostic, "data connection to peer 'b'")) << diagnostic;
      EXPECT_TRUE(has(diagnostic, foreign.sha256())) << diagnostic;
      EXPECT_TRUE(has(diagnostic, foreign_dials ? "it refuses this side's certificate (unknown CA"
                                                : "certificates.trusted doesn't vouch for its certificate: unable to "
                                                  "get local issuer certificate"))
          << diagnostic;
      if (foreign_dials) {
        EXPECT_TRUE(
            accepting.wait_for("stranger_refused", "a data connection of peer 'a': TcpOptions::certificates.trusted"))
            << accepting.all();
      }
      EXPECT_FALSE(a.channel->peer_info("b").has_value()) << "nothing falls back";
    }
  }
}

TEST_F(Certified, ACaThatHasExpiredVouchesForNobody) {
  const Identity late_ca = issue({.name = "late", .ca = true, .from = -7200, .to = -60});
  const Identity own = issue({.name = "own", .by = &late_ca});
  a_files_.set(own, late_ca);
  b_files_.set(own, late_ca);
  Node a(certified_pages, with(a_files_), false);
  Node b(certified_pages, with(b_files_));
  std::string diagnostic;
  EXPECT_EQ(connect(a, b, &diagnostic), errc::authentication_failed);
  EXPECT_TRUE(has(diagnostic, "certificate has expired") && has(diagnostic, "because of 'CN=late'")) << diagnostic;
}

TEST_F(Certified, ACaThatAnotherOneHasSignedIsTrustedAsItStands) {
  const Identity between = authority("between", &ca_);
  a_files_.set(issue({.name = "a", .by = &between}), between);
  b_files_.set(issue({.name = "b", .by = &between}), between);
  Node a(certified_pages, with(a_files_), false);
  Node b(certified_pages, with(b_files_));
  std::string diagnostic;
  ASSERT_FALSE(connect(a, b, &diagnostic)) << diagnostic;
  expect_pages_move(a, b);
  // The certificate that has signed it isn't trusted for that.
  a_files_.set(issue({.name = "a", .by = &ca_}), between);
  a.channel->disconnect("b");
  EXPECT_EQ(connect(a, b, &diagnostic), errc::authentication_failed);
}

/// A question of somebody whose key is known, with this endpoint. @return why it is refused; empty if it is answered.
std::string asked_with(const DialEndpoint& endpoint, Node& asking, Node& asked, std::error_code& ec) {
  kit::InitQuestion asks = question();
  asks.endpoint = encode_side_message(endpoint).encoded();
  std::string diagnostic;
  (void)asking.channel->send_init_side_msg(asked.channel->peer_init_url(), encode_side_message(asks),
                                           {std::nullopt, &diagnostic}, ec);
  return diagnostic;
}

TEST_F(Certified, AQuestionThatTellsOfACertificateSenselesslyIsRefused) {
  Node asking(certified_pages, plain(), false);
  Node certified(certified_pages, with(b_files_));
  Node keyed(certified_pages, plain());
  const Bytes hash(32, std::byte{7});
  std::error_code ec;
  std::string why = asked_with({1, true, hash}, asking, certified, ec);
  EXPECT_FALSE(ec) << why;
  for (Node* const asked : {&certified, &keyed}) {
    for (const std::size_t size : {0U, 31U, 33U, 64U}) {
      why = asked_with({1, true, Bytes(size, std::byte{7})}, asking, *asked, ec);
      EXPECT_EQ(ec, errc::malformed_message) << size;
      EXPECT_TRUE(has(why, "tells of a certificate by " + std::to_string(size) + " bytes; SHA-256 has 32")) << why;
    }
    for (const std::optional<bool> encrypted : {std::optional<bool>(), std::optional(false)}) {
      why = asked_with({1, encrypted, hash}, asking, *asked, ec);
      EXPECT_EQ(ec, errc::malformed_message) << why;
      EXPECT_TRUE(has(why, "tells of a certificate for connections that aren't to be encrypted")) << why;
    }
  }
  why = asked_with({1, true, hash}, asking, keyed, ec);
  EXPECT_EQ(ec, errc::encryption_mismatch) << why;
  why = asked_with({1, true, std::nullopt}, asking, certified, ec);
  EXPECT_EQ(ec, errc::encryption_mismatch) << why;
}

/// Has a key that is known, and answers each handshake with the endpoint that it is told.
class Answering {
 public:
  Answering()
      : service_({.bind_url = "tcp://127.0.0.1:0", .keyring = group_keyring()},
                 [this](const SideMessage& asked, kit::HandshakeService::Reply reply) {
                   if (asked.is<kit::Greeting>()) {
                     reply(encode_side_message(kit::GreetingAnswer{"ok", kit::protocol_version}));
                     return;
                   }
                   kit::InitAnswer answer;
                   answer.status = decode_side_message<kit::InitQuestion>(asked).who.value_or(false)
                                       ? kit::InitAnswer::here
                                       : kit::InitAnswer::ok;
                   answer.transport = "tcp";
                   answer.incarnation = 4711;
                   const std::lock_guard lock(mutex_);
                   answer.endpoint = encode_side_message(endpoint_).encoded();
                   reply(encode_side_message(answer));
                 }) {}

  /// How connecting to it ends.
  std::error_code connect(Node& from, const AcceptEndpoint& endpoint) {
    {
      const std::lock_guard lock(mutex_);
      endpoint_ = endpoint;
    }
    std::error_code ec;
    (void)from.channel->lazy_init_peer_connection("a", "b", service_.bound_url(), std::nullopt, {}, ec);
    return ec;
  }

 private:
  std::mutex mutex_;
  AcceptEndpoint endpoint_;
  kit::HandshakeService service_;
};

TEST_F(Certified, AnAnswerThatTellsOfACertificateSenselesslyIsRefused) {
  const asio::ip::tcp::endpoint any{asio::ip::address_v4::loopback(), 0};
  asio::io_context context;
  asio::ip::tcp::acceptor acceptor(context, any);
  Answering answering;
  AcceptEndpoint sound;
  sound.port = acceptor.local_endpoint().port();
  sound.dial_secret = sound.accept_secret = Bytes(16, std::byte{1});
  sound.tls_identity = Bytes(16, std::byte{2});
  sound.certificate = Bytes(32, std::byte{3});
  const Bytes secret(32, std::byte{4});
  std::vector<AcceptEndpoint> senseless(6, sound);
  senseless[0].certificate = Bytes(31, std::byte{3});
  senseless[1].certificate = Bytes();
  senseless[2].tls_secret = secret;
  senseless[3].tls_identity.reset();
  senseless[4].tls_identity = Bytes(15, std::byte{2});
  senseless[5].certificate.reset();  // an identity, and nothing that it is of
  for (const bool certified : {true, false}) {
    Node a(certified_pages, certified ? with(a_files_) : plain(), false);
    for (std::size_t i = 0; i < senseless.size(); ++i) {
      EXPECT_EQ(answering.connect(a, senseless[i]), errc::malformed_message) << i;
    }
    AcceptEndpoint of_the_other_kind = sound;
    if (certified) {
      of_the_other_kind.certificate.reset();
      of_the_other_kind.tls_secret = secret;
    }
    EXPECT_EQ(answering.connect(a, of_the_other_kind), errc::encryption_mismatch);
  }
  acceptor.non_blocking(true);
  std::error_code ec;
  (void)acceptor.accept(ec);
  EXPECT_EQ(ec, asio::error::would_block) << "none of them leads to a data connection";
}

}  // namespace
}  // namespace kvferry::tcp::testing
