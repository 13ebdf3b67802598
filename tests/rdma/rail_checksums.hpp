// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/testing/patterns.hpp>

#include "rdma/two_sides.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma::testing {

inline constexpr std::size_t region_pages = 2048;
inline constexpr std::size_t mebibyte = std::size_t{1} << 20;

inline TransferRequest with_checksums(TransferRequest request) {
  request.checksums = true;
  return request;
}

inline MessageHeader first_header(const std::vector<std::byte>& message) {
  MessageHeader header;
  std::memcpy(&header, message.data(), sizeof(header));
  return header;
}

template <class Entry>
std::vector<std::byte> checksums_message(MessageHeader header, const std::vector<Entry>& entries) {
  header.count = header.count != 0 ? header.count : static_cast<std::uint32_t>(entries.size());
  header.body_bytes = static_cast<std::uint32_t>(entries.size() * sizeof(Entry));
  std::vector<std::byte> message(sizeof(header) + header.body_bytes);
  std::memcpy(message.data(), &header, sizeof(header));
  if (!entries.empty()) {
    std::memcpy(message.data() + sizeof(header), entries.data(), header.body_bytes);
  }
  return message;
}

class RailProtocolChecksums : public TwoSides {
 protected:
  RailProtocolChecksums() : TwoSides(region_pages) {
    kvferry::testing::fill(MutableBuffer(a.memory), 5);
    kvferry::testing::fill(MutableBuffer(b.memory), 6);
  }

  void run() {
    while (move() || a.protocol->check_step() || b.protocol->check_step()) {
    }
  }
  void take(Side& side, const std::vector<std::byte>& message) {
    EXPECT_EQ(side.protocol->received(message), std::error_code()) << side.protocol->violation();
  }
  [[nodiscard]] static std::error_code said(Side& side, const std::vector<std::byte>& message) {
    return side.protocol->received(message);
  }

  static std::vector<MutableBuffer> cut(Side& side, std::size_t count, std::size_t size, std::size_t first = 0) {
    std::vector<MutableBuffer> objects;
    for (std::size_t i = 0; i < count; ++i) {
      objects.push_back(side.at(first + i * size, size));
    }
    return objects;
  }
  static std::vector<std::uint64_t> rising(std::size_t count) {
    std::vector<std::uint64_t> indexes(count);
    for (std::size_t i = 0; i < count; ++i) {
      indexes[i] = i;
    }
    return indexes;
  }
  static void expect_third_differs(const Outcome& outcome, const std::vector<std::error_code>& statuses,
                                   const std::string& diagnostic) {
    EXPECT_EQ(outcome.calls, 1);
    EXPECT_EQ(outcome.ec, errc::checksum_mismatch) << outcome.ec.message();
    EXPECT_EQ(outcome.count, statuses.size() - 1);
    for (std::size_t i = 0; i < statuses.size(); ++i) {
      EXPECT_EQ(statuses[i], i == 2 ? std::error_code(errc::checksum_mismatch) : std::error_code()) << i;
    }
    EXPECT_NE(diagnostic.find("object 2 "), std::string::npos) << diagnostic;
  }
};

}  // namespace kvferry::rdma::testing
