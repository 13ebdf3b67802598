// SPDX-License-Identifier: Apache-2.0
// The effects of a peer's random frames on memory: line 11 of docs/fault_table.md.
#include <kvferry/tcp/lane_protocol.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <random>
#include <set>
#include <span>
#include <utility>
#include <vector>

#include <kvferry/testing/traits.hpp>
#include "fuzz/frame_maker.hpp"
#include "fuzz/lane_model.hpp"
#include "peer_block.hpp"
#include "protocol_harness.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

/// A side with a transfer of each kind under way and regions of each access, and what random frames of a peer's do to it.
class RandomFrames : public ::testing::TestWithParam<bool> {
 protected:
  static constexpr std::size_t page = 512;
  static constexpr std::size_t pages = 4;
  static constexpr std::array accesses{Access::read_write, Access::none, Access::read, Access::write};
  static constexpr std::array kinds{TransferKind::write, TransferKind::read, TransferKind::send, TransferKind::recv};

  /// The kinds of frames and answers that have occurred by the end.
  struct Seen {
    std::set<FrameType> types;
    std::size_t placed = 0;
    std::size_t differed = 0;
    std::size_t fetched = 0;
  };

  static std::vector<std::byte> frames_of(std::uint32_t seed, Seen& seen) {
    std::mt19937 random(seed);
    std::vector<std::uint8_t> choices(600);
    std::ranges::generate(choices, [&] { return static_cast<std::uint8_t>(random()); });
    fuzz::Input input(choices.data(), choices.size());
    fuzz::FrameMaker maker(input, {.pages = pages, .page_size = page, .referable = page});
    for (std::uint64_t id = 1; id <= kinds.size(); ++id) {
      maker.heard(id);
    }
    std::vector<std::byte> bytes;
    for (int i = 0; i < 4; ++i) {
      FrameHeader header = maker.header();
      if (seed % 2 == 0) {  // right as a rule, so that what is behind a frame counts
        header.magic = FrameHeader::expected_magic;
        header.type = FrameType::write;
        header.region = i % 2 == 0 ? 0 : 3;
        header.first_offset = 0;
      }
      seen.types.insert(header.type);
      const auto frame = maker.with_body(header);
      bytes.insert(bytes.end(), frame.begin(), frame.end());
    }
    return bytes;
  }

  /// @param peers the memory of the peer, where this side fetches.
  static void round(std::uint32_t seed, std::span<const std::byte> peers, Seen& seen) {
    const auto bytes = frames_of(seed, seen);
    std::vector<std::vector<std::byte>> memory(accesses.size() + 2 * kinds.size(),
                                               std::vector<std::byte>(page * pages));
    std::vector<MemoryRegion> regions;
    for (std::size_t i = 0; i < accesses.size(); ++i) {
      regions.push_back({memory[i].data(), page * pages, page, accesses[i]});
    }
    std::shared_ptr<PeerBlock> fetching;
    if (!peers.empty()) {
      fetching = std::make_shared<PeerBlock>(false);
      fetching->is(peers, 0);
    }
    std::vector<std::shared_ptr<Outcome>> outcomes;
    {
      Side side(regions, fetching);
      for (std::size_t i = 0; i < kinds.size(); ++i) {
        outcomes.push_back(std::make_shared<Outcome>());
        auto& first = memory[accesses.size() + 2 * i];
        auto& second = memory[accesses.size() + 2 * i + 1];
        TransferRequest made = request(kinds[i], {{first.data(), page}, {second.data(), 100}});
        if (made.one_sided()) {
          made.remote_indexes = {2, 3};
        }
        made.checksums = seed % 4 < 2;
        side.start(std::move(made), outcomes.back());
      }
      (void)side.take(std::size_t{1} << 20);
      if (!side.feed(bytes, 1 + seed % 97)) {
        (void)side.take(std::size_t{1} << 20);
      }
      seen.differed += side.host->differed;
    }
    LaneModel model({0, 3}, pages, page, peers);
    model.read(bytes);
    for (std::uint32_t region = 0; region < accesses.size(); ++region) {
      for (std::size_t at = 0; at < page * pages; ++at) {
        const std::byte now = memory[region][at];
        ASSERT_TRUE(model.may_be(region, at, now, std::byte{}))
            << "seed " << seed << ", region " << region << ", " << at;
        seen.placed += now != std::byte{} ? 1U : 0U;
      }
    }
    for (std::size_t i = 0; i < kinds.size(); ++i) {
      EXPECT_EQ(outcomes[i]->calls, 1) << "seed " << seed;
      const bool receives = kinds[i] == TransferKind::read || kinds[i] == TransferKind::recv;
      for (std::size_t object = 0; object < 2; ++object) {
        const auto& buffer = memory[accesses.size() + 2 * i + object];
        const bool untouched = std::ranges::all_of(buffer, [](std::byte byte) { return byte == std::byte{}; });
        EXPECT_TRUE(untouched || (receives && model.may_have_received(i + 1))) << "seed " << seed;
      }
    }
    seen.fetched += fetching ? fetching->fetched() : 0;
  }
};
INSTANTIATE_TEST_SUITE_P(Fetching, RandomFrames, ::testing::Bool());

TEST_P(RandomFrames, Line11_ChangeNothingThatTheyDoNotName) {
  std::vector<std::byte> peers(GetParam() ? page : 0);
  fill(peers, 5);
  Seen seen;
  const std::uint32_t rounds = kvferry::testing::sanitized ? 1000 : 5000;
  for (std::uint32_t seed = 0; seed < rounds && !HasFailure(); ++seed) {
    round(seed, peers, seen);
  }
  EXPECT_EQ(seen.types.size(), frame_types.size());
  EXPECT_NE(seen.placed, 0U);
  EXPECT_NE(seen.differed, 0U) << "some frames have checksums that differ";
  EXPECT_EQ(seen.fetched != 0, GetParam());
}

}  // namespace
}  // namespace kvferry::tcp::testing
