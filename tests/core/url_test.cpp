// SPDX-License-Identifier: Apache-2.0
#include <kvferry/error.hpp>
#include <kvferry/url.hpp>

#include <gtest/gtest.h>

#include <ostream>
#include <string>
#include <tuple>

namespace kvferry::inline KVFERRY_ABI {
namespace {

struct GoodUrl {
  const char* url;
  const char* host;
  std::uint16_t port;
  const char* normalized;
};

void PrintTo(const GoodUrl& url, std::ostream* stream) { *stream << "port " << url.port; }

class Url : public ::testing::TestWithParam<GoodUrl> {};

TEST_P(Url, IsParsedAndWritten) {
  const auto& [url, host, port, normalized] = GetParam();
  std::error_code ec = errc::closed;
  const auto parsed = parse_url(url, ec);
  EXPECT_FALSE(ec);
  EXPECT_EQ(parsed.host, host);
  EXPECT_EQ(parsed.port, port);
  EXPECT_EQ(parsed.to_string(), normalized);
  EXPECT_EQ(parsed.to_url(), std::string("tcp://") + normalized);
  EXPECT_EQ(parse_url(url), parsed);
  EXPECT_EQ(parse_url(parsed.to_url()), parsed);
}

INSTANTIATE_TEST_SUITE_P(
    HandshakeFaults_Line09, Url,
    ::testing::Values(GoodUrl{"tcp://127.0.0.1:5555", "127.0.0.1", 5555, "127.0.0.1:5555"},
                    GoodUrl{"127.0.0.1:5555", "127.0.0.1", 5555, "127.0.0.1:5555"},
                    GoodUrl{"tcp://[::1]:5555", "::1", 5555, "[::1]:5555"},
                    GoodUrl{"[fe80::1%1]:1", "fe80::1%1", 1, "[fe80::1%1]:1"}, GoodUrl{"*:0", "*", 0, "*:0"},
                    GoodUrl{"[::]:65535", "::", 65535, "[::]:65535"},
                    GoodUrl{"kv-cache_0.pod.svc:80", "kv-cache_0.pod.svc", 80, "kv-cache_0.pod.svc:80"},
                    GoodUrl{"h:00080", "h", 80, "h:80"}, GoodUrl{"TCP://h:80", "h", 80, "h:80"},
                    GoodUrl{"host.example.:80", "host.example.", 80, "host.example.:80"},
                    GoodUrl{"[::0]:1", "::", 1, "[::]:1"}, GoodUrl{"0:1", "0.0.0.0", 1, "0.0.0.0:1"},
                    GoodUrl{"127.1:1", "127.0.0.1", 1, "127.0.0.1:1"},
                    GoodUrl{"0x7f000001:1", "127.0.0.1", 1, "127.0.0.1:1"},
                    GoodUrl{"[fd77:0:0::0002]:1", "fd77::2", 1, "[fd77::2]:1"},
                    GoodUrl{"[::ffff:10.0.0.1]:1", "10.0.0.1", 1, "10.0.0.1:1"},
                    GoodUrl{"[::ffff:0.0.0.0]:1", "0.0.0.0", 1, "0.0.0.0:1"},
                    GoodUrl{"[FE80::1%eth0]:1", "fe80::1%eth0", 1, "[fe80::1%eth0]:1"}));

struct BadUrl {
  std::string url;
  const char* problem;
};

void PrintTo(const BadUrl& url, std::ostream* stream) { *stream << url.problem; }

class InvalidUrl : public ::testing::TestWithParam<BadUrl> {};

TEST_P(InvalidUrl, IsRefusedWithItsReason) {
  std::error_code ec;
  EXPECT_EQ(parse_url(GetParam().url, ec), HostPort());
  EXPECT_EQ(ec, errc::invalid_url);
  try {
    std::ignore = parse_url(GetParam().url);
    ADD_FAILURE() << "parsed";
  } catch (const TransferError& error) {
    EXPECT_EQ(error.code(), errc::invalid_url);
    const std::string text = error.what();
    EXPECT_NE(text.find(GetParam().problem), std::string::npos) << text;
    EXPECT_TRUE(text.starts_with("url \"" + GetParam().url.substr(0, 1))) << text;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Url, InvalidUrl,
    ::testing::Values(BadUrl{"", "it is empty"}, BadUrl{"tcp://", "the port is missing"},
                    BadUrl{"host", "the port is missing"}, BadUrl{"host:", "the port is not a number"},
                    BadUrl{":80", "the host is missing"}, BadUrl{"host:65536", "the port is not a number"},
                    BadUrl{"host:-1", "the port is not a number"}, BadUrl{"host:+1", "the port is not a number"},
                    BadUrl{"host: 1", "the port is not a number"}, BadUrl{"host:1x", "the port is not a number"},
                    BadUrl{"host:0x1", "the port is not a number"}, BadUrl{"host:80/", "the port is not a number"},
                    BadUrl{"::1:80", "an IPv6 address needs brackets"},
                    BadUrl{"tcp://fe80::1", "an IPv6 address needs brackets"},
                    BadUrl{"[::1", "the closing bracket is missing"}, BadUrl{"[::1]", "the port is missing"},
                    BadUrl{"[::1]80", "the port is missing"}, BadUrl{"[]:80", "not an IPv6 address"},
                    BadUrl{"[1.2.3.4]:80", "not an IPv6 address"}, BadUrl{"[::1]:", "the port is not a number"},
                    BadUrl{"http://host:80", "the scheme is not tcp"}, BadUrl{"ipc://x:80", "the scheme is not tcp"},
                    BadUrl{"tcp:/host:80", "needs brackets"}, BadUrl{"user@host:80", "a character"},
                    BadUrl{"ho st:80", "a character"}, BadUrl{"ho\nst:80", "a character"},
                    BadUrl{"**:80", "a character"}, BadUrl{std::string("h\0:80", 5), "a character"},
                    BadUrl{std::string(1000, 'a') + ":80", "longer than 512"},
                    BadUrl{std::string(254, 'a') + ":80", "longer than 253"}, BadUrl{"a..b:80", "name is empty"},
                    BadUrl{".a:80", "name is empty"}, BadUrl{"1.2.3.4.5:80", "not an IPv4 address"},
                    BadUrl{"256.0.0.1:80", "not an IPv4 address"}, BadUrl{"10.0.0.1.:80", "not an IPv4 address"},
                    BadUrl{"[fe80::1%]:80", "the zone is not"}, BadUrl{"[fe80::1%a b]:80", "the zone is not"},
                    BadUrl{"[fe80::1%0123456789012345]:80", "the zone is not"},
                    BadUrl{"[fd77::1%eth0]:80", "only a link-local address"}));

TEST(UrlText, ShowsNoControlCharactersAndNoEndlessText) {
  try {
    std::ignore = parse_url("a\x1b[31m" + std::string(400, 'b') + ":80");
    ADD_FAILURE() << "parsed";
  } catch (const TransferError& error) {
    const std::string text = error.what();
    EXPECT_EQ(text.find('\x1b'), std::string::npos) << text;
    EXPECT_LT(text.size(), 300U);
  }
}

TEST(UrlText, KnowsWildcards) {
  EXPECT_TRUE(parse_url("*:1").is_wildcard());
  EXPECT_TRUE(parse_url("0.0.0.0:1").is_wildcard());
  EXPECT_TRUE(parse_url("[::]:1").is_wildcard());
  EXPECT_FALSE(parse_url("[::1]:1").is_wildcard());
  for (const auto* host : {"*", "0.0.0.0", "::", "::0", "0:0:0:0:0:0:0:0", "0", "0.0", "0x0", "::ffff:0.0.0.0"}) {
    EXPECT_TRUE((HostPort{host, 1}.is_wildcard())) << host;
  }
  for (const auto* host : {"", "localhost", "0.0.0.1", "::1", "::ffff:10.0.0.1", "fe80::1%eth0"}) {
    EXPECT_FALSE((HostPort{host, 1}.is_wildcard())) << host;
  }
  EXPECT_TRUE(parse_url("[::1]:1").is_ipv6_literal());
  EXPECT_FALSE(parse_url("localhost:1").is_ipv6_literal());
}

}  // namespace
}  // namespace kvferry
