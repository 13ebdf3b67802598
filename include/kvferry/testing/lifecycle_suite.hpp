// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <asio/dispatch.hpp>
#include <asio/post.hpp>

#include <algorithm>
#include <cstddef>
#include <functional>
#include <future>
#include <string>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/testing/conformance_test.hpp>
#include <kvferry/testing/suite_macros.hpp>
#include <kvferry/url.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// Construction, facts, and closing a channel that has nothing to do.
class LifecycleTests : public ConformanceBase {
 protected:
  void expect_refused(ChannelOptions options, errc code) {
    try {
      const auto channel = make_channel(std::move(options));
      ADD_FAILURE() << "constructed, instead of " << make_error_code(code).message();
    } catch (const TransferError& error) {
      EXPECT_EQ(error.code(), code) << error.what();
    }
  }

  void expect_region_refused(const MemoryRegion& region) {
    ChannelOptions options;
    options.regions = {region};
    expect_refused(std::move(options), errc::invalid_region);
  }

 public:
  void OffersSomeTransfer() {
    const Capabilities can = capabilities();
    EXPECT_TRUE(can.send_recv || can.write || can.read) << "a transport that transfers nothing";
    EXPECT_TRUE(!can.notifications || can.write) << "notifications come with writes";
    EXPECT_EQ(can.notifications, can.max_notification_bytes > 0);
  }

  void StatesFactsBeforeUse() {
    Node& node = add_node({.regions = {{4, 4096, Access::read}, {2, 512, Access::write}}, .local_bytes = 0});
    EXPECT_FALSE(node->transport().empty());
    EXPECT_TRUE(node->get_executor());

    const auto regions = node->regions();
    ASSERT_EQ(regions.size(), 2U);
    EXPECT_EQ(regions[0].data, node.region(0).data());
    EXPECT_EQ(regions[0].size, 4U * 4096);
    EXPECT_EQ(regions[0].page_size, 4096U);
    EXPECT_EQ(regions[0].peer_access, Access::read);
    EXPECT_EQ(regions[1].data, node.region(1).data());
    EXPECT_EQ(regions[1].page_count(), 2U);
    EXPECT_EQ(regions[1].peer_access, Access::write);
  }

  void StatesTheUrlThatWasBound() {
    const std::string url = add_node().url();
    std::error_code error;
    const HostPort parsed = parse_url(url, error);
    EXPECT_FALSE(error) << url;
    EXPECT_NE(parsed.port, 0) << url;
    EXPECT_NE(add_node().url(), url);
  }

  void StatesNoUrlWithoutListener() { EXPECT_EQ(add_node({.listens = false}).url(), ""); }

  void KnowsNobodyAtFirst() {
    Node& node = add_node();
    EXPECT_FALSE(node->remote_xfer_handler_exists("stranger"));
    EXPECT_FALSE(node->remote_xfer_handler_exists(""));
    EXPECT_FALSE(node->peer_info("stranger").has_value());
  }

  void WorksWithoutRegions() {
    Node& bare = add_node({.regions = {}, .local_bytes = 0, .listens = false});
    Node& other = add_node();
    connect(bare, other);
    EXPECT_TRUE(bare->regions().empty());
    EXPECT_TRUE(bare->remote_xfer_handler_exists(other.id()));
  }

  void RefusesInvalidRegions() {
    std::vector<std::byte> memory(8192);
    expect_region_refused({memory.data(), 0, 4096, Access::read_write});
    expect_region_refused({memory.data(), 8192, 0, Access::read_write});
    expect_region_refused({memory.data(), 8191, 4096, Access::read_write});
    expect_region_refused({memory.data(), 100, 4096, Access::read_write});
    expect_region_refused({nullptr, 8192, 4096, Access::read_write});
  }

  void RefusesInvalidUrls() {
    for (const char* url : {"nonsense", "tcp://127.0.0.1", "127.0.0.1:", "udp://127.0.0.1:0", "tcp://127.0.0.1:65536",
                            "tcp://127.0.0.1:12x", "tcp://[::1:5555", "tcp://127.0.0.1:-1", "tcp://224.0.0.1:0",
                            "tcp://255.255.255.255:0", "tcp://[ff02::1]:0"}) {
      SCOPED_TRACE(url);
      ChannelOptions options;
      options.peer_init_url = url;
      expect_refused(std::move(options), errc::invalid_url);
    }
  }

