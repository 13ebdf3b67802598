// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <memory>
#include <string>
#include <system_error>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/testing/conformance_test.hpp>
#include <kvferry/testing/suite_macros.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// Wrong arguments are refused before any I/O: nothing moves, the error is the promised one, and it is explained.
class ArgumentsTests : public ConformanceBase {
 protected:
  static constexpr TransferKind write = TransferKind::write;
  static constexpr TransferKind read = TransferKind::read;

  [[nodiscard]] std::vector<TransferKind> one_sided_kinds() {
    std::vector<TransferKind> kinds;
    if (capabilities().write) {
      kinds.push_back(write);
    }
    if (capabilities().read) {
      kinds.push_back(read);
    }
    return kinds;
  }

  /// Expects the batch to be refused, whole, with a diagnostic that has all the parts in it.
  void expect_refused(TransferKind kind, Node& from, Node& to, const Objects& objects, const TransferSpec& spec,
                      errc code, std::initializer_list<std::string> parts) {
    SCOPED_TRACE(to_string(kind));
    const auto transfer = start(kind, from, to, objects, spec);
    EXPECT_EQ(transfer->outcome(), failed(code)) << transfer->diagnostic();
    EXPECT_TRUE(transfer->consistent());
    EXPECT_NE(transfer->diagnostic().find(to.id()), std::string::npos) << transfer->diagnostic();
    for (const std::string& part : parts) {
      EXPECT_NE(transfer->diagnostic().find(part), std::string::npos)
          << part << " is not in: " << transfer->diagnostic();
    }
  }

 public:
  void AccessIsEnforced() {
    const std::vector<RegionSpec> regions{
        {4, 64, Access::none}, {4, 64, Access::read}, {4, 64, Access::write}, {4, 64, Access::read_write}};
    const auto [a, b] = connected_pair({}, {.regions = regions, .local_bytes = 0});
    for (const TransferKind kind : one_sided_kinds()) {
      const Access wanted = kind == write ? Access::write : Access::read;
      for (std::uint32_t region = 0; region < regions.size(); ++region) {
        SCOPED_TRACE(::testing::Message() << to_string(kind) << " of region " << region);
        fill_constant(b.region(region), background);
        const Objects objects = a.objects({64, 10}).fill(1);
        const auto transfer = start(kind, a, b, objects, without_checksums(at({0, 3}, region)));
        if (allows(regions[region].access, wanted)) {
          EXPECT_EQ(transfer->outcome(), done(2)) << transfer->diagnostic();
          continue;
        }
        EXPECT_EQ(transfer->outcome(), failed(errc::access_denied)) << transfer->diagnostic();
        EXPECT_TRUE(transfer->consistent());
        EXPECT_NE(transfer->diagnostic().find(b.id()), std::string::npos) << transfer->diagnostic();
        EXPECT_TRUE(b.untouched(region));
        EXPECT_TRUE(objects.match(1)) << "bytes of the peer's were read";
      }
    }
  }

