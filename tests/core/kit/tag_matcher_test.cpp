// SPDX-License-Identifier: Apache-2.0
#include <kvferry/kit/tag_matcher.hpp>

#include <gtest/gtest.h>

#include <cstddef>
#include <memory>
#include <span>
#include <system_error>
#include <vector>

#include <kvferry/kit/link.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
namespace {

using Matcher = TagMatcher<std::vector<int>>;

/// Counts what the recvs of its peer take up.
class CountingHost final : public LinkHost {
 public:
  [[nodiscard]] const PeerDescription& peer() const noexcept override { return peer_; }
  [[nodiscard]] std::shared_ptr<const RegionList> local_regions() const override { return RegionList::of({}); }
  [[nodiscard]] bool deliver_notification(std::vector<std::byte>, std::uint64_t) override { return false; }
  [[nodiscard]] bool take_memory(std::size_t bytes) override {
    taken += bytes;
    return true;
  }
  void give_back_memory(std::size_t bytes) noexcept override { taken -= bytes; }
  void link_failed(const Link&, std::error_code) override {}

  std::size_t taken = 0;

 private:
  PeerDescription peer_;
};

TEST(TagMatcher, PairsTheFirstSendOfATagWithItsFirstRecv) {
  Matcher matcher(std::make_shared<CountingHost>());
  matcher.add_send(1, 10, 100);
  matcher.add_send(1, 5, 50);  // started before
  matcher.add_send(2, 1, 1);
  EXPECT_FALSE(matcher.match(1));
  ASSERT_TRUE(matcher.add_post(1, 8, {3}));
  ASSERT_TRUE(matcher.add_post(1, 7, {4, 5}));
  const auto first = matcher.match(1);
  ASSERT_TRUE(first);
  EXPECT_EQ(first->send, 50U);
  EXPECT_EQ(first->recv, 7U);
  EXPECT_EQ(first->post, (std::vector{4, 5}));
  matcher.remove_send(1, 10);
  EXPECT_FALSE(matcher.match(1)) << "the other send is gone";
  matcher.add_send(1, 11, 110);
  EXPECT_TRUE(matcher.remove_post(1, 8));
  EXPECT_FALSE(matcher.remove_post(1, 8));
  EXPECT_FALSE(matcher.remove_post(3, 8));
  EXPECT_FALSE(matcher.match(1)) << "the other recv is gone";
  EXPECT_FALSE(matcher.match(2));
}

TEST(TagMatcher, RecvsTakeUpMemoryUntilTheyAreGone) {
  const auto host = std::make_shared<CountingHost>();
  Matcher matcher(host);
  ASSERT_TRUE(matcher.add_post(1, 1, std::vector<int>(1000)));
  const std::size_t first = host->taken;
  EXPECT_GE(first, 1000 * sizeof(int));
  ASSERT_TRUE(matcher.add_post(1, 2, {}));
  const std::size_t second = host->taken - first;
  EXPECT_GT(second, 0U) << "a recv of nothing takes room, too";
  ASSERT_TRUE(matcher.add_post(2, 3, {}));
  EXPECT_TRUE(matcher.remove_post(1, 2));
  EXPECT_EQ(host->taken, first + second);
  matcher.add_send(1, 1, 1);
  EXPECT_TRUE(matcher.match(1));
  EXPECT_EQ(host->taken, second);
  matcher.clear_posts();
  EXPECT_EQ(host->taken, 0U);
}

TEST(TagMatcher, TakesAsManyRecvsAsItsBoundAndMoreWhenSomeAreGone) {
  Matcher matcher(std::make_shared<CountingHost>());
  const auto fill = [&] {
    std::size_t count = 0;
    while (matcher.add_post(1, count + 1, std::vector<int>(max_paired_objects / 4))) {
      ++count;
    }
    return count;
  };
  const std::size_t most = fill();
  EXPECT_EQ(most, max_posted_cost / (max_paired_objects / 4) - 1) << "each takes a little more than its buffers";
  for (std::size_t round = 0; round < 3; ++round) {
    for (std::size_t recv = 1; recv <= most; ++recv) {
      if (round == 0) {
        ASSERT_TRUE(matcher.remove_post(1, recv));
      } else if (round == 1) {
        matcher.add_send(1, recv, recv);
        ASSERT_TRUE(matcher.match(1));
      }
    }
    if (round == 2) {
      matcher.clear_posts();
    }
    EXPECT_EQ(fill(), most) << round;
  }
}

}  // namespace
}  // namespace kvferry::kit
