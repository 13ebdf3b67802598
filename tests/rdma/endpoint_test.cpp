// SPDX-License-Identifier: Apache-2.0
#include "rdma/endpoint.hpp"

#include <gtest/gtest.h>

#include <set>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/kit/endpoint_codec.hpp>
#include <kvferry/rdma_error.hpp>

#include "rdma/message.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma {
namespace {

RailEndpoint rail() {
  RailEndpoint rail;
  rail.link_layer = "Ethernet";
  rail.gid_type = "RoCE v2";
  rail.gid.resize(16);
  rail.gid[10] = rail.gid[11] = std::byte{0xff};
  rail.mtu = 1024;
  rail.reads_taken = 4;
  rail.reads_made = 2;
  rail.max_message = 1 << 20;
  return rail;
}

TEST(RdmaEndpoint, Line21_MismatchesNameBothValues) {
  EXPECT_EQ(check_pairing(rail(), rail()), "");
  RailEndpoint other = rail();
  other.link_layer = "InfiniBand";
  EXPECT_EQ(check_pairing(rail(), other), "rail 0: link layer 'InfiniBand', this side's is 'Ethernet'");
  other = rail();
  other.gid_type = "RoCE v1";
  EXPECT_EQ(check_pairing(rail(), other), "rail 0: GID type 'RoCE v1', this side's is 'RoCE v2'");
  other = rail();
  other.gid[0] = std::byte{0xfd};
  EXPECT_EQ(check_pairing(rail(), other), "rail 0: a GID of an IPv6 address, this side's is of an IPv4 address");
  other = rail();
  other.reads_made = 0;
  EXPECT_EQ(check_pairing(rail(), other), "rail 0: takes 4 reads and makes 0 at a time, this side takes 4 and makes 2");
  EXPECT_NE(check_pairing(other, rail()), "");
  other = rail();
  other.reads_taken = 0;
  EXPECT_NE(check_pairing(rail(), other), "");
  EXPECT_NE(check_pairing(other, rail()), "");
}

TEST(RdmaEndpoint, Line21_TheSmallerValuesCount) {
  RailEndpoint own = rail();
  own.mtu = 4096;
  own.reads_taken = 16;
  own.reads_made = 8;
  own.max_message = 1 << 20;
  RailEndpoint peers = rail();
  peers.mtu = 1024;
  peers.reads_taken = 2;
  peers.reads_made = 4;
  peers.max_message = 1 << 30;
  Agreement agreed = agree(own, peers);
  EXPECT_EQ(agreed.mtu, 1024U);
  EXPECT_EQ(agreed.reads_taken, 4U);
  EXPECT_EQ(agreed.reads_made, 2U);
  EXPECT_EQ(agreed.max_message, 1U << 20);
  agreed = agree(peers, own);
  EXPECT_EQ(agreed.mtu, 1024U);
  EXPECT_EQ(agreed.reads_taken, 2U);
  EXPECT_EQ(agreed.reads_made, 4U);
  EXPECT_EQ(agreed.max_message, 1U << 20);
}

TEST(RdmaEndpoint, Line11_KeysAreAsManyAsSlices) {
  const std::vector<RemoteRegion> regions{{10'000, 100, Access::read, 0}, {100, 100, Access::none, 3}};
  Endpoint endpoint{8192, 64, {rail()}};
  endpoint.rails[0].regions = {{4096, 5000, {1, 2}, 0}, {0, 0, {}, 3}};
  EXPECT_EQ(check_endpoint(endpoint, regions), "");
  endpoint.rails[0].regions[0].slice_bytes = 4999;
  EXPECT_EQ(check_endpoint(endpoint, regions), "2 keys for a region of 3 slices");
  endpoint.rails[0].regions[0] = {~std::uint64_t{0} - 100, 5000, {1, 2}};
  EXPECT_NE(check_endpoint(endpoint, regions), "");
  endpoint.rails[0].regions[0] = {4096, 0, {1, 2}};
  EXPECT_NE(check_endpoint(endpoint, regions), "");
  endpoint.rails[0].regions = {{4096, 5000, {1, 2}, 0}, {4096, 5000, {1}, 3}};
  EXPECT_EQ(check_endpoint(endpoint, regions), "keys for a region that is closed");
  endpoint.rails[0].regions = {{0, 0, {}, 3}, {4096, 5000, {1, 2}, 0}};
  EXPECT_EQ(check_endpoint(endpoint, regions), "keys of region 0 after those of region 3");
  endpoint.rails[0].regions = {{0, 0, {}, 3}};
  EXPECT_EQ(check_endpoint(endpoint, regions), "") << "region 0 has been removed since";
  endpoint.rails[0].regions = {{4096, 5000, {1, 2}, 0}, {0, 0, {}, 3}, {4096, 5000, {1, 2}, 4}};
  EXPECT_EQ(check_endpoint(endpoint, regions), "") << "region 4 has been added since";
}

TEST(RdmaEndpoint, FurtherQueuePairsDifferInTwoNumbers) {
  RailEndpoint several = rail();
  several.queue_pair = 17;
  several.packet_number = 1000;
  EXPECT_EQ(queue_pairs_of(several), 1U);
  several.further.emplace();
  EXPECT_EQ(queue_pairs_of(several), 1U);
  several.further->assign({{18, 2000}, {19, 3000}});
  several.regions = {{4096, 5000, {1, 2}, 0}};
  ASSERT_EQ(queue_pairs_of(several), 3U);
  const std::vector<std::pair<std::uint64_t, std::uint64_t>> numbers{{17, 1000}, {18, 2000}, {19, 3000}};
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    const RailEndpoint one = queue_pair_of(several, i);
    EXPECT_EQ(std::pair(one.queue_pair, one.packet_number), numbers[i]);
    EXPECT_EQ(queue_pairs_of(one), 1U);
    EXPECT_TRUE(one.regions.empty());
    EXPECT_EQ(check_pairing(rail(), one), "");
    EXPECT_EQ(one.mtu, several.mtu);
    EXPECT_EQ(one.gid, several.gid);
  }
}

TEST(RdmaEndpoint, FurtherQueuePairsTravelWhereThereAreSome) {
  Endpoint endpoint{8192, 64, {rail(), rail()}};
  endpoint.rails[1].rail = 1;
  endpoint.rails[1].further = {{18, 2000}, {19, 3000}};
  std::error_code ec;
  const auto heard = kit::decode_endpoint<Endpoint>(kit::encode_endpoint(endpoint), ec);
  ASSERT_FALSE(ec) << ec.message();
  EXPECT_FALSE(heard.rails.at(0).further);
  ASSERT_EQ(queue_pairs_of(heard.rails.at(1)), 3U);
  EXPECT_EQ(queue_pair_of(heard.rails[1], 2).queue_pair, 19U);
  EXPECT_EQ(queue_pair_of(heard.rails[1], 2).packet_number, 3000U);
}

TEST(RdmaEndpoint, FurtherQueuePairsAreHeldToTheirBounds) {
  const auto is_sensible = [](std::vector<FurtherQueuePair> further) {
    Endpoint endpoint{min_message_bytes, min_messages, {rail()}};
    endpoint.rails[0].further = std::move(further);
    return check_endpoint(endpoint, {}).empty();
  };
  constexpr std::uint64_t most = (1U << 24) - 1;
  EXPECT_TRUE(is_sensible({}));
  EXPECT_TRUE(is_sensible({{most, most}}));
  EXPECT_FALSE(is_sensible({{most + 1, most}}));
  EXPECT_FALSE(is_sensible({{1, 1}, {most, most + 1}}));
  EXPECT_TRUE(is_sensible(std::vector<FurtherQueuePair>(max_queue_pairs - 1)));
  EXPECT_FALSE(is_sensible(std::vector<FurtherQueuePair>(max_queue_pairs)));
}

TEST(RdmaEndpoint, Line11_IsHeldToItsBounds) {
  const auto good = [] { return Endpoint{min_message_bytes, min_messages, {rail()}}; };
  const auto is_sensible = [](const Endpoint& endpoint) { return check_endpoint(endpoint, {}).empty(); };
  const auto with_rail = [&](auto change) {
    Endpoint endpoint = good();
    change(endpoint.rails[0]);
    return endpoint;
  };
  constexpr std::uint64_t max_24_bits = (1U << 24) - 1;
  EXPECT_TRUE(is_sensible(good()));
  EXPECT_TRUE(is_sensible({max_message_bytes, max_messages, {rail()}}));
  EXPECT_FALSE(is_sensible({min_message_bytes - 1, min_messages, {rail()}}));
  EXPECT_FALSE(is_sensible({max_message_bytes + 1, min_messages, {rail()}}));
  EXPECT_FALSE(is_sensible({min_message_bytes, min_messages - 1, {rail()}}));
  EXPECT_FALSE(is_sensible({min_message_bytes, max_messages + 1, {rail()}}));
  EXPECT_FALSE(is_sensible({min_message_bytes, min_messages, {}}));

  const auto with_first_buffers = [&](std::uint64_t count) {
    Endpoint endpoint = good();
    endpoint.first_messages = count;
    return endpoint;
  };
  EXPECT_TRUE(is_sensible(with_first_buffers(min_first_messages)));
  EXPECT_TRUE(is_sensible(with_first_buffers(min_messages)));
  EXPECT_FALSE(is_sensible(with_first_buffers(min_first_messages - 1)));
  EXPECT_FALSE(is_sensible(with_first_buffers(min_messages + 1)));

  EXPECT_TRUE(is_sensible(with_rail([](auto& one) { one.rail = max_rails - 1; })));
  EXPECT_FALSE(is_sensible(with_rail([](auto& one) { one.rail = max_rails; })));
  EXPECT_FALSE(is_sensible(with_rail([](auto& one) { one.gid.resize(15); })));
  EXPECT_TRUE(is_sensible(with_rail([](auto& one) { one.lid = 0xffff; })));
  EXPECT_FALSE(is_sensible(with_rail([](auto& one) { one.lid = 0x10000; })));
  EXPECT_TRUE(is_sensible(with_rail([](auto& one) { one.queue_pair = max_24_bits; })));
  EXPECT_FALSE(is_sensible(with_rail([](auto& one) { one.queue_pair = max_24_bits + 1; })));
  EXPECT_TRUE(is_sensible(with_rail([](auto& one) { one.packet_number = max_24_bits; })));
  EXPECT_FALSE(is_sensible(with_rail([](auto& one) { one.packet_number = max_24_bits + 1; })));
  EXPECT_FALSE(is_sensible(with_rail([](auto& one) { one.mtu = 1000; })));
  EXPECT_TRUE(is_sensible(with_rail([](auto& one) { one.reads_taken = one.reads_made = 255; })));
  EXPECT_FALSE(is_sensible(with_rail([](auto& one) { one.reads_taken = 256; })));
  EXPECT_FALSE(is_sensible(with_rail([](auto& one) { one.reads_made = 256; })));
  EXPECT_TRUE(is_sensible(with_rail([](auto& one) { one.max_message = max_message_bytes; })));
  EXPECT_FALSE(is_sensible(with_rail([](auto& one) { one.max_message = max_message_bytes - 1; })));
  EXPECT_FALSE(is_sensible(with_rail([](auto& one) { one.regions.resize(2); })));

  Endpoint many = good();
  many.rails.resize(max_rails, rail());
  for (std::size_t i = 0; i < many.rails.size(); ++i) {
    many.rails[i].rail = i;
  }
  EXPECT_TRUE(is_sensible(many));
  many.rails.back().rail = max_rails - 2;
  EXPECT_EQ(check_endpoint(many, {}), "rail 14 after rail 14");
  many.rails.back().rail = 3;
  EXPECT_EQ(check_endpoint(many, {}), "rail 3 after rail 14");
  many.rails.resize(max_rails + 1);
  EXPECT_EQ(check_endpoint(many, {}), "17 rails, at least 1 and at most 16");
}

TEST(RdmaEndpoint, APortThatNeedsAGlobalRouteSaysSoAndOthersSayNothing) {
  Endpoint endpoint;
  endpoint.rails.push_back(rail());
  std::error_code ec;
  const auto other = kit::decode_endpoint<Endpoint>(kit::encode_endpoint(endpoint), ec);
  ASSERT_FALSE(ec) << ec.message();
  EXPECT_EQ(other.rails.at(0).global_route, std::nullopt);
  endpoint.rails[0].global_route = 1;
  const auto with = kit::decode_endpoint<Endpoint>(kit::encode_endpoint(endpoint), ec);
  ASSERT_FALSE(ec) << ec.message();
  EXPECT_EQ(with.rails.at(0).global_route, 1U);
}

TEST(RdmaError, StatusesBelongToConditions) {
  EXPECT_EQ(std::error_code(wc_status::retry_exceeded).category().name(), std::string("kvferry.rdma"));
  const std::set memory{wc_status::local_protection_error, wc_status::local_access_error,
                        wc_status::memory_window_bind_error};
  const std::set breach{wc_status::local_length_error, wc_status::bad_response, wc_status::remote_invalid_request,
                        wc_status::remote_invalid_rd_request, wc_status::remote_access_error};
  const std::set refusals{wc_status::remote_access_error, wc_status::remote_invalid_request,
                          wc_status::remote_operation_error};
  for (int value = 1; value <= static_cast<int>(wc_status::general); ++value) {
    const auto status = static_cast<wc_status>(value);
    const std::error_code code = status;
    EXPECT_EQ(code == condition::invalid_argument, memory.contains(status)) << code.message();
    EXPECT_EQ(code == condition::may_still_land, !refusals.contains(status)) << code.message();
    EXPECT_EQ(code == condition::peer_failed, !memory.contains(status)) << code.message();
    EXPECT_EQ(code == condition::retryable, !memory.contains(status) && !breach.contains(status)) << code.message();
  }
  EXPECT_NE(std::error_code(wc_status::success), condition::peer_failed);
  EXPECT_NE(std::error_code(wc_status::retry_exceeded), condition::timed_out);
  EXPECT_FALSE(std::error_code(wc_status::remote_access_error).message().empty());
}

}  // namespace
}  // namespace kvferry::rdma
