// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/testing/conformance_test.hpp>
#include <kvferry/testing/suite_macros.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// Connecting by bytes that came by a road of the program's own.
class MetadataTests : public ConformanceBase {
 protected:
  using ConnectProbe = Probe<std::error_code, PeerInfo>;
  using Metadata = std::vector<std::byte>;

  std::shared_ptr<ConnectProbe> start_connect_by(Node& from, std::span<const std::byte> metadata,
                                                 const InitSpec& spec = {}) {
    auto probe = watch<ConnectProbe>(from.id() + "'s connect by metadata");
    const InitiationScope initiating;
    from->async_connect(from.id(), metadata, spec, probe->handler());
    return probe;
  }

 public:
  void ConnectsToWhoMadeIt() {
    const auto [a, b] = pair();
    const Metadata metadata = b->local_metadata("the other");
    EXPECT_LT(metadata.size(), 1024U);
    const auto connected = start_connect_by(a, metadata);
    ASSERT_FALSE(connected->error()) << connected->error().message();
    const PeerInfo info = std::get<1>(connected->results());
    EXPECT_EQ(info.id, "the other");
    EXPECT_EQ(info.init_url, b.url());
    EXPECT_EQ(info.incarnation, a->peer_info("the other")->incarnation);
    EXPECT_EQ(info.regions.size(), b->regions().size());
    EXPECT_TRUE(b->remote_xfer_handler_exists(a.id()));
    EXPECT_FALSE(start_connect_by(a, metadata)->error()) << "once more: nothing happens";
  }

  void BlockingForms() {
    const auto [a, b] = pair();
    auto calls = aside([&, &node = a, metadata = b->local_metadata(b.id())] {
      const PeerInfo info = node->connect(node.id(), metadata);
      std::error_code ec = std::make_error_code(std::errc::io_error);
      EXPECT_EQ(node->connect(node.id(), metadata, {}, ec).id, info.id);
      EXPECT_FALSE(ec);
      return info.id;
    });
    EXPECT_EQ(in_time(calls), b.id());
    expect_usable(a, b);
    EXPECT_THROW(a->connect(a.id(), Metadata(3)), TransferError);
  }

  void OfAnEarlierIncarnationIsRefused() {
    const auto [a, b] = pair();
    const std::string url = b.url();
    const Metadata old = b->local_metadata(b.id());
    b.destroy_channel();
    Node& again = add_node({.id = b.id(), .init_url = url});
    std::string diagnostic;
    EXPECT_EQ(start_connect_by(a, old, {{}, &diagnostic})->error(), errc::peer_restarted);
    EXPECT_NE(diagnostic.find(std::to_string(again_incarnation(a, again))), std::string::npos) << diagnostic;
    EXPECT_EQ(start_connect_by(a, old)->error(), errc::peer_restarted) << "also where the new one is connected";
    EXPECT_TRUE(a->remote_xfer_handler_exists(b.id()));
    expect_usable(a, again);
  }

  void OfALaterIncarnationTakesThePlace() {
    const auto [a, b] = connected_pair();
    const std::string url = b.url();
    b.destroy_channel();
    Node& again = add_node({.id = b.id(), .init_url = url});
    EXPECT_FALSE(start_connect_by(a, again->local_metadata(again.id()))->error());
    expect_usable(a, again);
  }

  void WhatIsNoMetadataIsRefused() {
    const auto [a, b] = pair();
    const Metadata good = b->local_metadata(b.id());
    for (std::size_t size = 0; size < good.size(); ++size) {
      std::string diagnostic;
      EXPECT_EQ(start_connect_by(a, std::span(good).first(size), {{}, &diagnostic})->error(), errc::malformed_message)
          << size;
      EXPECT_FALSE(diagnostic.empty());
    }
    EXPECT_EQ(start_connect_by(a, Metadata(100'000, std::byte{0x80}))->error(), errc::malformed_message);
    Metadata longer = good;
    longer.push_back(std::byte{0});
    EXPECT_EQ(start_connect_by(a, longer)->error(), errc::malformed_message);
    // With any byte changed it ends in time, and connects to nobody else. (The url comes last. Another one
    // would lead out of this test.)
    for (std::size_t i = 0; i < good.size() - b.url().size(); ++i) {
      Metadata changed = good;
      changed[i] ^= std::byte{0x05};
      const auto connecting = start_connect_by(a, changed, {Milliseconds(200), nullptr});
      if (!connecting->error()) {
        EXPECT_EQ(std::get<1>(connecting->results()).incarnation, a->peers().front().incarnation);
      }
    }
  }

  void WhoCanNotBeConnectedToHasNone() {
    Node& silent = add_node({.listens = false});
    try {
      (void)silent->local_metadata(silent.id());
      ADD_FAILURE() << "metadata of a channel that answers no handshakes";
    } catch (const TransferError& error) {
      EXPECT_EQ(error.code(), errc::not_supported);
    }
    Node& node = add_node();
    EXPECT_THROW((void)node->local_metadata(""), TransferError);
    EXPECT_THROW((void)node->local_metadata("\n"), TransferError);
    EXPECT_EQ(start_connect_by(node, node->local_metadata("me"))->error(), errc::self_connection);
    node->close();
    EXPECT_EQ(start_connect_by(node, Metadata())->error(), errc::closed);
  }

 private:
  /// Connects to it by its url, to learn who it is.
  [[nodiscard]] std::uint64_t again_incarnation(Node& from, Node& to) {
    connect(from, to);
    return from->peer_info(to.id())->incarnation;
  }
};

KVFERRY_TESTING_SUITE(MetadataTest, MetadataTests, ConnectsToWhoMadeIt, BlockingForms,
                      OfAnEarlierIncarnationIsRefused, OfALaterIncarnationTakesThePlace, WhatIsNoMetadataIsRefused,
                      WhoCanNotBeConnectedToHasNone);

}  // namespace kvferry::testing
