// SPDX-License-Identifier: Apache-2.0
// Security and options of a channel of several roads: options that are refused, and roads that security rules out.
#include <gtest/gtest.h>

#include <chrono>
#include <cstddef>
#include <memory>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/keyring.hpp>

#include "auto_node.hpp"
#include "common/certificates.hpp"

namespace kvferry::inline KVFERRY_ABI::roads::testing {
namespace {

const std::error_code invalid = std::make_error_code(std::errc::invalid_argument);

/// One for all.
[[nodiscard]] std::shared_ptr<const Keyring> keyring() {
  static const KeyPair keys = make_key_pair();
  return std::make_shared<Keyring>(keys, std::vector<PeerKey>{{std::string(PeerKey::any_id), keys.public_key}});
}

[[nodiscard]] AutoOptions keyed(std::vector<AutoRoad> given, bool allow_unencrypted = false) {
  AutoOptions options = with(std::move(given));
  options.keyring = keyring();
  options.allow_unencrypted = allow_unencrypted;
  return options;
}

[[nodiscard]] AutoRoad plain_tcp(std::string name, bool within_host = false) {
  TcpOptions options;
  options.encryption = Encryption::off;
  return road<TcpTransferChannel>(std::move(name), options, within_host);
}

TEST(AutoSecurity, OverTcpKeysEncryptThePages) {
  Node b(keyed({tcp()}));
  Node a(keyed({tcp()}));
  ASSERT_FALSE(a.connect(b));
  EXPECT_TRUE(has(a.path_to("b"), "TLS 1.3 ")) << a.path_to("b");
  EXPECT_FALSE(a.write(1));
  EXPECT_TRUE(b.holds(1));
}

[[nodiscard]] AutoRoad certified_tcp(const CertificateFiles& files) {
  TcpOptions options;
  options.certificates = files;
  return road<TcpTransferChannel>("tcp", options);
}

TEST(AutoSecurity, ARoadMayBeEncryptedByCertificates) {
  const auto files = kvferry::testing::lasting_certificates();
  Node b(keyed({certified_tcp(files)}));
  Node a(keyed({certified_tcp(files)}));
  ASSERT_FALSE(a.connect(b));
  EXPECT_TRUE(has(a.path_to("b"), " with certificates")) << a.path_to("b");
  EXPECT_FALSE(a.write(1));
  EXPECT_TRUE(b.holds(1));
  EXPECT_TRUE(has(failure_of(with({certified_tcp(files)})).sentence, "there is no ChannelOptions::keyring"));
  EXPECT_EQ(failure_of(keyed({shm(), certified_tcp({"/none/a", "/none/b", "/none/c"})})).code,
            std::errc::no_such_file_or_directory)
      << "a road that isn't secured as the program wants it is not left out";
}

TEST(AutoSecurity, ACertificateThatIsRefusedOrMissingLeadsToNoOtherRoad) {
  const auto files = kvferry::testing::lasting_certificates();
  Node b(keyed({tcp(), tcp_named("other")}));
  Node a(keyed({certified_tcp(files), tcp_named("other")}));
  std::string why;
  EXPECT_EQ(a.connect(b, &why), errc::encryption_mismatch) << why;
  EXPECT_TRUE(has(why, "TcpOptions::certificates: ")) << why;
  // One that the other side doesn't trust.
  const auto stranger = kvferry::testing::authority("stranger");
  const kvferry::testing::CertificateDirectory own(kvferry::testing::issue({.name = "own", .by = &stranger}), stranger);
  Node c(keyed({certified_tcp(own.files()), tcp_named("other")}));
  Node d(keyed({certified_tcp(files), tcp_named("other")}));
  EXPECT_EQ(d.connect(c, &why), errc::authentication_failed) << why;
  EXPECT_TRUE(has(why, "certificates.trusted doesn't vouch for its certificate")) << why;
  // The accepting side is the one that refuses, of which the other has to hear.
  Node e(keyed({certified_tcp(own.files()), tcp_named("other")}));
  Node f(keyed({certified_tcp(files), tcp_named("other")}));
  EXPECT_EQ(e.connect(f, &why), errc::authentication_failed) << why;
  EXPECT_TRUE(has(why, "doesn't vouch") || has(why, "it refuses this side's certificate")) << why;
}

TEST(AutoSecurity, WithAKeyringNoRoadLeavesTheHostInTheClear) {
  const auto refused = failure_of(keyed({shm(), plain_tcp("plain"), tcp()}));
  EXPECT_EQ(refused.code, invalid);
  EXPECT_TRUE(has(refused.sentence, "the road 'plain' moves pages off this host unencrypted")) << refused.sentence;
  EXPECT_FALSE(failure_of(keyed({shm(), tcp()})));
  EXPECT_FALSE(failure_of(keyed({plain_tcp("plain", true)}))) << "it leads to no other host";
  EXPECT_FALSE(failure_of(keyed({plain_tcp("plain")}, true)));
  EXPECT_FALSE(failure_of(with({plain_tcp("plain")}))) << "nothing is encrypted";
}

TEST(AutoSecurity, WhereEncryptionIsRequiredNothingAllowsARoadToDoWithout) {
  const auto required = [](AutoOptions options) {
    options.require_encryption = true;
    return failure_of(std::move(options));
  };
  const auto refused = required(keyed({shm(), plain_tcp("plain")}, true));
  EXPECT_EQ(refused.code, invalid);
  EXPECT_TRUE(has(refused.sentence, "require_encryption is set")) << refused.sentence;
  EXPECT_EQ(required(with({tcp()})).code, invalid) << "without keys nothing is encrypted";
  EXPECT_FALSE(required(keyed({shm(), tcp()})));
  EXPECT_FALSE(required(with({shm()}))) << "it leads to no other host";
}

/// Of a transport of a program's own nothing is known but what it says.
class Own : public TcpTransferChannel {
 public:
  using TcpTransferChannel::TcpTransferChannel;

