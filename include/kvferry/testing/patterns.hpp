// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include <kvferry/testing/peer_memory.hpp>
#include <kvferry/transfer_spec.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// The content of memory to which nothing was written.
inline constexpr std::byte background{0x5a};
/// The bytes around local objects, which must stay.
inline constexpr std::byte guard{0xa5};
inline constexpr std::size_t guard_size = 48;

namespace detail {

/// A pattern, block by block: SplitMix64, so that neither neighbouring seeds nor neighbouring offsets look alike.
///
/// Tests are compiled without optimisation, and for sanitizers, where each call and each access takes longer than the word
/// itself. So a block is made in one loop over local variables, and copied and compared in one call.
class PatternBlocks {
 public:
  static constexpr std::size_t block = 512;

  explicit PatternBlocks(std::uint64_t seed) : state_(seed * 0xd1342543de82ef95ULL) {}

  /// The next `size` bytes, at most a block; fewer only for the last. They stay until the next call.
  [[nodiscard]] const std::byte* next(std::size_t size) {
    std::uint64_t state = state_;
    std::uint64_t* const words = words_;
    const std::size_t count = (size + sizeof(std::uint64_t) - 1) / sizeof(std::uint64_t);
    for (std::size_t i = 0; i < count; ++i) {
      state += 0x9e3779b97f4a7c15ULL;
      std::uint64_t word = state;
      word = (word ^ (word >> 30U)) * 0xbf58476d1ce4e5b9ULL;
      word = (word ^ (word >> 27U)) * 0x94d049bb133111ebULL;
      words[i] = word ^ (word >> 31U);
    }
    state_ = state;
    return reinterpret_cast<const std::byte*>(words);
  }

 private:
  std::uint64_t state_;
  std::uint64_t words_[block / sizeof(std::uint64_t)] = {};
};

inline ::testing::AssertionResult differs(std::size_t offset, std::size_t size, std::byte found, std::byte expected) {
  return ::testing::AssertionFailure() << "byte " << offset << " of " << size << " is " << std::to_integer<int>(found)
                                       << ", not " << std::to_integer<int>(expected);
}

}  // namespace detail

/// Fills a buffer with the pattern of a seed.
inline void fill(MutableBuffer buffer, std::uint64_t seed) {
  detail::PatternBlocks pattern(seed);
  for (std::size_t offset = 0; offset < buffer.size(); offset += pattern.block) {
    const std::size_t size = std::min(pattern.block, buffer.size() - offset);
    std::memcpy(buffer.data() + offset, pattern.next(size), size);
  }
}

/// Whether a buffer holds the pattern of a seed, from its first byte to its last.
[[nodiscard]] inline ::testing::AssertionResult matches(ConstBuffer buffer, std::uint64_t seed) {
  detail::PatternBlocks pattern(seed);
  for (std::size_t offset = 0; offset < buffer.size(); offset += pattern.block) {
    const std::size_t size = std::min(pattern.block, buffer.size() - offset);
    const std::byte* const expected = pattern.next(size);
    if (std::memcmp(buffer.data() + offset, expected, size) == 0) {
      continue;
    }
    for (std::size_t i = 0; i < size; ++i) {
      if (buffer[offset + i] != expected[i]) {
        return detail::differs(offset + i, buffer.size(), buffer[offset + i], expected[i]) << " of pattern " << seed;
      }
    }
  }
  return ::testing::AssertionSuccess();
}

inline void fill_constant(MutableBuffer buffer, std::byte value) {
  if (!buffer.empty()) {
    std::memset(buffer.data(), std::to_integer<int>(value), buffer.size());
  }
}

/// Whether all bytes of a buffer have one value.
[[nodiscard]] inline ::testing::AssertionResult is_constant(ConstBuffer buffer, std::byte value) {
  // In one call, as sanitizers look at each access of a loop.
  if (buffer.empty() ||
      (buffer.front() == value && std::memcmp(buffer.data(), buffer.data() + 1, buffer.size() - 1) == 0)) {
    return ::testing::AssertionSuccess();
  }
  const auto found = std::find_if(buffer.begin(), buffer.end(), [value](std::byte byte) { return byte != value; });
  return detail::differs(static_cast<std::size_t>(found - buffer.begin()), buffer.size(), *found, value);
}