  void PairedOperationsIgnoreAccess() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const auto [a, b] = connected_pair();
    // Local objects lie in a region that is closed to peers.
    const Objects source = a.objects({64}).fill(2);
    const Objects target = b.objects({64});
    const auto recv = start(TransferKind::recv, b, a, target);
    const auto send = start(TransferKind::send, a, b, source);
    EXPECT_EQ(send->outcome(), done(1));
    EXPECT_EQ(recv->outcome(), done(1));
    EXPECT_TRUE(target.match(2));
  }

  void UnknownRegion() {
    const auto [a, b] = connected_pair({}, {.regions = {{4, 64}, {4, 64}}, .local_bytes = 0});
    const Objects objects = a.objects({8});
    for (const TransferKind kind : one_sided_kinds()) {
      expect_refused(kind, a, b, objects, at({0}, 2), errc::unknown_region, {"2"});
      expect_refused(kind, a, b, objects, at({0}, UINT32_MAX), errc::unknown_region, {"4294967295", "2"});
    }
  }

  void PeerWithoutRegions() {
    const auto [a, b] = connected_pair({}, {.regions = {}, .local_bytes = 0});
    const Objects objects = a.objects({8});
    for (const TransferKind kind : one_sided_kinds()) {
      expect_refused(kind, a, b, objects, at({0}), errc::unknown_region, {"0"});
    }
  }

  void IndexOutOfRange() {
    const auto [a, b] = connected_pair({}, {.regions = {{37, 4096}}, .local_bytes = 0});
    const std::uint64_t max = std::numeric_limits<std::uint64_t>::max();
    const Objects objects = a.objects({4096, 4096, 4096});
    for (const TransferKind kind : one_sided_kinds()) {
      // The last ones wrap around to valid addresses when multiplied by the page size, or when the size is added.
      for (const std::uint64_t index :
           {std::uint64_t{37}, std::uint64_t{38}, std::uint64_t{1} << 32, max, max - 1, std::uint64_t{1} << 52,
            (std::uint64_t{1} << 52) + 1, std::uint64_t{1} << 63, max / 4096, max / 4096 - 1}) {
        SCOPED_TRACE(index);
        const std::vector<std::uint64_t> indexes{0, index, 36};
        std::vector<std::error_code> statuses(3);
        TransferSpec spec = at(indexes);
        spec.statuses = statuses;
        const auto transfer = start(kind, a, b, objects, spec);
        EXPECT_EQ(transfer->outcome(), failed(errc::index_out_of_range)) << transfer->diagnostic();
        EXPECT_TRUE(statuses[0]);
        EXPECT_EQ(statuses[1], errc::index_out_of_range);
        EXPECT_TRUE(statuses[2]);
        for (const std::string& part : {b.id(), std::to_string(index), std::string("37")}) {
          EXPECT_NE(transfer->diagnostic().find(part), std::string::npos) << transfer->diagnostic();
        }
      }
    }
    EXPECT_TRUE(b.untouched());
    EXPECT_TRUE(objects.untouched());
  }

  void ObjectLargerThanThePage() {
    const auto [a, b] = connected_pair({}, {.regions = {{4, 4096}}, .local_bytes = 0});
    const Objects objects = a.objects({4096, 4097, 1});
    for (const TransferKind kind : one_sided_kinds()) {
      expect_refused(kind, a, b, objects, at({0, 1, 2}), errc::object_too_large, {"4097", "4096"});
    }
    EXPECT_TRUE(b.untouched());
    EXPECT_TRUE(objects.untouched());
  }

  void CountsOfObjectsAndIndexesDiffer() {
    const auto [a, b] = connected_pair();
    const std::vector<std::uint64_t> indexes = consecutive(0, 29);
    const Objects objects = a.objects(31, 16);
    for (const TransferKind kind : one_sided_kinds()) {
      expect_refused(kind, a, b, objects, at(indexes), errc::count_mismatch, {"31", "29"});
      expect_refused(kind, a, b, objects, at({}), errc::count_mismatch, {"31", "0"});
      expect_refused(kind, a, b, a.objects({16}), at(indexes), errc::count_mismatch, {"1", "29"});
    }
    EXPECT_TRUE(b.untouched());
  }

  void CountsOfObjectsAndStatusesDiffer() {
    const auto [a, b] = connected_pair();
    const Objects objects = a.objects({16, 16});
    const std::vector<std::uint64_t> indexes{0, 1};
    for (const TransferKind kind : kinds()) {
      for (const std::size_t count : {std::size_t{1}, std::size_t{3}}) {
        SCOPED_TRACE(to_string(kind));
        std::vector<std::error_code> statuses(count);
        TransferSpec spec = spec_of(kind, indexes);
        spec.statuses = statuses;
        const auto transfer = start(kind, a, b, objects, spec);
        EXPECT_EQ(transfer->outcome(), failed(errc::count_mismatch)) << transfer->diagnostic();
        EXPECT_NE(transfer->diagnostic().find(std::to_string(count)), std::string::npos) << transfer->diagnostic();
      }
    }
  }

  void CountsOfObjectsAndSizesDiffer() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const auto [a, b] = connected_pair();
    std::vector<std::size_t> sizes(3);
    TransferSpec spec = tagged(0);
    spec.sizes = sizes;
    expect_refused(TransferKind::recv, a, b, a.objects({16, 16}), spec, errc::count_mismatch, {"2", "3"});
  }

  void EmptyBatch() {
    const auto [a, b] = connected_pair();
    for (const TransferKind kind : kinds()) {
      SCOPED_TRACE(to_string(kind));
      EXPECT_EQ(start(kind, a, b, Objects())->outcome(), done(0));
      EXPECT_EQ(start(kind, a, "stranger", Objects())->outcome(), done(0));
    }
    std::error_code error = std::make_error_code(std::errc::io_error);
    EXPECT_EQ(a->batched_write({}, {.peer_id = b.id()}, error), 0U);
    EXPECT_EQ(error, capabilities().write ? std::error_code() : make_error_code(errc::not_supported));
    EXPECT_FALSE(a->remote_xfer_handler_exists("stranger"));
  }

  void EmptyBatchMeetsNobody() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const auto [a, b] = connected_pair();
    const Objects source = a.objects({16}).fill(3);
    const Objects target = b.objects({16});
    const auto recv = start(TransferKind::recv, b, a, target, tagged(5));
    EXPECT_EQ(start(TransferKind::send, a, b, Objects(), tagged(5))->outcome(), done(0));
    EXPECT_EQ(start(TransferKind::send, a, b, source, tagged(5))->outcome(), done(1));
    EXPECT_EQ(recv->outcome(), done(1));
    EXPECT_TRUE(target.match(3));
  }

  void SuccessOverwritesStatuses() {
    const auto [a, b] = connected_pair();
    for (const TransferKind kind : one_sided_kinds()) {
      const auto transfer = start_any(kind, a, b, a.objects({16, 16, 16}));
      EXPECT_EQ(transfer->outcome(), done(3));
      EXPECT_EQ(transfer->statuses(), std::vector<std::error_code>(3));
    }
  }

  void WhatTheTransportCannotDo() {
    const Capabilities can = capabilities();
    const auto [a, b] = connected_pair();
    const Objects objects = a.objects({16});
    const std::vector<std::pair<TransferKind, bool>> all{{TransferKind::send, can.send_recv},
                                                         {TransferKind::recv, can.send_recv},
                                                         {TransferKind::write, can.write},
                                                         {TransferKind::read, can.read}};
    for (const auto& [kind, supported] : all) {
      if (!supported) {
        EXPECT_EQ(start_any(kind, a, b, objects)->outcome(), failed(errc::not_supported)) << to_string(kind);
      }
    }
    if (!can.notifications) {
      EXPECT_EQ(start_receive_notification(a)->error(), errc::not_supported);
    }
    expect_usable(a, b);
  }

  void TooManyPendingOperations() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    NodeSpec spec;
    spec.options.max_pending_operations = 8;
    const auto [a, b] = connected_pair(spec);
    std::vector<std::shared_ptr<Transfer>> pending;
    std::vector<Objects> targets;
    for (std::uint64_t tag = 0; tag < 8; ++tag) {
      targets.push_back(a.objects({16}));
      pending.push_back(start(TransferKind::recv, a, b, targets.back(), tagged(tag)));
    }
    EXPECT_EQ(start(TransferKind::recv, a, b, a.objects({16}), tagged(8))->outcome(), failed(errc::resource_limit));
    for (std::uint64_t tag = 0; tag < 8; ++tag) {
      ASSERT_EQ(start(TransferKind::send, b, a, b.objects({16}).fill(tag), tagged(tag))->outcome(), done(1));
      ASSERT_EQ(pending[tag]->outcome(), done(1)) << "harmed by a refused operation";
      EXPECT_TRUE(targets[tag].match(tag));
    }
    expect_usable(a, b);
  }
};

KVFERRY_TESTING_SUITE(ArgumentsTest, ArgumentsTests, AccessIsEnforced, PairedOperationsIgnoreAccess, UnknownRegion,
                      PeerWithoutRegions, IndexOutOfRange, ObjectLargerThanThePage, CountsOfObjectsAndIndexesDiffer,
                      CountsOfObjectsAndStatusesDiffer, CountsOfObjectsAndSizesDiffer, EmptyBatch,
                      EmptyBatchMeetsNobody, SuccessOverwritesStatuses, WhatTheTransportCannotDo,
                      TooManyPendingOperations);

}  // namespace kvferry::testing