 protected:
  [[nodiscard]] bool leaves_host_in_the_clear() const noexcept override {
    return TransferChannelKit::leaves_host_in_the_clear();  // NOLINT(bugprone-parent-virtual-call): the default
  }
};

TEST(AutoSecurity, ATransportThatSaysNothingCountsAsUnencrypted) {
  EXPECT_EQ(failure_of(keyed({road<Own>("own", TcpOptions())})).code, invalid);
}

TEST(AutoSecurity, AMismatchOfEncryptionLeadsToNoOtherRoad) {
  Node b(keyed({plain_tcp("left"), plain_tcp("right")}, true));
  Node a(keyed({tcp_named("left"), plain_tcp("right")}, true));
  std::string why;
  EXPECT_EQ(a.connect(b, &why), errc::encryption_mismatch);
  EXPECT_TRUE(has(why, "not left: ")) << why;
  EXPECT_EQ(a.bytes_out("right"), 0U);
}

TEST(AutoSecurity, WhoDoesNotProveWhoItIsLeadsToNoOtherRoad) {
  const auto first = std::make_shared<Fate>();
  const auto second = std::make_shared<Fate>();
  first->set(Fate::State::unreachable);
  first->refuse_with(errc::authentication_failed);
  Node b(with({tcp_named("first"), tcp_named("second")}));
  Node a(with({mortal_tcp("first", first), mortal_tcp("second", second)}));
  EXPECT_EQ(a.connect(b), errc::authentication_failed);
  EXPECT_EQ(second->connects(), 0U);
}

TEST(AutoSecurity, ProcessesOfTwoUsersOfOneHostMeetElsewhere) {
  const auto fate = std::make_shared<Fate>();
  fate->set(Fate::State::unreachable);
  fate->refuse_with(errc::authentication_failed);
  Node b;
  Node a(with({mortal_shm(fate), tcp()}));
  ASSERT_FALSE(a.connect(b));
  EXPECT_TRUE(begins(a.path_to("b"), "tcp ")) << a.path_to("b");
}

TEST(AutoOptionsCheck, WhatARoadHasOfItsOwnIsNotLostWithoutAWord) {
  TcpOptions own;
  own.keyring = keyring();
  const auto refused = failure_of(with({road<TcpTransferChannel>("tcp", own)}));
  EXPECT_EQ(refused.code, invalid);
  EXPECT_TRUE(has(refused.sentence, "keyring")) << refused.sentence;
  AutoOptions same = with({road<TcpTransferChannel>("tcp", own)});
  same.keyring = own.keyring;
  EXPECT_FALSE(failure_of(std::move(same)));

  own = TcpOptions();
  own.checksums = true;
  EXPECT_EQ(failure_of(with({road<TcpTransferChannel>("tcp", own)})).code, invalid);
  own = TcpOptions();
  own.peer_init_url = "tcp://127.0.0.1:1";
  EXPECT_EQ(failure_of(with({road<TcpTransferChannel>("tcp", own)})).code, invalid);
  std::vector<std::byte> memory(page);
  own = TcpOptions();
  own.regions = {{memory.data(), memory.size(), page}};
  EXPECT_EQ(failure_of(with({road<TcpTransferChannel>("tcp", own)})).code, invalid);
}

TEST(AutoOptionsCheck, ARoadsRegionsAreTheChannelsMemoryWithTheSameAccess) {
  std::vector<std::byte> memory(page);
  ChannelOptions common;
  common.regions = {{memory.data(), memory.size(), page}};
  const auto refusal = [&](const ChannelOptions& own) {
    try {
      check_options_of_road("tcp", own, common);
    } catch (const TransferError& error) {
      return error.code();
    }
    return std::error_code();
  };
  ChannelOptions own;
  own.regions = common.regions;
  EXPECT_FALSE(refusal(own));
  own.regions.front().peer_access = Access::read;
  EXPECT_EQ(refusal(own), invalid) << "peers could write";
  own.regions = common.regions;
  own.regions.front().dmabuf_offset = page;
  EXPECT_EQ(refusal(own), invalid) << "another part of it";
  own.regions = common.regions;
  own.regions.front().dmabuf_fd = 0;
  EXPECT_EQ(refusal(own), invalid) << "it would be registered as ordinary memory";
  common.regions.front().dmabuf_fd = 1;
  EXPECT_FALSE(refusal(own)) << "a duplicate of the descriptor";
}

/// Each in turn: a road that wants it, of a channel that doesn't have it.
template <class Value>
void expect_not_lost(Value ChannelOptions::*member, Value value, const std::string& field) {
  TcpOptions own;
  own.*member = value;
  const auto refused = failure_of(with({road<TcpTransferChannel>("tcp", own)}));
  EXPECT_EQ(refused.code, invalid) << field;
  EXPECT_TRUE(has(refused.sentence, "ChannelOptions::" + field + " ")) << refused.sentence;
}

TEST(AutoOptionsCheck, NeitherAreItsBoundsTimesAndDemands) {
  expect_not_lost(&ChannelOptions::require_encryption, true, "require_encryption");
  expect_not_lost(&ChannelOptions::require_equal_page_sizes, false, "require_equal_page_sizes");
  expect_not_lost(&ChannelOptions::max_peers, std::size_t{5}, "max_peers");
  expect_not_lost(&ChannelOptions::max_posted_recv_bytes_of_peer, std::size_t{4096}, "max_posted_recv_bytes_of_peer");
  expect_not_lost(&ChannelOptions::default_timeout, std::chrono::milliseconds(7), "default_timeout");
  expect_not_lost(&ChannelOptions::io_threads, std::size_t{3}, "io_threads");
  expect_not_lost(&ChannelOptions::poll, PollPolicy::always(), "poll");
  int context = 0;
  expect_not_lost(&ChannelOptions::zmq_context, static_cast<void*>(&context), "zmq_context");
  expect_not_lost(&ChannelOptions::advertised_init_url, std::string("tcp://10.0.0.1:1"), "advertised_init_url");
}

TEST(AutoOptionsCheck, OnlyWhatTheHostLacksIsLeftOut) {
  const auto throws = [](const std::error_code& cause) {
    return AutoRoad{"warp", [cause](ChannelOptions) -> std::unique_ptr<kit::TransferChannelKit> {
                      throw TransferError(cause, "no");
                    }};
  };
  EXPECT_FALSE(failure_of(with({throws(std::make_error_code(std::errc::no_such_device)), tcp()})));
  EXPECT_EQ(failure_of(with({throws(errc::not_supported), tcp()})).code, errc::not_supported)
      << "checksums, or encryption, that it doesn't have";
  EXPECT_EQ(failure_of(with({throws(invalid), tcp()})).code, invalid);
  TcpOptions wrong;
  wrong.congestion_control = "no-such-thing";
  EXPECT_EQ(failure_of(with({shm(), road<TcpTransferChannel>("tcp", wrong)})).code,
            std::errc::no_such_file_or_directory);
}

TEST(AutoOptionsCheck, MemoryOfADmaBufThatNoRoadReachesIsRefused) {
  std::vector<std::byte> memory(page);
  MemoryRegion region{memory.data(), memory.size(), page};
  region.dmabuf_fd = 0;
  try {
    AutoOptions options = with({shm(), tcp()});
    options.regions = {region};
    const AutoTransferChannel channel(std::move(options));
    ADD_FAILURE() << "a region that no peer can reach";
  } catch (const TransferError& error) {
    EXPECT_EQ(error.code(), errc::no_path);
    const std::string why = error.what();
    EXPECT_TRUE(has(why, "region 0: shm can't reach memory of a dma-buf")) << why;
    EXPECT_TRUE(has(why, "region 0: tcp can't reach memory of a dma-buf")) << why;
  }
  AutoTransferChannel channel(with({shm(), tcp()}));
  std::error_code ec;
  (void)channel.add_region(region, ec);
  EXPECT_EQ(ec, errc::not_supported);
}

TEST(AutoOptionsCheck, ARoadThatIgnoresTheOptionsIsRefused) {
  const AutoRoad whole{"tcp", [](const ChannelOptions&) { return std::make_unique<TcpTransferChannel>(TcpOptions()); }};
  EXPECT_EQ(failure_of(with({whole})).code, invalid);
}

}  // namespace
}  // namespace kvferry::roads::testing