/// Whether a page starts with the pattern of a seed and has the background behind it.
[[nodiscard]] inline ::testing::AssertionResult page_holds(ConstBuffer page, std::size_t size, std::uint64_t seed) {
  if (auto object = matches(page.first(size), seed); !object) {
    return object << " (the object)";
  }
  if (auto rest = is_constant(page.subspan(size), background); !rest) {
    return rest << " (behind the object's " << size << " bytes)";
  }
  return ::testing::AssertionSuccess();
}

/// @name The same for memory that others access
/// @{
inline void fill(PeerMemory memory, std::uint64_t seed) {
  const UnwatchedAccess unwatched;
  fill(MutableBuffer(memory), seed);
}
inline void fill_constant(PeerMemory memory, std::byte value) {
  const UnwatchedAccess unwatched;
  fill_constant(MutableBuffer(memory), value);
}
[[nodiscard]] inline ::testing::AssertionResult matches(PeerMemory memory, std::uint64_t seed) {
  const UnwatchedAccess unwatched;
  return matches(ConstBuffer(memory), seed);
}
[[nodiscard]] inline ::testing::AssertionResult is_constant(PeerMemory memory, std::byte value) {
  const UnwatchedAccess unwatched;
  return is_constant(ConstBuffer(memory), value);
}
[[nodiscard]] inline ::testing::AssertionResult page_holds(PeerMemory page, std::size_t size, std::uint64_t seed) {
  const UnwatchedAccess unwatched;
  return page_holds(ConstBuffer(page), size, seed);
}
/// @}

/// The objects of a batch in local memory, with guard bytes around each.
///
/// The memory is the caller's (part of a region, for transports that need that) and is used up from its start.
class Objects {
 public:
  Objects() = default;

  /// The memory that objects of these sizes take.
  [[nodiscard]] static std::size_t footprint(std::span<const std::size_t> sizes) {
    std::size_t total = guard_size;
    for (const std::size_t size : sizes) {
      total += size + guard_size;
    }
    return total;
  }

  Objects(MutableBuffer memory, std::span<const std::size_t> sizes) {
    memory_ = memory.first(footprint(sizes));
    fill_constant(memory_, guard);
    std::size_t offset = guard_size;
    for (const std::size_t size : sizes) {
      buffers_.push_back(memory_.subspan(offset, size));
      fill_constant(buffers_.back(), background);
      offset += size + guard_size;
    }
  }

  [[nodiscard]] std::size_t count() const { return buffers_.size(); }
  [[nodiscard]] MutableBuffer operator[](std::size_t i) const { return buffers_.at(i); }
  [[nodiscard]] const std::vector<MutableBuffer>& buffers() const { return buffers_; }
  [[nodiscard]] ConstObjects readable() const { return ConstObjects(buffers_); }
  [[nodiscard]] MutableObjects writable() const { return MutableObjects(buffers_); }

  /// Object i gets the pattern of `seed + i`.
  const Objects& fill(std::uint64_t seed) const {
    for (std::size_t i = 0; i < buffers_.size(); ++i) {
      testing::fill(buffers_[i], seed + i);
    }
    return *this;
  }

  /// Whether object i holds the pattern of `seed + i`, and no byte around any of them changed.
  [[nodiscard]] ::testing::AssertionResult match(std::uint64_t seed) const {
    for (std::size_t i = 0; i < buffers_.size(); ++i) {
      if (auto result = matches(buffers_[i], seed + i); !result) {
        return result << " (object " << i << ")";
      }
    }
    return guards_intact();
  }

  /// Whether nothing was put into any object.
  [[nodiscard]] ::testing::AssertionResult untouched() const {
    for (std::size_t i = 0; i < buffers_.size(); ++i) {
      if (auto result = is_constant(buffers_[i], background); !result) {
        return result << " (object " << i << ")";
      }
    }
    return guards_intact();
  }

  [[nodiscard]] ::testing::AssertionResult guards_intact() const {
    std::size_t offset = 0;
    for (std::size_t i = 0; i <= buffers_.size(); ++i) {
      if (auto result = is_constant(memory_.subspan(offset, guard_size), guard); !result) {
        return result << " (the guard before object " << i << ")";
      }
      offset += guard_size + (i < buffers_.size() ? buffers_[i].size() : 0);
    }
    return ::testing::AssertionSuccess();
  }

 private:
  MutableBuffer memory_;
  std::vector<MutableBuffer> buffers_;
};

}  // namespace kvferry::testing
