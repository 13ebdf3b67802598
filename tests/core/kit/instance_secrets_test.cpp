// SPDX-License-Identifier: Apache-2.0
#include "core/kit/instance_secrets.hpp"

#include <gtest/gtest.h>

#include <array>
#include <cstddef>
#include <cstdint>

namespace kvferry::kit {
namespace {

TEST(InstanceSecrets, TheHashIsThatOfItsAuthors) {
  // The example of the paper's appendix A.
  std::array<std::byte, 15> message{};
  for (std::size_t i = 0; i < message.size(); ++i) {
    message.at(i) = static_cast<std::byte>(i);
  }
  EXPECT_EQ(siphash({0x0706050403020100, 0x0f0e0d0c0b0a0908}, message), 0xa129ca6149be45e5U);
}

TEST(InstanceSecrets, AreTheSameForThatPeerAloneAndForWhatItHasShownAlone) {
  const InstanceSecrets secrets;
  const InstanceSecrets others;
  const Bytes shown(16, std::byte{1});
  EXPECT_EQ(secrets.for_peer("a").size(), 16U);
  EXPECT_EQ(secrets.for_peer("a"), secrets.for_peer("a"));
  EXPECT_NE(secrets.for_peer("a"), secrets.for_peer("b"));
  EXPECT_NE(secrets.for_peer("a"), secrets.for_peer("a", shown));
  EXPECT_NE(secrets.for_peer("a"), others.for_peer("a"));
  EXPECT_TRUE(equal(secrets.for_peer("a"), secrets.for_peer("a")));
  EXPECT_FALSE(equal(secrets.for_peer("a"), secrets.for_peer("b")));
  EXPECT_FALSE(equal(shown, Bytes()));
}

}  // namespace
}  // namespace kvferry::kit
