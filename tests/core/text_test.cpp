// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/text.hpp>

#include <gtest/gtest.h>

#include <string>

namespace kvferry::inline KVFERRY_ABI {
namespace {

TEST(Text, WhatAPeerSentIsQuotedInOneLine) {
  EXPECT_EQ(in_quotes("decode-0"), "'decode-0'");
  EXPECT_EQ(in_quotes("a'\nb"), R"('a\x27\x0ab')");
  EXPECT_EQ(in_quotes(std::string(100, 'x')), "'" + std::string(100, 'x') + "'");
  EXPECT_EQ(in_quotes(std::string(5'000'000, 'x')), "'" + std::string(100, 'x') + "...'");
}

TEST(Text, ControlCharactersAreFound) {
  for (const std::string text : {"a\nb", "\x1f", "\x7f", "\xc2\x80", "x\xc2\x9f"}) {
    EXPECT_TRUE(has_control_character(text)) << in_quotes(text);
  }
  EXPECT_TRUE(has_control_character(std::string(1, '\0')));
  for (const std::string text : {"", " ", "~", "\xc2\xa0", "\xc3\x80", "\xd0\x80"}) {
    EXPECT_FALSE(has_control_character(text)) << in_quotes(text);
  }
}

}  // namespace
}  // namespace kvferry
