// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include <kvferry/testing/conformance_test.hpp>
#include <kvferry/testing/suite_macros.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// Batches of all lengths, and many batches at a time.
class BatchesTests : public ConformanceBase {
 protected:
  static constexpr std::size_t page_size = 4096;
  /// More objects than any queue, vector of buffers, or message holds.
  static constexpr std::size_t many = sanitized ? 20'000 : 100'000;

  /// Long enough for the whole of a large batch on a busy machine under a sanitizer.
  [[nodiscard]] std::chrono::milliseconds patience() const { return 3 * limit(); }

  /// A permutation of all pages in which neighbours are now and then neighbours still.
  [[nodiscard]] static std::vector<std::uint64_t> scattered(std::size_t count) {
    std::vector<std::uint64_t> indexes(count);
    std::iota(indexes.begin(), indexes.end(), std::uint64_t{0});
    for (std::size_t i = 0; i + 7 < count; i += 7) {
      std::swap(indexes[i], indexes[count - 1 - (i * 31) % count]);
    }
    return indexes;
  }

  /// Writes all pages of a's region to scattered pages of b's, then reads them back.
  void write_and_read_back(std::size_t count) {
    const NodeSpec spec{.regions = {{count, page_size}}, .local_bytes = 0};
    const auto [a, b] = connected_pair(spec, spec);
    const std::vector<std::uint64_t> indexes = scattered(count);
    std::vector<MutableBuffer> pages;
    for (std::uint64_t i = 0; i < count; ++i) {
      pages.push_back(a.page(i));
      fill(pages.back(), i);
    }
    TransferSpec spec_of_all = within(patience(), at(indexes));
    spec_of_all.peer_id = b.id();
    if (capabilities().write) {
      expect_done(a->make_request(TransferKind::write, ConstObjects(pages), spec_of_all), a);
    }
    for (std::size_t i = 0; i < count; ++i) {
      if (!capabilities().write) {
        fill(b.page(indexes[i]), i);
      }
      ASSERT_TRUE(matches(b.page(indexes[i]), i)) << "object " << i;
    }
    if (capabilities().read) {
      fill_constant(a.region(), background);
      expect_done(a->make_request(TransferKind::read, MutableObjects(pages), spec_of_all), a);
      for (std::size_t i = 0; i < count; ++i) {
        ASSERT_TRUE(matches(pages[i], i)) << "object " << i;
      }
    }
  }

  void expect_done(TransferRequest request, Node& node) {
    SCOPED_TRACE(to_string(request.kind));
    const std::size_t count = request.objects.size();
    const auto transfer = watch<Transfer>("a batch of " + std::to_string(count), count);
    request.statuses = transfer->statuses();
    request.diagnostic = &transfer->diagnostic();
    {
      const InitiationScope initiating;
      node->async_transfer(std::move(request), transfer->handler());
    }
    ASSERT_TRUE(transfer->wait_for(patience() + limit()));
    ASSERT_EQ(transfer->outcome(), done(count)) << transfer->diagnostic();
    EXPECT_TRUE(transfer->consistent());
  }

 public:
  void One() { write_and_read_back(1); }

  void Thousand() { write_and_read_back(1000); }

  void Many() { write_and_read_back(many); }

  void EveryLengthUpToAHundred() {
    KVFERRY_TESTING_REQUIRE(write);
    const auto [a, b] = connected_pair({.regions = {{100, 64}}}, {.regions = {{100, 64}}});
    for (std::size_t count = 1; count <= 100; ++count) {
      a.reuse_local_memory();
      const Objects objects = a.objects(count, 64).fill(1000 * count);
      const std::vector<std::uint64_t> indexes = consecutive(100 - count, count);
      const auto transfer = start(TransferKind::write, a, b, objects, at(indexes));
      ASSERT_EQ(transfer->outcome(), done(count)) << transfer->diagnostic();
      for (std::size_t i = 0; i < count; ++i) {
        ASSERT_TRUE(matches(b.page(indexes[i]), 1000 * count + i)) << i << " of " << count;
      }
    }
  }

  void ManyPaired() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const std::size_t count = many;
    const NodeSpec spec{.regions = {}, .local_bytes = count * (64 + guard_size) + guard_size};
    const auto [a, b] = connected_pair(spec, spec);
    const Objects source = a.objects(count, 64).fill(1);
    const Objects target = b.objects(count, 64);
    const auto receiving = start(TransferKind::recv, b, a, target, within(patience()));
    const auto sending = start(TransferKind::send, a, b, source, within(patience()));
    ASSERT_TRUE(receiving->wait_for(patience()));
    ASSERT_EQ(sending->outcome(), done(count)) << sending->diagnostic();
    ASSERT_EQ(receiving->outcome(), done(count)) << receiving->diagnostic();
    EXPECT_TRUE(target.match(1));
    EXPECT_EQ(receiving->sizes(), std::vector<std::size_t>(count, 64));
  }

  void ThousandOperationsOutstanding() {
    const std::size_t count = 1000;
    const auto [a, b] =
        connected_pair({.local_bytes = 2 << 20}, {.regions = {{2 * count, 64}}, .local_bytes = 2 << 20});
    struct Expected {
      std::shared_ptr<Transfer> transfer;
      Objects target;
      std::uint64_t seed;
    };
    std::vector<Expected> filled;
    std::vector<std::shared_ptr<Transfer>> transfers;
    const Capabilities can = capabilities();
    for (std::uint64_t i = 0; i < count; ++i) {
      fill(b.page(count + i), 5000 + i);
      if (can.send_recv) {
        const Objects target = b.objects({100});
        filled.push_back({start(TransferKind::recv, b, a, target, tagged(i)), target, i});
      }
      if (can.read) {
        const Objects target = a.objects({64});
        filled.push_back({start(TransferKind::read, a, b, target, at({count + i})), target, 5000 + i});
      }
    }
    for (std::uint64_t i = 0; i < count; ++i) {
      if (can.write) {
        transfers.push_back(start(TransferKind::write, a, b, a.objects({64}).fill(9000 + i), at({i})));
      }
      if (can.send_recv) {
        const std::uint64_t tag = count - 1 - i;
        transfers.push_back(start(TransferKind::send, a, b, a.objects({100}).fill(tag), tagged(tag)));
      }
    }
    for (const auto& transfer : transfers) {
      ASSERT_EQ(transfer->outcome(), done(1)) << transfer->diagnostic();
    }
    for (const auto& [transfer, target, seed] : filled) {
      ASSERT_EQ(transfer->outcome(), done(1)) << transfer->diagnostic();
      ASSERT_TRUE(target.match(seed));
    }
    for (std::uint64_t i = 0; can.write && i < count; ++i) {
      ASSERT_TRUE(matches(b.page(i), 9000 + i));
    }
  }
};

KVFERRY_TESTING_SUITE(BatchesTest, BatchesTests, One, Thousand, Many, EveryLengthUpToAHundred, ManyPaired,
                      ThousandOperationsOutstanding);

}  // namespace kvferry::testing
