// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/testing/conformance_test.hpp>
#include <kvferry/testing/suite_macros.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// As long as nothing goes wrong, transfers with checksums behave like others. Their findings are tested where a
/// transport's bytes can be got at.
class ChecksumsTests : public ConformanceBase {
 protected:
  [[nodiscard]] static TransferSpec with_checksums(TransferSpec spec, bool on = true) {
    spec.checksums = on;
    return spec;
  }

 public:
  void EveryKindMovesTheRightBytes() {
    KVFERRY_TESTING_REQUIRE(checksums);
    const auto [a, b] = connected_pair();
    const std::vector<std::size_t> sizes{4096, 1, 0, 2048, 4095};
    std::uint64_t seed = 0;
    for (const bool on : {true, false, true}) {
      seed += 11;
      const Objects source = a.objects(sizes).fill(seed);
      const Objects target = a.objects(sizes);
      const Capabilities can = capabilities();
      if (can.write) {
        const auto write = start(TransferKind::write, a, b, source, with_checksums(at({1, 2, 3, 4, 5}), on));
        EXPECT_EQ(write->outcome(), done(5)) << write->diagnostic();
        EXPECT_TRUE(matches(b.page(1), seed));
        EXPECT_TRUE(page_holds(b.page(4), 2048, seed + 3));
      }
      if (can.write && can.read) {
        const auto read = start(TransferKind::read, a, b, target, with_checksums(at({1, 2, 3, 4, 5}), on));
        EXPECT_EQ(read->outcome(), done(5)) << read->diagnostic();
        EXPECT_TRUE(target.match(seed));
      }
      a.reuse_local_memory();
      EXPECT_EQ(a->stats().checksum_mismatches + b->stats().checksum_mismatches, 0U);
    }
  }

  void ASendAndARecvHaveThemIfEitherSideAsks() {
    KVFERRY_TESTING_REQUIRE(checksums);
    KVFERRY_TESTING_REQUIRE(send_recv);
    const auto [a, b] = connected_pair();
    std::uint64_t tag = 0;
    for (const bool sender : {false, true}) {
      for (const bool receiver : {false, true}) {
        const Objects source = a.objects({3000, 0, 17}).fill(++tag);
        const Objects target = b.objects({3000, 0, 17});
        const auto recv = start(TransferKind::recv, b, a, target, with_checksums(tagged(tag), receiver));
        const auto send = start(TransferKind::send, a, b, source, with_checksums(tagged(tag), sender));
        EXPECT_EQ(send->outcome(), done(3)) << send->diagnostic();
        EXPECT_EQ(recv->outcome(), done(3)) << recv->diagnostic();
        EXPECT_TRUE(target.match(tag));
      }
    }
  }

  void WhereThereAreNoneTheyAreRefused() {
    const auto [a, b] = connected_pair();
    const Capabilities can = capabilities();
    const Outcome expected = can.checksums ? done(1) : failed(errc::not_supported);
    const Objects objects = a.objects({4096}).fill(5);
    if (can.write) {
      EXPECT_EQ(start(TransferKind::write, a, b, objects, with_checksums(at({1})))->outcome(), expected);
    }
    if (can.read) {
      EXPECT_EQ(start(TransferKind::read, a, b, objects, with_checksums(at({1})))->outcome(), expected);
    }
    if (can.send_recv && !can.checksums) {
      EXPECT_EQ(start(TransferKind::send, a, b, objects, with_checksums(tagged(1)))->outcome(), expected);
      EXPECT_EQ(start(TransferKind::recv, a, b, objects, with_checksums(tagged(1)))->outcome(), expected);
    }
  }
};

KVFERRY_TESTING_SUITE(Checksums, ChecksumsTests, EveryKindMovesTheRightBytes, ASendAndARecvHaveThemIfEitherSideAsks,
                      WhereThereAreNoneTheyAreRefused);

}  // namespace kvferry::testing
