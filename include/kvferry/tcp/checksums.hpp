// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/uio.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include <kvferry/tcp/frame.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

/// Fills in the sums of checksums whose lengths are set: of the bytes in `memory`, from its beginning on.
void take_checksums(std::span<const iovec> memory, std::span<Checksum> checksums) noexcept;

/// Finds out which checksums of a frame differ from the bytes that have landed in `memory`.
///
/// Bytes that their own frame overwrites can't be compared. If pieces of `memory` overlap, their checksums never
/// differ.
/// @return their numbers, rising; none as a rule.
[[nodiscard]] std::vector<std::size_t> differing_checksums(std::span<const iovec> memory,
                                                           std::span<const Checksum> checksums);

/// Objects of a frame by their number in it, a bit each, as an acknowledgement names them.
class ObjectSet {
 public:
  static constexpr std::size_t of_a_descriptor = 8 * sizeof(Descriptor);

  /// How many descriptors hold the bits of so many objects.
  [[nodiscard]] static constexpr std::size_t descriptors_for(std::size_t objects) noexcept {
    return (objects + of_a_descriptor - 1) / of_a_descriptor;
  }

  ObjectSet() = default;
  /// @param descriptors `descriptors_for(max_chunk_objects)` at most.
  explicit ObjectSet(std::span<const Descriptor> descriptors) noexcept;

  void add(std::size_t object) noexcept { words_[object / word_bits] |= std::uint64_t{1} << object % word_bits; }
  [[nodiscard]] bool has(std::size_t object) const noexcept {
    return (words_[object / word_bits] >> object % word_bits & 1) != 0;
  }
  [[nodiscard]] bool has_any_below(std::size_t objects) const noexcept {
    std::size_t object = 0;
    while (object < objects && !has(object)) {
      ++object;
    }
    return object < objects;
  }
  [[nodiscard]] std::vector<Descriptor> descriptors(std::size_t objects) const;

 private:
  static constexpr std::size_t word_bits = 64;
  std::array<std::uint64_t, max_chunk_objects / word_bits> words_{};
};

/// The bytes of a payload that some of its checksums cover, to be asked for in the payload's order.
class CoveredBytes {
 public:
  CoveredBytes(std::span<const Checksum> checksums, std::span<const std::size_t> numbers);

  /// Whether some of the next `length` bytes are among them.
  [[nodiscard]] bool in_next(std::uint64_t length) noexcept;

 private:
  std::vector<std::pair<std::uint64_t, std::uint64_t>> covered_;  ///< Begin and end.
  std::size_t head_ = 0;
  std::uint64_t at_ = 0;
};

}  // namespace kvferry::tcp
