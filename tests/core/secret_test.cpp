// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/secret.hpp>

#include <gtest/gtest.h>

#include <array>
#include <cstddef>
#include <span>

namespace kvferry::inline KVFERRY_ABI {
namespace {

TEST(Secret, IsAnotherOneEachTime) {
  std::array<std::byte, secret_bytes> one{};
  std::array<std::byte, secret_bytes> other{};
  make_secret(one);
  make_secret(other);
  EXPECT_FALSE(equal_secrets(one, other));
}

TEST(Secret, EqualsWhatHasTheSameBytes) {
  std::array<std::byte, secret_bytes> one{};
  make_secret(one);
  auto other = one;
  EXPECT_TRUE(equal_secrets(one, other));
  other.back() ^= std::byte{1};
  EXPECT_FALSE(equal_secrets(one, other));
  EXPECT_FALSE(equal_secrets(one, std::span(one).first(secret_bytes - 1)));
  EXPECT_FALSE(equal_secrets(one, {}));
}

}  // namespace
}  // namespace kvferry