  void RefusesAnAdvertisedUrlThatNobodyCanDial() {
    for (const char* url : {"tcp://*:0", "tcp://0.0.0.0:5600", "0:0", "tcp://[::]:0", "tcp://[::ffff:0.0.0.0]:5600",
                            "tcp://224.0.0.1:5600", "tcp://[ff02::1]:5600", "nonsense"}) {
      for (const bool listens : {true, false}) {
        SCOPED_TRACE(url);
        ChannelOptions options = suite_options();
        options.peer_init_url = listens ? facts().listen_url : "";
        options.advertised_init_url = url;
        try {
          const auto channel = make_channel(std::move(options));
          ADD_FAILURE() << "constructed";
        } catch (const TransferError& error) {
          EXPECT_EQ(error.code(), errc::invalid_url) << error.what();
          const std::string sentence = error.what();
          EXPECT_NE(sentence.find("advertised_init_url"), std::string::npos) << sentence;
          EXPECT_NE(sentence.find('"' + std::string(url) + '"'), std::string::npos) << sentence;
        }
      }
    }
  }

  void RefusesAnAddressInUse() {
    const std::string taken = add_node().url();
    ChannelOptions options;
    options.peer_init_url = taken;
    try {
      const auto channel = make_channel(options);
      ADD_FAILURE() << "two channels answer at " << taken;
    } catch (const TransferError& error) {
      EXPECT_EQ(error.code(), std::errc::address_in_use) << error.what();
      EXPECT_NE(std::string(error.what()).find(std::to_string(parse_url(taken).port)), std::string::npos)
          << error.what();
    }
  }

  void ReleasesTheAddressOnClose() {
    Node& first = add_node();
    const std::string url = first.url();
    first->close();
    first.destroy_channel();
    EXPECT_EQ(add_node({.init_url = url}).url(), url);
  }

  void ConstructsAndDestroysManyTimes() {
    for (int i = 0; i < 20; ++i) {
      ChannelOptions options = suite_options();
      options.peer_init_url = facts().listen_url;
      const auto channel = make_channel(std::move(options));
      if (i % 2 == 0) {
        channel->close();
      }
    }
  }

  void CloseIsIdempotent() {
    const auto [a, b] = connected_pair();
    a->close();
    a->close();
    EXPECT_FALSE(a->remote_xfer_handler_exists(b.id()));
    EXPECT_FALSE(a->peer_info(b.id()).has_value());
    a->close();
  }

  void CloseFromManyThreadsAtOnce() {
    const auto [a, b] = connected_pair();
    std::vector<std::future<void>> closers;
    for (int i = 0; i < 8; ++i) {
      closers.push_back(aside([&channel = a.channel()] { channel.close(); }));
    }
    for (auto& closer : closers) {
      in_time(closer);
    }
    EXPECT_FALSE(a->remote_xfer_handler_exists(b.id()));
  }

  void EverythingIsRefusedAfterClose() {
    const auto [a, b] = connected_pair();
    const Objects objects = a.objects({64});
    const std::string url = b.url();
    a->close();

    for (const TransferKind kind : kinds()) {
      SCOPED_TRACE(to_string(kind));
      EXPECT_EQ(start_any(kind, a, b, objects)->outcome(), failed(errc::closed));
      EXPECT_EQ(start(kind, a, "stranger", objects, within(std::chrono::milliseconds(0)))->outcome(),
                failed(errc::closed));
      EXPECT_EQ(start(kind, a, b, Objects())->outcome(), failed(errc::closed));
    }
    EXPECT_EQ(start_connect(a, a.id(), b.id(), url)->error(), errc::closed);
    EXPECT_EQ(start_side_message(a, url, SideMessage("X", {}))->error(), errc::closed);
    EXPECT_EQ(start_receive_notification(a)->error(), errc::closed);

    std::error_code error;
    EXPECT_EQ(a->batched_send(objects.readable(), {.peer_id = b.id()}, error), 0U);
    EXPECT_EQ(error, errc::closed);
    EXPECT_THROW(a->batched_recv(objects.writable(), {.peer_id = b.id()}), TransferError);
    EXPECT_THROW(a->receive_notification(), TransferError);
    EXPECT_THROW(a->lazy_init_peer_connection(a.id(), b.id(), url), TransferError);
    EXPECT_THROW(a->send_init_side_msg(url, SideMessage("X", {})), TransferError);
  }
};

KVFERRY_TESTING_SUITE(LifecycleTest, LifecycleTests, OffersSomeTransfer, StatesFactsBeforeUse, StatesTheUrlThatWasBound,
                      StatesNoUrlWithoutListener, KnowsNobodyAtFirst, WorksWithoutRegions, RefusesInvalidRegions,
                      RefusesInvalidUrls, RefusesAnAdvertisedUrlThatNobodyCanDial, RefusesAnAddressInUse,
                      ReleasesTheAddressOnClose, ConstructsAndDestroysManyTimes, CloseIsIdempotent,
                      CloseFromManyThreadsAtOnce, EverythingIsRefusedAfterClose);

}  // namespace kvferry::testing
