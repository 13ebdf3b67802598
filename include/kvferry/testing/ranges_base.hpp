// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/testing/conformance_test.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// Computes byte by byte what an operation of byte ranges and strides has to do, and compares.
class RangesBase : public ConformanceBase {
 protected:
  static constexpr std::uint64_t region_bytes = 64 * 4096;
  static constexpr std::uint64_t most = std::numeric_limits<std::uint64_t>::max();

  [[nodiscard]] std::vector<TransferKind> one_sided_kinds() {
    std::vector<TransferKind> result;
    for (const TransferKind kind : kinds()) {
      if (is_one_sided(kind)) {
        result.push_back(kind);
      }
    }
    return result;
  }

  [[nodiscard]] static TransferSpec in_ranges(std::span<const RemoteRange> ranges,
                                              std::span<const LocalStride> strides = {}) {
    TransferSpec spec{};
    spec.remote_ranges = ranges;
    spec.local_strides = strides;
    return spec;
  }

  /// The size of a buffer with so many blocks.
  [[nodiscard]] static constexpr std::size_t extent(const LocalStride& stride, std::size_t count) {
    return (count - 1) * stride.stride + stride.block_size;
  }

  /// Bytes that lie end to end.
  struct Run {
    std::size_t offset;
    std::size_t size;
  };

  /// Where the bytes of a range lie in its region.
  [[nodiscard]] static std::vector<Run> runs(const RemoteRange& range) {
    std::vector<Run> result;
    for (std::uint64_t block = 0; block < range.count; ++block) {
      result.push_back(
          {static_cast<std::size_t>(range.offset + block * range.stride), static_cast<std::size_t>(range.size)});
    }
    return result;
  }

  /// Where the bytes of an object lie in its buffer.
  [[nodiscard]] static std::vector<Run> runs(std::size_t size, const LocalStride& stride) {
    if (stride.block_size == 0 || stride.stride == 0) {
      return {{0, size}};
    }
    std::vector<Run> result;
    for (std::size_t offset = 0; offset < size; offset += stride.stride) {
      result.push_back({offset, std::min(stride.block_size, size - offset)});
    }
    return result;
  }

  /// Calls `move(one offset, other offset, size)` for the bytes of both in their order. Fails where one has more of them.
  template <class Move>
  static void pair_up(std::vector<Run> one, std::vector<Run> other, Move move) {
    std::size_t at_other = 0;
    for (Run& run : one) {
      while (run.size != 0) {
        while (at_other < other.size() && other[at_other].size == 0) {
          ++at_other;
        }
        ASSERT_LT(at_other, other.size());
        Run& counterpart = other[at_other];
        const std::size_t size = std::min(run.size, counterpart.size);
        move(run.offset, counterpart.offset, size);
        for (Run* const moved : {&run, &counterpart}) {
          moved->offset += size;
          moved->size -= size;
        }
      }
    }
    ASSERT_TRUE(std::all_of(other.begin() + static_cast<std::ptrdiff_t>(at_other), other.end(),
                            [](const Run& run) { return run.size == 0; }));
  }

  [[nodiscard]] static std::vector<std::byte> copy_of(ConstBuffer buffer) {
    const UnwatchedAccess unwatched;
    return {buffer.begin(), buffer.end()};
  }

  [[nodiscard]] static bool same(const std::vector<std::byte>& one, const std::vector<std::byte>& other) {
    return one.size() == other.size() && (one.empty() || std::memcmp(one.data(), other.data(), one.size()) == 0);
  }

  /// Moves objects to and from ranges of `b`, and compares every byte of either side with what a copy byte by byte makes.
  void expect_moved(Node& a, Node& b, const Objects& objects, const std::vector<RemoteRange>& ranges,
                    const std::vector<LocalStride>& strides = {}) {
    for (const TransferKind kind : one_sided_kinds()) {
      SCOPED_TRACE(to_string(kind));
      objects.fill(kind == TransferKind::write ? 10 : 1000);
      std::vector<std::vector<std::byte>> remote;
      for (std::size_t region = 0; region < b->regions().size(); ++region) {
        fill(b.region(region), 500 + region);
        remote.push_back(copy_of(b.region(region)));
      }
      std::vector<std::vector<std::byte>> local;
      for (const MutableBuffer object : objects.buffers()) {
        local.push_back(copy_of(object));
      }
      for (std::size_t i = 0; i < ranges.size(); ++i) {
        pair_up(runs(ranges[i]), runs(objects[i].size(), strides.empty() ? LocalStride{} : strides[i]),
                [&](std::size_t there, std::size_t here, std::size_t size) {
                  std::byte* const at_peer = remote[ranges[i].region].data() + there;
                  std::byte* const local_byte = local[i].data() + here;
                  kind == TransferKind::write ? std::memcpy(at_peer, local_byte, size)
                                              : std::memcpy(local_byte, at_peer, size);
                });
        ASSERT_FALSE(HasFatalFailure());
      }

      const auto transfer = start(kind, a, b, objects, in_ranges(ranges, strides));
      ASSERT_EQ(transfer->outcome(), done(objects.count())) << transfer->diagnostic();
      EXPECT_TRUE(transfer->consistent());
      for (std::size_t region = 0; region < remote.size(); ++region) {
        EXPECT_TRUE(same(copy_of(b.region(region)), remote[region])) << "region " << region;
      }
      for (std::size_t i = 0; i < objects.count(); ++i) {
        EXPECT_TRUE(same(copy_of(objects[i]), local[i])) << "object " << i;
      }
      EXPECT_TRUE(objects.guards_intact());
    }
  }

  /// Expects the whole batch to be refused, with a diagnostic that has all the parts in it; by a blocking call as well, which may
  /// look at what it was given before anything is checked.
  void expect_refused(Node& a, Node& b, const Objects& objects, const TransferSpec& spec, errc code,
                      std::initializer_list<const char*> parts = {}) {
    for (const TransferKind kind : one_sided_kinds()) {
      SCOPED_TRACE(to_string(kind));
      fill_constant(b.region(), background);
      objects.fill(7);
      const auto transfer = start(kind, a, b, objects, spec);
      EXPECT_EQ(transfer->outcome(), failed(code)) << transfer->diagnostic();
      EXPECT_TRUE(transfer->consistent());
      EXPECT_NE(transfer->diagnostic().find(b.id()), std::string::npos) << transfer->diagnostic();
      for (const char* part : parts) {
        EXPECT_NE(transfer->diagnostic().find(part), std::string::npos)
            << part << " is not in: " << transfer->diagnostic();
      }
      std::string why;
      TransferSpec again = spec;
      again.peer_id = b.id();
      again.diagnostic = &why;
      auto blocking = aside([&, &node = a] {
        std::error_code ec;
        if (kind == TransferKind::read) {
          node->batched_read(objects.writable(), again, ec);
        } else {
          node->batched_write(objects.readable(), again, ec);
        }
        return ec;
      });
      EXPECT_EQ(in_time(blocking), code) << why;
      EXPECT_EQ(why, transfer->diagnostic());
      EXPECT_TRUE(b.untouched());
      EXPECT_TRUE(objects.match(7)) << "bytes of the peer's were read";
    }
  }
};

}  // namespace kvferry::testing
