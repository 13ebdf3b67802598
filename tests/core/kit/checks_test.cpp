// SPDX-License-Identifier: Apache-2.0
// Requests that are refused before they are tried: each bound from both of its sides.
#include <kvferry/kit/checks.hpp>

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <system_error>
#include <vector>

#include <kvferry/error.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
namespace {

std::byte object_memory[64];
std::byte* const nowhere = nullptr;

Capabilities everything() {
  Capabilities all;
  all.send_recv = all.write = all.read = all.notifications = all.ranges = true;
  all.max_notification_bytes = 8;
  return all;
}

TransferRequest write_of(std::size_t objects) {
  TransferRequest request;
  request.kind = TransferKind::write;
  request.peer_id = "peer";
  request.objects.assign(objects, MutableBuffer(object_memory, 8));
  request.remote_indexes.assign(objects, 0);
  return request;
}

/// A write of two objects that is changed.
template <class Change>
std::error_code error_of(Change change, const Capabilities& capabilities = everything()) {
  TransferRequest request = write_of(2);
  change(request);
  const Failure failure = check_request(request, capabilities);
  EXPECT_EQ(failure.sentence.empty(), !failure.code) << failure.sentence;
  return failure.code;
}

TEST(Checks, OfARequest) {
  std::vector<std::error_code> statuses(3);
  std::vector<std::size_t> sizes(3);
  EXPECT_FALSE(error_of([](auto&) {}));
  EXPECT_FALSE(error_of([](auto& request) { request.notification.resize(8); }));
  EXPECT_EQ(error_of([](auto& request) { request.notification.resize(9); }), errc::notification_too_large);
  EXPECT_EQ(error_of([](auto& request) { request.peer_id.clear(); }), errc::empty_peer_id);
  EXPECT_EQ(error_of([](auto& request) { request.remote_indexes.resize(1); }), errc::count_mismatch);
  EXPECT_EQ(error_of([](auto& request) { request.kind = TransferKind::send; }), errc::count_mismatch)
      << "a send has no remote indexes";
  EXPECT_FALSE(error_of([](auto& request) { request.kind = TransferKind::send, request.remote_indexes.clear(); }));
  EXPECT_EQ(error_of([&](auto& request) { request.statuses = statuses; }), errc::count_mismatch);
  EXPECT_FALSE(error_of([&](auto& request) { request.statuses = std::span(statuses).first(2); }));
  EXPECT_EQ(error_of([&](auto& request) { request.sizes = sizes; }), errc::count_mismatch);
  EXPECT_FALSE(error_of([&](auto& request) { request.sizes = std::span(sizes).first(2); }));
  EXPECT_FALSE(error_of([](auto& request) { request.kind = TransferKind::read, request.notification.resize(1); }));
  EXPECT_EQ(error_of([](auto& request) {
              request.kind = TransferKind::send, request.remote_indexes.clear(), request.notification.resize(1);
            }),
            errc::not_supported);
  EXPECT_FALSE(error_of([](auto& request) {
    request.objects.clear(), request.remote_indexes.clear(), request.notification.resize(1);
  }));
  EXPECT_FALSE(error_of([](auto& request) { request.notification.resize(1), request.notification_key = 5; }));
  EXPECT_EQ(error_of([](auto& request) { request.notification_key = 5; }), std::errc::invalid_argument);
  EXPECT_EQ(error_of([](auto& request) { request.objects[1] = MutableBuffer(nowhere, 1); }), std::errc::bad_address);
  EXPECT_FALSE(error_of([](auto& request) { request.objects[1] = MutableBuffer(nowhere, 0); }));
}

TEST(Checks, OfWhatATransportCanDo) {
  for (const auto kind : {TransferKind::write, TransferKind::read, TransferKind::send, TransferKind::recv}) {
    Capabilities one;
    (kind == TransferKind::write  ? one.write
     : kind == TransferKind::read ? one.read
                                  : one.send_recv) = true;
    for (const auto asked : {TransferKind::write, TransferKind::read, TransferKind::send, TransferKind::recv}) {
      const bool paired = kind == TransferKind::send || kind == TransferKind::recv;
      const bool can = asked == kind || (paired && (asked == TransferKind::send || asked == TransferKind::recv));
      const auto change = [&](TransferRequest& request) {
        request.kind = asked;
        if (!request.one_sided()) {
          request.remote_indexes.clear();
        }
      };
      EXPECT_EQ(error_of(change, one), can ? std::error_code() : std::error_code(errc::not_supported));
    }
  }
}

TEST(Checks, OfARequestAgainstThePeersRegions) {
  PeerDescription peer;
  peer.regions = {{16, 8, Access::write, 0}, {16, 8, Access::read, 1}};
  const auto error_against_peer = [&](auto change) {
    TransferRequest request = write_of(1);
    change(request);
    return check_against_peer(request, peer, {}).code;
  };
  EXPECT_FALSE(error_against_peer([](auto& request) { request.remote_indexes[0] = 1; }));
  EXPECT_EQ(error_against_peer([](auto& request) { request.remote_indexes[0] = 2; }), errc::index_out_of_range);
  EXPECT_EQ(error_against_peer([](auto& request) { request.remote_region = 2; }), errc::unknown_region);
  EXPECT_EQ(error_against_peer([](auto& request) { request.remote_region = 1; }), errc::access_denied);
  EXPECT_EQ(error_against_peer([](auto& request) { request.kind = TransferKind::read; }), errc::access_denied);
  EXPECT_FALSE(
      error_against_peer([](auto& request) { request.kind = TransferKind::read, request.remote_region = 1; }));
  EXPECT_EQ(error_against_peer([](auto& request) { request.objects[0] = MutableBuffer(object_memory, 9); }),
            errc::object_too_large);
}

TEST(Checks, OfRegionsThatThePeerHasRemoved) {
  PeerDescription peer;
  peer.regions = {{16, 8, Access::read_write, 1}, {32, 16, Access::read_write, 4}};
  peer.next_region = 6;
  const auto error_of_region = [&](std::uint32_t number) {
    TransferRequest request = write_of(2);
    request.remote_region = number;
    const auto of_pages = check_against_peer(request, peer, {}).code;
    request.remote_indexes.clear();
    request.remote_ranges.assign(2, RemoteRange::contiguous(number, 0, 8));
    EXPECT_EQ(check_against_peer(request, peer, {}).code, of_pages);
    return of_pages;
  };
  EXPECT_FALSE(error_of_region(1));
  EXPECT_FALSE(error_of_region(4));
  for (const std::uint32_t gone : {0U, 2U, 3U, 5U}) {
    EXPECT_EQ(error_of_region(gone), errc::region_gone);
  }
  EXPECT_EQ(error_of_region(6), errc::unknown_region);
}

TEST(Checks, OfTheNumbersOfAPeersRegions) {
  using Numbers = std::vector<std::uint64_t>;
  constexpr std::uint64_t end = std::uint64_t{1} << 31;
  const auto error_of_numbers = [](std::size_t regions, const std::optional<Numbers>& numbers,
                                   std::optional<std::uint64_t> next, std::optional<std::uint64_t> given = {}) {
    return check_region_numbers("peer", regions, numbers, next, given).code;
  };
  EXPECT_FALSE(error_of_numbers(2, {}, {}));
  EXPECT_FALSE(error_of_numbers(2, {}, 2));
  EXPECT_FALSE(error_of_numbers(2, Numbers{1, 5}, 6));
  EXPECT_FALSE(error_of_numbers(0, Numbers{}, 7));
  EXPECT_FALSE(error_of_numbers(1, Numbers{end - 1}, end));
  EXPECT_FALSE(error_of_numbers(2, Numbers{1, 5}, 6, 6));
  EXPECT_EQ(error_of_numbers(2, Numbers{1, 5}, 6, 7), errc::invalid_region);
  EXPECT_EQ(error_of_numbers(2, {}, {}, 3), errc::invalid_region);
  EXPECT_EQ(error_of_numbers(2, {}, 1), errc::invalid_region);
  EXPECT_EQ(error_of_numbers(2, Numbers{1}, 6), errc::invalid_region);
  EXPECT_EQ(error_of_numbers(2, Numbers{1, 1}, 6), errc::invalid_region);
  EXPECT_EQ(error_of_numbers(2, Numbers{5, 1}, 6), errc::invalid_region);
  EXPECT_EQ(error_of_numbers(2, Numbers{1, 5}, 5), errc::invalid_region);
  EXPECT_EQ(error_of_numbers(1, Numbers{end}, {}), errc::invalid_region);
  EXPECT_EQ(error_of_numbers(1, Numbers{~std::uint64_t{0}}, {}), errc::invalid_region);
  EXPECT_EQ(error_of_numbers(1, {}, end + 1), errc::invalid_region);
}

TEST(Checks, WhatAHandshakeLeavesOutOfRegionsFollowsFromTheOthers) {
  InitQuestion question;
  question.regions = {{4096, 4096, 3}, {8192, 4096, 1}};
  PeerDescription peer;
  read_regions(question, peer);
  EXPECT_EQ(peer.regions.back().number, 1U);
  EXPECT_EQ(peer.next_region, 2U);
  EXPECT_EQ(peer.given_regions, 2U);
  question.region_numbers = {1, 5};
  read_regions(question, peer);
  EXPECT_EQ(peer.regions.front().number, 1U);
  EXPECT_EQ(peer.regions.back().number, 5U);
  EXPECT_EQ(peer.next_region, 6U);
  EXPECT_EQ(peer.given_regions, 6U);
  question.next_region = 9;
  question.given_regions = 3;
  read_regions(question, peer);
  EXPECT_EQ(peer.next_region, 9U);
  EXPECT_EQ(peer.given_regions, 3U);
  question.regions.clear();
  question.region_numbers->clear();
  question.next_region.reset();
  question.given_regions.reset();
  read_regions(question, peer);
  EXPECT_EQ(peer.next_region, 0U);
}

TEST(Checks, OfPageSizesThatDiffer) {
  PeerDescription peer;
  peer.regions = {{16, 8, Access::read_write, 0}, {32, 16, Access::read_write, 1}};
  peer.given_regions = 2;
  const std::vector<MemoryRegion> own{{object_memory, 16, 16}};
  TransferRequest request = write_of(1);
  EXPECT_FALSE(check_against_peer(request, peer, {}).code);
  EXPECT_EQ(check_against_peer(request, peer, own).code, errc::page_size_mismatch);
  request.remote_region = 1;
  EXPECT_FALSE(check_against_peer(request, peer, own).code) << "this channel has no second region";
  request.remote_region = 0;
  peer.given_regions = 0;
  EXPECT_FALSE(check_against_peer(request, peer, own).code) << "the peer has added it later";
  peer.given_regions = 2;
  request.remote_indexes.clear();
  request.remote_ranges = {RemoteRange::contiguous(0, 3, 8)};
  EXPECT_FALSE(check_against_peer(request, peer, own).code);
}

TEST(Checks, OfRangesWhereThereAreNone) {
  Capabilities no_ranges = everything();
  no_ranges.ranges = false;
  const auto ranged = [](TransferRequest& request) {
    request.remote_indexes.clear();
    request.remote_ranges.assign(2, RemoteRange::contiguous(0, 0, 8));
  };
  const auto strided = [](TransferRequest& request) { request.local_strides.assign(2, {4, 4}); };
  EXPECT_FALSE(error_of(ranged));
  EXPECT_FALSE(error_of(strided));
  EXPECT_EQ(error_of(ranged, no_ranges), errc::not_supported);
  EXPECT_EQ(error_of(strided, no_ranges), errc::not_supported);
}

TEST(Checks, ChecksumsThatTheTransportHasNot) {
  Capabilities with = everything();
  with.checksums = true;
  const auto asked = [](auto& request) { request.checksums = true; };
  EXPECT_FALSE(error_of(asked, with));
  EXPECT_EQ(error_of(asked), errc::not_supported);
  EXPECT_FALSE(error_of([](auto& request) { request.checksums = false; }));
}

TEST(Checks, OfAnId) {
  EXPECT_FALSE(check_id("a", "the peer's"));
  EXPECT_FALSE(check_id(std::string(max_peer_id_bytes, 'a'), "the peer's"));
  EXPECT_EQ(check_id(std::string(max_peer_id_bytes + 1, 'a'), "the peer's").code, errc::invalid_peer_id);
  EXPECT_EQ(check_id("", "the peer's").code, errc::empty_peer_id);
  EXPECT_EQ(check_id("\xff", "the peer's").code, errc::invalid_peer_id);
  EXPECT_EQ(check_id("a\nb", "the peer's").code, errc::invalid_peer_id);
}

TEST(Checks, OfOwnRegions) {
  const auto error_of_regions = [](const std::vector<MemoryRegion>& regions) {
    try {
      check_regions(regions);
      return std::error_code();
    } catch (const TransferError& error) {
      return error.code();
    }
  };
  const MemoryRegion good{object_memory, 16, 8};
  EXPECT_FALSE(error_of_regions({}));
  EXPECT_FALSE(error_of_regions(std::vector(1024, good)));
  EXPECT_EQ(error_of_regions(std::vector(1025, good)), errc::invalid_region);
  EXPECT_EQ(error_of_regions({good, {nullptr, 16, 8}}), errc::invalid_region);
  EXPECT_EQ(error_of_regions({good, {object_memory, 0, 8}}), errc::invalid_region);
  EXPECT_EQ(error_of_regions({good, {object_memory, 16, 0}}), errc::invalid_region);
  EXPECT_EQ(error_of_regions({good, {object_memory, 17, 8}}), errc::invalid_region);
  // NOLINTNEXTLINE(performance-no-int-to-ptr): memory that can't be
  EXPECT_EQ(error_of_regions({good, {reinterpret_cast<std::byte*>(~std::uintptr_t{4095}), 8192, 4096}}),
            errc::invalid_region);
}

TEST(Checks, OfAPeersHandshake) {
  const LocalFacts local{"tcp", 1};
  const RegionTuple good{16, 8, 3};
  const auto error_of_peer = [&](const std::vector<RegionTuple>& regions, const LocalFacts& facts,
                                 std::uint64_t version = protocol_version, const std::string& transport = "tcp",
                                 std::uint64_t incarnation = 2) {
    return check_handshake(facts, "peer", version, transport, incarnation, regions).code;
  };
  EXPECT_FALSE(error_of_peer({good}, local));
  EXPECT_FALSE(error_of_peer(std::vector(1024, good), local));
  EXPECT_EQ(error_of_peer(std::vector(1025, good), local), errc::invalid_region);
  EXPECT_EQ(error_of_peer({good}, local, protocol_version + 1), errc::version_mismatch);
  EXPECT_EQ(error_of_peer({good}, local, protocol_version, "rdma"), errc::transport_mismatch);
  EXPECT_EQ(error_of_peer({good}, local, protocol_version, "tcp", 1), errc::self_connection);
  EXPECT_EQ(error_of_peer({good, {16, 0, 3}}, local), errc::invalid_region);
  EXPECT_EQ(error_of_peer({good, {0, 8, 3}}, local), errc::invalid_region);
  EXPECT_EQ(error_of_peer({good, {17, 8, 3}}, local), errc::invalid_region);
  EXPECT_EQ(error_of_peer({good, {16, 8, 4}}, local), errc::invalid_region);
}

}  // namespace
}  // namespace kvferry::kit
