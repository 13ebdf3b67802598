// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/host_address.hpp>

#include <gtest/gtest.h>

namespace kvferry::inline KVFERRY_ABI {
namespace {

TEST(HostAddress, IsTheSameInAnySpelling) {
  const auto is = [](const char* host, const char* address) {
    const auto found = address_of(host);
    return found && *found == asio::ip::make_address(address);
  };
  EXPECT_TRUE(is("10.0.0.1", "10.0.0.1"));
  EXPECT_TRUE(is("::ffff:10.0.0.1", "10.0.0.1"));
  EXPECT_TRUE(is("::ffff:a00:1", "10.0.0.1"));
  EXPECT_TRUE(is("127.1", "127.0.0.1"));
  EXPECT_TRUE(is("fd77:0:0::0002", "fd77::2"));
  EXPECT_TRUE(is("fe80::1%eth0", "fe80::1"));
  for (const auto* name : {"", "*", "localhost", "10.0.0.1.example", "a:b", "1.2.3.4.5"}) {
    EXPECT_FALSE(address_of(name)) << name;
  }
}

TEST(HostAddress, AZoneIsNotToldToOthers) {
  EXPECT_EQ(url_for_others("tcp://[fe80::1%eth0]:5"), "tcp://[fe80::1]:5");
  EXPECT_EQ(url_for_others("tcp://10.0.0.1:5"), "tcp://10.0.0.1:5");
  EXPECT_EQ(url_for_others("tcp://host.example:5"), "tcp://host.example:5");
  for (const auto* nowhere : {"", "tcp://*:5", "tcp://[::0]:5", "tcp://0:5", "tcp://[::ffff:0.0.0.0]:5", "tcp://10.0.0.1:0"}) {
    EXPECT_EQ(url_for_others(nowhere), "") << nowhere;
  }
}

TEST(HostAddress, AZoneIsTheOneInWhichThePeerWasSeen) {
  EXPECT_EQ(with_zone_of("tcp://[fe80::1]:5", "[fe80::1%eth0]:40000"), "tcp://[fe80::1%eth0]:5");
  EXPECT_EQ(with_zone_of("tcp://[fe80::1]:5", "10.0.0.1:40000"), "tcp://[fe80::1]:5");
  EXPECT_EQ(with_zone_of("tcp://[fe80::1]:5", ""), "tcp://[fe80::1]:5");
  EXPECT_EQ(with_zone_of("tcp://[fd77::1]:5", "[fe80::1%eth0]:40000"), "tcp://[fd77::1]:5");
  EXPECT_EQ(with_zone_of("tcp://host.example:5", "[fe80::1%eth0]:40000"), "tcp://host.example:5");
  EXPECT_EQ(with_zone_of("", "[fe80::1%eth0]:40000"), "");
}

TEST(HostAddress, SaysWhyNothingCanBeConnectedTo) {
  EXPECT_EQ(why_not_dialable({"10.0.0.1", 5}), "");
  EXPECT_EQ(why_not_dialable({"host.example", 5}), "");
  EXPECT_EQ(why_not_dialable({"fe80::1%lo", 5}), "");
  EXPECT_EQ(why_not_dialable({"fe80::1%1", 5}), "") << "the number of lo";
  EXPECT_NE(why_not_dialable({"10.0.0.1", 0}), "");
  EXPECT_NE(why_not_dialable({"::0", 5}), "");
  EXPECT_NE(why_not_dialable({"fe80::1", 5}).find("needs a zone"), std::string::npos);
  EXPECT_NE(why_not_dialable({"fe80::1%nosuch0", 5}).find("no zone 'nosuch0'"), std::string::npos);
  EXPECT_NE(why_not_dialable({"239.1.2.3", 5}), "");
  EXPECT_NE(why_not_dialable({"ff02::1%lo", 5}), "");
}

}  // namespace
}  // namespace kvferry
